"""Every base operation, however it is written: what it reads and gives, and which module it is."""

from __future__ import annotations

import numpy as np
import pytest

from adapterx.graph.base_names import REWRITTEN_BY
from adapterx.graph.bases import find_bases
from adapterx.graph.extract import extract_adapters
from adapterx.graph.inject import inject_adapters
from adapterx.graph.load import load_model
from tests.graph.base_models import (
    CONVOLUTIONS,
    D_IN,
    D_OUT,
    EMBEDDINGS,
    FLOATS,
    GEMMS,
    IDS,
    LINEARS,
    PICTURES,
    ROWS,
    VOCABULARY,
    C,
    W,
    floats,
    model,
    proto,
)
from tests.zoo import CASES, build

WITH_BASE = [name for name, case in CASES.items() if case.with_base]


def only_base(*args, **options):
    [base] = find_bases(model(*args, **options))
    return base


def names(*args, **options):
    return [base.name for base in find_bases(model(*args, **options))]


@pytest.mark.parametrize(
    ("form", "inputs"), [*((form, FLOATS) for form in LINEARS.values()), *((form, ROWS) for form in GEMMS.values())]
)
def test_a_linear_layer_is_found_in_every_form(form, inputs):
    body, tensors, op_type, bias = form
    base = only_base(body, tensors, inputs=inputs)
    assert (base.kind, base.op.op_type, base.d_in, base.d_out) == ("linear", op_type, D_IN, D_OUT)
    assert (base.x.name, base.output.name, base.dtype) == ("x", "y", "float32")
    assert (None if base.bias is None else base.bias.name) == bias
    assert base.weight.d_in == D_IN
    assert base.weight.d_out == D_OUT
    assert base.pure


@pytest.mark.parametrize("form", CONVOLUTIONS.values())
def test_a_convolution_is_found_with_its_kernel(form):
    body, tensors, bias = form
    base = only_base(body, tensors, inputs=PICTURES)
    assert (base.kind, base.d_in, base.d_out, base.kernel) == ("conv", 6, D_OUT, (3, 3))
    assert (base.x.name, base.output.name, base.bias.name) == ("x", "y", bias)


def test_a_convolution_in_groups_reads_all_channels():
    base = only_base("y = Conv<group=2>(x, w)", {"w": floats(D_OUT, 3, 1, 1)}, inputs=PICTURES)
    assert (base.d_in, base.d_out, base.kernel) == (6, D_OUT, (1, 1))


@pytest.mark.parametrize("form", EMBEDDINGS.values())
def test_an_embedding_reads_ids_and_gives_floats(form):
    body, tensors, op_type = form
    base = only_base(body, tensors, inputs=IDS)
    assert (base.kind, base.op.op_type, base.d_in, base.d_out) == ("embedding", op_type, VOCABULARY, D_OUT)
    assert (base.x.name, base.output.name, base.dtype) == ("x", "y", "float32")


def test_the_dtype_is_that_of_the_activations():
    tensors = {"w": W.astype(np.float16)}
    assert only_base("y = MatMul(x, w)", tensors, inputs="float16[n,t,32] x", outputs="float16 y").dtype == "float16"


