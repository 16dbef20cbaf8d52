"""LoRA on embeddings, in the spellings that names and optimizers leave of it."""

import numpy as np
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import proto
from tests.zoo import build
from tests.zoo.proof import run_ort

WORDS, PLACES, HIDDEN = 11, 5, 6
IDS = np.random.default_rng(0).integers(0, PLACES, (3, 4))
ONE = """
    e{i} = Gather(t{i}, {x})
    l{i} = Gather(a{i}, {x})
    z{i} = MatMul(l{i}, p{i})
    d{i} = Mul(z{i}, s)
    {y} = Add(e{i}, d{i})
"""
# The words, and the places of the words, which the same ids stand for here.
BODY = ONE.format(i=1, x="x", y="y1") + ONE.format(i=2, x="x", y="y2") + "y = Add(y1, y2)"
PATHS = {
    f"{value}{i}": f"/m/model/{module}/{kind}"
    for i, module in ((1, "words"), (2, "places"))
    for value, kind in (("e", "base_layer/Gather"), ("l", "Gather"), ("z", "MatMul"), ("d", "Mul"), ("y", "Add"))
}
RAW = {
    f"{side}{i}": f"m.base_model.model.{module}.lora_embedding_{name}.style"
    for i, module in ((1, "words"), (2, "places"))
    for side, name in (("a", "A"), ("p", "B"))
}


def weights(rank, seed=1):
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(9)
    made = {"t1": fixed.standard_normal((WORDS, HIDDEN)), "t2": fixed.standard_normal((PLACES, HIDDEN))}
    made |= {"a1": rng.standard_normal((WORDS, rank)), "a2": rng.standard_normal((PLACES, rank))}
    made |= {"p1": rng.standard_normal((rank, HIDDEN)), "p2": rng.standard_normal((rank, HIDDEN))}
    return {name: array.astype(np.float32) for name, array in {**made, "s": np.array(1.5)}.items()}


def model(tensors, names, body=BODY, shape="n,t"):
    return proto(body, tensors, inputs=f"int64[{shape}] x", outputs=f"float[{shape},6] y", names=names)


def adapter_of(tensors):
    sites = {"words": "1", "places": "2"}
    return Adapter({n: LowRank(a=tensors["a" + i].T, b=tensors["p" + i] * tensors["s"]) for n, i in sites.items()})


def assert_extracted(given, tmp_path, other, want, ids=IDS, **options):
    """What is extracted from ``given`` computes ``want`` with ``other``."""
    out = extract_adapters(given, tmp_path, make_inputs=True, **options)
    session = AdapterSession(out.model_path, adapters={"other": other, "own": out.adapter})
    np.testing.assert_allclose(session.run(None, {"x": ids}, adapter="other")[0], want, rtol=1e-4, atol=1e-4)
    own = run_ort(given.SerializeToString(), {"x": ids})[0]
    np.testing.assert_allclose(session.run(None, {"x": ids}, adapter="own")[0], own, rtol=1e-4, atol=1e-4)
    return out


def expected(tensors, body=BODY, ids=IDS, shape="n,t"):
    return run_ort(model(tensors, {}, body, shape).SerializeToString(), {"x": ids})[0]


@pytest.mark.parametrize("names", [PATHS, RAW], ids=["node paths", "tensor names"])
def test_two_tables_that_the_same_ids_are_looked_up_in_are_two_sites(names, tmp_path):
    other = weights(4, seed=2)
    out = assert_extracted(model(weights(2), names), tmp_path, adapter_of(other), expected(other))
    assert [(s.name, s.kind, s.d_in, s.d_out, s.rank) for s in out.sites] == [
        ("words", "embedding", WORDS, HIDDEN, 2), ("places", "embedding", PLACES, HIDDEN, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", ["n", "n,s,t"])
def test_ids_may_have_any_number_of_dimensions(shape, tmp_path):
    ids = IDS[0] if shape == "n" else IDS[None]
    body = BODY.replace("MatMul", "Gemm") if shape == "n" else BODY
    other = weights(3, seed=2)
    want = expected(other, body, ids, shape)
    assert_extracted(model(weights(2), PATHS, body, shape), tmp_path, adapter_of(other), want, ids)


def test_a_table_that_is_looked_up_twice_is_one_site(tmp_path):
    again = ONE.format(i=2, x="r", y="y2").replace("t2", "t1").replace("a2", "a1").replace("p2", "p1")
    body = f"r = Sub(top, x){ONE.format(i=1, x='x', y='y1')}{again}y = Add(y1, y2)"
    numbered = {"e2": "base_layer_1/Gather", "l2": "Gather_1", "z2": "MatMul_1", "d2": "Mul_1", "y2": "Add_1"}
    paths = PATHS | {name: f"/m/model/words/{end}" for name, end in numbered.items()}
    tensors, other = ({**weights(r, seed=r), "top": np.array(PLACES - 1)} for r in (2, 4))
    for unused in ("t2", "a2", "p2"):
        del tensors[unused], other[unused]
    one = Adapter({"words": LowRank(a=other["a1"].T, b=other["p1"] * other["s"])})
    out = assert_extracted(model(tensors, paths, body), tmp_path, one, expected(other, body))
    assert out.sites.names == ["words"]


def test_branches_that_lost_their_names_are_told_by_the_values_of_the_exported_adapter(tmp_path):
    tensors, other = weights(2), weights(3, seed=2)
    given = model(tensors, {})
    out = assert_extracted(given, tmp_path, adapter_of(other), expected(other), adapter=adapter_of(tensors))
    assert {(site.name, site.name_source) for site in out.sites} == {
        ("words", "adapter_values"), ("places", "adapter_values"),
    }  # fmt: skip


def test_a_table_without_a_branch_is_no_site():
    body = ONE.format(i=1, x="x", y="y1") + "e2 = Gather(t2, x)\ny = Add(y1, e2)"
    tensors = {name: array for name, array in weights(2).items() if name not in {"a2", "p2"}}
    assert find_sites(model(tensors, RAW, body)).names == ["words"]


def test_an_adapter_of_another_vocabulary_is_refused(tmp_path):
    built = build("ts_embedding")
    out = extract_adapters(built.model, tmp_path, make_inputs=True)
    words = out.adapter.sites["model.embed_tokens"]
    more = LowRank(a=np.zeros((4, 102), np.float32), b=words.b)
    with pytest.raises(MismatchError, match=r"model\.embed_tokens: adapter is \(4, 102\) -> 48, model is 101 -> 48"):
        AdapterSession(out.model_path, adapters={"wrong": Adapter({**out.adapter.sites, "model.embed_tokens": more})})
