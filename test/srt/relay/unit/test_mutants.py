"""The mutation tester changes what functions do, one thing at a time and nothing else, and knows which tests to run."""

from pathlib import Path

import pytest

from relay.mutation.mutants import mutants
from relay.mutation.parts import PARTS, Part

SOURCE = '''
LIMIT = 7

def original(value: int, others: list[int]) -> list[int]:
    """Not a word of this is changed, nor of the texts of errors."""
    if not others and value > LIMIT:
        raise ValueError(f"{value + 1} is too much")
    count = max(others)
    self.count += 1
    return [count, *others]
'''


def test_what_is_changed() -> None:
    assert [mutant.change for mutant in mutants(SOURCE)] == [
        "without `count = max(others)`",
        "without `self.count += 1`",
        "without `raise ValueError(f'{value + 1} is too much')`",
        "And -> Or",
        "without `not others`",
        "without `value > LIMIT`",
        "not x -> x",
        "Gt -> GtE",
        "max -> min",
        "Add -> Sub",
        "1 -> 2",
        "[…] without `count`",
        "[…] without `*others`",
    ]


def test_every_mutant_is_another_program() -> None:
    sources = [mutant.source for mutant in mutants(SOURCE)]
    assert len({SOURCE, *sources}) == len(sources) + 1
    for source in sources:
        compile(source, "mutant", "exec")


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_every_module_in_which_something_can_be_changed_has_tests(part: Part) -> None:
    for module in part.every_module():
        files = [file for lane in part.test_files(module) for file in lane]
        assert [file for file in files if not Path(file).exists()] == []
        assert files or not any(mutants((part.folder / module).read_text())), module
