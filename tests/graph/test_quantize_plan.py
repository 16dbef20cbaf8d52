"""Which layers are quantized, by whose word, and where the weights of large models go."""

import re

import numpy as np
import onnx
import pytest

from adapterx.errors import ModelError, OptionError
from adapterx.graph.base_methods import RTN, DynamicInt8, StaticInt8, block_in_graph, method_named
from adapterx.graph.quantize import quantize_base
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import floats, proto, two_layers
from tests.graph.merging import external, initializers, ported, run
from tests.zoo import build


def storage(done):
    return {row.module: row.storage.split()[0] for row in done.rows}


def test_exceptions_are_meant_by_operator_by_name_and_by_expression_and_the_last_name_wins(tmp_path):
    built = build("ts_llama")
    layers = {"MatMul": RTN(bits=8), "mlp.down_proj": RTN(bits=2), re.compile(r".*\.1\.mlp\..*"): None}
    found = storage(quantize_base(built.base_model, tmp_path / "q.onnx", layers=layers))
    assert found["model.layers.0.mlp.down_proj"] == "int2"
    assert found["model.layers.0.mlp.up_proj"] == found["lm_head"] == "int8"
    assert not any("layers.1.mlp" in name for name in found)
    assert len(found) == 12


def test_the_head_and_embeddings_are_quantized_when_asked_for(tmp_path):
    built = build("ts_llama")
    done = quantize_base(built.base_model, tmp_path / "q.onnx", method=RTN(bits=8), head=True, embeddings=True)
    assert {"lm_head", "model.embed_tokens"} <= storage(done).keys()
    assert not done.floats
    for got, want in zip(run(tmp_path / "q.onnx", built.feeds), built.expected["base"], strict=True):
        assert 0 < np.abs(got - want).max() < 0.15


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ({"fc3": None}, "'fc3'; nearest is fc"),
        ({re.compile("nothing"): RTN()}, "regular expression 'nothing'"),
        ({"Conv": RTN()}, r"no module"),
    ],
)
def test_an_exception_that_means_nothing_is_refused(layers, match, tmp_path):
    with pytest.raises(ModelError, match=match):
        quantize_base(two_layers(), tmp_path / "q.onnx", layers=layers)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_was_asked_for_and_cannot_be_is_an_error_not_a_row(tmp_path):
    names = {"w": "model.conv.weight", "v": "model.fc.weight"}
    tensors = {"w": floats(4, 3, 1, 1), "v": floats(5, 7)}
    model = proto("a = Conv(x, w)\ny = MatMul(a, v)", tensors, inputs="float[n,3,5,5] x", names=names)
    assert quantize_base(model, tmp_path / "q.onnx").floats[0].reason.startswith("a convolution")
    with pytest.raises(ModelError, match=r"model\.conv \(Conv\): a convolution"):
        quantize_base(model, tmp_path / "q.onnx", layers={"conv": RTN()})


def test_what_is_no_linear_layer_is_told(tmp_path):
    body = "a = MatMul(x, w)\ny = MatMul(a, v)"
    done = quantize_base(
        proto(body, {"w": floats(32, 24), "v": floats(3, 24, 4)}, inputs="float[3,t,32] x"), tmp_path / "q"
    )
    assert [row.reason for row in done.floats] == ["its constant (3, 24, 4) is no weight of a linear layer"]


def test_branches_share_weights_and_dynamic_ranges_are_made_in_each(tmp_path):
    branch = "{{ {y} = MatMul(x, w) }}"
    body = (
        f"z = MatMul(x, w)\nc = If(k) <then_branch = t () => (float[n,24] a) {branch.format(y='a')}, "
        f"else_branch = e () => (float[n,24] b) {branch.format(y='b')}>\ny = Concat<axis=1>(z, c)"
    )
    model = proto(body, {"w": floats(32, 24)}, inputs="float[n,32] x, bool k", outputs="float[n,m] y")
    for method in (RTN(bits=8, accuracy_level=0), DynamicInt8()):
        done = quantize_base(model, tmp_path / "q.onnx", method=method)
        assert len(done.rows) == 1
        onnx.save(model, tmp_path / "float.onnx")
        feeds = {"x": floats(4, 32), "k": np.array(True)}
        got, want = run(tmp_path / "q.onnx", feeds)[0], run(tmp_path / "float.onnx", feeds)[0]
        assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()
    static = quantize_base(model, tmp_path / "q.onnx", method=StaticInt8(), calibration=[feeds])
    assert {row.reason for row in static.floats} == {
        "it lies in a branch or a loop, where activations cannot be measured"
    }


