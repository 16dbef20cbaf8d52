"""Modules that were trained in full, by what names, scopes and paths tell; and what else must stay refused."""

import numpy as np
import pytest

from adapterx.adapter import WHOLE_BIAS, WHOLE_WEIGHT, Adapter, LowRank
from adapterx.errors import MismatchError, ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import proto
from tests.zoo.proof import run_ort

D, CLASSES, WORDS = 6, 4, 9
X = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, WORDS, (2, 3))
LORA = "b = MatMul(x, w)\n l = MatMul(x, a)\n z = MatMul(l, p)\n h = Add(b, z)\n"
PATHS = {"b": "/m/fc/base_layer/MatMul", "l": "/m/fc/style/MatMul", "z": "/m/fc/style_1/MatMul", "h": "/m/fc/Add"}
SAVED = "m.base_model.model.head.modules_to_save.style"
SIZES = {"w": (D, D), "a": (D, 2), "p": (2, D), "k": (D, CLASSES), "kt": (CLASSES, D), "c": (CLASSES,), "v": (D, D)}
SIZES |= {"g": (D,), "table": (WORDS, D), "g2": (D, D), "one": ()}


def model(body, names, *, seed=1, inputs="float[n,t,6] x", outputs="float[n,t,o] y", scopes=None, lora=LORA):
    """A low-rank branch, and ``body`` that goes on from its ``h``; what is trained differs by ``seed``."""
    text = lora + body
    tensors = {}
    for name, size in SIZES.items():
        if f"{name})" in text or f"{name}," in text:
            rng = np.random.default_rng(9 if name in "wv" else seed)
            tensors[name] = rng.standard_normal(size).astype(np.float32)
    return proto(text, tensors, inputs=inputs, outputs=outputs, names=PATHS | names, scopes=scopes), tensors


def assert_extracted(body, names, tmp_path, whole, *, feeds=None, **options):
    """With another adapter's ``whole`` sites, the extracted model is the graph that was exported with that."""
    feeds = feeds or {"x": X}
    given, _ = model(body, names, **options)
    other, tensors = model(body, names, seed=2, **options)
    sites = {name: LowRank.of_parts(parts(tensors)) for name, parts in whole.items()}
    if "lora" not in options:
        sites["fc"] = LowRank(a=tensors["a"].T, b=tensors["p"])
    out = extract_adapters(given, tmp_path, make_inputs=True)
    session = AdapterSession(out.model_path, adapters={"own": out.adapter, "other": Adapter(sites)})
    for name, graph in (("own", given), ("other", other)):
        want = run_ort(graph.SerializeToString(), feeds)[0]
        np.testing.assert_allclose(session.run(None, feeds, adapter=name)[0], want, rtol=1e-4, atol=1e-4)
    return out


def whole_head(tensors):
    weight = tensors["kt"] if "kt" in tensors else tensors["k"].T
    return {WHOLE_WEIGHT: weight} | ({WHOLE_BIAS: tensors["c"][None]} if "c" in tensors else {})


HEADS = {
    "by the weight's name": ("y = MatMul(h, k)", {"k": f"{SAVED}.weight"}, None),
    "by the name of a weight that is turned": (
        "t = Transpose<perm=[1,0]>(kt)\n y = MatMul(h, t)",
        {"kt": f"{SAVED}.weight"},
        None,
    ),
    "by the bias's name": ("m = MatMul(h, k)\n y = Add(m, c)", {"c": f"{SAVED}.bias"}, None),
    "by the scope": ("m = MatMul(h, k)\n y = Add(m, c)", {}, {"m": ["", "m", SAVED, "linear"]}),
    "by the path": ("m = MatMul(h, k)\n y = Add(c, m)", {"m": "/m/head/style/MatMul", "y": "/m/head/style/Add"}, None),
}


@pytest.mark.parametrize("how", HEADS)
def test_a_head_is_found_in_every_spelling(how, tmp_path):
    body, names, scopes = HEADS[how]
    out = assert_extracted(body, names, tmp_path, {"head": whole_head}, scopes=scopes)
    head = out.sites[-1]
    assert (head.name, head.adapter, head.kind, head.d_in, head.d_out) == ("head", "style", "saved", D, CLASSES)


def test_a_head_of_rows_is_a_gemm(tmp_path):
    names = {"kt": f"{SAVED}.weight", "c": f"{SAVED}.bias"}
    rows = {"inputs": "float[n,6] x", "outputs": "float[n,4] y", "feeds": {"x": X[0]}}
    assert_extracted("y = Gemm<transB=1>(h, kt, c)", names, tmp_path, {"head": whole_head}, **rows)


def test_a_head_of_several_layers_is_as_many_sites(tmp_path):
    body = "d = MatMul(h, g2)\n f = Tanh(d)\n y = MatMul(f, k)"
    names = {"g2": f"{SAVED}.dense.weight", "k": f"{SAVED}.out.weight"}
    whole = {"head.dense": lambda t: {WHOLE_WEIGHT: t["g2"].T}, "head.out": whole_head}
    assert assert_extracted(body, names, tmp_path, whole).sites.names == ["fc", "head.dense", "head.out"]