@pytest.mark.parametrize(
    ("body", "tensors", "output"),
    [
        # A sum that others read without the vector, a vector of another width, a scalar, one for each token.
        ("m = MatMul(x, w)\na = Add(m, c)\ny = Mul(a, m)", {"c": C}, "m"),
        ("m = MatMul(x, w)\ny = Add(m, c)", {"c": np.float32(1)}, "m"),
        ("m = MatMul(x, w)\ny = Add(m, c)", {"c": floats(D_OUT, 1)}, "m"),
        ("m = MatMul(x, w)\ny = Add(m, m)", {}, "m"),
        ("m = MatMul(x, w)\ny = Mul(m, c)", {"c": C}, "m"),
    ],
)
def test_what_is_no_bias_is_not_taken_for_one(body, tensors, output):
    base = only_base(body, {"w": W, **tensors})
    assert base.bias is None
    assert base.output.name == output


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ("y = MatMul(w, x)", {"w": floats(5, 9)}),
        ("y = MatMul(x, x2)", {}),
        ("k = Identity(w)\ny = MatMul(k, v)", {"w": W, "v": floats(D_OUT, 3)}),
        ("y = MatMul(x, w)", {"w": floats(2, D_IN, D_OUT)}),
        ("y = com.microsoft.FusedMatMul<transA=1>(x, w)", {"w": W}),
        ("y = Gather(w, i)", {"w": W, "i": np.array([1])}),
        ("j = Cast<to=7>(x)\ny = Gather<axis=1>(w, j)", {"w": W}),
    ],
)
def test_what_no_adapter_can_act_on_is_left_out(body, tensors):
    assert find_bases(model(body, tensors, inputs=f"{FLOATS}, float[n,32,7] x2")) == []


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ('y = com.microsoft.FusedGemm<activation="Relu">(x, w, c)', {"c": C}),
        ("y = Gemm(x, w, x2)", {}),
        ("y = Gemm<beta=2.0>(x, w, c)", {"c": C}),
    ],
)
def test_a_fused_operation_says_that_it_gives_more_than_the_product(body, tensors):
    assert not only_base(body, {"w": W, **tensors}, inputs=f"{ROWS}, float[n,24] x2").pure


def test_rows_that_were_flattened_and_folded_back_are_seen_as_they_were():
    body = """
        r = Reshape(x, flat)
        m = Gemm(r, w, c)
        s = Shape(x)
        n = Gather(s, zero)
        t = Gather(s, one)
        n1 = Unsqueeze(n, axes)
        t1 = Unsqueeze(t, axes)
        f = Concat<axis=0>(n1, t1, width)
        y = Reshape(m, f)"""
    numbers = {"flat": np.array([-1, D_IN]), "zero": np.int64(0), "one": np.int64(1), "axes": np.array([0])}
    base = only_base(body, {"w": W, "c": C, **numbers, "width": np.array([D_OUT])})
    assert (base.x.name, base.output.name) == ("x", "y")
    other = only_base(body, {"w": W, "c": C, **numbers, "width": np.array([-1])})
    assert (other.x.name, other.output.name) == ("r", "m")


# -- Names ------------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
PATH = "/model/layers.0/self_attn/q_proj"
SCOPES = ["", "model", "model.layers.0", "model.layers.0.self_attn", Q, "linear"]
# One weight that kept its name shows where the module tree begins.
NORM = {"g": floats(D_OUT)}
NORMS_NAME = {"g": "model.layers.0.input_layernorm.weight"}


@pytest.mark.parametrize(
    ("body", "named", "scopes"),
    [
        ("y = MatMul(x, w)", {"w": f"{Q}.weight"}, {}),
        ("y = MatMul(x, w)", {"w": f"m.base_model.model.{Q}.base_layer.weight"}, {}),
        ("y = MatMul(x, w)", {"w": f"{Q}.MatMul.weight"}, {}),
        ("y = MatMul(x, w)", {"w": f"{Q}.weight_quantized"}, {}),
        ("y = MatMul(x, w)", {"w": f"{Q}.weight_merged_0"}, {}),
        ("y = MatMul(x, w)", {"y": f"{PATH}/MatMul"}, {}),
        ("y = MatMul(x, w)", {"y": f"{PATH}/MatMul_matmul_Q4"}, {}),
        ("y = MatMul(x, w)", {"y": f"{PATH}/Gemm_MatMul_quant"}, {}),
        ("y = MatMul(x, w)", {"y": f"{PATH}/MatMul/MatmulTransposeFusion//MatMulScaleFusion/"}, {}),
        ("y = MatMul(x, w)", {"y": f"fused {PATH}/Gemm"}, {}),
        ("y = MatMul(x, w)", {"y": f"{PATH}/base_layer/MatMul"}, {}),
        ("y = MatMul(x, w)", {}, {"y": SCOPES}),
        ("y = MatMul(x, w)", {}, {"y": [*SCOPES[:-1], f"{Q}.base_layer", "linear"]}),
        ("m = MatMul(x, w)\ny = Add(m, c)", {"c": f"{Q}.bias"}, {}),
        ("m = MatMul(x, w)\ny = com.microsoft.BiasGelu(m, c)", {"c": f"{Q}.bias"}, {}),
        # A weight's name says more than the path of a function that is called inside another module.
        ("y = MatMul(x, w)", {"w": f"{Q}.weight", "y": "/model/layers.0/self_attn/MatMul"}, {}),
    ],
)
def test_the_module_is_told_by_any_one_source(body, named, scopes):
    tensors = {"w": W, "c": C} if "c" in named else {"w": W}
    assert names(body, {**tensors, **NORM}, names={**named, **NORMS_NAME}, scopes=scopes) == [Q]


