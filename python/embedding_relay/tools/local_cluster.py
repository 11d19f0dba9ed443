"""How to start SGLang servers and the router on this machine, as the demo, the tests and the benchmarks do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from embedding_relay import cores
from embedding_relay.cpu_platform import NAME as CPU_PLATFORM
from embedding_relay.cpu_platform import find_accelerator
from embedding_relay.tools.local_process import (
    LocalProcess,
    Progress,
    free_ports,
    silent,
    stop_all,
    wait_all_ready,
)

HOST = "127.0.0.1"

# A server that starts ends if it finds less memory free than it wants to leave to others, which other servers that
# start meanwhile bring about. What it takes itself is limited by the number of tokens.
ONE_OF_SEVERAL = ("--mem-fraction-static", "0.8", "--max-total-tokens", "40000")
CPU_ARGUMENTS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--mm-attention-backend", "sdpa"),
    *ONE_OF_SEVERAL,
)
# An idle scheduler would otherwise spin on one core, which the other processes of this machine need.
COMMON_ARGUMENTS = ("--host", HOST, "--sleep-on-idle")
# The router's breaker counts an error against both servers of a pair, so a dead encode instance would shut out the
# language instance as well. Health checks tell them apart; by default they take minutes. An instance that takes in a
# burst of pictures is slow to answer them, and must not count as unhealthy for that.
ROUTER_ARGUMENTS = (
    "--disable-circuit-breaker",
    *("--health-check-interval-secs", "5"),
    *("--health-failure-threshold", "2"),
    *("--health-success-threshold", "1"),
    *("--health-check-timeout-secs", "15"),
)

CPU_ENVIRON = {"SGLANG_PLATFORM": CPU_PLATFORM}
COMMON_ENVIRON = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Options:
    """What one cluster's members have in common, and what each gets on top."""

    model: Path
    logs: Path
    device: str = "auto"  # "cpu", "accelerator", or "auto": the accelerator if there is one
    arguments: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    process: type[LocalProcess] = LocalProcess
    """How servers and the router are started."""

    def on_cpu(self) -> bool:
        return self.device == "cpu" or (self.device == "auto" and find_accelerator() is None)


def sglang_server(
    name: str, options: Options, port: int, *arguments: str, environ: Mapping[str, str] | None = None
) -> LocalProcess:
    """A SGLang server in any mode; later arguments, and `environ`, win over the recipe's."""
    cpu = options.on_cpu()
    recipe = COMMON_ENVIRON | (CPU_ENVIRON if cpu else {})
    if cpu and not {"encode", "language", "prefill"} & set(arguments):
        # Our modes share the cores by themselves; a server in another mode may run beside them here.
        recipe |= cores.share(os.environ, len(os.sched_getaffinity(0)), cores.usable_cores()).environ
    # The command that SGLang recommends; the one beside our interpreter, whatever the PATH says.
    command = [str(Path(sys.executable).with_name("sglang")), "serve"]
    command += ["--model-path", str(options.model), "--port", str(port)]
    command += [*COMMON_ARGUMENTS, *(CPU_ARGUMENTS if cpu else ONE_OF_SEVERAL), *options.arguments, *arguments]
    merged = recipe | dict(options.environ) | dict(environ or {})
    return options.process(name, command, f"http://{HOST}:{port}", options.logs / f"{name}.log", merged)


def router(
    options: Options, port: int, prefill: Sequence[tuple[str, int]], decode: Sequence[str], *arguments: str
) -> LocalProcess:
    """SGLang's own router in its prefill/decode fan-out. `prefill`: URL and bootstrap port of each encode instance."""
    servers = ["--pd-disaggregation"]
    for url, bootstrap_port in prefill:
        servers += ["--prefill", url, str(bootstrap_port)]
    for url in decode:
        servers += ["--decode", url]
    return _router("router", options, port, servers, *arguments)


def plain_router(options: Options, port: int, servers: Sequence[str], *arguments: str) -> LocalProcess:
    """SGLang's own router in front of servers of which each answers alone, by their URLs."""
    return _router("plain-router", options, port, ["--worker-urls", *servers], *arguments)


