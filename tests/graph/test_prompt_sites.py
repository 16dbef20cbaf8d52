"""Prompts in graphs: known by their own name, by what an exporter folded, by their values; and what is none."""

import numpy as np
import onnx
import pytest

from adapterx.adapter import PROMPT, Adapter, LowRank
from adapterx.errors import MismatchError, NoAdaptersFound
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import proto

TOKENS, WIDTH = 3, 6
X = np.random.default_rng(0).standard_normal((2, 4, WIDTH)).astype(np.float32)
OWN = np.random.default_rng(1).standard_normal((TOKENS, WIDTH)).astype(np.float32)
OTHER = np.random.default_rng(2).standard_normal((TOKENS, WIDTH)).astype(np.float32)
NAME = "m.prompt_encoder.style.embedding.weight"
REPEATED = "n = Shape<start=0, end=1>(x)\n r = Concat<axis=0>(n, one, one)\n e = Tile(p, r)\n y = Concat<axis=1>(e, x)"
LOOKED_UP = (
    "l = Gather(p, ids)\n n = Shape<start=0, end=1>(x)\n r = Concat<axis=0>(n, one, one)\n e = Tile(l, r)\n"
    " y = Concat<axis=1>(e, x)"
)
COUNT = {"one": np.array([1])}


def model(body, tensors, names):
    return proto(body, COUNT | tensors, inputs="float[n,t,6] x", outputs="float[n,s,6] y", names=names)


def folded(given, origin):
    """``given`` with dynamo's word for what ``p`` was made of."""
    told = onnx.helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, [1, TOKENS, WIDTH])
    told.metadata_props.add(key="pkg.onnxscript.optimizer.folded_from", value=str([origin, "val_8"]))
    given.graph.value_info.append(told)
    return given


def adapter(prompt):
    return Adapter({"prompt_encoder": LowRank.of_parts({PROMPT: prompt})})


def assert_swapped(given, tmp_path, **options):
    out = extract_adapters(given, tmp_path, make_inputs=True, **options)
    [site] = out.sites
    assert (site.name, site.kind, site.rank, site.d_out) == ("prompt_encoder", "prompt", TOKENS, WIDTH)
    session = AdapterSession(out.model_path, adapters={"own": out.adapter, "other": adapter(OTHER)})
    for name, prompt in (("own", OWN), ("other", OTHER)):
        want = np.concatenate([np.broadcast_to(prompt, (2, TOKENS, WIDTH)), X], axis=1)
        np.testing.assert_array_equal(session.run(None, {"x": X}, adapter=name)[0], want)
    return site


def test_a_prompt_that_is_looked_up_is_known_by_its_name(tmp_path):
    given = model(LOOKED_UP, {"p": OWN, "ids": np.arange(TOKENS)[None]}, {"p": NAME})
    assert assert_swapped(given, tmp_path).adapter == "style"


def test_a_prompt_that_was_folded_under_a_leading_dimension_keeps_that(tmp_path):
    site = assert_swapped(folded(model(REPEATED, {"p": OWN[None]}, {}), NAME), tmp_path)
    assert (site.adapter, site.name_source) == ("style", "folded_from")


def test_a_prompt_that_lost_its_name_is_told_by_the_values_of_the_exported_adapter(tmp_path):
    given = model(REPEATED, {"p": OWN[None]}, {})
    with pytest.raises(NoAdaptersFound):
        find_sites(given)
    with pytest.raises(MismatchError, match="prompt_encoder"):
        find_sites(given, adapter=adapter(OTHER))
    assert assert_swapped(given, tmp_path, adapter=adapter(OWN)).name_source == "adapter_values"


def test_beside_a_prompt_other_constants_may_be_repeated(tmp_path):
    body = f"{REPEATED.replace(' y = ', ' c = ')}\n o = Tile(zero, r)\n y = Concat<axis=1>(c, o)"
    given = model(body, {"p": OWN[None], "zero": np.zeros((1, 2, WIDTH), np.float32)}, {"p": NAME})
    assert extract_adapters(given, tmp_path, make_inputs=True).sites.names == ["prompt_encoder"]


def test_a_prompt_that_the_graph_computes_is_refused_with_the_way_out(tmp_path):
    body = LOOKED_UP.replace("l = Gather(p, ids)", "g = Gather(p, ids)\n l = MatMul(g, w)")
    tensors = {"p": OWN, "ids": np.arange(TOKENS)[None], "w": np.eye(WIDTH, dtype=np.float32)}
    given = model(body, tensors, {"p": NAME, "w": "m.prompt_encoder.style.mlp_head.0.weight"})
    with pytest.raises(NoAdaptersFound, match=r"mlp_head\.0\.weight: of a prompt .*from_pretrained"):
        extract_adapters(given, tmp_path, make_inputs=True)


def test_a_constant_of_the_base_that_is_repeated_is_none():
    with pytest.raises(NoAdaptersFound) as error:
        find_sites(model(REPEATED, {"p": OWN[None]}, {"p": "vit.embeddings.cls_token"}))
    assert "cls_token" not in str(error.value)