@pytest.mark.parametrize("one_file", [True, False])
def test_weights_in_data_files_go_to_one_that_is_smaller_and_the_source_stays(one_file, tmp_path):
    built = build("ts_llama")
    (tmp_path / "in").mkdir()
    source = external(tmp_path / "in" / "m.onnx", built.base_model, one_file=one_file)
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    quantize_base(source, tmp_path / "in" / "q.onnx", method=RTN(accuracy_level=0))
    quantize_base(built.base_model, tmp_path / "inline.onnx", method=RTN(accuracy_level=0))
    assert {path: path.read_bytes() for path in before} == before
    written = {path.name for path in (tmp_path / "in").iterdir()} - {path.name for path in before}
    assert written == {"q.onnx", "q.onnx.data"}
    data = sum(len(raw) for path, raw in before.items() if path.suffix != ".onnx")
    assert (tmp_path / "in" / "q.onnx.data").stat().st_size < 0.6 * data
    ours, inline = initializers(tmp_path / "in" / "q.onnx"), initializers(tmp_path / "inline.onnx")
    assert ours.keys() == inline.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, inline[name])


def test_ports_that_are_external_keep_their_place(tmp_path):
    built = build("ts_llama")
    model = ported("ts_llama", tmp_path / "x", make_inputs=False)
    quantize_base(model, tmp_path / "q" / "q.onnx", method=RTN(bits=8, accuracy_level=0))
    assert {path.name for path in (tmp_path / "q").iterdir()} == {"q.onnx", "q.onnx.data"}
    session = AdapterSession(tmp_path / "q" / "q.onnx", adapters={"c": built.adapters["c"]})
    for got, want in zip(session.run(None, built.feeds, adapter="c"), built.expected["c"], strict=True):
        assert 0 < np.abs(got - want).max() < 0.15


def test_a_float_layer_keeps_every_bit(tmp_path):
    built = build("dy_llama")
    quantize_base(built.base_model, tmp_path / "q.onnx", layers={"o_proj": None})
    before, after = initializers(built.base_model), initializers(tmp_path / "q.onnx")
    kept = before.keys() & after.keys()
    assert sum(before[name].size > 1000 for name in kept) == 4  # two o_proj, the embedding, the head
    for name in kept:
        np.testing.assert_array_equal(before[name], after[name])


# -- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("rtm", {}, "nearest is rtn"),
        ("rtn", {"bits": 3}, "2, 4 and 8 bits"),
        ("rtn", {"block_size": 40}, "multiple of 16"),
        ("rtn", {"accuracy_level": 5}, "accuracy_level=5"),
        ("rtn", {"format": "qqd"}, "nearest is qdq"),
        ("rtn", {"bits": 2, "format": "qdq"}, "opset 25"),
        ("hqq", {"symmetric": True}, "has no option symmetric"),
        ("nf4", {"block_size": 48}, "16, 32, 64, 128, 256"),
        ("static", {"bits": 4}, "it takes none"),
    ],
)
def test_what_no_kernel_runs_is_refused_before_anything_is_read(name, options, match):
    with pytest.raises(OptionError, match=match):
        method_named(name, **options)


def test_an_embedding_of_two_bits_is_refused(tmp_path):
    model = proto("e = Gather(w, i)\ny = MatMul(e, v)", {"w": floats(9, 32), "v": floats(32, 8)}, inputs="int64[n,t] i")
    with pytest.raises(OptionError, match="an embedding takes 4 or 8 bits"):
        quantize_base(model, tmp_path / "q.onnx", method=RTN(bits=2), embeddings=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("group", "width", "block"), [(32, 100, 32), (48, 96, 16), (-1, 4096, 256), (-1, 20, 32), (96, 96, 32)]
)
def test_a_group_is_written_in_blocks_that_divide_it_or_hold_the_row(group, width, block):
    assert block_in_graph(group, width) == block