@pytest.mark.parametrize(
    ("named", "scopes"),
    [
        ({}, {}),
        ({"w": "onnx::MatMul_7", "y": "node_linear_3"}, {}),
        ({"y": "MatMul_12"}, {}),
        ({}, {"y": ["", "linear"]}),
        ({}, {"y": ["", "_empty_nn_module_stack_from_metadata_hook", "linear"]}),
        # Two sources that contradict each other.
        ({"w": f"{Q}.weight", "y": "/model/layers.0/self_attn/v_proj/MatMul"}, {}),
    ],
)
def test_an_operation_that_nothing_names_has_no_name(named, scopes):
    assert names("y = MatMul(x, w)", {"w": W}, names=named, scopes=scopes) == [""]


def test_an_embedding_and_an_output_head_that_share_a_weight_are_two_modules():
    body = "e = Gather(w, i)\nv = Transpose<perm=[1,0]>(w)\ny = MatMul(e, v)"
    table = {"w": floats(VOCABULARY, D_OUT)}
    ids = "int64[n,t] i"
    paths = {"e": "/model/embed_tokens/Gather", "y": "/lm_head/MatMul"}
    both = ["model.embed_tokens", "lm_head"]
    for weight in ("model.embed_tokens.weight", "lm_head.weight", "onnx::MatMul_3"):
        assert names(body, table, inputs=ids, names={"w": weight, **paths}) == both
    # Without paths the weight's name belongs to one of them.
    assert names(body, table, inputs=ids, names={"w": "model.embed_tokens.weight"}) == [both[0], ""]
    assert names(body, table, inputs=ids, names={"w": "lm_head.weight"}) == ["", both[1]]


def test_a_module_that_is_called_twice_has_two_operations_of_one_name():
    body = "a = MatMul(x, w)\nb = Identity(w)\ny = MatMul(a, b)"
    square = {"w": floats(D_IN, D_IN)}
    paths = {"a": "/m/block/MatMul", "y": "/m/block_1/MatMul"}
    assert names(body, square, names=paths) == ["block", "block"]
    # An nn.Sequential numbers its children, not itself.
    children = {"a": "/m/net/net.0/MatMul", "b": "/m/act/Identity", "y": "/m/net/net.0_1/MatMul"}
    assert names(body, square, names=children) == ["net.0", "net.0"]
    # Two modules of such names, with weights of their own, are two.
    body = "a = MatMul(x, w)\ny = MatMul(a, v)"
    assert names(body, {**square, "v": floats(D_IN, D_IN)}, names=paths) == ["block", "block_1"]


def test_equal_weights_that_an_exporter_merged_do_not_merge_their_modules():
    body = "a = MatMul(x, w)\ny = MatMul(a, w)"
    named = {"w": "fc1.weight", "a": "/fc1/MatMul", "y": "/fc2/MatMul"}
    assert names(body, {"w": floats(D_IN, D_IN)}, names=named) == ["fc1", "fc2"]


