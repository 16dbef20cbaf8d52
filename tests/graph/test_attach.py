"""Ports on a base operation compute the one formula: each part, on any rank of ``x``, with a row for each adapter."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterx.adapter import GAIN, INPUT_GAIN, LORA_A, LORA_B, SHIFT, tensor_name
from adapterx.errors import ModelError
from adapterx.graph.attach import Place, attached
from adapterx.graph.bases import find_bases
from adapterx.graph.ported import Origin, give_ports
from adapterx.graph.ports import PortOptions
from adapterx.graph.rewire import put_after
from adapterx.graph.shapes import Shapes
from adapterx.site import AdapterSite, SiteTable
from tests.graph.base_models import floats, model

D_IN, D_OUT, WORDS = 6, 8, 11
W, C = floats(D_IN, D_OUT), floats(D_OUT)
ALL = (LORA_A, LORA_B, GAIN, INPUT_GAIN, SHIFT)
NOT_IN_FRONT = (LORA_A, LORA_B, GAIN, SHIFT)
RANKS = (1, 3, 2)
# Rows of a batch: each adapter alone, the base, a weighted sum of two, and the first again.
SHARES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0.5, 0, 2], [1, 0, 0]], np.float32)
N = len(SHARES)


def linear(x):
    return x @ W + C


def convolved(x, kernel, *, bias=None, strides=None, pads=None, groups=1):
    """The sum over each window, by the definition."""
    axes = kernel.ndim - 2
    strides, pads = strides or (1,) * axes, pads or (0,) * 2 * axes
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=tuple(range(2, 2 + axes)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides))]
    pairs = zip(np.split(windows, groups, axis=1), np.split(kernel, groups), strict=True)
    inner = list(range(2, 2 + axes))
    ends = list(range(2 + axes, 2 + 2 * axes))
    parts = [np.tensordot(part, k, ([1, *ends], [1, *inner])) for part, k in pairs]
    y = np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)
    return y if bias is None else y + bias.reshape(-1, *[1] * axes)


FLAT = {"strides": (2,), "pads": (1, 2)}
GROUPED = {"strides": (1, 2), "pads": (1, 0, 1, 0), "groups": 2}
K1, K2 = floats(D_OUT, D_IN, 3), floats(D_OUT, D_IN // 2, 3, 2)
TABLE = floats(WORDS, D_OUT)

# name: (nodes, shape of x; for a convolution its kernel, and where it is put)
LINEARS = {
    "2-D Gemm": ("y = Gemm(x, w, c)", (N, D_IN)),
    "3-D MatMul": ("m = MatMul(x, w)\ny = Add(m, c)", (N, 5, D_IN)),
    "4-D MatMul": ("m = MatMul(x, w)\ny = Add(c, m)", (N, 2, 5, D_IN)),
}
CONVS = {
    "1-D Conv": ("y = Conv<strides=[2], pads=[1,2]>(x, w, c)", (N, D_IN, 9), K1, FLAT),
    "2-D Conv of groups": (
        "m = Conv<strides=[1,2], pads=[1,0,1,0], group=2>(x, w)\ny = Add(m, c)", (N, D_IN, 5, 7), K2, GROUPED,
    ),
}  # fmt: skip
LOOKUPS = {"1-D ids": (N,), "2-D ids": (N, 5), "3-D ids": (N, 2, 5)}


class Subject:
    """A model of one base operation, and the same in numpy."""

    def __init__(self, name):
        self.kernel, self.placing, self.ports, self.op = (), {}, ALL, "MatMul"
        if name in LINEARS:
            body, shape = LINEARS[name]
            tensors = {"w": W, "c": C}
        elif name in CONVS:
            body, shape, kernel, self.placing = CONVS[name]
            channels = C if name == "1-D Conv" else C.reshape(-1, 1, 1)
            tensors, self.kernel, self.weight, self.op = {"w": kernel, "c": channels}, kernel.shape[2:], kernel, "Conv"
        else:
            body, shape, tensors = "y = Gather(w, x)", LOOKUPS[name], {"w": TABLE}
            self.ports, self.op = NOT_IN_FRONT, "Gather"
        dims = ["n", *map(str, shape[1:])]
        given = f"{'int64' if self.op == 'Gather' else 'float'}[{','.join(dims)}] x"
        gives = {"MatMul": [*dims[:-1], "8"], "Conv": ["n", "8", *"pq"[: len(dims) - 2]], "Gather": [*dims, "8"]}[
            self.op
        ]
        self.model = model(body, tensors, inputs=given, outputs=f"float[{','.join(gives)}] y")
        self.x = np.random.default_rng(1).integers(0, WORDS, shape) if self.op == "Gather" else floats(*shape)
        self.d_in = WORDS if self.op == "Gather" else D_IN

    def base(self, x):
        if self.op == "Gather":
            return TABLE[x]
        return convolved(x, self.weight, bias=C, **self.placing) if self.kernel else linear(x)

    def low(self, x, a):
        """``x @ a.T``, ranks last; of a convolution, second."""
        if self.op == "Gather":
            return np.moveaxis(a[:, x], 0, -1)
        return convolved(x, a, **{**self.placing, "groups": 1}) if self.kernel else x @ a.T

    def column(self, vector):
        """Beside what has the features last, or second."""
        return vector.reshape(-1, *[1] * len(self.kernel))

    def adapted(self, x, parts):
        """The formula, for one row."""
        y = self.base(x[None] if INPUT_GAIN not in parts else x[None] * (1 + self.column(parts[INPUT_GAIN])))
        y = y * (1 + self.column(parts.get(GAIN, np.zeros(D_OUT))))
        y = y + self.column(parts.get(SHIFT, np.zeros(D_OUT)))
        if LORA_A not in parts:
            return y[0]
        low, b = self.low(x[None], parts[LORA_A]), parts[LORA_B]
        delta = np.moveaxis(np.moveaxis(low, 1, -1) @ b, -1, 1) if self.kernel else low @ b
        return (y + delta)[0]

    def adapter(self, seed, rank):
        rng = np.random.default_rng(seed)
        shapes = {
            LORA_A: (rank, self.d_in, *self.kernel), LORA_B: (rank, D_OUT),
            GAIN: (1, D_OUT), INPUT_GAIN: (1, D_IN), SHIFT: (1, D_OUT),
        }  # fmt: skip
        return {port: rng.standard_normal(shapes[port]).astype(np.float32) / 2 for port in self.ports}

    def ported(self, ports):
        """A session on the model with ``ports``."""
        [base] = find_bases(self.model)
        site = AdapterSite(
            "fc", "", "lora", self.op, self.d_in, D_OUT, 2, 1.0, "float32", "structure", "", self.kernel, ports
        )
        rank = Shapes(self.model).rank(base.output)

        def put(site, values, masks):
            users = list(base.output.uses())
            nodes = attached(self.model, Place(base.output, base.x, base.op, rank), site, values, masks)
            put_after(base.output, nodes, users)

        options = PortOptions("input", dynamic_rank=True, optional=True, location="")
        give_ports(self.model, SiteTable([site]), options, put, origin=Origin())
        return ort.InferenceSession(ir.to_proto(self.model).SerializeToString())


SUBJECTS = [*LINEARS, *CONVS, *LOOKUPS]


def run(session, x, parts, **masks):
    known = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    feeds = {tensor_name("fc", port): array for port, array in parts.items()} | masks
    return session.run(None, {"x": x, **{name: array for name, array in feeds.items() if name in known}})[0]


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_row_of_a_mixed_batch_gets_its_own_adapter(name):
    subject = Subject(name)
    session = subject.ported(subject.ports)
    adapters = [subject.adapter(seed, rank) for seed, rank in enumerate(RANKS)]
    bank = {port: np.concatenate([one[port] for one in adapters]) for port in subject.ports}
    masks = {"adapter_mask": np.repeat(SHARES, RANKS, axis=1), "adapter_row_mask": SHARES}
    got = run(session, subject.x, bank, **masks)
    for i in (0, 1, 2, 5):
        assert_close(got[i], subject.adapted(subject.x[i], adapters[int(np.argmax(SHARES[i]))]))
    assert_close(got[3], subject.adapted(subject.x[3], {}))
    # A weighted sum: the parts are summed, and then the formula holds for the sum.
    weighed = [port for port in subject.ports if port != LORA_A]
    total = {port: 0.5 * adapters[0][port] + 2 * adapters[2][port] for port in weighed if port != LORA_B}
    total[LORA_A] = np.concatenate([adapters[0][LORA_A], adapters[2][LORA_A]])
    total[LORA_B] = np.concatenate([0.5 * adapters[0][LORA_B], 2 * adapters[2][LORA_B]])
    assert_close(got[4], subject.adapted(subject.x[4], total))


@pytest.mark.parametrize("name", SUBJECTS)
def test_one_adapter_needs_no_masks_and_none_leaves_the_base(name):
    subject = Subject(name)
    session = subject.ported(subject.ports)
    one = subject.adapter(7, 2)
    want = np.stack([subject.adapted(row, one) for row in subject.x])
    assert_close(run(session, subject.x, one), want)
    assert_close(run(session, subject.x, {}), subject.base(subject.x))


@pytest.mark.parametrize("ports", [(GAIN,), (INPUT_GAIN,), (SHIFT,), (LORA_A, LORA_B), (LORA_A, LORA_B, SHIFT)])
@pytest.mark.parametrize("name", ["2-D Gemm", "4-D MatMul", "2-D Conv of groups"])
def test_each_part_alone(name, ports):
    subject = Subject(name)
    session = subject.ported(ports)
    one = {port: array for port, array in subject.adapter(3, 2).items() if port in ports}
    assert_close(run(session, subject.x, one), np.stack([subject.adapted(row, one) for row in subject.x]))


def test_an_input_that_is_quantized_before_it_is_read_cannot_be_scaled():
    body = "q, qs, qz = DynamicQuantizeLinear(x)\ni = MatMulInteger(q, w, qz)\nf = Cast<to=1>(i)\ny = Mul(f, qs)"
    subject = Subject("3-D MatMul")
    subject.model = model(
        body, {"w": np.ones((D_IN, D_OUT), np.uint8)}, inputs="float[n,t,6] x", outputs="float[n,t,8] y"
    )
    with pytest.raises(ModelError, match="fc: its input cannot be scaled for it alone"):
        subject.ported((INPUT_GAIN,))
