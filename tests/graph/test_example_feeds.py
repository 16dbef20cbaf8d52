"""Feeds made from nothing but a graph fit its shapes, its tables and its ports."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from adapterx.graph.example_feeds import example_feeds
from adapterx.graph.extract import extract_adapters
from adapterx.manifest import KEY, Manifest
from tests.graph.text_models import Layer, text_model

ROWS = {"small": 3, "large": 50}


def feeds_of(inputs, body="y = Identity(one)", **options):
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]>\ng ({inputs}) => (float[N] y) {{\n{body}\n}}'
    )
    tables = {name: np.zeros((rows, 4), np.float32) for name, rows in ROWS.items()} | {"one": np.ones(1, np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tables.items())
    return example_feeds(ir.from_proto(proto), **options)


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ("N, T, 8", (2, 5, 8)),
        ("4, T", (4, 5)),
        ("N, N", (2, 2)),
        ("?, ?", (2, 5)),
    ],
)
def test_a_symbol_has_one_size_and_the_first_is_the_batch(shape, want):
    assert feeds_of(f"float[{shape}] x")["x"].shape == want


def test_rows_and_lengths_may_be_asked_for_where_the_model_does_not_fix_them():
    feeds = feeds_of("float[N, T, 8] x, float[N, 7] z, float[T] p", rows=6, length=1)
    assert {name: feed.shape for name, feed in feeds.items()} == {"x": (6, 1, 8), "z": (6, 7), "p": (1,)}


def test_a_symbol_keeps_its_size_in_every_input():
    feeds = feeds_of("float[N, T] x, float[T, N] z, float[M, T] w")
    assert [feeds[name].shape for name in "xzw"] == [(2, 5), (5, 2), (2, 5)]


def test_dimensions_without_a_name_are_not_one_symbol():
    """Else an unnamed batch would give its size to every unnamed length behind it."""
    assert feeds_of("float[?] x, float[4, ?] z")["z"].shape == (4, 5)


@pytest.mark.parametrize(("symbol", "size"), [("past + T", 10), ("T + 1", 6), ("past+T+1", 11)])
def test_a_sum_of_symbols_is_the_sum_of_their_sizes(symbol, size):
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "past", "T", symbol]))
    model = ir.Model(ir.Graph([x], [], nodes=[], name="g"), ir_version=10)
    assert example_feeds(model)["x"].shape == (1, 5, 5, size)


def test_masks_are_ones_positions_count_up_and_truth_is_true():
    feeds = feeds_of("int64[N, T] attention_mask, float[N, T] token_MASK, int64[N, T] position_ids, bool[N] use_cache")
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((2, 5), np.int64))
    np.testing.assert_array_equal(feeds["token_MASK"], np.ones((2, 5), np.float32))
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 1, 2, 3, 4]] * 2)
    np.testing.assert_array_equal(feeds["use_cache"], [True, True])


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16", "double", "int64", "int32", "bool"])
def test_a_feed_has_the_dtype_of_its_input(dtype):
    want = "float32" if dtype == "float" else "float64" if dtype == "double" else dtype
    assert feeds_of(f"{dtype}[N] x")["x"].dtype.name == want


@pytest.mark.parametrize(
    "body",
    [
        "a = Gather(large, ids)\n y = Gather(small, ids)",
        "a = Gather(small, ids)\n y = Gather(large, ids)",
        "i = Cast<to=7>(ids)\n j = Identity(i)\n y = Gather(small, j)",
    ],
)
def test_ids_stay_below_the_shortest_table_that_they_index(body):
    ids = feeds_of("int64[40, 40] ids", body)["ids"]
    assert (ids.min(), ids.max()) == (0, 2)


def test_a_value_that_is_gathered_from_is_no_index_and_one_that_indexes_nothing_is_small():
    feeds = feeds_of("int64[40, 40] ids, int64[50] data", "y = Gather(data, ids)")
    assert feeds["data"].max() == 1
    assert feeds["ids"].max() == 49


def test_another_seed_gives_other_numbers_and_the_same_the_same():
    first, again, other = (feeds_of("float[N, 8] x", seed=seed)["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("packed", [False, True])
def test_the_ports_of_an_extracted_model_are_left_out_even_where_they_are_required(tmp_path, packed):
    model = text_model((Layer("a.q", 8, 8, 2, 2.0), Layer("b.q", 8, 8, 2, 2.0)))
    out = extract_adapters(model.proto, tmp_path, make_inputs=True, pack_inputs=packed, optional_inputs=False)
    extracted = ir.load(out.model_path)
    manifest = Manifest.loads(extracted.metadata_props[KEY], where="m")
    del extracted.graph.initializers["adapter_mask"]
    extracted.graph.inputs[-1].const_value = None
    assert list(example_feeds(extracted, manifest=manifest)) == ["x"]
    assert len(example_feeds(extracted)) == (4 if packed else 6)


def test_an_input_with_a_default_needs_no_feed(tmp_path):
    out = extract_adapters(text_model((Layer("a.q", 8, 8, 2, 2.0),)).proto, tmp_path, make_inputs=True)
    assert list(example_feeds(ir.load(out.model_path))) == ["x"]
