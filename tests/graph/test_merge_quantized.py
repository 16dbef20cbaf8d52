"""Merging into quantized weights: dequantized, added to, quantized again. What that may cost, and what is told of it.

The bound: every group of numbers that share a scale (a block, a column, a whole weight) is stored no worse, in the sum
of squares, than ONNX Runtime's own quantizer would store the merged numbers. Its grid puts no number further off than
one step.
"""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from adapterx import weight_rows
from adapterx.adapter import Adapter, LowRank
from adapterx.base_weight import _grid, _grouped, read_weight
from adapterx.errors import MismatchError
from adapterx.graph import merged_files
from adapterx.graph.merge import merge_adapter, unmerge_adapter
from tests.graph import quantizers
from tests.stored_weights import D_IN, D_OUT, INTEGER, LINEAR, as_bytes, bnb4, n_bits, rng, run, stored, weight, x
from tests.zoo import CASES, build
from tests.zoo.quantizers import QUANTIZERS

FORMS = {**LINEAR, **INTEGER}
QUANTIZED = [name for name in FORMS if name not in {"MatMul", "Transpose", "Gemm", "FusedMatMul"}]
NAME = "fc"


def named(model):
    """The same model, whose weight bears a module's name."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    renames = {t.name: f"{NAME}.weight{t.name[1:]}" for t in made.graph.initializer if t.name.startswith("W")}
    for tensor in made.graph.initializer:
        tensor.name = renames.get(tensor.name, tensor.name)
    for node in made.graph.node:
        node.input[:] = [renames.get(name, name) for name in node.input]
    return made


def random_change(size):
    a = rng.standard_normal((3, D_IN)).astype(np.float32)
    return LowRank(a=a, b=(size * rng.standard_normal((3, D_OUT))).astype(np.float32))


def errors(ref, tensor, wanted):
    """Squares of the differences, summed up by group, and the step of each group."""
    difference = (read_weight(ref, tensor) - wanted).T if not ref.rows_first else read_weight(ref, tensor) - wanted
    groups = _grouped(ref, np.square(difference.reshape(ref.shape)))
    return groups.sum(axis=2), np.abs(_grid(ref, tensor).scale[:, :, 0])


@pytest.mark.parametrize("size", [0.01, 0.5])
@pytest.mark.parametrize("form", QUANTIZED)
def test_a_quantized_weight_keeps_its_form_and_the_error_is_told(form, size, tmp_path):
    model = named(FORMS[form](tmp_path))
    change = random_change(0 if form == "QDQ uint4 without zero points" else size)
    onnx.save(model, tmp_path / "model.onnx")
    before, tensor = stored(model)
    merge = merge_adapter(tmp_path / "model.onnx", Adapter({NAME: change}), tmp_path / "merged.onnx")
    merged = onnx.load(tmp_path / "merged.onnx")
    after, new_tensor = stored(merged)
    assert [node.op_type for node in merged.graph.node] == [node.op_type for node in model.graph.node]
    assert after == before
    wanted = read_weight(before, tensor) + change.a.T @ change.b
    read = read_weight(after, new_tensor)
    [row] = merge.rows
    assert row.max_error == pytest.approx(np.abs(read - wanted).max(), abs=1e-5)
    assert row.rms_error == pytest.approx(np.sqrt(np.square(read - wanted).mean()), rel=1e-3, abs=1e-6)
    assert row.change == pytest.approx(np.sqrt(np.square(change.a.T @ change.b).mean()), rel=1e-3, abs=1e-6)
    if form in LINEAR:
        np.testing.assert_allclose(run(merged), x @ read, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("size", [0.01, 0.5])
@pytest.mark.parametrize(
    "options",
    [(4, True), (4, False), (8, True), (8, False), (2, False)],
    ids=lambda options: f"{options[0]} bits{' symmetric' * options[1]}",
)
def test_no_block_is_stored_worse_than_onnxruntimes_quantizer_stores_it(options, size, tmp_path):
    model = named(n_bits(*options))
    change = random_change(size)
    onnx.save(model, tmp_path / "model.onnx")
    merge_adapter(tmp_path / "model.onnx", Adapter({NAME: change}), tmp_path / "merged.onnx")
    wanted = read_weight(*stored(model)) + change.a.T @ change.b
    ours, _ = errors(*stored(onnx.load(tmp_path / "merged.onnx")), wanted)
    theirs, step = errors(*stored(n_bits(*options, weight=wanted)), wanted)
    assert (ours <= theirs * 1.001 + 1e-9).all()
    assert (ours <= 32 * np.square(step) * 1.001).all()


def test_an_adapter_of_zeros_changes_no_byte(tmp_path):
    for form in QUANTIZED:
        model = named(FORMS[form](tmp_path))
        onnx.save(model, tmp_path / "model.onnx")
        merge_adapter(tmp_path / "model.onnx", Adapter({NAME: random_change(0)}), tmp_path / "merged.onnx")
        _, before = stored(model)
        ref, after = stored(onnx.load(tmp_path / "merged.onnx"))
        for name in ref.tensors.values():
            assert as_bytes(after(name)) == as_bytes(before(name)), form


PIPELINES = ["ts_llama_int4", "ts_llama_int4_asymmetric", "ts_llama_int4_qdq", "ts_bert_int8_dynamic", "dy_normed_int4"]


@pytest.mark.parametrize("name", PIPELINES)
def test_merged_after_quantizing_is_as_good_as_merged_before_up_to_one_more_rounding(name, tmp_path):
    """Two independent roundings are twice the square of one; the outputs may be twice as far off, not more."""
    built, quantize = build(CASES[name].source), QUANTIZERS[CASES[name].quantized]
    adapter = built.adapters["b"]
    merge_adapter(build(name).base_model, adapter, tmp_path / "after.onnx")
    merge_adapter(built.base_model, adapter, tmp_path / "float.onnx")
    onnx.save(quantize(tmp_path / "float.onnx", (), built.feeds), tmp_path / "before.onnx")
    truth = built.expected["b"][0]
    after, before = (distance(tmp_path / file, built.feeds, truth) for file in ("after.onnx", "before.onnx"))
    assert 0 < after < 2 * before


def distance(path, feeds, truth):
    session = ort.InferenceSession(str(path))
    got = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
    return np.sqrt(np.square(got - truth).mean())


def test_packed_bytes_in_a_data_file_are_rewritten_in_place(tmp_path, monkeypatch):
    model = named(n_bits(4, False))
    onnx.save(model, tmp_path / "inside.onnx")
    names = {"location": "weights.bin", "size_threshold": 100}
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, **names)
    adapter = Adapter({NAME: random_change(0.5)})
    merge_adapter(tmp_path / "inside.onnx", adapter, tmp_path / "one.onnx")
    small = lambda ref, nbytes: weight_rows.row_blocks(ref, nbytes, block_bytes=1000)  # noqa: E731
    monkeypatch.setattr(merged_files, "row_blocks", small)
    merge_adapter(tmp_path / "model.onnx", adapter, tmp_path / "two.onnx")
    one, two = onnx.load(tmp_path / "one.onnx"), onnx.load(tmp_path / "two.onnx")
    for (ref, tensor), (_, other) in [(stored(one), stored(two))]:
        for tensor_name in ref.tensors.values():
            np.testing.assert_array_equal(tensor(tensor_name), other(tensor_name))
    assert (tmp_path / "two.onnx.data").stat().st_size == (tmp_path / "weights.bin").stat().st_size


def test_half_scales_stay_what_they_are(tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        model = named(n_bits(4, True, dtype))
        onnx.save(model, tmp_path / "model.onnx")
        change = random_change(0.5)
        merge_adapter(tmp_path / "model.onnx", Adapter({NAME: change}), tmp_path / "merged.onnx")
        ref, tensor = stored(onnx.load(tmp_path / "merged.onnx"))
        assert tensor(ref.tensors["scale"]).dtype == dtype
        wanted = read_weight(*stored(model)) + change.a.T @ change.b
        np.testing.assert_allclose(read_weight(ref, tensor), wanted, atol=1.01 * (wanted.max() - wanted.min()) / 15)


def test_nf4_is_refused_and_so_is_undoing_a_quantized_merge(tmp_path):
    onnx.save(named(bnb4(1)), tmp_path / "model.onnx")
    with pytest.raises(MismatchError, match="its weight is in nf4, which can be read but not written"):
        merge_adapter(tmp_path / "model.onnx", Adapter({NAME: random_change(1)}), tmp_path / "merged.onnx")
    onnx.save(named(n_bits(4, True)), tmp_path / "model.onnx")
    with pytest.raises(MismatchError, match="what rounding took away cannot be undone"):
        unmerge_adapter(tmp_path / "model.onnx", Adapter({NAME: random_change(1)}), tmp_path / "merged.onnx")


def test_reordered_columns_are_refused_with_the_reason(tmp_path):
    model = named(n_bits(4, True))
    model.graph.node[0].input.extend(["", "order"])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(D_IN, np.int32), "order"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(MismatchError, match="reordered by g_idx"):
        merge_adapter(tmp_path / "model.onnx", Adapter({NAME: random_change(1)}), tmp_path / "merged.onnx")


def test_an_int32_bias_keeps_the_scale_of_its_weight(tmp_path):
    """ONNX Runtime adds such a bias to the product of codes, and takes the product of the scales for its own."""
    path = static_gemm(tmp_path)
    change = random_change(0.01)
    merge_adapter(path, Adapter({NAME: change}), tmp_path / "merged.onnx")
    before, after = stored(onnx.load(path)), stored(onnx.load(tmp_path / "merged.onnx"))
    scale = before[0].tensors["scale"]
    np.testing.assert_array_equal(after[1](scale), before[1](scale))
    wanted = read_weight(*before) + change.a.T @ change.b
    inside = np.abs(wanted) <= 127 * before[1](scale)
    step = float(before[1](scale).reshape(-1)[0])
    assert np.abs(read_weight(*after) - wanted)[inside].max() <= 0.51 * step


def static_gemm(tmp_path):
    node = helper.make_node("Gemm", ["x", f"{NAME}.weight", f"{NAME}.bias"], ["y"], name="gemm")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", D_IN])],
        [helper.make_tensor_value_info("y", 1, ["n", D_OUT])],
        [
            numpy_helper.from_array(weight, f"{NAME}.weight"),
            numpy_helper.from_array(np.ones(D_OUT, np.float32), f"{NAME}.bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "gemm.onnx")
    return quantizers.static(str(tmp_path / "gemm.onnx"), tmp_path / "static.onnx", [{"x": x}])
