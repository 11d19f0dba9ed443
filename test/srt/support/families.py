"""A pair and an undivided server of one family of models: what both are asked, and a line about how they compare."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import Answer, chat_body, data_uri, picture, post
from embedding_relay.tools.local_cluster import HOST, LocalCluster, sglang_server
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers
from support.questions import TOLERANCE, stories
from support.questions import difference as chat_difference
from support.today import todays

# So small that every question resumes.
POOL: Final = {
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "4",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "16",
    # Of the two ways that rows can take on one host, another one each day.
    "SGLANG_EMBEDDING_DATA_PLANE": todays(("mooncake", "shared_memory"), 1)[0],
}
HALF: Final = re.compile(r"relay half=(\w+) class=(\w+) held=(\d+) of=(\d+)")


@dataclass(frozen=True)
class Question:
    """A prompt in which media stand where their kinds are named in braces."""

    text: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()

    def ask(self, url: str, family: str) -> Answer:
        prompt = tiny_model.FAMILIES[family].prompt
        words = self.text.format(image=prompt.image, video=prompt.video, audio=prompt.audio)
        media = {"image_data": self.images, "video_data": self.videos, "audio_data": self.audios}
        body = {
            "text": f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n",
            "sampling_params": {"temperature": 0, "max_new_tokens": 8},
            "return_logprob": True,
            **{field: list(given) for field, given in media.items() if given},
        }
        return post(f"{url}/generate", body)


def image(wide: int, high: int, seed: int) -> str:
    return data_uri(picture(wide, high, seed))


def audio(seconds: float, seed: int) -> str:
    """Tones that follow each other, as a WAV file of 16,000 samples a second."""
    dice, samples = random.Random(seed), bytearray()
    for _ in range(int(seconds * 10)):
        pitch = dice.uniform(200, 2000)
        for at in range(1600):
            samples += int(12000 * math.sin(math.tau * pitch * at / 16000)).to_bytes(2, "little", signed=True)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(samples))
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


def video(wide: int, high: int, seed: int) -> str:
    """Four frames, half a second each. SGLang's decoder needs FFmpeg's libraries, and so does this."""
    import numpy
    import torch
    from torchcodec.encoders import VideoEncoder

    frames = torch.from_numpy(numpy.stack([numpy.asarray(picture(wide, high, seed + at)) for at in range(4)]))
    made = VideoEncoder(frames.permute(0, 3, 1, 2).contiguous(), frame_rate=2).to_tensor(format="mp4")
    return "data:video/mp4;base64," + base64.b64encode(made.numpy().tobytes()).decode()


def questions(family: str) -> dict[str, Question]:
    recipe = tiny_model.FAMILIES[family]
    prompt, side = recipe.prompt, recipe.pixels_per_token
    asked = {}
    if prompt.image:
        asked |= {
            "one image": Question("{image}what is this", (image(6 * side, 5 * side, 1),)),
            "another image": Question("{image}what is this", (image(6 * side, 5 * side, 2),)),
            "a large one": Question("look at {image} closely", (image(18 * side, 14 * side, 5),)),
        }
        if recipe.several_images:
            two = (image(5 * side, 5 * side, 3), image(4 * side, 7 * side, 4))
            asked["two adjacent"] = Question("{image}{image}which is larger", two)
    if prompt.audio:
        asked |= {
            "one audio": Question("{audio}what is this", audios=(audio(1.5, 6),)),
            "another audio": Question("{audio}what is this", audios=(audio(1.5, 7),)),
            "a long one": Question("listen to {audio} closely", audios=(audio(9, 8),)),
        }
    if prompt.video:
        asked |= {
            "one video": Question("{video}what happens", videos=(video(168, 140, 20),)),
            "another video": Question("{video}what happens", videos=(video(168, 140, 30),)),
            "two videos": Question("{video}and{video}", videos=(video(168, 140, 40), video(140, 140, 50))),
            "an image and a video": Question("{image}is in{video}", (image(160, 128, 9),), (video(140, 140, 60),)),
        }
    if prompt.audio and prompt.image:
        asked["everything"] = Question(
            "is {image} as loud as {audio}in{video}", (image(160, 128, 9),), (video(140, 140, 70),), (audio(1, 10),)
        )
    return asked


@dataclass(frozen=True)
class Line:
    """Of the table of families."""

    family: str
    name: str
    """Of SGLang's class."""
    asked: list[str]
    difference: float
    """The largest in log-probability; infinite where tokens differ."""
    rounds: int
    """Of the longest transfer."""
    saved_encode: float
    saved_language: float
    """The share of the weights that this half does not hold."""
    trouble: str = ""


