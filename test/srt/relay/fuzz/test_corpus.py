"""Every hostile message of the corpus, against both sides of a world at work: its rooms do not notice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.protocol import codec
from embedding_relay.protocol.errors import UndecodableFrames
from embedding_relay.testing.world import World
from support.corpus import CORPUS, Line, read_corpus
from support.hostile import AttackedWorld, Seeded
from support.schedules import Shape

FILES = sorted(CORPUS.glob("*.txt"))
SHAPE = Shape(block_size=2, encode_blocks=3, language_blocks=(4, 4), defaults=(8, 3), encodes=1)


def words(world: World, room: int) -> dict[str, bytes]:
    language, encode = world.languages[0], next(iter(world.encodes.values()))
    register = encode.core.session(language.plane.session_id)
    assert register is not None
    _, host, port, session, pointers, handshake = codec.encode(register)
    return {
        "room": b"%d" % room,
        "host": host,
        "port": port,
        "session": session,
        "encode_host": encode.address.host.encode(),
        "encode_port": b"%d" % encode.address.port,
        "pointers": pointers,
        "handshake": handshake,
    }


def at_work(steps: int) -> tuple[AttackedWorld, int]:
    """Three rooms, the first of which all ranks have asked for, `steps` moves later."""
    attacked = AttackedWorld(Seeded(steps), SHAPE)
    for _ in range(3):
        attacked.schedule.start(40, 5, 0)
    room = next(iter(attacked.world.truths))
    encode = next(iter(attacked.world.encodes.values()))
    while not encode.core.is_settled(room):
        attacked.world._step()
    for _ in range(steps):
        attacked.world._step()
    return attacked, room


def messages_of(frames: list[bytes]) -> Iterator[object]:
    for decode in (codec.decode_to_encode, codec.decode_to_language):
        try:
            yield decode(frames)
        except UndecodableFrames:
            continue


def test_there_is_a_file_for_every_theme() -> None:
    assert len(FILES) == 11


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_line_is_a_message_or_none_as_it_says(file: Path) -> None:
    attacked, room = at_work(0)
    for line in read_corpus(file, words(attacked.world, room)):
        assert bool(list(messages_of(line.frames))) is line.is_message, line


@pytest.mark.parametrize("steps", [0, 5, 20, 60])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rooms_under_way_do_not_notice(file: Path, steps: int) -> None:
    attacked, room = at_work(steps)
    lines: list[Line] = read_corpus(file, words(attacked.world, room))
    for line in lines:
        attacked.attack_encode(line.frames)
        attacked.attack_language(line.frames)
        attacked.world._step()
    assert attacked.messages == 2 * len(lines)
    attacked.finish_honestly()