def test_what_a_path_leaves_out_before_a_module_the_name_of_its_bias_has():
    """TorchScript's paths lead through a ModuleDict without naming it."""
    body, named = "m = MatMul(x, w)\ny = Add(m, c)", {"c": "m.parts.left.bias", "m": "/m/left/MatMul"}
    around = {"g": floats(3)}, {"g": "m.norm.weight"}
    assert names(body, {"w": W, "c": C, **around[0]}, names={**named, **around[1]}) == ["parts.left"]


def test_functions_inside_one_module_are_not_that_module():
    body = "a = MatMul(x, w)\ny = MatMul(a, v)"
    tensors = {"w": floats(D_IN, D_IN), "v": 2 * floats(D_IN, D_IN)}
    paths = {"a": "/model/experts/MatMul", "y": "/model/experts/MatMul_1"}
    assert names(body, tensors, names=paths) == ["", ""]
    assert names(body, tensors, names={**paths, "w": "model.experts.weight"}) == ["model.experts", ""]


def test_factors_of_adapters_that_the_graph_holds_are_no_bases():
    body = "b = MatMul(x, w)\nl = MatMul(x, a)\nd = MatMul(l, v)\ny = Add(b, d)"
    tensors = {"w": W, "a": floats(D_IN, 4), "v": floats(4, D_OUT)}
    named = {"w": f"{Q}.weight", "a": f"{Q}.lora_A.default.weight", "v": f"{Q}.lora_B.default.weight"}
    assert names(body, tensors, names=named) == [Q]
    # A bottleneck that the model has by itself is three linear layers.
    assert names(body, tensors, names={"w": "fc.weight", "a": "down.weight", "v": "up.weight"}) == ["fc", "down", "up"]


RULE = "FuseBatchNormIntoConv, RemoveOptionalBiasFromConv"


@pytest.mark.parametrize(
    ("named", "rule"),
    [
        # TorchScript folds both into new tensors, dynamo keeps the weight's name, ONNX Runtime puts words before it.
        ({"w": "onnx::Conv_47", "c": "onnx::Conv_48", "y": "/stem/conv/Conv"}, ""),
        ({"w": "stem.conv.weight", "c": "stem.conv.weight_bias"}, ""),
        ({"w": "stem.conv.weight", "c": "stem.conv.bias"}, RULE),
        ({"w": "ConvBnFusion_W_stem.conv.weight", "c": "ConvBnFusion_BN_B_stem.bn.bias"}, ""),
    ],
)
def test_a_weight_with_a_normalization_folded_in_is_no_longer_its_modules(named, rule):
    tensors = {"w": floats(D_OUT, 6, 3, 3), "c": C, "g": floats(3), "h": floats(3)}
    around = {"g": "stem.bn2.weight", "h": "fc.weight"}
    body = "y = Conv(x, w, c)\nz = Relu(y)"
    loaded = model(body, tensors, inputs=PICTURES, outputs="float z", names={**named, **around, "z": "/act/Relu"})
    node, _ = loaded.graph
    node.metadata_props[REWRITTEN_BY] = rule
    [base] = find_bases(loaded)
    assert (base.name, base.folded) == ("", "stem.conv")


@pytest.mark.parametrize(
    "named",
    [
        {"w": "stem.conv.weight", "c": "stem.conv.bias"},
        {"w": "onnx::Conv_47", "c": "stem.conv.bias", "y": "/stem/conv/Conv"},
        {"w": "stem.conv.weight_quantized", "c": "stem.conv.bias_quantized"},
    ],
)
def test_a_weight_that_was_only_turned_cast_or_quantized_still_is(named):
    around = {"g": "stem.bn2.weight", "h": "fc.weight"}
    tensors = {"w": floats(D_OUT, 6, 3, 3), "c": C, "g": floats(3), "h": floats(3)}
    base = only_base("y = Conv(x, w, c)", tensors, inputs=PICTURES, names={**named, **around})
    assert (base.name, base.folded) == ("stem.conv", "")


