"""Every command and every snippet of every page: none that a reader could not use, and none of an unknown kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import snippets
from support.command_lines import Wrong
from support.pages import PAGES, Block, all_blocks

HERE = Path(__file__)


@pytest.mark.parametrize("block", all_blocks(), ids=str)
def test_a_block_is_of_use(block: Block) -> None:
    snippets.check(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_in_its_sentences_exists(page: Path) -> None:
    snippets.check_code(page.read_text())


# ---- what is wrong is noticed


@pytest.mark.parametrize(
    ("language", "text", "named"),
    [
        ("bash", "sglang serve --model-path M --disaggregation-mod encode", "--disaggregation-mod"),
        ("bash", "python -m sglang_router.launch_router --prefil http://10.0.0.1:30000", "--prefil"),
        ("bash", "sglang-relay demo --kept", "--kept"),
        ("bash", "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE=many sglang-relay demo", "BUFFER_SIZE"),
        ("bash", "export SGLANG_EMBEDDING_CASH_BLOCK_SIZE=2", "CASH"),
        ("bash", "export RELAY_STRIKE=2", "RELAY_STRIKE"),
        ("bash", "scripts/test --lane unit", "--lane"),
        ("bash", "scripts/tests unit", "scripts/tests"),
        ("bash", "pip install '.[gpu]'", "gpu"),
        ("bash", "apt-get install libverbs1", "libverbs1"),
        ("bash", "wget http://127.0.0.1:8000/health", "wget"),
        ("bash", "cd somewhere && wget x", "wget"),
        ("bash", "curl http://127.0.0.1:8000/v1/chat/completion", "/v1/chat/completion"),
        ("bash", "curl http://127.0.0.1:30000/v1/chat", "/v1/chat"),
        ("bash", "curl http://127.0.0.1:8600/api/execute/start", "GET /api/execute/start"),
        ("bash", "curl http://127.0.0.1:9999/health", "9999"),
        ("bash", "curl http://127.0.0.1:8000/generate --json '{\"text\": }'", "Expecting value"),
        ("bash", "python benchmark/steps.py --turn 3", "--turn"),
        ("bash", "# nothing", "no command"),
        ("python", "print(1)", "no test runs this"),
        ("json", "{", "Expecting"),
        ("yaml", "a: [", "expected"),
        ("promql", "sglang:embedding_relay_pool", "embedding_relay_pool"),
        ("mermaid", "graf TD", "no diagram"),
        ("", "relay room=7 status=Excellent", "nothing here writes"),
        ("console", "ENCODE  pool  tortoises", "tortoises"),
        ("perl", "print 1", "no rule for blocks"),
    ],
)
def test_a_block_that_is_of_no_use(language: str, text: str, named: str) -> None:
    with pytest.raises(Exception, match=named):
        snippets.check(Block(HERE, 1, language, text, ""))


@pytest.mark.parametrize(
    ("run_by", "named"),
    [
        ("test/srt/absent.py::test_a", "absent"),
        ("test/srt/relay/unit/test_docs.py::test_absent", "test_absent"),
        ("test/srt/relay/unit/test_cli.py::test_help", "does not read"),
    ],
)
def test_a_test_that_runs_no_block(run_by: str, named: str) -> None:
    with pytest.raises(Wrong, match=named):
        snippets.check(Block(HERE, 1, "python", "print(1)", run_by))


@pytest.mark.parametrize(
    "code",
    [
        *("`--disagregation-mode encode`", "`SGLANG_EMBEDDING_DATA_PLAN`", "`sglang-relay bacth`", "`RELAY_STRIKE=1`"),
        "`sglang:embedding_relay_pool`",
    ],
)
def test_a_sentence_that_names_what_is_not_there(code: str) -> None:
    with pytest.raises(Wrong):
        snippets.check_code(f"So {code} it is.")
