"""Ports of another element type than the activations: real exports against PyTorch, with adapters never in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from adapterx.adapter import Adapter, LowRank
from adapterx.convert import convert_adapter
from adapterx.errors import MismatchError, ModelError, OptionError
from adapterx.formats import load_adapter, save_adapter
from adapterx.graph.extract import extract_adapters
from adapterx.graph.inject import inject_adapters
from adapterx.graph.merge import merge_adapter
from adapterx.manifest import KEY, Manifest
from adapterx.runtime.ports import port_arrays, rounded
from adapterx.runtime.session import AdapterSession
from adapterx.verify import verify_extraction
from tests.zoo import CASES, build

# Against PyTorch with the very numbers, relative to outputs of up to 13 (`dy_mlp`) and 4: what the ports round away.
# The adapters of the zoo change a result by about its own size.
LOST = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "int8": 6e-2}
NARROW = ("float16", "bfloat16", "int8")
QUANTIZED_BASES = ("ts_llama_int4", "genai_llama_int4")


def error(got, want):
    """Relative to the largest output."""
    pairs = [(np.asarray(g, np.float32), np.asarray(w, np.float32)) for g, w in zip(got, want, strict=True)]
    return max(float(np.abs(g - w).max(initial=0) / max(1.0, float(np.abs(w).max(initial=0)))) for g, w in pairs)


def manifest_in(path):
    (text,) = [e.value for e in onnx.load(path, load_external_data=False).metadata_props if e.key == KEY]
    return Manifest.loads(text, where=str(path))


def extracted(name, folder, **options):
    given = build(name).adapters["a"] if CASES[name].needs_adapter else None
    return extract_adapters(build(name).model, folder, adapter=given, **{"make_inputs": True, **options})


def assert_other_adapters(name, path, tolerance):
    """Two that were not exported, one of them of another rank; and none."""
    built, session = build(name), AdapterSession(path)
    assert error(session.run(None, built.feeds), built.expected["base"]) <= CASES[name].atol
    for other in ("b", "c"):
        session.load_adapter(other, built.adapters[other])
        got = session.run(None, built.feeds, adapter=other)
        assert error(got, built.expected[other]) <= tolerance, other
        assert error(got, built.expected["a"]) > 2 * tolerance, f"{other} is told from a"
    return session


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_float32_model_with_narrow_ports_is_pytorch_but_for_what_they_round_away(dtype, packed, tmp_path):
    out = extracted("dy_mlp", tmp_path, adapter_dtype=dtype, pack_inputs=packed)
    assert {(site.dtype, site.activations) for site in out.sites} == {(dtype, "float32")}
    assert_other_adapters("dy_mlp", out.model_path, LOST[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_float16_model_with_ports_of_another_type_is_pytorch(dtype, tmp_path):
    out = extracted("ts_llama_half", tmp_path, adapter_dtype=dtype)
    assert {(site.dtype, site.activations) for site in out.sites} == {(dtype, "float16")}
    assert_other_adapters("ts_llama_half", out.model_path, max(LOST[dtype], CASES["ts_llama_half"].atol))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", QUANTIZED_BASES)
def test_on_a_base_in_four_bits_they_are_what_its_float_ports_make_of_the_rounded_adapter(name, dtype, tmp_path):
    built = build(name)
    out = extracted(name, tmp_path / "narrow", adapter_dtype=dtype)
    wide = extracted(name, tmp_path / "wide")
    # An int4 base rounds what it reads, so that a last bit of the kernels would be a step here.
    narrow, exact = (AdapterSession(each.model_path, kernels="off") for each in (out, wide))
    for other in ("b", "c"):
        narrow.load_adapter(other, built.adapters[other])
        exact.load_adapter(other, rounded(narrow.adapters[other], narrow.manifest))
        got = narrow.run(None, built.feeds, adapter=other)
        assert error(got, exact.run(None, built.feeds, adapter=other)) <= 1e-5, other
        assert error(got, built.expected[other]) <= 5 * LOST[dtype], other


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dy_mlp", "float16"), ("dy_mlp", "bfloat16"), ("ts_dora", "int8"), ("ts_llama_half", "int8"),
     ("ts_llama_half", "float32"), ("ts_llama_int4", "int8")],
)  # fmt: skip
def test_without_an_adapter_it_is_the_model_with_float_ports_to_the_bit(name, dtype, tmp_path):
    runs = [
        AdapterSession(extracted(name, tmp_path / str(one), adapter_dtype=one).model_path).run(None, build(name).feeds)
        for one in (None, dtype)
    ]
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("name", "inputs"), [("dy_mlp", True), ("dy_mlp", False), ("ts_dora", True)])
@pytest.mark.parametrize("dtype", NARROW)
def test_verification_proves_it_as_exactly_as_that_of_float_ports(name, dtype, inputs, tmp_path):
    if dtype == "int8" and not inputs:
        with pytest.raises(OptionError, match="int8"):
            extracted(name, tmp_path, adapter_dtype=dtype, make_inputs=False)
        return
    out = extracted(name, tmp_path, adapter_dtype=dtype, make_inputs=inputs)
    done = verify_extraction(build(name).model, out.model_path, feeds=build(name).feeds)
    assert done.passed, [row for row in done.rows if not row.passed]
    assert {row.tolerance for row in done.rows if "random adapter of" in row.check} == {1e-4}


def test_kinds_beside_plain_lora_keep_the_activations_type_for_everything_else(tmp_path):
    out = extracted("ts_dora", tmp_path, adapter_dtype="int8")
    session = assert_other_adapters("ts_dora", out.model_path, LOST["int8"])
    types = {name.rsplit(".", 2)[1]: array.dtype.name for name, array in port_arrays(
        session.adapters["b"], session.manifest
    ).items()}  # fmt: skip
    assert types == {
        "lora_A": "int8", "lora_B": "int8", "lora_scale": "float32", "gain": "float32", "shift": "float32",
    }  # fmt: skip


def test_convolutions_and_embeddings_stay_as_they_were(tmp_path):
    for name in ("ts_conv1d", "ts_embedding"):
        before = extracted(name, tmp_path / f"{name}.before").sites
        after = extracted(name, tmp_path / name, adapter_dtype="float16").sites
        stay = [site for site in before if not site.is_multiplied]
        assert stay, name
        assert [site for site in after if site.name in {one.name for one in stay}] == stay


@pytest.mark.parametrize("dtype", NARROW)
def test_injection_makes_the_same_manifest_and_the_same_model(dtype, tmp_path):
    built = build("dy_mlp")
    out = inject_adapters(built.base_model, tmp_path / "in", adapter=built.adapters["a"], adapter_dtype=dtype)
    twin = extracted("dy_mlp", tmp_path / "out", adapter_dtype=dtype)
    # The name of the exported adapter, its factor, and where the names come from are all that differ.
    of_the_export = {"adapter": "", "scale": 1.0, "name_source": "structure", "node": ""}
    one, other = ([dataclasses.replace(site, **of_the_export) for site in it.sites] for it in (out, twin))
    assert sorted(one, key=str) == sorted(other, key=str)
    assert_other_adapters("dy_mlp", out.model_path, LOST[dtype])


def test_a_session_can_put_such_ports_into_a_model_and_refuses_one_that_has_others(tmp_path):
    built = build("dy_mlp")
    session = AdapterSession(built.base_model, {"b": built.adapters["b"]}, adapter_dtype="int8")
    assert {site.dtype for site in session.sites} == {"int8"}
    assert error(session.run(None, built.feeds, adapter="b"), built.expected["b"]) <= LOST["int8"]
    path = extracted("dy_mlp", tmp_path, adapter_dtype="float16").model_path
    AdapterSession(path, adapter_dtype="float16")
    with pytest.raises(OptionError, match="takes float16 \\(3 such\\); extract or inject it with adapter_dtype='int8'"):
        AdapterSession(path, adapter_dtype="int8")


def test_the_written_adapter_has_the_float_type_of_the_ports_and_for_codes_its_own(tmp_path):
    exact = load_adapter(build("dy_mlp").adapters["a"])
    for dtype, stored in (("float16", "float16"), ("bfloat16", "bfloat16"), ("int8", "float32"), (None, "float32")):
        out = extracted("dy_mlp", tmp_path / str(dtype), adapter_dtype=dtype)
        written = load_adapter(out.adapter_path)
        assert written == out.adapter
        assert {change.dtype.name for change in written.sites.values()} == {stored}
        assert error([written.sites["fc1"].a], [exact.sites["fc1"].a]) < 1e-2


def test_what_a_port_cannot_hold_is_refused_by_site_and_nothing_is_written(tmp_path):
    large = two_layers(17, ("float32", "float32"), largest=1e6)
    with pytest.raises(MismatchError, match=r"(?s)float16 at 2 of 2 sites:\n  one: finite .* become infinite.*  two: "):
        extract_adapters(large, tmp_path / "out", make_inputs=True, adapter_dtype="float16")
    assert not (tmp_path / "out").exists()
    extract_adapters(large, tmp_path / "out", make_inputs=True, adapter_dtype="bfloat16")
    path = extracted("dy_mlp", tmp_path / "mlp", adapter_dtype="float16").model_path
    other = load_adapter(build("dy_mlp").adapters["b"])
    site = other.sites["fc1"]
    huge = Adapter({**other.sites, "fc1": LowRank(a=site.a * np.float32(1e6), b=site.b)})
    with pytest.raises(MismatchError, match="fc1: finite float32 values become infinite in the model's float16"):
        AdapterSession(path, {"huge": huge})


SIZES = {"one": (8, 8), "two": (8, 6)}


def two_layers(opset, dtypes=("float16", "float32"), largest=1.0):
    """Two layers, each with an adapter, in these element types."""
    rng, nodes, tensors, x = np.random.default_rng(0), [], [], "x"
    for (name, (d_in, d_out)), dtype in zip(SIZES.items(), dtypes, strict=True):
        shapes = {"weight": (d_in, d_out), "lora_A.weight": (d_in, 2), "lora_B.weight": (2, d_out)}
        for end, shape in shapes.items():
            factor = largest if end == "lora_A.weight" else 0.5
            tensors.append(
                numpy_helper.from_array((factor * rng.standard_normal(shape)).astype(dtype), f"{name}.{end}")
            )
        steps = {
            "h": ("Cast", [x]), "b": ("MatMul", [f"{name}.h", f"{name}.weight"]),
            "l": ("MatMul", [f"{name}.h", f"{name}.lora_A.weight"]),
            "z": ("MatMul", [f"{name}.l", f"{name}.lora_B.weight"]), "y": ("Add", [f"{name}.b", f"{name}.z"]),
        }  # fmt: skip
        for output, (op_type, inputs) in steps.items():
            to = {"to": helper.np_dtype_to_tensor_dtype(np.dtype(dtype))} if op_type == "Cast" else {}
            nodes.append(helper.make_node(op_type, inputs, [f"{name}.{output}"], f"{name}/{output}", **to))
        x = f"{name}.y"
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    made = helper.make_tensor_value_info(x, helper.np_dtype_to_tensor_dtype(np.dtype(dtypes[-1])), ["n", 6])
    graph = helper.make_graph(nodes, "g", [given], [made], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def numbers(proto, name):
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    return numpy_helper.to_array(tensor).astype(np.float32)


@pytest.mark.parametrize("dtype", [*NARROW, "float32"])
def test_a_model_with_activations_of_two_types_takes_one_type_of_ports(dtype, tmp_path):
    proto = two_layers(17)
    out = extract_adapters(proto, tmp_path, make_inputs=True, adapter_dtype=dtype)
    assert {site.name: site.x_dtype for site in out.sites} == {"one": "float16", "two": "float32"}
    assert {site.dtype for site in out.sites} == {dtype}
    rng = np.random.default_rng(1)
    drawn = {
        name: LowRank(a=rng.standard_normal((3, 8), np.float32) / 2, b=rng.standard_normal((3, o), np.float32) / 2)
        for name, o in (("one", 8), ("two", 6))
    }
    x = rng.standard_normal((4, 8)).astype(np.float32)
    want = x
    for name in ("one", "two"):
        want = want @ numbers(proto, f"{name}.weight") + want @ drawn[name].a.T @ drawn[name].b
    got = AdapterSession(out.model_path, {"it": Adapter(drawn)}).run(None, {"x": x}, adapter="it")
    assert error(got, [want]) <= max(LOST[dtype], 2e-3)


def test_before_castlike_two_types_are_refused_in_words(tmp_path):
    with pytest.raises(ModelError, match=r"several types \(float, float16\), and its opset 13 has no CastLike"):
        extract_adapters(two_layers(13), tmp_path / "out", make_inputs=True, adapter_dtype="int8")
    extract_adapters(two_layers(13), tmp_path / "as_it_is", make_inputs=True)


def test_a_merge_takes_such_ports_out_again(tmp_path):
    built = build("dy_mlp")
    path = extracted("dy_mlp", tmp_path, adapter_dtype="int8").model_path
    merged = merge_adapter(path, built.adapters["b"], tmp_path / "merged.onnx").path
    plain = onnx.load(merged)
    assert not [v.name for v in plain.graph.input if "lora" in v.name]
    got = ort.InferenceSession(str(merged)).run(None, built.feeds)
    assert error(got, built.expected["b"]) <= 1e-4


@pytest.mark.parametrize("dtype", NARROW)
def test_a_converted_file_feeds_plain_onnx_runtime_and_a_session(dtype, tmp_path):
    built = build("dy_mlp")
    path = extracted("dy_mlp", tmp_path, adapter_dtype=dtype).model_path
    written = convert_adapter(built.adapters["b"], path, tmp_path / "b.onnx_adapter")
    assert load_adapter(tmp_path / "b.onnx_adapter") == written
    assert {change.dtype.name for change in written.sites.values()} == {"float32" if dtype == "int8" else dtype}
    lora, options = ort.LoraAdapter(), ort.RunOptions()
    lora.Load(str(tmp_path / "b.onnx_adapter"))
    options.add_active_adapter(lora)
    alone = ort.InferenceSession(str(path)).run(None, built.feeds, options)
    assert error(alone, built.expected["b"]) <= LOST[dtype]
    session = AdapterSession(path, {"b": tmp_path / "b.onnx_adapter"})
    assert error(session.run(None, built.feeds, adapter="b"), alone) <= 1e-5


def test_a_converted_file_of_codes_has_those_that_a_session_makes_and_every_input_that_it_needs(tmp_path):
    built = build("dy_mlp")
    for rank in (True, False):
        out = extracted("dy_mlp", tmp_path / str(rank), adapter_dtype="int8", dynamic_rank=rank, optional_inputs=False)
        one = load_adapter(built.adapters["b"])
        few = Adapter({"fc2": one.sites["fc2"]})
        file = tmp_path / f"{rank}.onnx_adapter"
        convert_adapter(few, out.model_path, file)
        session = AdapterSession(out.model_path, {"few": few}, kernels="off")
        fed = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
        alone = ort.InferenceSession(str(out.model_path)).run(None, {**built.feeds, **fed})
        np.testing.assert_array_equal(alone[0], session.run(None, built.feeds, adapter="few")[0])


def test_an_adapter_that_is_stored_in_int8_gives_its_codes_again(tmp_path):
    built = build("dy_mlp")
    path = extracted("dy_mlp", tmp_path, adapter_dtype="int8").model_path
    adapter = load_adapter(built.adapters["b"])
    save_adapter(adapter, tmp_path / "b.safetensors", quantize="int8")
    session = AdapterSession(path, {"exact": adapter, "stored": tmp_path / "b.safetensors"})
    exact, stored = (port_arrays(session.adapters[name], session.manifest) for name in ("exact", "stored"))
    codes = [name for name, array in exact.items() if array.dtype == np.int8]
    assert len(codes) == 2 * len(session.sites)
    for name in codes:
        np.testing.assert_array_equal(exact[name], stored[name])


@pytest.mark.parametrize(("name", "dtype"), [("dy_mlp", "int8"), ("ts_llama_int4", "float16"), ("ts_dora", "bfloat16")])
def test_rows_of_one_batch_take_narrow_adapters_of_their_own(name, dtype, tmp_path):
    built = build(name)
    path = extracted(name, tmp_path, adapter_dtype=dtype, pack_inputs=name == "dy_mlp").model_path
    session = AdapterSession(path, {other: built.adapters[other] for other in ("b", "c")})
    rows = ["b", None, "c", "b"]
    feeds = {name: np.concatenate([array[:1]] * len(rows)) for name, array in built.feeds.items()}
    got = session.run(None, feeds, adapters=rows)
    for i, row in enumerate(rows):
        alone = session.run(None, {name: array[i : i + 1] for name, array in feeds.items()}, adapter=row)
        assert error([one[i : i + 1] for one in got], alone) <= 1e-5, row
    assert error([got[0][:1]], [got[0][2:3]]) > 1e-2, "b is told from c"
