"""Every setting: its default, its range, and the one line that a bad value stops the server with."""

import re
from pathlib import Path

import pytest

from embedding_relay import config
from embedding_relay.config import RelayConfig
from embedding_relay.pairing import ALLOWED_HOSTS
from embedding_relay.protocol.errors import SettingError
from support.repo import REPO

COUNTS = [
    config.CACHE_BLOCKS,
    config.BLOCK_SIZE,
    config.DEFAULT_ALLOCATE,
    config.BOOTSTRAP_TIMEOUT,
    config.WAITING_TIMEOUT,
    config.HEARTBEAT_MAX_FAILURES,
]
SECONDS = [config.FIRST_WORD_TIMEOUT, config.HEARTBEAT_INTERVAL]
BAD_COUNTS = [
    "0",
    "-1",
    "1.5",
    "1e3",
    "many",
    "0x10",
    "1_000",
    "+5",
    "\uff11\uff12",
    "²",
    "99999999999",
    "9" * 5000,
    "1\n2",
    "None",
]


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    assert RelayConfig.from_environment({}).data_plane == "auto"
    assert RelayConfig.from_environment({}) == RelayConfig(
        cache_blocks=512,
        block_size=128,
        default_allocate_tokens=8192,
        bootstrap_timeout=300,
        first_word_timeout=30.0,
        waiting_timeout=300,
        heartbeat_interval=5.0,
        heartbeat_max_failures=2,
        transport=None,
    )


def test_an_empty_value_is_an_unset_one() -> None:
    assert RelayConfig.from_environment(dict.fromkeys([*COUNTS, *SECONDS], " ")) == RelayConfig()


def test_the_page_of_settings_has_every_one_with_its_default() -> None:
    page = (REPO / "docs/settings.md").read_text()
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| [^|]+ \| ([^|]+) \|", page, re.MULTILINE)
    told = {name: default.strip("` ") for names, default in rows for name in re.findall(r"[A-Z_]+", names)}
    pattern = re.compile(r"(?:SGLANG|MC|MOONCAKE)_[A-Z_]*[A-Z]")
    assert told.keys() == {value for value in vars(config).values() if pattern.fullmatch(str(value))}
    values = {name: default for name, default in told.items() if default not in ("any", "none")}
    assert len(values) > len(told) / 2
    assert RelayConfig.from_environment(values) == RelayConfig()


def test_every_setting_is_read() -> None:
    read = RelayConfig.from_environment(
        {
            config.CACHE_BLOCKS: "8",
            config.BLOCK_SIZE: " 16 ",
            config.DEFAULT_ALLOCATE: "1200",
            config.BOOTSTRAP_TIMEOUT: "30",
            config.FIRST_WORD_TIMEOUT: "2.5",
            config.WAITING_TIMEOUT: "60",
            config.HEARTBEAT_INTERVAL: "0.5",
            config.HEARTBEAT_MAX_FAILURES: "3",
            config.MOONCAKE_PROTOCOL: "RDMA",
            config.DATA_PLANE: "Shared_Memory",
            config.ADMISSION: "2048",
            config.ADMISSION_TIMEOUT: "12.5",
        }
    )
    assert read == RelayConfig(
        cache_blocks=8,
        block_size=16,
        default_allocate_tokens=1200,
        bootstrap_timeout=30,
        first_word_timeout=2.5,
        waiting_timeout=60,
        heartbeat_interval=0.5,
        heartbeat_max_failures=3,
        transport="rdma",
        data_plane="shared_memory",
        admission_mib=2048,
        admission_timeout=12.5,
    )
    timing = read.timing
    assert (timing.bootstrap, timing.first_word, timing.waiting, timing.silence) == (30, 2.5, 60, 2.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("", None), ("auto", None), (" AUTO ", None), ("0", 0), ("4294967296", 2**32), (str(2**48), 2**48)],
)
def test_the_row_cache_takes_any_number_of_bytes(text: str, size: int | None) -> None:
    assert RelayConfig.from_environment({config.ROW_CACHE: text}).row_cache_bytes == size


@pytest.mark.parametrize("text", ["-1", "1.5", "4G", "much", str(2**48 + 1), "9" * 400, "٤"])
def test_what_is_no_number_of_bytes_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingError, match=f"^{config.ROW_CACHE} must be a number of bytes, 0 for none or `auto`, not"):
        RelayConfig.from_environment({config.ROW_CACHE: text})


@pytest.mark.parametrize("text", ["auto", "AUTO", " Auto "])
def test_the_first_allocation_may_be_learned(text: str) -> None:
    assert RelayConfig.from_environment({config.DEFAULT_ALLOCATE: text}).default_allocate_tokens is None


@pytest.mark.parametrize(("text", "limit"), [("", None), ("Auto", None), ("0", 0), ("512", 512)])
def test_the_memory_of_requests_is_a_part_of_the_machines_a_number_or_not_limited(text: str, limit: int | None) -> None:
    assert RelayConfig.from_environment({config.ADMISSION: text}).admission_mib == limit


@pytest.mark.parametrize("text", ["-1", "half", "1.5"])
def test_a_bad_limit_of_memory_is_one_line(text: str) -> None:
    with pytest.raises(
        SettingError, match=f"^{config.ADMISSION} must be a positive integer, 0 or `auto`, not '{text}'$"
    ):
        RelayConfig.from_environment({config.ADMISSION: text})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("text", BAD_COUNTS)
