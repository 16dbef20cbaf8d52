"""Which modules a target means, and what is said when it means none."""

from __future__ import annotations

import re

import numpy as np
import pytest

from adapterx.errors import ModelError, OptionError
from adapterx.graph.bases import find_bases
from adapterx.graph.load import load_model
from adapterx.graph.targets import ALL_LINEAR, Modules, modules_of, targeted
from tests.graph.base_models import IDS, W, floats, model
from tests.zoo import build

LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
NAMES = ["model.embed_tokens", *(f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in LAYER), "lm_head"]
MODULES = Modules(dict.fromkeys(NAMES, ()))
FUSED = Modules(dict.fromkeys(["h.0.attn.qkv_proj", "h.0.mlp.gate_up_proj", "h.0.mlp.down_proj"], ()))


def meant(targets, modules=None):
    return targeted(modules or MODULES, targets, where="the model")


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("model.layers.1.self_attn.q_proj", ["layers.1.self_attn.q_proj"]),
        ("layers.1.self_attn.q_proj", ["layers.1.self_attn.q_proj"]),
        ("q_proj", [f"layers.{i}.self_attn.q_proj" for i in (0, 1, 10)]),
        (["lm_head", "embed_tokens"], ["embed_tokens", "lm_head"]),
        (["q_proj", "model.layers.0.self_attn.q_proj"], [f"layers.{i}.self_attn.q_proj" for i in (0, 1, 10)]),
        (re.compile(r".*\.1\.self_attn\.[qv]_proj"), ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        ([re.compile("lm_.*"), "10.mlp.gate_proj"], ["10.mlp.gate_proj", "lm_head"]),
        # A part of a name is not an end of it, and a regular expression is the whole of it.
        (re.compile("lm_head|head"), ["lm_head"]),
    ],
)
def test_a_target_is_a_whole_name_an_end_of_one_or_a_pattern_of_one(targets, ends):
    found = meant(targets)
    assert len(found) == len(ends)
    assert all(name.endswith(end) for name, end in zip(found, ends, strict=True))


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("q_proj", ["h.0.attn.qkv_proj"]),
        (["v_proj", "qkv_proj"], ["h.0.attn.qkv_proj"]),
        ("mlp.up_proj", ["h.0.mlp.gate_up_proj"]),
        (re.compile(r"h\.\d+\.attn\.k_proj"), ["h.0.attn.qkv_proj"]),
    ],
)
def test_the_name_of_a_part_means_the_layer_that_it_was_fused_into(target, found):
    assert meant(target, FUSED) == found


def test_the_name_of_a_fused_layer_means_its_parts():
    assert meant("layers.1.self_attn.qkv_proj") == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert "model.layers.1.mlp.gate_up_proj" not in MODULES.aliases, "there is no up_proj"


def test_targets_that_mean_nothing_are_told_at_once_with_the_nearest_names():
    with pytest.raises(ModelError) as caught:
        meant(["q_prj", "q_proj", re.compile("q_proj"), r".*\.q_proj", "self_attn.v_prj"])
    assert str(caught.value).splitlines() == [
        "no module of the model is meant by",
        "  'q_prj'; nearest is q_proj",
        "  the regular expression 'q_proj'",
        r"  '.*\\.q_proj'; a regular expression has to be compiled: re.compile(...)",
        "  'self_attn.v_prj'; nearest is self_attn.v_proj",
        "It has 17 named modules that adapters can act on, whose names end in: embed_tokens, gate_proj, k_proj, "
        "lm_head, o_proj, q_proj, v_proj",
    ]


@pytest.mark.parametrize("targets", [[], "", [""], ["q_proj", 3], [None]])
def test_what_is_no_target_is_refused(targets):
    with pytest.raises(OptionError, match="targets are names of modules"):
        meant(targets)


def linears(body, tensors, outputs, **names):
    return modules_of(find_bases(model(body, tensors, outputs=outputs, names=names)), "the model")


def test_all_linear_is_every_linear_layer_but_the_one_that_makes_the_logits():
    """As PEFT's ``all-linear``: no embedding, no convolution, no output head, however the head is called."""
    body = "e = Gather(t, i)\na = MatMul(e, w)\nm = MatMul(a, h)\ns = Mul(m, c)\nlogits = Cast<to=1>(s)"
    tensors = {"t": floats(9, 32), "w": W, "h": floats(24, 9), "c": np.float32(2)}
    named = {"t": "embed.weight", "w": "fc.weight", "h": "score.weight"}
    found = modules_of(
        find_bases(model(body, tensors, inputs="int64[n,t] i", outputs="float logits", names=named)), "m"
    )
    assert list(found.named) == ["embed", "fc", "score"]
    assert meant(ALL_LINEAR, found) == ["fc"]
    assert meant([ALL_LINEAR, "embed"], found) == ["embed", "fc"]
    # The same layer is no head when something else is done with what it gives.
    other = modules_of(
        find_bases(model(body.replace("Mul(m, c)", "MatMul(m, c)"), {**tensors, "c": floats(9, 9)},
                         inputs="int64[n,t] i", outputs="float logits", names={**named, "c": "last.weight"})), "m",
    )  # fmt: skip
    assert meant(ALL_LINEAR, other) == ["fc", "score"]


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("ts_llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("genai_llama", {"qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("ts_gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("ts_bert", {"query", "key", "value", "dense"}),
    ],
)
def test_all_linear_of_real_exports(case, kinds):
    modules = modules_of(find_bases(load_model(build(case).base_model)), case)
    found = targeted(modules, ALL_LINEAR, where=case)
    assert {name.rpartition(".")[2] for name in found} == kinds


def test_what_lost_its_name_or_its_own_weight_is_spoken_of():
    modules = Modules(MODULES.named, frozenset({"stem.conv1"}), unnamed=3)
    with pytest.raises(ModelError, match=r"'conv1': stem\.conv1 has a normalization folded(.|\n)*\n3 more .* no name"):
        meant("conv1", modules)


def test_a_model_that_nothing_names_is_refused_with_what_to_do():
    with pytest.raises(ModelError, match=r"nothing names the 1 base operations.*Inject into the export first"):
        linears("y = MatMul(x, w)", {"w": W}, "float y")
    with pytest.raises(ModelError, match="no linear layer, convolution or embedding"):
        modules_of(find_bases(model("y = Cast<to=1>(x)", {}, inputs=IDS)), "the model")
