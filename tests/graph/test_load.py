"""Models as they come: operators that ONNX Runtime keeps in the standard domain, subgraphs, linked files."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from adapterx.errors import ModelError
from adapterx.graph.load import check_model, load_model
from adapterx.graph.view import all_nodes
from adapterx.graph.weights import read

SCALE = numpy_helper.from_array(np.ones(4, np.float32), "scale")


def normed(op, *, opset=20, microsoft=False, operands="x, scale"):
    """One norm in the standard domain."""
    imports = f'"" : {opset}' + (', "com.microsoft" : 1' if microsoft else "")
    proto = onnx.parser.parse_model(
        f"<ir_version: 8, opset_import: [{imports}]>\n"
        f"g (float[N, 4] x) => (float[N, 4] y) {{ y = {op}<axis=-1>({operands}) }}"
    )
    proto.graph.initializer.append(SCALE)
    return proto


@pytest.mark.parametrize("microsoft", [False, True])
@pytest.mark.parametrize(("op", "opset"), [("SimplifiedLayerNormalization", 20), ("LayerNormalization", 16)])
def test_onnx_runtimes_own_norms_pass_and_nothing_of_the_argument_changes(op, opset, microsoft):
    proto = normed(op, opset=opset, microsoft=microsoft)
    before = proto.SerializeToString(deterministic=True)
    model = load_model(proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert [node.domain for node in model.graph] == [""]
    assert set(model.opset_imports) == ({"", "com.microsoft"} if microsoft else {""})


def test_what_onnx_knows_itself_is_checked_by_its_own_rules():
    load_model(normed("LayerNormalization", opset=17))
    with pytest.raises(ModelError, match=r"LayerNormalization.* has input size 1"):
        load_model(normed("LayerNormalization", opset=17, operands="x"))


def test_a_norm_inside_a_subgraph_passes_too():
    inner = normed("SimplifiedLayerNormalization").graph
    names = {"x": "x", "scale": "scale", "y": "z"}
    branches = []
    for name in ("then_branch", "else_branch"):
        node = onnx.NodeProto.FromString(inner.node[0].SerializeToString())
        node.output[0] = names["y"]
        out = onnx.helper.make_tensor_value_info("z", 1, ["N", 4])
        branches.append((name, onnx.helper.make_graph([node], name, [], [out])))
    proto = normed("SimplifiedLayerNormalization")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], **dict(branches)))
    nodes = [node.op_type for node in all_nodes(load_model(proto))]
    assert nodes == ["If", "SimplifiedLayerNormalization", "SimplifiedLayerNormalization"]


def test_a_proto_without_a_graph_is_refused():
    with pytest.raises(ModelError, match=r"the model cannot be read as an ONNX model .*no graph"):
        load_model(onnx.ModelProto(ir_version=8))


def test_a_model_that_we_made_is_checked_whatever_its_size():
    model = load_model(normed("LayerNormalization"))
    next(iter(model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="what we made is not a valid ONNX model"):
        check_model(model, "what we made")


def test_tensors_in_linked_files_read_the_file_behind_the_link_even_where_onnx_ir_reads_them(tmp_path):
    """onnx_ir refuses links, and elements of half a byte are read by it alone."""
    packed = ir.tensor(np.arange(8).reshape(2, 4).astype(ml_dtypes.uint4), name="w")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "hash").write_bytes(packed.tobytes())
    for name in ("w.bin", "model.onnx"):
        (snapshot / name).symlink_to(blobs / ("hash" if name == "w.bin" else name))
    stored = ir.ExternalTensor("w.bin", 0, 4, packed.dtype, shape=packed.shape, name="w", base_dir=snapshot)
    value = ir.Value(name="w", const_value=stored)
    out = ir.node("Identity", [value])
    out.outputs[0].name = "y"
    out.outputs[0].type, out.outputs[0].shape = ir.TensorType(ir.DataType.UINT4), packed.shape
    graph = ir.Graph([], out.outputs, nodes=[out], initializers=[value], name="g", opset_imports={"": 21})
    (blobs / "model.onnx").write_bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    loaded = load_model(snapshot / "model.onnx").graph.initializers["w"].const_value
    np.testing.assert_array_equal(read(loaded), packed.numpy())
