"""Where the rows of a batch lie after each operator, on graphs of a few nodes; and why nothing tells, in words."""

import re
import time

import numpy as np
import onnx_ir as ir
import pytest

from adapterx.graph.row_order import RowOrder
from adapterx.graph.shapes import Shapes
from tests.graph.base_models import floats, model

SHARED = "what it reads is the same for all rows of a batch: nothing of the inputs that have rows comes in"
TOKENS = "float[batch,tokens,32] x"
SEQUENCE_FIRST = "s = Transpose<perm=[1,0,2]>(x)"
INTS = {
    "zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "all": np.int64(2**62), "zeros": [0], "ones": [1],
    "twos": [2], "alls": [2**62], "flat": [-1, 32], "heads": [0, 0, 4, 8], "back": [0, -1, 32], "three": [1, 3, 1],
    "thrice": [3, 1, 1], "minus": [-1], "last": [32], "one_and_all": [1, -1, 32], "pads": [0, 0, 0, 0, 1, 0],
    "front": [1, 0, 0, 0, 0, 0], "pairs": [-1, 2, 32], "of_four": [-1, 4, 32],
}  # fmt: skip
CONSTANTS = {name: np.asarray(value, np.int64) for name, value in INTS.items()} | {
    "w": floats(32, 32), "c": floats(32), "table": floats(50, 32), "half": np.float32(0.5),
}  # fmt: skip
COUNTED = "sh = Shape(x)\nn = Gather(sh, zero)\nt = Gather(sh, one)"


def order(body, inputs=TOKENS):
    used = set(re.findall(r"\w+", body))
    tensors = {name: array for name, array in CONSTANTS.items() if name in used}
    made = model(f"{body}\nout = Identity(y)", tensors, inputs=inputs, outputs="float out")
    return made, RowOrder(made, Shapes(made))


def rows_after(body, inputs=TOKENS):
    made, found = order(body, inputs)
    return found.rows(made.graph.outputs[0].producer().inputs[0])


def placed(rows):
    return rows if isinstance(rows, str) else (rows.axis, str(rows.before), str(rows.after))


KEPT = {
    "an elementwise operator": ("y = Gelu(x)", (0, "1", "1")),
    "a constant that is added": ("y = Add(c, x)", (0, "1", "1")),
    "a residual": ("h = MatMul(x, w)\ny = Add(h, x)", (0, "1", "1")),
    "a norm over the last axis": ("y = LayerNormalization<axis=-1>(x, c)", (0, "1", "1")),
    "a softmax over tokens": ("y = Softmax<axis=1>(x)", (0, "1", "1")),
    "a mean over tokens": ("y = ReduceMean<keepdims=0>(x, ones)", (0, "1", "1")),
    "attention": ("k = Transpose<perm=[0,2,1]>(x)\ns = MatMul(x, k)\np = Softmax(s)\ny = MatMul(p, x)", (0, "1", "1")),
    "tokens flattened": ("y = Reshape(x, flat)", (0, "1", "tokens")),
    "tokens flattened by two axes": ("y = Flatten<axis=2>(x)", (0, "1", "tokens")),
    "heads": ("h = Reshape(x, heads)\ny = Transpose<perm=[0,2,1,3]>(h)", (0, "1", "1")),
    "heads folded into rows": (
        "h = Reshape(x, heads)\nt = Transpose<perm=[0,2,1,3]>(h)\ns = Concat<axis=0>(minus, last)\ny = Reshape(t, s)",
        (0, "1", "tokens")),
    "a sequence first": (SEQUENCE_FIRST + "\ny = Relu(s)", (1, "1", "1")),
    "a sequence first, flattened": (SEQUENCE_FIRST + "\ny = Reshape(s, flat)", (0, "tokens", "1")),
    "flattened and folded back": (
        f"{SEQUENCE_FIRST}\nf = Reshape(s, flat)\nsh = Shape(s)\ny = Reshape(f, sh)", (1, "1", "1")),
    "a leading 1": ("y = Reshape(x, one_and_all)", (1, "1", "tokens")),
    "one more axis in front": ("y = Unsqueeze(x, zeros)", (1, "1", "1")),
    "the axes turned to the end": ("y = Transpose<perm=[1,2,0]>(x)", (2, "1", "1")),
    "more tokens beside": ("y = Concat<axis=1>(x, x)", (0, "1", "1")),
    "some of the tokens": ("y = Slice(x, zeros, twos, ones)", (0, "1", "1")),
    "a slice that takes every row": ("y = Slice(x, zeros, alls, zeros)", (0, "1", "1")),
    "one token": ("y = Gather<axis=1>(x, zero)", (0, "1", "1")),
    "pads of tokens": ("y = Pad(x, pads)", (0, "1", "1")),
    "each row several times": ("y = Tile(x, thrice)", (0, "3", "1")),
    "tokens several times": ("y = Tile(x, three)", (0, "1", "1")),
    "a class token": (
        f"{COUNTED}\nu = Unsqueeze(n, zeros)\ns = Concat<axis=0>(u, ones, last)\ne = Expand(c, s)\n"
        "y = Concat<axis=1>(e, x)", (0, "1", "1")),
    "what stands in for rows that are lost": (
        "i = NonZero(x)\nf = Cast<to=1>(i)\nr = ReduceSum(f)\ny = Add(x, r)", (0, "1", "1")),
    "a product with einsum": ('y = Einsum<equation="btd,de->bte">(x, w)', (0, "1", "1")),
    "int4 weights": ("y = com.microsoft.MatMulNBits<K=32, N=32, bits=4, block_size=16>(x, w, c)", (0, "1", "1")),
    "fused attention": ("y = com.microsoft.MultiHeadAttention<num_heads=4>(x, x, x)", (0, "1", "1")),
    "a recurrence": (f"{SEQUENCE_FIRST}\ny, h = GRU<hidden_size=32>(s, w, w)", (2, "1", "1")),
    "the row's own token, by two indices": (
        f"{COUNTED}\nr = Range(zero, n, one)\nm = ReduceMax<keepdims=0>(x, twos)\na = ArgMax<axis=1, keepdims=0>(m)\n"
        "i = Unsqueeze(r, ones)\nj = Unsqueeze(a, ones)\nij = Concat<axis=1>(i, j)\ny = GatherND(x, ij)",
        (0, "1", "1")),
    "the row's own token, by one index": (
        f"{COUNTED}\nr = Range(zero, n, one)\nm = ReduceMax<keepdims=0>(x, twos)\na = ArgMax<axis=1, keepdims=0>(m)\n"
        "i = Mul(r, t)\nij = Add(a, i)\nf = Reshape(x, flat)\ny = Gather(f, ij)", (0, "1", "1")),
}  # fmt: skip

