"""LoRA on convolutions, in the spellings that names and optimizers leave of it."""

import numpy as np
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError, ModelError, NoAdaptersFound
from adapterx.graph.bases import find_bases
from adapterx.graph.extract import extract_adapters
from adapterx.graph.load import load_model
from adapterx.graph.sites import find_sites
from adapterx.kinds.conv import spread
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import proto
from tests.zoo import build
from tests.zoo.proof import run_ort

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 6, 7, 7)).astype(np.float32)
BODY = """
    b1 = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w1, c1)
    l1 = Conv<strides=[2,2], pads=[1,1,1,1]>(x, a1)
    z1 = Conv(l1, p1)
    d1 = Mul(z1, s)
    y1 = Add(b1, d1)
    b2 = Conv(y1, w2)
    l2 = Conv(y1, a2)
    z2 = Conv(l2, p2)
    d2 = Mul(s, z2)
    y = Add(d2, b2)
"""
PEFT = {
    f"{side}{i}": f"m.base_model.model.conv{i}.lora_{name}.style.weight" for i in (1, 2) for side, name in ("aA", "pB")
}
SHAPES = {"w1": (8, 6, 3, 3), "c1": (8,), "w2": (5, 8, 2, 1)}


def weights(rank, seed=1, **changes):
    rng = np.random.default_rng(seed)
    base = {name: np.random.default_rng(9).standard_normal(shape) / 4 for name, shape in SHAPES.items()}
    adapter = {"a1": (rank, 6, 3, 3), "p1": (8, rank, 1, 1), "a2": (rank, 8, 2, 1), "p2": (5, rank, 1, 1)}
    made = base | {name: rng.standard_normal(shape) for name, shape in adapter.items()} | {"s": np.array(0.5)} | changes
    return {name: array.astype(np.float32) for name, array in made.items()}


def model(tensors, body=BODY, names=PEFT):
    return proto(body, tensors, inputs="float[n,6,7,7] x", outputs="float[n,5,h,w] y", names=names)


def adapter_of(tensors):
    """The adapter in ``tensors``, as a reader would give it."""
    return Adapter(
        {
            f"conv{i}": LowRank(a=tensors[f"a{i}"], b=spread(tensors[f"p{i}"], len(tensors[f"a{i}"])) * tensors["s"])
            for i in (1, 2)
        }
    )


def assert_extracted(given, tmp_path, other, want, **options):
    """What is extracted from ``given`` computes ``want`` with ``other``."""
    out = extract_adapters(given, tmp_path, make_inputs=True, **options)
    assert sorted(out.sites.names) == ["conv1", "conv2"]
    session = AdapterSession(out.model_path, adapters={"other": other, "own": out.adapter})
    np.testing.assert_allclose(session.run(None, {"x": X}, adapter="other")[0], want, rtol=1e-4, atol=1e-4)
    own = run_ort(given.SerializeToString(), {"x": X})[0]
    np.testing.assert_allclose(session.run(None, {"x": X}, adapter="own")[0], own, rtol=1e-4, atol=1e-4)
    return out


def expected(tensors, body=BODY):
    return run_ort(model(tensors, body).SerializeToString(), {"x": X})[0]


def test_one_convolution_right_behind_another_takes_what_the_other_made(tmp_path):
    other = weights(5, seed=2)
    out = assert_extracted(model(weights(2)), tmp_path, adapter_of(other), expected(other))
    assert [(s.adapter, s.kind, s.kernel, s.rank) for s in out.sites] == [
        ("style", "conv", (3, 3), 2), ("style", "conv", (2, 1), 2),
    ]  # fmt: skip


def test_a_bias_beside_b_becomes_a_shift(tmp_path):
    body = BODY.replace("Conv(l1, p1)", "Conv(l1, p1, q1)")
    tensors, other = ({**weights(2, seed=seed), "q1": np.full(8, seed, np.float32)} for seed in (1, 2))
    change = adapter_of(other)
    shift = (other["q1"] * other["s"]).reshape(1, -1)
    one = LowRank(a=change.sites["conv1"].a, b=change.sites["conv1"].b, parts={"shift": shift})
    given = model(tensors, body)
    assert_extracted(given, tmp_path, Adapter({**change.sites, "conv1": one}), expected(other, body))


