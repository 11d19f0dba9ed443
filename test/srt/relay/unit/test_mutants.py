"""The mutation tester changes what functions do, one thing at a time, and nothing else."""

from relay.mutation.mutants import mutants

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
