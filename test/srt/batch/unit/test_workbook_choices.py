"""What a person chose: columns that exist, sheets that were analysed, templates that can be filled."""

from pathlib import Path
from typing import Any

import pytest

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Choices
from embedding_relay.batch.workbook.choices import Template
from support.workbooks import (
    PICTURE_URL,
    received,
    save_book,
)


def test_another_sheet_needs_another_analysis(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["x"]]))
    with pytest.raises(Unreadable, match="of the sheet 'Sheet', not of 'Other'"):
        book._replace(choices=Choices(sheet="Other")).tasks()


COLUMNS = ["text", "Target Language", "a.b"]


@pytest.mark.parametrize(
    ("template", "filled", "names"),
    [
        ("Translate {text} into {Target Language}", "Translate Hello into German", ("text", "Target Language")),
        ("{ text }{TEXT}{{text}}", "HelloHello{text}", ("text",)),
        ("{{{text}}}", "{Hello}", ("text",)),
        ("no columns", "no columns", ()),
        ("{a.b}|", "|", ("a.b",)),
        ("{{}}", "{}", ()),
    ],
)
def test_a_template_is_filled(template: str, filled: str, names: tuple[str, ...]) -> None:
    made = Template(template, COLUMNS)
    assert made.fill({"text": "Hello", "Target Language": "German"}) == filled
    assert made.names == names


def test_what_a_cell_says_is_no_template() -> None:
    assert Template("{text}", COLUMNS).fill({"text": "{a.b} {{x}}"}) == "{a.b} {{x}}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{txt}", "'txt' that does not exist; there are: text, Target Language, a.b"),
        ("{}", "''"),
        ("{text", "single {"),
        ("text}", "single }"),
        ("{te{text}xt}", "single {"),
        ("{text.__class__}", "does not exist"),
        ("{0}", "does not exist"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words.replace("{", r"\{").replace("}", r"\}")):
        Template(template, COLUMNS)


def test_choices_win_and_are_checked(tmp_path: Path) -> None:
    rows = [["prompt", "other", "photo"], ["a", "b", PICTURE_URL]]
    path = save_book(tmp_path / "a.xlsx", rows)
    content = path.read_bytes()

    def chosen(number: int, **choices: Any) -> Analysis:
        path.write_bytes(content)
        return received(path, Choices(**choices), into=str(number)).analysis

    found = chosen(1, prompt_column="OTHER ", image_columns=())
    assert (found.prompt_column, found.image_columns) == ("other", ())
    assert [column.role for column in found.columns] == ["", "prompt", ""]
    assert chosen(2, image_columns=("other", "photo", "other")).image_columns == ("other", "photo")
    assert chosen(3, prompt_column="photo").image_columns == ()
    assert chosen(4, image_columns=("prompt",)).prompt_column == ""
    for number, (choices, words) in enumerate(
        [
            ({"prompt_column": "nope"}, "no column 'nope'; there are: prompt, other, photo"),
            ({"image_columns": ("nope",)}, "no column 'nope'"),
            ({"template": "{nope}"}, "'nope' that does not exist"),
            ({"sheet": "nope"}, "no sheet 'nope'; there are: Sheet"),
        ],
        10,
    ):
        with pytest.raises(Unreadable, match=words):
            chosen(number, **choices)
