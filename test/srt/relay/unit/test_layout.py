"""The columns are the specification's: their order, their widths, and what the handshake says of them."""

import pytest

from embedding_relay.memory.layout import Aux, BufferLayout
from embedding_relay.protocol.errors import SettingError


def layout(**changes: object) -> BufferLayout:
    fields = {"hidden_size": 256, "dtype": "bfloat16", "deepstack_rows": 0, "block_size": 128, "blocks": 4, **changes}
    return BufferLayout(**fields)  # type: ignore[arg-type]


def test_columns_are_in_the_order_of_the_specification() -> None:
    names = [column.name for column in layout(deepstack_rows=2).columns]
    assert names == [
        "input_embeddings",
        "fill_ids",
        "mrope_positions",
        "aux_datas",
        "deepstack_embeddings",
        "media_items",
    ]
    assert [name for name in names if name != "deepstack_embeddings"] == [column.name for column in layout().columns]


def test_item_lengths_are_bytes_per_block() -> None:
    assert layout().item_lens == (128 * 512, 128 * 4, 128 * 12, 64, 128 * 16)
    assert layout(dtype="float32", deepstack_rows=3).item_lens[::4] == (128 * 1024, 128 * 3 * 1024)


def test_records_are_behind_the_columns_of_the_specification_and_not_announced_with_them() -> None:
    memory = layout().memory
    assert [length for _, length in memory[:-1]] == [4 * length for length in layout().item_lens]
    assert (memory[-1][0].name, memory[-1][1]) == ("records", 4 * 128 * 32)
    assert layout().pool_bytes == sum(length for _, length in memory)
    assert [column.name for column in layout().short_columns] == ["records", "aux_datas"]


def test_the_handshake_tells_layouts_apart() -> None:
    different = [{"block_size": 16}, {"dtype": "float16"}, {"deepstack_rows": 1}, {"hidden_size": 128}, {"blocks": 5}]
    different.append({"model": (("architecture", "Another"),)})
    handshakes = {layout(**change).handshake() for change in ({}, *different)}
    assert len(handshakes) == 7


@pytest.mark.parametrize("has_mrope", [True, False])
def test_an_aux_row_is_read_as_it_was_written(has_mrope: bool) -> None:
    aux = Aux(total=7, mrope_delta=-3, has_mrope=has_mrope, media_items=2)
    assert aux.values() == [7, -3, int(has_mrope), 2, *[0] * 12]
    assert Aux.of(aux.values()) == aux
    assert not aux.has_records, "whoever knows of none leaves a zero there"


@pytest.mark.parametrize(("record_bytes", "has_records"), [(32, True), (36, False)])
def test_an_aux_row_says_of_how_many_bytes_records_are(record_bytes: int, has_records: bool) -> None:
    aux = Aux.of(Aux(7, 0, True, 2, record_bytes).values())
    assert (aux.record_bytes, aux.has_records) == (record_bytes, has_records)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(SettingError, match="float64"):
        layout(dtype="float64")
