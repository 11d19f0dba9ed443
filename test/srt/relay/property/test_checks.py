"""Any damage to received rows is either seen, or harms nobody: the quick look agrees with the slow one."""

from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.memory.checks import SmallColumns
from support.columns import EDGES, LARGEST, LIMITS, SMALLEST, WHERE, changed, columns, is_safe
from support.effort import effort, unhurried

pytestmark = unhurried

numbers = st.sampled_from(EDGES) | st.integers(SMALLEST, LARGEST)


@st.composite
def damaged(draw: st.DrawFn) -> SmallColumns:
    runs = draw(st.lists(st.integers(-1, 4), min_size=1, max_size=30))
    received = columns(*runs, modality=draw(st.sampled_from((1, 2, 3))))
    for _ in range(draw(st.integers(0, 4))):
        row, axis = draw(st.integers(0, len(runs) - 1)), draw(st.integers(0, 3))
        received = changed(received, draw(st.sampled_from(WHERE)), row, axis, draw(numbers))
    return received


@effort()
@given(damaged())
def test_it_is_refused_exactly_when_a_model_could_not_take_it(received: SmallColumns) -> None:
    assert (received.flaw(LIMITS) is None) is is_safe(received, LIMITS)


@effort()
@given(damaged())
def test_what_is_wrong_is_one_short_line(received: SmallColumns) -> None:
    wrong = received.flaw(LIMITS) or ""
    assert "\n" not in wrong
    assert len(wrong) < 200
