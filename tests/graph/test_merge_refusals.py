"""What cannot be merged is refused with the reason, before anything is written."""

import math

import numpy as np
import onnx
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError, ModelError, OptionError
from adapterx.formats import load_adapter
from adapterx.graph.extract import extract_adapters
from adapterx.graph.inject import inject_adapters
from adapterx.graph.merge import merge_adapter
from adapterx.runtime.session import AdapterSession
from tests.graph import base_models
from tests.graph.base_models import C, W, floats
from tests.graph.merging import assert_outputs, ported, run
from tests.zoo import build


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def change(d_in, d_out, rank=1):
    return LowRank(a=np.ones((rank, d_in), np.float32), b=np.ones((rank, d_out), np.float32))


def test_every_fault_is_told_before_anything_is_written(tmp_path):
    built = build("ts_mlp")
    adapter = Adapter({"fc1": change(99, 56), "fc3": change(56, 24), "head": change(24, 10)})
    with pytest.raises(MismatchError) as caught:
        merge_adapter(built.base_model, adapter, tmp_path / "merged.onnx")
    told = str(caught.value)
    assert "cannot be merged at 2 of 3 sites" in told
    assert "fc1: the adapter is (99,) -> 56, the weight is 40 -> 56" in told
    assert "fc3: the model has no such module; nearest is fc" in told
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_still_holds_an_adapter_is_refused(tmp_path):
    built = build("ts_mlp")
    with pytest.raises(ModelError, match="still holds an adapter, at 3 sites; take it out with extract_adapters"):
        merge_adapter(built.model, built.adapters["b"], tmp_path / "merged.onnx")


def test_what_no_weight_can_hold_is_refused(tmp_path):
    plain = build("dy_plain").model
    with pytest.raises(MismatchError, match="a prompt stands beside the weights"):
        merge_adapter(plain, build("ts_prompt").adapters["b"], tmp_path / "merged.onnx")
    built = build("ts_conv1d")
    with pytest.raises(MismatchError, match="conv2: a convolution in 2 groups"):
        merge_adapter(built.base_model, built.adapters["b"], tmp_path / "merged.onnx")


def test_a_base_that_is_not_in_the_graph_has_to_come_from_the_adapter(tmp_path):
    """The classifier was trained in full: the extracted model has zeros there."""
    built, model = build("ts_saved"), ported("ts_saved", tmp_path / "ported")
    whole = load_adapter(built.adapters["b"])
    without = Adapter({site: one for site, one in whole.sites.items() if site != "classifier"})
    with pytest.raises(MismatchError, match="the model has no base at classifier"):
        merge_adapter(model, without, tmp_path / "merged.onnx")
    merge_adapter(model, whole, tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["b"], 1e-4)


def test_options_and_targets_that_cannot_be_are_refused(tmp_path):
    built = build("ts_mlp")
    with pytest.raises(OptionError, match="weight=nan"):
        merge_adapter(built.base_model, built.adapters["b"], tmp_path / "merged.onnx", weight=float("nan"))
    with pytest.raises(ModelError, match="is the model itself"):
        merge_adapter(built.base_model, built.adapters["b"], built.base_model)


def test_numbers_beyond_float16_are_refused(tmp_path):
    built, model = build("ts_llama_half"), ported("ts_llama_half", tmp_path / "ported")
    name = load_adapter(built.adapters["b"]).sites.keys().__iter__().__next__()
    d_in, d_out = (
        load_adapter(built.adapters["b"]).sites[name].a.shape[1],
        load_adapter(built.adapters["b"]).sites[name].d_out,
    )
    huge = LowRank(a=np.full((1, d_in), 300, np.float32), b=np.full((1, d_out), 300, np.float32))
    with pytest.raises(ModelError, match="beyond float16"):
        merge_adapter(model, Adapter({name: huge}), tmp_path / "merged.onnx")
    assert not (tmp_path / "merged.onnx").exists()


LATER = {
    "BiasGelu": "y = com.microsoft.BiasGelu(m, c)",
    "SkipLayerNormalization": "y = com.microsoft.SkipLayerNormalization(r, m, g, g, c)",
    "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention<num_heads=2>(m, m, m, c3)",
}


