"""Memory of each half beside one undivided server: the same model, the same requests, on this machine, in one run.

    .venv/bin/python benchmark/memory.py [--family qwen2_5_vl] [--requests 4]

The model is generated, with halves large enough to be seen above the gigabyte that every scheduler process needs for
torch and SGLang. RSS is that of the scheduler process after the requests, the KV pool and the embedding blocks in it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import ask, picture
from embedding_relay.tools.local_cluster import LocalCluster, Options
from embedding_relay.tools.local_process import LocalProcess

SIZE = tiny_model.Size(hidden=1024, layers=24, vision_hidden=1024, vision_layers=24)
SIDE = 224
MIB = 2**20
HELD = re.compile(r"relay mode=\w+ parameters=(\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tiny_model.FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--requests", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model.make(Path(scratch, "model"), arguments.family, size=SIZE)
        # On the CPU also where there is an accelerator: only there is RSS all of a server's memory.
        options = Options(model=model, logs=Path(scratch), device="cpu")
        print(f"{'scheduler of':<14} {'parameters':>12} {'MiB of them':>12} {'RSS MiB':>8}")
        measure(local_cluster.undivided(options), ["server"], arguments.requests, parameters_of(model))
        measure(local_cluster.relay(options), ["encode", "language"], arguments.requests, None)


def measure(cluster: LocalCluster, names: Sequence[str], requests: int, parameters: int | None) -> None:
    with cluster:
        for seed in range(requests):
            answer = ask(cluster.url, [picture(SIDE, SIDE, seed)], "what is this")
            if not answer.ok:
                raise SystemExit(f"status {answer.status}: {answer.body}")
        for name in names:
            member = cluster[name]
            held = held_by(member) if parameters is None else parameters
            # Two bytes for each: the models are made in bfloat16.
            print(f"{name:<14} {held:>12,} {2 * held / MIB:>12.0f} {scheduler_rss(member) / MIB:>8.0f}", flush=True)


def parameters_of(model: Path) -> int:
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118  (it is no mapping)


def held_by(member: LocalProcess) -> int:
    """What a half logged when its model was loaded."""
    found = HELD.search(member.log_text())
    if found is None:
        raise SystemExit(f"{member.name} did not log how many parameters it holds")
    return int(found[1])


def scheduler_rss(member: LocalProcess) -> int:
    """Bytes; SGLang names its processes after what they do."""
    for pid in member.group_members():
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("sglang::scheduler"):
            status = Path(f"/proc/{pid}/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+) kB", status)
            if found is not None:
                return 1024 * int(found[1])
    raise SystemExit(f"{member.name} has no scheduler process")


if __name__ == "__main__":
    main()