def test_what_a_normalizations_result_is_called_tells_where_metadata_is_deleted():
    named = {"w": "stem.weight", "c": "stem.bias", "g": "head.weight"}
    body = "getitem_3 = Gemm(x, w, c)\nh = Relu(getitem_3)\ny = Gemm(h, g)"
    tensors = {"w": W, "c": C, "g": floats(D_OUT, 5)}
    first, second = find_bases(model(body, tensors, inputs="float[n,32] x", names=named))
    assert (first.name, first.folded, second.name) == ("", "stem", "head")


def test_of_layers_that_follow_each_other_directly_each_is_told_by_ports_of_its_own(tmp_path):
    body = "e = Gather(t, i)\nh = MatMul(e, w)\ny = MatMul(h, v)"
    tensors = {"t": floats(VOCABULARY, D_IN), "w": W, "v": floats(D_OUT, 7)}
    named = {"t": "embed.weight", "w": "fc1.weight", "v": "fc2.weight"}
    made = proto(body, tensors, inputs="int64[n,k] i", outputs="float[n,k,7] y", names=named)
    out = inject_adapters(made, tmp_path, targets=["fc1", "fc2"], kinds=["lora", "ia3"])
    loaded = load_model(out.model_path)
    assert [base.name for base in find_bases(loaded)] == ["embed", "fc1", "fc2"]
    for old in named.values():
        loaded.graph.initializers[old].name = f"anonymous.{old[:-7]}"
    assert [base.name for base in find_bases(loaded)] == ["", "fc1", "fc2"]


def test_in_a_model_of_ours_the_ports_tell_the_names(tmp_path):
    """Also those that only the exported adapter could tell."""
    built = build("dy_llama_stripped")
    out = extract_adapters(built.model, tmp_path, make_inputs=True, adapter=built.adapters["a"])
    bases = {base.name: (base.d_in, base.d_out) for base in find_bases(load_model(out.model_path))}
    assert {site.name: (site.d_in, site.d_out) for site in built.truth}.items() <= bases.items()


@pytest.mark.parametrize("name", ["ts_ia3", "ts_dora", "ts_conv", "ts_embedding", "dy_bias"])
def test_ports_of_every_kind_tell_the_names(name, tmp_path):
    built = build(name)
    out = extract_adapters(built.model, tmp_path, make_inputs=True, adapter=built.adapters["a"])
    loaded = load_model(out.model_path)
    for value in list(loaded.graph.initializers.values()):
        if ".weight" not in value.name or not value.is_graph_input():
            value.name = f"anonymous.{id(value)}"
    for node in loaded.graph:
        node.metadata_props.clear()
        node.name = ""
    assert set(out.sites.names) <= {base.name for base in find_bases(loaded)}


# -- Real exports -----------------------------------------------------------------------------------------------------

# The genai builder packs what it can when there is no adapter.
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}


@pytest.mark.parametrize("name", WITH_BASE)
def test_the_base_export_has_every_module_that_peft_adapts(name):
    built = build(name)
    bases = {base.name: (base.d_in, base.d_out) for base in find_bases(load_model(built.base_model))}
    wanted = {site.name: (site.d_in, site.d_out) for site in built.truth}
    if name.startswith("genai"):
        packed = {n for n in wanted if n.rpartition(".")[2] in PACKED}
        assert all(f"{n.rpartition('.')[0]}.qkv_proj" in bases for n in packed)
        wanted = {n: shape for n, shape in wanted.items() if n not in packed}
    assert wanted.items() <= bases.items()
    assert "" not in bases


@pytest.mark.parametrize("name", WITH_BASE)
def test_the_adapted_export_has_the_same_bases(name):
    built = build(name)
    found = [{(b.name, b.d_in, b.d_out) for b in find_bases(load_model(m))} for m in (built.model, built.base_model)]
    if not name.startswith("genai"):
        assert found[0] == found[1]