@contextmanager
def running(family: str, logs: Path) -> Iterator[tuple[LocalCluster, LocalProcess]]:
    """The pair, and an undivided server."""
    flags = (*tiny_model.FAMILIES[family].arguments, "--context-length", "8192")
    options = servers.options(tiny_model.cached(family), logs / family, *flags, **POOL)
    cluster = local_cluster.relay(options)
    alone = sglang_server("undivided", options, *free_ports(1))
    together = LocalCluster(cluster.url, [[*cluster.members, alone]])
    with servers.running(together) as started:
        yield started, alone


def compare(family: str, logs: Path) -> Line:
    asked = questions(family)
    with running(family, logs) as (cluster, alone):
        expected, answers = (
            {name: question.ask(server.url, family) for name, question in asked.items()} for server in (alone, cluster)
        )
        trouble = _trouble(expected, answers) or _trouble_with_audio_in_chat(family, cluster, alone)
        told = stories(cluster["language"].log_text())
        halves = {half[0]: half for half in HALF.findall(cluster["encode"].log_text() + cluster["language"].log_text())}
    saved = {name: 1 - int(half[2]) / int(half[3]) for name, half in halves.items()}
    return Line(
        family,
        halves["language"][1],
        list(asked),
        max(difference(expected[name], answers[name]) for name in asked),
        max((story.rounds for story in told), default=0),
        saved["encode"],
        saved["language"],
        trouble,
    )


def difference(one: Answer, other: Answer) -> float:
    here, there = logprobs(one), logprobs(other)
    if not here or [token for _, token in here] != [token for _, token in there]:
        return math.inf
    return max(abs(a - b) for (a, _), (b, _) in zip(here, there, strict=True))


def logprobs(answer: Answer) -> list[tuple[float, int]]:
    """Nothing of an answer that is none: no two of those are equal."""
    return (
        [(value, token) for value, token, _ in answer.body["meta_info"]["output_token_logprobs"]] if answer.ok else []
    )


def _trouble(expected: dict[str, Answer], answers: dict[str, Answer]) -> str:
    for who, given in (("undivided", expected), ("pair", answers)):
        for name, answer in given.items():
            if not answer.ok:
                return f"{who}, {name}: {answer.status} {json.dumps(answer.body)[:200]}"
    rows = [name for name in expected if _tokens(expected[name]) != _tokens(answers[name])]
    if rows:
        return f"other counts of prompt tokens: {rows}"
    for kind in ("image", "audio", "video"):
        one, another = answers.get(f"one {kind}"), answers.get(f"another {kind}")
        if one and another and not difference(one, another) > 20 * TOLERANCE:
            return f"another {kind} makes no difference"
    return ""


def _trouble_with_audio_in_chat(family: str, cluster: LocalCluster, alone: LocalProcess) -> str:
    """The router refuses it by itself; both halves take it from a client that asks them directly."""
    if not tiny_model.FAMILIES[family].prompt.audio:
        return ""
    parts = [{"type": "audio_url", "audio_url": {"url": audio(1.2, 11)}}, {"type": "text", "text": "what is this"}]
    body = chat_body([], "") | {"messages": [{"role": "user", "content": parts}]}
    encode = cluster["encode"]
    port = int(encode.command[encode.command.index("--disaggregation-bootstrap-port") + 1])
    where = {"bootstrap_host": HOST, "bootstrap_port": port, "bootstrap_room": 2**40 + 1}
    path = "/v1/chat/completions"
    with ThreadPoolExecutor() as pool:
        half = pool.submit(post, encode.url + path, body | where)
        ours, theirs = post(cluster["language"].url + path, body | where), post(alone.url + path, body)
        statuses = [half.result().status, ours.status, theirs.status, post(cluster.url + path, body).status]
    if statuses != [200, 200, 200, 400]:
        return f"audio in chat: {statuses} of the halves, an undivided server and the router"
    return "" if chat_difference(ours, theirs) < TOLERANCE else "audio in chat: another answer"


def _tokens(answer: Answer) -> Any:
    return answer.body["meta_info"]["prompt_tokens"]


def save(line: Line, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{line.family}.json").write_text(json.dumps(asdict(line), indent=2) + "\n")