def test_a_bad_count_is_one_line_that_names_its_variable(name: str, text: str) -> None:
    with pytest.raises(SettingError) as caught:
        RelayConfig.from_environment({name: text})
    line = str(caught.value)
    assert line.startswith(name)
    assert "positive integer" in line
    assert "\n" not in line
    assert len(line) < 200


@pytest.mark.parametrize("name", [name for name in COUNTS if name != config.DEFAULT_ALLOCATE])
def test_only_the_first_allocation_may_be_learned(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        RelayConfig.from_environment({name: "auto"})


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "soon", "1,5"])
def test_a_bad_number_of_seconds_is_refused(name: str, text: str) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be a positive number of seconds"):
        RelayConfig.from_environment({name: text})


@pytest.mark.parametrize(
    ("blocks", "size", "named"),
    [("1048577", "1", config.CACHE_BLOCKS), ("1048576", "4096", config.BLOCK_SIZE)],
)
def test_a_pool_that_no_index_can_name_is_refused(blocks: str, size: str, named: str) -> None:
    with pytest.raises(SettingError, match=named):
        RelayConfig.from_environment({config.CACHE_BLOCKS: blocks, config.BLOCK_SIZE: size})


def test_mooncakes_own_settings_choose_the_transport() -> None:
    assert RelayConfig.from_environment({config.MOONCAKE_FORCE_TCP: "1"}).transport == "tcp"
    assert RelayConfig.from_environment({config.MOONCAKE_PROTOCOL: "tcp"}).transport == "tcp"
    seconds = [
        RelayConfig.from_environment({config.MOONCAKE_TRANSFER_TIMEOUT: text}).write_timeout for text in ("", "2", "60")
    ]
    assert seconds == [30, 5, 60], "Mooncake has no less than five"
    with pytest.raises(SettingError, match=config.MOONCAKE_PROTOCOL):
        RelayConfig.from_environment({config.MOONCAKE_PROTOCOL: "no-such-transport"})


def test_the_data_plane_is_one_of_three() -> None:
    assert RelayConfig.from_environment({config.DATA_PLANE: "mooncake"}).data_plane == "mooncake"
    one_of = f"{config.DATA_PLANE} must be one of auto, mooncake, shared_memory, not 'tcp'"
    with pytest.raises(SettingError, match=one_of):
        RelayConfig.from_environment({config.DATA_PLANE: "tcp"})


def test_hosts_may_be_named_that_requests_may_have_asked() -> None:
    assert RelayConfig.from_environment({}).may_ask("169.254.169.254")
    assert RelayConfig.from_environment({ALLOWED_HOSTS: " "}).may_ask("any.example")
    named = RelayConfig.from_environment({ALLOWED_HOSTS: "10.0.0.0/8, encode.example"})
    assert named.may_ask("10.1.2.3")
    assert named.may_ask("encode.example")
    assert not named.may_ask("169.254.169.254")


@pytest.mark.parametrize("text", ["10.0.0.0/33", "a b", "http://encode:8998", "encode:8998", "x" * 300 + "/"])
def test_a_host_that_nobody_can_have_is_one_line(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        RelayConfig.from_environment({ALLOWED_HOSTS: f"encode.example,{text}"})
    line = str(caught.value)
    assert line.startswith(f"{ALLOWED_HOSTS} must have an address, a network, a host name or *.domain between commas")
    assert "\n" not in line
    assert len(line) < 200


def test_a_directory_of_media_is_an_absolute_path_of_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    read = RelayConfig.from_environment({config.ALLOWED_MEDIA_DIR: f" {tmp_path} "})
    assert read.allowed_media_dir == tmp_path
    for wrong in ("media", ".", "/", "//", str(tmp_path / "file"), str(tmp_path / "missing")):
        with pytest.raises(SettingError, match=config.ALLOWED_MEDIA_DIR):
            RelayConfig.from_environment({config.ALLOWED_MEDIA_DIR: wrong})


@pytest.mark.parametrize(
    ("text", "allowed"), [("1", True), ("True", True), ("0", False), ("false", False), ("", False)]
)
def test_private_urls_are_allowed_by_a_plain_word(text: str, allowed: bool) -> None:
    assert RelayConfig.from_environment({config.PRIVATE_MEDIA_URLS: text}).private_media_urls == allowed


def test_no_other_word_is_taken_for_it() -> None:
    with pytest.raises(SettingError, match=config.PRIVATE_MEDIA_URLS):
        RelayConfig.from_environment({config.PRIVATE_MEDIA_URLS: "yes"})


def test_a_name_that_is_almost_a_setting_is_recognised() -> None:
    names = {
        "SGLANG_EMBEDDING_CACHE_BUFER_SIZE": config.CACHE_BLOCKS,
        "SGLANG_EMBEDDING_SECRETFILE": config.SECRET_FILE,
        "SGLANG_EMBEDDING_ALLOWED_HOST": ALLOWED_HOSTS,
    }
    of_others = ["SGLANG_EMBEDDING_POOL_SIZE_MB", "SGLANG_EMBEDDINGS_SPARSE_HEAD", "SGLANG_PLATFORM", "PATH"]
    assert config.misspelt(dict.fromkeys([*names, *of_others, *COUNTS, *SECONDS, config.DATA_PLANE], "1")) == names
