"""Changes of parts as one change of the fused layer, against the products themselves."""

from __future__ import annotations

import numpy as np
import pytest

from adapterx.adapter import GAIN, INPUT_GAIN, MAGNITUDE, SHIFT, WHOLE_WEIGHT, LowRank
from adapterx.errors import MismatchError
from adapterx.fused import FUSED, joined, parts_of_fused, split

D_IN = 6
QKV = {"q_proj": 8, "k_proj": 4, "v_proj": 4}


def change(d_out, *, rank=2, seed=0, parts=()):
    rng = np.random.default_rng([seed, d_out])
    sides = (rng.standard_normal((rank, width)).astype(np.float32) for width in (D_IN, d_out))
    a, b = sides
    widths = {INPUT_GAIN: D_IN}
    extra = {name: rng.standard_normal((1, widths.get(name, d_out))).astype(np.float32) for name in parts}
    return LowRank(a=a, b=b, parts=extra)


def delta(one, x):
    return (x @ one.a.T) @ one.b


X = np.random.default_rng(1).standard_normal((5, D_IN)).astype(np.float32)


@pytest.mark.parametrize(
    ("fused", "widths", "given"),
    [
        ("qkv_proj", QKV, ("q_proj", "k_proj", "v_proj")),
        # With grouped-query attention, keys and values are alike: what is given tells the rest.
        ("qkv_proj", QKV, ("q_proj", "v_proj")),
        ("qkv_proj", QKV, ("v_proj", "k_proj")),
        ("qkv_proj", QKV, ("q_proj",)),
        ("qkv_proj", QKV, ("v_proj",)),
        ("gate_up_proj", {"gate_proj": 10, "up_proj": 10}, ("up_proj",)),
        ("gate_up_proj", {"gate_proj": 10, "up_proj": 10}, ("up_proj", "gate_proj")),
    ],
)
def test_the_joined_change_is_each_parts_own_on_its_columns_and_zero_elsewhere(fused, widths, given):
    changes = {name: change(widths[name], rank=2 + i, seed=i) for i, name in enumerate(given)}
    whole = joined(changes, fused, sum(widths.values()))
    want = [delta(changes[n], X) if n in changes else np.zeros((5, width)) for n, width in widths.items()]
    np.testing.assert_allclose(delta(whole, X), np.concatenate(want, axis=1), rtol=1e-6, atol=1e-6)
    assert whole.rank == sum(one.rank for one in changes.values())


def test_joining_what_was_split_gives_it_back():
    whole = change(16, rank=3)
    parts = dict(zip(FUSED["qkv_proj"], split(whole, QKV.values()), strict=True))
    again = joined(parts, "qkv_proj", 16)
    np.testing.assert_array_equal(again.a, whole.a)
    np.testing.assert_array_equal(again.b, whole.b)


def test_gains_and_shifts_lie_on_their_parts_columns():
    q, v = change(8, parts=(GAIN, SHIFT)), LowRank.of_parts({SHIFT: np.ones((1, 4), np.float32)})
    whole = joined({"q_proj": q, "v_proj": v}, "qkv_proj", 16)
    nothing = np.zeros((1, 4))
    np.testing.assert_array_equal(whole.parts[GAIN], np.concatenate([q.parts[GAIN], nothing, nothing], axis=1))
    np.testing.assert_array_equal(whole.parts[SHIFT], np.concatenate([q.parts[SHIFT], nothing, nothing + 1], axis=1))
    np.testing.assert_array_equal(whole.b[:, :8], q.b)
    assert not whole.b[:, 8:].any()


def test_whole_weights_are_stacked_when_all_parts_have_them():
    weights = {name: np.full((width, D_IN), i, np.float32) for i, (name, width) in enumerate(QKV.items())}
    parts = {name: LowRank.of_parts({WHOLE_WEIGHT: weight}) for name, weight in weights.items()}
    np.testing.assert_array_equal(
        joined(parts, "qkv_proj", 16).parts[WHOLE_WEIGHT], np.concatenate([*weights.values()])
    )


def with_input_gain(value):
    return LowRank.of_parts({INPUT_GAIN: np.full((1, D_IN), value, np.float32), GAIN: np.zeros((1, 10), np.float32)})


@pytest.mark.parametrize(
    ("changes", "fused", "said"),
    [
        ({"q_proj": change(8), "v_proj": change(5)}, "qkv_proj", "add up to 16.*q_proj 8, v_proj 5"),
        ({"q_proj": change(7)}, "qkv_proj", "q_proj 7"),
        ({"q_proj": change(16)}, "qkv_proj", "q_proj 16"),
        ({"gate_proj": change(6), "up_proj": change(10)}, "gate_up_proj", None),
        ({"gate_proj": change(6)}, "gate_up_proj", "gate_proj 6"),
        ({"q_proj": change(8, parts=(MAGNITUDE,)), "v_proj": change(4)}, "qkv_proj", "k_proj has none"),
        ({"gate_proj": with_input_gain(1), "up_proj": with_input_gain(2)}, "gate_up_proj", "scale their one input"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused_with_the_widths(changes, fused, said):
    d_out = 20 if "gate" in fused and "scale" in (said or "") else 16
    if said is None:
        assert joined(changes, fused, d_out).d_out == d_out
        return
    with pytest.raises(MismatchError, match=said):
        joined(changes, fused, d_out)


def test_a_model_that_has_both_the_fused_layer_and_a_part_needs_no_joining():
    assert parts_of_fused(["a.qkv_proj", "b.qkv_proj", "b.q_proj"]).keys() == {"a.q_proj", "a.k_proj", "a.v_proj"}
    assert parts_of_fused(["qkv_proj"]) == {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