@pytest.mark.parametrize("operator", LATER)
@pytest.mark.parametrize("part", ["gain", "whole_bias"])
def test_a_bias_that_a_later_operation_adds_cannot_be_changed(operator, part, tmp_path):
    body = f"m = MatMul(x, w)\nr = MatMul(x, v)\n{LATER[operator]}"
    tensors = {"w": W, "v": W, "c": C, "g": C, "c3": np.tile(C, 3)}
    model = base_models.proto(body, tensors, outputs="float[n,t,24] y", names={"w": "fc.weight", "v": "other.weight"})
    one = LowRank(a=np.zeros((0, 32), np.float32), b=np.zeros((0, 24), np.float32), parts={part: C[None]})
    with pytest.raises(MismatchError, match="fc: it changes the bias, which an optimizer made part of"):
        merge_adapter(model, Adapter({"fc": one}), tmp_path / "merged.onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MismatchError, match="fc: an optimizer moved its bias"):
        inject_adapters(model, tmp_path / "out", adapter=Adapter({"fc": one}))


def test_dora_leaves_a_bias_that_a_later_operation_adds(tmp_path):
    model = base_models.proto("m = MatMul(x, w)\ny = com.microsoft.BiasGelu(m, c)", {"w": W, "c": C},
                              outputs="float[n,t,24] y", names={"w": "fc.weight"})  # fmt: skip
    one = LowRank(a=floats(2, 32), b=floats(2, 24), parts={"magnitude": 1 + floats(1, 24) ** 2})
    merge_adapter(model, Adapter({"fc": one}), tmp_path / "merged.onnx")
    whole = W.T + one.b.T @ one.a
    x, want = floats(2, 3, 32), one.parts["magnitude"].T * whole / np.linalg.norm(whole, axis=1, keepdims=True)
    merged = onnx.load(tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", {"x": x}), [gelu(x @ want.T + C)], 1e-3)
    assert [tensor.name for tensor in merged.graph.initializer] == ["fc.weight", "c"]


@pytest.mark.parametrize("partial", [False, True])
def test_a_module_with_a_normalization_folded_in_is_refused_by_its_name(partial, tmp_path):
    names = {"w": "fc.weight", "c": "fc.bias", "v": "head.weight"}
    body = "getitem = Gemm(x, w, c)\nh = Relu(getitem)\ny = Gemm(h, v)"
    tensors = {"w": W, "c": C, "v": floats(24, 5)}
    model = base_models.proto(body, tensors, inputs="float[n,32] x", outputs="float[n,5] y", names=names)
    adapter = Adapter({"fc": change(32, 24), "head": change(24, 5)})
    with pytest.raises(MismatchError, match="fc: the module has a normalization folded"):
        merge_adapter(model, adapter, tmp_path / "merged.onnx", partial=partial)
    with pytest.raises(MismatchError, match="fc: the module has a normalization folded"):
        inject_adapters(model, tmp_path / "out", adapter=adapter, partial=partial)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "site", "widths", "said"),
    [
        ("ts_saved", "classifier", (48, 3), "classifier: adapter brings no whole_weight and no whole_bias"),
        ("ts_bias", "fc1", (40, 56), "fc1: adapter brings no whole_bias"),
    ],
)
@pytest.mark.parametrize("part", [{}, {"shift": 1.0}])
def test_what_a_trainer_wrote_for_a_base_that_is_not_there_is_refused(name, site, widths, said, part, tmp_path):
    """The extracted model has zeros in place of what was trained in full: LoRA beside them would be all there is."""
    built = build(name)
    out = extract_adapters(built.model, tmp_path / "out", make_inputs=True, adapter=built.adapters["a"])
    whole = load_adapter(built.adapters["b"])
    parts = {port: np.full((1, widths[1]), value, np.float32) for port, value in part.items()}
    beside = LowRank(a=change(*widths).a, b=change(*widths).b, parts=parts)
    other = Adapter({**whole.sites, site: beside}, whole.metadata)
    assert other.metadata["format"] == "peft"
    for keep_ports in (False, True):
        with pytest.raises(MismatchError, match=said):
            merge_adapter(out.model_path, other, tmp_path / "merged.onnx", keep_ports=keep_ports)
    with pytest.raises(MismatchError, match=said):
        AdapterSession(out.model_path, adapters={"other": other})
    # What was fitted to this model says how to come from those zeros.
    session = AdapterSession(out.model_path, adapters={"own": out.adapter})
    assert_outputs(session.run(None, built.feeds, adapter="own"), built.expected["a"], 1e-4)
    merge_adapter(out.model_path, out.adapter, tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["a"], 1e-4)
