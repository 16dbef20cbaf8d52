"""A call's rows are resolved once, and what cannot be resolved is refused with its row."""

import numpy as np
import pytest

from adapterx.errors import FeedError, OptionError, UnknownAdapter
from adapterx.runtime.inference import ort
from adapterx.runtime.resident import Resident
from adapterx.runtime.rows import Rows

HELD = {name: Resident(None, number, {}) for number, name in enumerate(("fr", "de", "es"), start=1)}


def test_each_row_gets_its_shares_of_the_distinct_adapters():
    rows = Rows.of(["de", None, {"fr": 0.7, "de": 0.3}, "fr", {}, {"es": 0}], HELD)
    assert rows.residents == (HELD["de"], HELD["fr"])
    want = [[1, 0], [0, 0], [0.3, 0.7], [0, 1], [0, 0], [0, 0]]
    np.testing.assert_array_equal(rows.shares, np.array(want, np.float32))


@pytest.mark.parametrize(
    ("adapters", "uniform"),
    [
        ([], True),
        ([None, None], True),
        (["fr", "fr"], True),
        ([{"fr": 1.0}, "fr"], True),
        (["fr", None], False),
        ([{"fr": 0.5}] * 2, False),
        (["fr", "de"], False),
    ],
)
def test_rows_are_uniform_when_one_adapter_or_the_base_serves_all(adapters, uniform):
    assert Rows.of(adapters, HELD).is_uniform is uniform


def test_every_row_with_an_unknown_name_is_told_with_the_nearest_name():
    with pytest.raises(UnknownAdapter) as refused:
        Rows.of(["fr", "dee", None, {"fr": 1, "xx": 2}], HELD)
    message = str(refused.value)
    assert "row 1: no adapter 'dee'" in message
    assert "row 3: no adapter 'xx'" in message
    assert "nearest is de" in message
    assert "loaded: fr, de, es" in message


@pytest.mark.parametrize("adapters", ["fr", b"fr", {"fr": 1.0}, 3, None])
def test_what_is_no_list_of_rows_is_refused(adapters):
    with pytest.raises(OptionError, match="one entry a row"):
        Rows.of(adapters, HELD)


@pytest.mark.parametrize("entry", [3, 0.5, ["fr"], ("fr", 0.5)])
def test_an_entry_that_is_neither_name_nor_weights_is_refused_with_its_row(entry):
    with pytest.raises(OptionError, match="row 1: expected a name, None, or"):
        Rows.of(["fr", entry], HELD)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e300, "much", None, [1.0]])
def test_a_weight_that_is_no_finite_number_is_refused_with_its_row(weight):
    with pytest.raises(OptionError, match="row 2: the weight of 'de' must be a finite number"):
        Rows.of(["fr", None, {"de": weight}], HELD)


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(OptionError, match="row 0: adapters have names; got 7"):
        Rows.of([{7: 1.0}], HELD)


def test_the_number_of_rows_must_be_that_of_every_input_that_counts_them():
    rows = Rows.of(["fr", "de", None], HELD)
    three = {"ids": np.zeros((3, 4)), "past": ort.OrtValue.ortvalue_from_numpy(np.zeros((3, 1), np.float32))}
    rows.check_batch(three | {"scalar": np.zeros(())}, ["ids", "past", "absent"])
    with pytest.raises(FeedError, match=r"3 entries, and the batch has 2 rows \('past' has shape \[2, 1\]\)"):
        rows.check_batch(three | {"past": np.zeros((2, 1))}, ["ids", "past"])
    with pytest.raises(FeedError, match="'scalar' has shape"):
        rows.check_batch({"scalar": np.zeros(())}, ["scalar"])
    with pytest.raises(FeedError, match="the model names 'absent', and the feeds are 'ids', 'past'"):
        rows.check_batch(three, ["absent"])


def test_a_message_shows_the_first_of_many_names():
    many = {f"a{i}": HELD["fr"] for i in range(2000)}
    with pytest.raises(UnknownAdapter) as refused:
        Rows.of(["nothing like it"] * 500, many)
    assert len(str(refused.value)) < 1500
    assert "and 1988 more" in str(refused.value)