LOST = {
    "softmax over rows": ("y = Softmax<axis=0>(x)", r"node '.*' \(Softmax\) works across the rows of the batch"),
    "sum over rows": ("y = ReduceSum<keepdims=0>(x, zeros)", "ReduceSum.* works across the rows"),
    "sum over all": ("y = ReduceSum(x)", "ReduceSum.* works across the rows"),
    "norm over rows": ("y = LayerNormalization<axis=0>(x, c)", "LayerNormalization.* works across"),
    "running sum over rows": ("y = CumSum(x, zero)", "CumSum.* works across the rows"),
    "product over rows": ("k = Transpose<perm=[1,2,0]>(x)\ny = MatMul(k, w)", "MatMul.* sums over the rows"),
    "all pairs of rows": (
        "f = ReduceMean<keepdims=0>(x, ones)\nk = Transpose(f)\ny = MatMul(f, k)", "MatMul.* from two axes"),
    "one row": ("y = Gather(x, zero)", "Gather.* picks entries along the axis of the batch"),
    "some rows": ("y = Slice(x, zeros, twos, zeros)", "Slice.* takes some of the rows"),
    "rows cut apart": ("a, b = Split<axis=0, num_outputs=2>(x)\ny = Relu(a)", "Split.* cuts the rows"),
    "other rows beside": ("y = Concat<axis=0>(x, x)", "Concat.* puts other entries beside the rows"),
    "pads of rows": ("y = Pad(x, front)", "Pad.* puts other entries beside the rows"),
    "entries that were found": ("i = NonZero(x)\ny = Transpose(i)", "NonZero.* is not known to keep rows"),
    "rows folded two by two": ("m = ReduceMean<keepdims=0>(x, ones)\ny = Reshape(m, pairs)", "no axis of it counts"),
    "rows across a turned sequence": (
        f"{SEQUENCE_FIRST}\nu = Unsqueeze(s, ones)\nsw = Reshape(u, of_four)\ny = Relu(sw)", "no axis of it counts"),
    "a constant": ("i = Identity(table)\ny = MatMul(i, w)\nz = Relu(x)", "the same for all rows of a batch"),
    "tokens of experts": (
        "f = Reshape(x, flat)\np = MatMul(f, w)\ng = Greater(p, half)\ni = NonZero(g)\n"
        "a, b = Split<axis=0, num_outputs=2>(i)\ns = Squeeze(a, zeros)\ny = Gather(f, s)", "Gather.* picks entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_rows_are_followed_through(name):
    body, want = KEPT[name]
    assert placed(rows_after(body)) == want


@pytest.mark.parametrize("name", LOST)
def test_rows_are_lost_and_a_reason_says_where(name):
    body, reason = LOST[name]
    found = rows_after(body)
    assert isinstance(found, str)
    assert re.search(reason, found)


INPUTS = {
    "one name in most": ("float[N,T,32] x, float[N,8] a, float[T] p", ("x", "a"), {"p": SHARED}),
    "a name that says batch": ("float[T,32] q, float[batch_size,T,32] x", ("x",), {"q": SHARED}),
    "dimensions without a name": ("float[?,?,32] x, float[1,?] p", ("x",), {"p": SHARED}),
    "names that an exporter made up": (
        "float[x_dynamic_axes_1,x_dynamic_axes_2,32] x, float[a_dynamic_axes_1,8] a", ("x", "a"), {}),
    "a batch that is fixed": ("float[2,7,32] x, float[2,8] a, float[7,7] p, bool flag", ("x", "a"), {"p": SHARED}),
    "a batch of one": ("float[1,7,32] x", ("x",), {}),
    "a state with the batch second": ("float[batch,T,32] x, float[4,batch,32] h", ("x",), {"h": (1, "1", "1")}),
    "things that nobody says the rows of": (
        "float[batch,T,32] x, float[patches,32] p", ("x",),
        {"p": "input 'p' has a first dimension of its own, patches"}),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_bring_rows_are_told_from_those_that_do_not(name):
    inputs, batch, others = INPUTS[name]
    made, found = order("y = Relu(x)", inputs)
    assert found.batch == batch
    values = {value.name: value for value in made.graph.inputs}
    assert {name: placed(found.rows(values[name])) for name in others} == others
    assert placed(found.rows(values["x"])) == (0, "1", "1")


def test_heads_that_an_exporter_counts_with_the_rows_are_several_entries_each():
    made, _ = order("y = Relu(x)", "float[batch,T,32] x, float[m,T,8] past")
    made.graph.inputs[1].shape = ir.Shape(["batch x heads", "T", 8])
    assert placed(RowOrder(made, Shapes(made)).rows(made.graph.inputs[1])) == (0, "1", "heads")


def test_a_fixed_batch_is_followed_in_numbers():
    assert placed(rows_after("y = Reshape(x, flat)", "float[2,7,32] x")) == (0, "1", "7")
    assert placed(rows_after("y = Reshape(x, one_and_all)", "float[1,7,32] x")) == (0, "1", "1")
    turned = "s = Transpose<perm=[1,0,2]>(x)\nf = Reshape(s, flat)\nsh = Shape(s)\ny = Reshape(f, sh)"
    assert placed(rows_after(turned, "float[2,2,32] x")) == (1, "1", "1")


def test_what_is_expanded_to_the_batch_can_be_told_apart_where_an_adapter_comes_in():
    body = f"{COUNTED}\nu = Unsqueeze(n, zeros)\ns = Concat<axis=0>(u, last)\ne = Expand(c, s)\ny = MatMul(e, w)"
    made, found = order(body)
    y = made.graph.outputs[0].producer().inputs[0]
    assert found.rows(y) == SHARED
    assert placed(RowOrder(made, Shapes(made), bases=[y]).rows(y)) == (0, "1", "1")


BRANCH = "= If (yes) <then_branch = a () => (float[batch,tokens,32] p) { p = Relu(x) }, else_branch = b () => "


def test_branches_have_to_agree():
    same = f"y {BRANCH}(float[batch,tokens,32] q) {{ q = Tanh(x) }}>"
    other = f"y {BRANCH}(float[tokens,batch,32] q) {{ q = Transpose<perm=[1,0,2]>(x) }}>"
    inputs = f"bool yes, {TOKENS}"
    assert placed(rows_after(same, inputs)) == (0, "1", "1")
    assert "branches in which the rows of the batch lie differently" in rows_after(other, inputs)


LOOP = """y = Loop(one, , x) <body = l (int64 i, bool c, float[n,t,32] h) => (bool d, float[n,t,32] k) {
  d = Identity(c)
  k = Relu(h)
}>"""


def test_nothing_is_followed_into_a_loop():
    assert re.search(r"node '.*' \(Loop\) is a loop", rows_after(LOOP))


def test_a_deep_model_is_followed_fast():
    body = "\n".join(["h0 = Relu(x)", *(f"h{i + 1} = Add(h{i}, x)" for i in range(5000)), "y = Relu(h5000)"])
    start = time.perf_counter()
    assert placed(rows_after(body)) == (0, "1", "1")
    assert time.perf_counter() - start < 10