def test_an_embedding_may_be_trained_in_full(tmp_path):
    options = {"inputs": "int64[n,t] x", "outputs": "float[n,t,6] y", "feeds": {"x": IDS}, "lora": ""}
    names = {"table": "m.base_model.model.words.modules_to_save.style.weight"}
    whole = {"words": lambda t: {WHOLE_WEIGHT: t["table"]}}
    out = assert_extracted("y = Gather(table, x)", names, tmp_path, whole, **options)
    assert [(s.name, s.kind, s.d_in, s.d_out) for s in out.sites] == [("words", "saved", WORDS, D)]
    narrow = Adapter({"words": LowRank.of_parts({WHOLE_WEIGHT: np.zeros((WORDS, D + 1), np.float32)})})
    with pytest.raises(MismatchError, match="words: adapter is 9 -> 7, model is 9 -> 6"):
        AdapterSession(out.model_path, adapters={"narrow": narrow})


def given_adapter(tensors):
    head = LowRank.of_parts({WHOLE_WEIGHT: tensors["k"].T})
    return Adapter({"fc": LowRank(a=tensors["a"].T, b=tensors["p"]), "head": head})


def test_a_head_that_lost_its_name_is_told_by_the_values_of_the_exported_adapter(tmp_path):
    given, tensors = model("y = MatMul(h, k)", {})
    out = extract_adapters(given, tmp_path, make_inputs=True, adapter=given_adapter(tensors))
    assert [(site.name, site.kind, site.name_source) for site in out.sites][1:] == [("head", "saved", "adapter_values")]
    other, others = model("y = MatMul(h, k)", {}, seed=2)
    session = AdapterSession(out.model_path, adapters={"other": given_adapter(others)})
    want = run_ort(other.SerializeToString(), {"x": X})[0]
    np.testing.assert_allclose(session.run(None, {"x": X}, adapter="other")[0], want, rtol=1e-4, atol=1e-4)


def test_a_head_without_a_name_is_not_guessed_from_another_adapter():
    given, _ = model("y = MatMul(h, k)", {})
    _, others = model("y = MatMul(h, k)", {}, seed=2)
    with pytest.raises(MismatchError, match="head: trained in full, and of the graph's operations of that shape"):
        find_sites(given, adapter=given_adapter(others))


def test_a_head_of_another_file_of_the_export_is_passed_over(tmp_path):
    given, tensors = model("y = Tanh(h)", {})
    sites = find_sites(given, adapter=given_adapter(tensors | {"k": np.ones((D, CLASSES), np.float32)}))
    assert (sites.names, sites.left) == (["fc"], ())


def test_a_module_that_is_here_without_what_the_given_adapter_has_there_is_refused(tmp_path):
    given, tensors = model("y = MatMul(h, k)", {"k": "m.base_model.model.head.weight"})
    low = LowRank(a=np.ones((2, D), np.float32), b=np.ones((2, CLASSES), np.float32))
    with pytest.raises(ModelError, match="head: the given adapter has it, and nothing of it is found"):
        extract_adapters(given, tmp_path, adapter=Adapter({**given_adapter(tensors).sites, "head": low}))


def test_exports_of_one_base_with_two_heads_take_each_others_adapters(tmp_path):
    body, names, scopes = HEADS["by the weight's name"]
    outs = []
    for seed in (1, 2):
        given, _ = model(body, names, seed=seed, scopes=scopes)
        outs.append(extract_adapters(given, tmp_path / str(seed), make_inputs=True))
    one, other = outs
    assert one.adapter.metadata["base_fingerprint"] == other.adapter.metadata["base_fingerprint"] != ""
    AdapterSession(one.model_path, adapters={"other": other.adapter_path})


def test_what_else_reads_the_weight_keeps_it(tmp_path):
    body = "r = MatMul(h, k)\n q = MatMul(b, k)\n y = Add(r, q)"
    names = {"r": "/m/head/style/MatMul", "q": "/m/plain/MatMul"}
    given, tensors = model(body, names)
    out = extract_adapters(given, tmp_path, make_inputs=True)
    assert out.sites.names == ["fc", "head"]
    nothing = Adapter({"head": LowRank.of_parts({WHOLE_WEIGHT: np.zeros((CLASSES, D), np.float32)})})
    session = AdapterSession(out.model_path, adapters={"none": nothing})
    want = X @ tensors["w"] @ tensors["k"]
    np.testing.assert_allclose(session.run(None, {"x": X}, adapter="none")[0], want, rtol=1e-4, atol=1e-4)


STAYS = {
    "what another module reads, too": (
        "r = MatMul(h, k)\n q = MatMul(b, k)\n y = Add(r, q)", {"k": f"{SAVED}.weight", "q": "/m/plain/MatMul"},
    ),
    "a norm": ("y = LayerNormalization(h, g)", {"g": f"{SAVED}.weight"}),
    "codes": ("q = Cast<to=3>(k)\n u = DequantizeLinear(q, one)\n y = MatMul(h, u)", {"k": f"{SAVED}.weight"}),
    "a fused activation": (
        'y = com.microsoft.FusedGemm<activation="Relu">(h, k, c)', {"k": f"{SAVED}.weight", "c": f"{SAVED}.bias"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STAYS)
def test_what_is_no_plain_layer_of_its_own_is_refused_by_name(what, tmp_path):
    given, _ = model(*STAYS[what])
    assert any("head.modules_to_save.style.weight" in line for line in find_sites(given).left)
    with pytest.raises(ModelError, match=r"head\.modules_to_save\.style\.weight"):
        extract_adapters(given, tmp_path, make_inputs=True)