def _router(name: str, options: Options, port: int, servers: Sequence[str], *arguments: str) -> LocalProcess:
    (metrics_port,) = free_ports(1)
    command = [sys.executable, "-m", "sglang_router.launch_router", *servers]
    command += ["--host", HOST, "--port", str(port), "--prometheus-port", str(metrics_port)]
    # Its default waits three minutes for connections in flight before it ends.
    command += ["--policy", "round_robin", "--shutdown-grace-period-secs", "3", "--worker-startup-check-interval", "1"]
    command += [*ROUTER_ARGUMENTS, *arguments]
    # Its /health answers 200 before it knows a single server.
    ready_path = "/readiness"
    return options.process(name, command, f"http://{HOST}:{port}", options.logs / f"{name}.log", ready_path=ready_path)


class LocalCluster:
    """Members started in stages (those of one stage together) and stopped together. Ask at `url`."""

    def __init__(self, url: str, stages: Sequence[Sequence[LocalProcess]], progress: Progress = silent) -> None:
        self.url = url
        self.stages = stages
        self.progress = progress

    @property
    def members(self) -> list[LocalProcess]:
        return [member for stage in self.stages for member in stage]

    def __getitem__(self, name: str) -> LocalProcess:
        return next(member for member in self.members if member.name == name)

    def start(self, seconds: float = 300.0) -> None:
        """Start everything and wait until all of it is ready; on any failure nothing is left running."""
        deadline = time.monotonic() + seconds
        try:
            for stage in self.stages:
                for member in stage:
                    member.start()
                wait_all_ready(stage, deadline - time.monotonic(), self.progress)
        except BaseException:
            self.stop(grace=0)
            raise

    def stop(self, grace: float = 30.0) -> None:
        """An interrupt meanwhile, as of a second Ctrl-C, kills what is left and is raised then."""
        try:
            stop_all(self.members[::-1], grace, self.progress)
        except KeyboardInterrupt:
            stop_all(self.members[::-1], 0, self.progress)
            raise

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def undivided(options: Options, progress: Progress = silent) -> LocalCluster:
    """One ordinary server."""
    (port,) = free_ports(1)
    server = sglang_server("server", options, port)
    return LocalCluster(server.url, [[server]], progress)


def _encode_mode(bootstrap_port: int) -> tuple[str, ...]:
    return ("--disaggregation-mode", "encode", "--disaggregation-bootstrap-port", str(bootstrap_port))


def relay(
    options: Options,
    *,
    encode_arguments: Sequence[str] = (),
    language_arguments: Sequence[str] = (),
    router_arguments: Sequence[str] = (),
    encode_environ: Mapping[str, str] | None = None,
    language_environ: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> LocalCluster:
    """One encode instance, one language instance, and the router in front of them."""
    encode_port, language_port, router_port, bootstrap_port = free_ports(4)
    encode_mode = _encode_mode(bootstrap_port)
    language_mode = ("--disaggregation-mode", "language")
    encode = sglang_server("encode", options, encode_port, *encode_mode, *encode_arguments, environ=encode_environ)
    language = sglang_server(
        "language", options, language_port, *language_mode, *language_arguments, environ=language_environ
    )
    front = router(options, router_port, [(encode.url, bootstrap_port)], [language.url], *router_arguments)
    # All together: the router waits for its servers by itself, and is as slow to start as they are.
    return LocalCluster(front.url, [[encode, language, front]], progress)


def three_stages(
    options: Options,
    *,
    encode_instances: int = 1,
    progress: Progress = silent,
) -> LocalCluster:
    """Encode instances, a prefill instance that knows them, SGLang's own decode instance, and their router."""
    prefill_port, decode_port, router_port, kv_port, *ports = free_ports(4 + 2 * encode_instances)
    encode = [
        sglang_server(f"encode-{number}" if number else "encode", options, port, *_encode_mode(bootstrap_port))
        for number, (port, bootstrap_port) in enumerate(zip(ports[::2], ports[1::2], strict=True))
    ]
    prefill_mode = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(kv_port))
    knows = ("--encoder-urls", *(one.url for one in encode))
    prefill = sglang_server("prefill", options, prefill_port, *prefill_mode, *knows)
    decode = sglang_server("decode", options, decode_port, "--disaggregation-mode", "decode")
    front = router(options, router_port, [(prefill.url, kv_port)], [decode.url])
    return LocalCluster(front.url, [[*encode, prefill, decode], [front]], progress)
