"""The secret's file, and the keys that are made from it."""

import os
import pickle
import stat
from pathlib import Path

import pytest

from embedding_relay import config
from embedding_relay.config import RelayConfig
from embedding_relay.keys import Keys, hkdf, make_secret, read_keys
from embedding_relay.protocol.errors import SettingError
from embedding_relay.tools import cli

GOOD = bytes(range(100, 132)).hex()


def secret_file(path: Path, content: str | bytes = GOOD, mode: int = 0o600) -> Path:
    file = path / "secret"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    file.chmod(mode)
    return file


def refusal(file: Path | str) -> str:
    """The one line that the server stops with."""
    with pytest.raises(SettingError) as caught:
        RelayConfig.from_environment({config.SECRET_FILE: str(file)})
    line = str(caught.value)
    assert line.startswith(f"{config.SECRET_FILE}: ")
    assert "\n" not in line
    return line


def test_the_derivation_is_that_of_the_standard() -> None:
    """RFC 5869, appendix A, the first bytes of test cases 1 and 3."""
    first = hkdf(b"\x0b" * 22, info=bytes(range(0xF0, 0xFA)), salt=bytes(range(13)))
    assert first.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    third = hkdf(b"\x0b" * 22, info=b"")
    assert third.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_equal_secrets_give_equal_keys_and_each_use_has_its_own(tmp_path: Path) -> None:
    keys = read_keys(str(secret_file(tmp_path)))
    assert keys == read_keys(str(secret_file(tmp_path, f"\n {GOOD.upper()} \n"))) == Keys.of(bytes.fromhex(GOOD))
    other = Keys.of(bytes.fromhex(GOOD[::-1]))
    assert len({keys.control, keys.registry, other.control, other.registry}) == 4
    assert {len(keys.control), len(keys.registry)} == {32}


def test_a_made_secret_is_for_its_owner_only_and_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "secret"
    before = os.umask(0)
    try:
        assert cli.main(["make-secret", str(file)]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert capsys.readouterr().out == f"{file}\n"
    secret = file.read_text()
    assert RelayConfig.from_environment({config.SECRET_FILE: str(file)}).keys == read_keys(str(file))
    assert cli.main(["make-secret", str(file)]) == 1
    assert file.read_text() == secret
    assert capsys.readouterr().err == f"sglang-relay make-secret: {file}: File exists\n"
    assert cli.main(["make-secret", str(tmp_path / "no" / "directory")]) == 1


def test_every_secret_is_new(tmp_path: Path) -> None:
    make_secret(tmp_path / "one")
    make_secret(tmp_path / "two")
    assert read_keys(str(tmp_path / "one")) != read_keys(str(tmp_path / "two"))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o610, 0o604])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    assert refusal(secret_file(tmp_path, mode=mode)).endswith(f"is open to other users (mode {mode:04o}): chmod 600")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "0 hexadecimal digits, where 64 are needed"),
        (GOOD[:-2], "62 hexadecimal digits, where 64 are needed"),
        (GOOD[:-1], "must hold 64 hexadecimal digits"),
        ("correct horse battery staple, and many more words than sixty-four letters", "hexadecimal digits and nothing"),
        (b"\xff" * 64, "hexadecimal digits and nothing else"),
        ("0" * 64, "is not random"),
        ("c0ffee" * 20, "is not random"),
        ("a" * 100_000, "is not random"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_repeated(tmp_path: Path, content: str | bytes, said: str) -> None:
    line = refusal(secret_file(tmp_path, content))
    assert said in line
    assert GOOD[:8] not in line
    assert "horse" not in line


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing").endswith("cannot be read: No such file or directory")
    assert "is not an ordinary file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "is not an ordinary file" in refusal(tmp_path / "pipe")
    assert "cannot be read" in refusal("null\0character")
    assert len(refusal("x" * 5000)) < 300


def test_a_link_to_the_file_serves_as_well(tmp_path: Path) -> None:
    secret_file(tmp_path)
    (tmp_path / "link").symlink_to("secret")
    assert read_keys(str(tmp_path / "link")) == Keys.of(bytes.fromhex(GOOD))


def test_no_file_means_no_keys() -> None:
    assert RelayConfig.from_environment({}).keys is None


def test_keys_are_never_shown(tmp_path: Path) -> None:
    settings = RelayConfig.from_environment({config.SECRET_FILE: str(secret_file(tmp_path))})
    keys = settings.keys
    assert keys is not None
    for text in (repr(settings), str(settings), repr(keys), f"{keys}"):
        assert "Keys()" in text
        for hidden in (GOOD, keys.control.hex(), keys.registry.hex(), repr(keys.control), repr(keys.registry)):
            assert hidden not in text
    assert pickle.loads(pickle.dumps(keys)) == keys