def test_zeros_that_the_run_makes_are_no_bias(tmp_path):
    """What dynamo writes, unoptimized, where there is none."""
    zeros = "    i0 = Cast<to=1>(nil)\n    n5 = Expand(i0, five)\n    n2 = Expand(i0, two)\n"
    body = zeros + BODY.replace("(y1, w2)", "(y1, w2, n5)").replace("(x, a1)", "(x, a1, n2)")
    body = body.replace("(l2, p2)", "(l2, p2, n5)").replace("(y1, a2)", "(y1, a2, n2)")
    numbers = {"nil": np.int64(0), "five": np.array([5]), "two": np.array([2])}
    given, other = model({**weights(2), **numbers}, body), weights(5, seed=2)
    assert_extracted(given, tmp_path, adapter_of(other), expected(other))
    bases = find_bases(load_model(given))
    assert [(base.pure, base.bias is None) for base in bases] == [(True, False), (True, True)]


def test_groups_of_b_read_their_own_ranks(tmp_path):
    body = BODY.replace("z1 = Conv(l1, p1)", "z1 = Conv<group=2>(l1, p1)")
    tensors, other = (
        weights(4, seed=seed, p1=np.random.default_rng(seed).standard_normal((8, 2, 1, 1))) for seed in (1, 2)
    )
    assert_extracted(model(tensors, body), tmp_path, adapter_of(other), expected(other, body))


def test_of_a_factor_that_exporters_merged_the_name_is_not_believed(tmp_path):
    body = BODY.replace("(x, a1)", "(x, a)").replace("(y1, a2)", "(y1, a)")
    rng = np.random.default_rng(3)
    shapes = {"w1": (8, 8, 3, 3), "w2": (5, 8, 3, 3), "a": (2, 8, 3, 3)}
    tensors = weights(2, **{name: rng.standard_normal(shape) for name, shape in shapes.items()})
    tensors = {name: array for name, array in tensors.items() if name not in {"a1", "a2"}}
    # It bears the second one's name.
    names = {**PEFT, "a": PEFT["a2"]}
    given = proto(body, tensors, inputs="float[n,8,7,7] x", outputs="float[n,5,h,w] y", names=names)
    out = extract_adapters(given, tmp_path, make_inputs=True)
    assert sorted(out.sites.names) == ["conv1", "conv2"]
    assert (out.adapter.sites["conv1"].d_out, out.adapter.sites["conv2"].d_out) == (8, 5)


def test_a_branch_that_goes_elsewhere_than_its_base_is_refused(tmp_path):
    body = BODY.replace("pads=[1,1,1,1]>(x, a1)", "pads=[0,0,2,2]>(x, a1)")
    with pytest.raises(ModelError, match=r"conv1\.lora_A\.style"):
        extract_adapters(model(weights(2), body), tmp_path, make_inputs=True)


def test_branches_that_lost_their_names_are_told_by_the_values_of_the_exported_adapter(tmp_path):
    tensors, other = weights(2), weights(3, seed=2)
    given = model(tensors, names={})
    with pytest.raises(NoAdaptersFound, match="conv of rank 2 that nothing names; give the exported adapter"):
        find_sites(given)
    out = assert_extracted(given, tmp_path, adapter_of(other), expected(other), adapter=adapter_of(tensors))
    assert {site.name_source for site in out.sites} == {"adapter_values"}


def test_or_by_the_shapes_of_another(tmp_path):
    other = weights(3, seed=2)
    out = assert_extracted(
        model(weights(2), names={}), tmp_path, adapter_of(other), expected(other), adapter=adapter_of(other)
    )
    assert {site.name_source for site in out.sites} == {"adapter_shapes"}


def test_a_bottleneck_of_the_base_is_no_adapter():
    plain = BODY.replace("d1 = Mul(z1, s)", "d1 = Identity(z1)").replace("d2 = Mul(s, z2)", "d2 = Identity(z2)")
    tensors = {name: array for name, array in weights(2).items() if name != "s"}
    with pytest.raises(NoAdaptersFound) as error:
        find_sites(model(tensors, plain, names={}))
    assert "conv of rank" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros((2, 3, 5, 5), np.float32)}, r"conv1: adapter has a kernel of \(5, 5\), model of \(3, 3\)"),
        ({"a": np.zeros((2, 3), np.float32)}, r"conv1: adapter has a kernel of \(\), model of \(3, 3\)"),
        ({"a": np.zeros((2, 4, 3, 3), np.float32)}, r"conv1: adapter is \(2, 4, 3, 3\) -> 16, model is 3 -> 16"),
    ],
)
def test_an_adapter_of_another_kernel_or_of_other_channels_is_refused(change, message, tmp_path):
    out = extract_adapters(build("ts_conv").model, tmp_path, make_inputs=True)
    wrong = LowRank(a=change["a"], b=np.zeros((2, 16), np.float32))
    with pytest.raises(MismatchError, match=message):
        AdapterSession(out.model_path, adapters={"wrong": Adapter({**out.adapter.sites, "conv1": wrong})})
