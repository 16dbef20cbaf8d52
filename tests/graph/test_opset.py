"""An opset is raised where the operators mean the same, and refused where they do not."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from adapterx.errors import ModelError
from adapterx.graph.load import check_model, load_model
from adapterx.graph.opset import raise_opset
from tests.graph.base_models import floats
from tests.graph.merging import run


def at(opset, body, inputs="float[n,8] x"):
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]>\ng ({inputs}) => (float[a,b] y) {{\n{body}\n}}'
    )


SAME = {
    "reductions": "m = ReduceMean<axes=[1], keepdims=1>(x)\ny = Sub(x, m)",
    "split_features": "p, q = Split<axis=1>(x)\ny = Concat<axis=1>(q, p)",
    "split_rows": "p, q = Split<axis=0>(x)\ny = Concat<axis=0>(q, p)",
    "layer": "h = Softmax<axis=1>(x)\nc = Cast<to=1>(h)\ny = Identity(c)",
}


@pytest.mark.parametrize("name", SAME)
def test_a_model_computes_the_same_afterwards(name, tmp_path):
    proto = at(14, SAME[name])
    model = load_model(proto)
    raise_opset(model, 21, where="it")
    assert model.opset_imports[""] == 21
    check_model(model, "it")
    onnx.save(proto, tmp_path / "old.onnx")
    onnx.save(ir.to_proto(model), tmp_path / "new.onnx")
    for rows in (4, 0) if name == "split_rows" else (4,):
        feeds = {"x": floats(rows, 8)}
        np.testing.assert_array_equal(run(tmp_path / "new.onnx", feeds)[0], run(tmp_path / "old.onnx", feeds)[0])


def test_a_later_opset_is_left_alone():
    model = load_model(at(22, "y = Relu(x)"))
    raise_opset(model, 21, where="it")
    assert model.opset_imports[""] == 22


@pytest.mark.parametrize(
    ("opset", "body", "named"),
    [
        (17, "g = GridSample(z, s)\nf = Flatten<axis=1>(g)\ny = Add(x, f)", "GridSample"),
        (11, "y = Softmax<axis=1>(x)", "operators|Softmax"),
    ],
)
def test_another_meaning_is_refused_by_name(opset, body, named):
    inputs = "float[n,8] x, float[n,2,2,2] z, float[n,2,2,2] s" if "s)" in body else "float[n,8] x"
    model = load_model(at(opset, body, inputs))
    with pytest.raises(ModelError, match=f"opset {opset}.*({named}).*format='matmulnbits'"):
        raise_opset(model, 21, where="it")
    assert model.opset_imports[""] == opset
