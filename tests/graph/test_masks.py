"""Masks reach operands whose rows are several entries each, lie along another axis, or are not told apart."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from adapterx.adapter import tensor_name
from adapterx.graph.facts import Rows
from adapterx.graph.inject import inject_adapters
from adapterx.graph.masks import Masks, Operand
from adapterx.graph.sizes import Size
from adapterx.manifest import KEY, Manifest
from adapterx.site import VECTORS
from tests.graph.base_models import floats, model, proto

N, T, D = 3, 4, 8
RANKS = (2, 3, 1)
CONSTANTS = {
    "flat": [-1, D], "windows": [0, -1, 2, D], "of_two": [-1, 2, D], "zeros": [0],
    "frames": [-1, D, 3, 3],
}  # fmt: skip
SHAPES = {name: np.array(value, np.int64) for name, value in CONSTANTS.items()}
W, V, K, TABLE = floats(D, D), floats(D, D) * 0.3, floats(D, D, 1, 1), floats(11, D)
TOKENS, LIKE_X = "float[n,t,8] x", "sh = Shape(x)\n"

# What comes in, and how a Gemm, a MatMul or another operation reads it; the output has the rows on axis 0 again.
BY_POSITION = {
    "flattened tokens": f"{LIKE_X}f = Reshape(x, flat)\ng = Tanh(f)\nm = MatMul(g, w)\nr = Relu(m)\ny = Reshape(r, sh)",
    "windows": (
        f"{LIKE_X}a = Reshape(x, windows)\nf = Reshape(a, of_two)\ng = Tanh(f)\nm = MatMul(g, w)\nr = Relu(m)\n"
        "y = Reshape(r, sh)"),
    "tokens before rows": (
        "s = Transpose<perm=[1,0,2]>(x)\nsh = Shape(s)\nf = Reshape(s, flat)\ng = Tanh(f)\nm = MatMul(g, w)\n"
        "r = Relu(m)\nq = Reshape(r, sh)\ny = Transpose<perm=[1,0,2]>(q)"),
}  # fmt: skip
TWO = f"{LIKE_X}f = Reshape(x, flat)\ng = Tanh(f)\nm = MatMul(g, w)\nr = Relu(m)\no = MatMul(r, v)\ny = Reshape(o, sh)"
FORMS = BY_POSITION | {
    "a sequence first": "s = Transpose<perm=[1,0,2]>(x)\nm = MatMul(s, w)\ny = Transpose<perm=[1,0,2]>(m)",
    "the first axis": "y = MatMul(x, w)",
}


def ported(folder, body, *, inputs=TOKENS, tensors=None, targets=("fc",), kinds=("lora", "ia3", "bias")):
    used = {**(tensors or {"w": W}), **{name: array for name, array in SHAPES.items() if f" {name})" in body}}
    names = {"w": "fc.weight", "v": "second.weight"}
    made = proto(body, used, inputs=inputs, outputs="float[n,t,8] y", names=names)
    path = inject_adapters(made, folder, targets=list(targets), kinds=kinds).model_path
    ours = ir.load(path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    manifest = Manifest.loads(ours.metadata_props[KEY], where="it")
    return ort.InferenceSession(path, options), manifest, ours


def adapters(manifest):
    rng = np.random.default_rng(5)
    return [
        {
            tensor_name(site.name, port): rng.standard_normal(
                (1 if port in VECTORS else rank, *site.width(port)), np.float32
            )
            for site in manifest.sites
            for port in site.ports
        }
        for rank in RANKS
    ]


def shares(picks, manifest):
    rows = np.array([[float(pick == i) for i in range(len(RANKS))] for pick in picks], np.float32)
    both = {"adapter_mask": np.repeat(rows, RANKS, axis=1), "adapter_row_mask": rows}
    return {name: mask for name, mask in both.items() if name in {manifest.mask, manifest.row_mask}}


def bank(them):
    return {name: np.concatenate([one[name] for one in them]) for name in them[0]}


def assert_rows_are_their_own(session, manifest, x):
    them, picks = adapters(manifest), [i % len(RANKS) for i in (2, 0, 1, 1)][: len(x)]
    got = session.run(None, {"x": x, **bank(them), **shares(picks, manifest)})[0]
    for row, pick in enumerate(picks):
        want = session.run(None, {"x": x, **them[pick]})[0]
        alone = session.run(None, {"x": x[row : row + 1], **them[pick]})[0]
        np.testing.assert_allclose(got[row], want[row], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[row], alone[0], rtol=1e-5, atol=1e-5)
        assert np.abs(got[row] - session.run(None, {"x": x})[0][row]).max() > 0.1


@pytest.mark.parametrize("shape", [(3, 4, D), (4, 4, D), (2, 6, D), (1, 2, D)])
@pytest.mark.parametrize("form", FORMS)
def test_every_row_meets_its_own_adapter_wherever_rows_lie(form, shape, tmp_path):
    session, manifest, _ = ported(tmp_path, FORMS[form])
    assert (manifest.batch, manifest.unmixed) == (("x",), {})
    assert_rows_are_their_own(session, manifest, floats(*shape))


@pytest.mark.parametrize("form", BY_POSITION)
def test_a_mask_whose_rows_do_not_come_out_even_stops_the_run(form, tmp_path):
    session, manifest, _ = ported(tmp_path, BY_POSITION[form])
    feeds = {"x": floats(3, 2, D), **bank(adapters(manifest))}
    with pytest.raises((Fail, InvalidArgument, RuntimeException), match="Reshape"):
        session.run(None, {**feeds, **shares([0, 1, 2, 0, 1, 2, 0], manifest)})


def test_no_rows_at_all_give_none(tmp_path):
    session, manifest, _ = ported(tmp_path, BY_POSITION["flattened tokens"])
    them, x = adapters(manifest), np.zeros((0, 2, D), np.float32)
    assert session.run(None, {"x": x, **them[0]})[0].size == 0
    empty = {name: mask[:0] for name, mask in shares([0], manifest).items()}
    assert session.run(None, {"x": x, **bank(them), **empty})[0].size == 0


def test_sites_with_as_many_entries_a_row_share_what_repeats_the_mask(tmp_path):
    body = TWO
    session, manifest, ours = ported(tmp_path, body, tensors={"w": W, "v": V}, targets=["fc", "second"], kinds=["lora"])
    assert [node.op_type for node in ours.graph].count("Expand") == 1
    assert_rows_are_their_own(session, manifest, floats(N, T, D))


def test_what_repeats_the_mask_lies_behind_the_first_value_that_needs_it():
    made = model("a = Relu(x)\nb = Tanh(a)\ny = Relu(b)", {}, inputs="float[m,8] x")
    early, late = (node.outputs[0] for node in list(made.graph)[:2])
    masks, flattened = Masks(made, as_input=True), Rows(after=Size(T))
    forms = [masks.form(Operand(2, ir.DataType.FLOAT, flattened, at)) for at in (late, early)]
    masks.place()
    assert forms[0] is forms[1]
    order = list(made.graph)
    assert order.index(early.producer()) < order.index(forms[0].producer()) < order.index(late.producer())


def test_frames_of_pictures_are_mapped_by_position(tmp_path):
    body = f"{LIKE_X}f = Reshape(x, frames)\ng = Tanh(f)\nm = Conv(g, w)\nr = Relu(m)\ny = Reshape(r, sh)"
    session, manifest, _ = ported(tmp_path, body, inputs="float[n,t,8,3,3] x", tensors={"w": K}, kinds=["lora", "ia3"])
    assert not manifest.unmixed
    assert_rows_are_their_own(session, manifest, floats(N, T, D, 3, 3))


def test_ids_that_were_flattened_are_mapped_by_position(tmp_path):
    body = "u = Reshape(x, minus)\ne = Gather(w, u)\nr = Relu(e)\ny = Reshape(r, last)"
    tensors = {"w": TABLE, "minus": np.array([-1]), "last": np.array([-1, T, D])}
    session, manifest, _ = ported(tmp_path, body, inputs="int64[n,4] x", tensors=tensors, kinds=["lora"])
    assert not manifest.unmixed
    assert_rows_are_their_own(session, manifest, np.random.default_rng(1).integers(0, 11, (N, T)))


PICKED = "p = Gather(x, zeros)\nm = MatMul(p, w)\ny = Add(m, x)"


def test_a_site_that_cannot_tell_rows_apart_says_why_and_takes_one_adapter_for_all(tmp_path):
    session, manifest, _ = ported(tmp_path, PICKED)
    ((site, why),) = manifest.unmixed.items()
    assert site == "fc"
    assert "(Gather) picks entries along the axis of the batch" in why
    them, x = adapters(manifest), floats(N, T, D)
    alone = session.run(None, {"x": x, **them[1]})[0]
    zeros = {name: np.zeros((N, 3), np.float32) for name in shares([0], manifest)}
    np.testing.assert_array_equal(session.run(None, {"x": x, **them[1], **zeros})[0], alone)
    assert np.abs(alone - session.run(None, {"x": x})[0]).max() > 0.1


def test_a_module_that_is_called_twice_is_mixed_only_if_both_calls_are(tmp_path):
    body = "m = MatMul(x, w)\np = Gather(x, zeros)\no = MatMul(p, w)\ny = Add(m, o)"
    assert set(ported(tmp_path / "one", body)[1].unmixed) == {"fc"}
    turned = "s = Transpose<perm=[1,0,2]>(x)\no = MatMul(s, w)\nq = Transpose<perm=[1,0,2]>(o)"
    both = f"{turned}\nm = MatMul(x, w)\ny = Add(m, q)"
    session, manifest, _ = ported(tmp_path / "two", both)
    assert_rows_are_their_own(session, manifest, floats(N, T, D))
