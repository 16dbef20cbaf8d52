"""Which claims are believed, which contradictions are errors, and what goes by structure alone."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from adapterx.errors import ModelError, NoAdaptersFound
from adapterx.graph.claims import NAME_SCOPES
from adapterx.graph.sites import find, find_sites
from tests.graph.test_joins import WEIGHTS, model

ONE = "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n p = Add(b, z)\n"
CALLED_AGAIN = (
    f"{ONE} n = Neg(x)\n c = MatMul(n, W)\n m = MatMul(n, A2)\n w = MatMul(m, B2)\n q = Add(c, w)\n y = Sub(p, q)"
)
ONE_NAME = {"A": "fc.lora_A.weight", "B": "fc.lora_B.weight"}


def scoped(proto, scopes):
    """Give nodes, by output name, the scope of a LoRA factor."""
    for node in proto.graph.node:
        if node.output[0] in scopes:
            node.metadata_props.add(key=NAME_SCOPES, value=f"['m', '{scopes[node.output[0]]}', 'linear']")
    return proto


def test_a_name_that_two_branches_share_still_names_both_when_nothing_else_does():
    body = CALLED_AGAIN.replace("A2", "A").replace("B2", "B")
    finding = find(ir.from_proto(model(body, names=ONE_NAME)))
    assert [(found.site.name, len(found.branches)) for found in finding.found] == [("fc", 2)]


def test_names_of_shared_weights_do_not_contradict_each_other():
    body = CALLED_AGAIN.replace("A2", "A").replace("B2", "B")
    assert find_sites(model(body, names={"A": "one.lora_A.weight", "B": "two.lora_B.weight"})).names == ["one"]


def test_structural_names_count_what_was_taken_by_structure(monkeypatch):
    for name in "AB":
        monkeypatch.setitem(WEIGHTS, f"{name}2", WEIGHTS[name] + 1)
    assert find_sites(model(CALLED_AGAIN, names={}), structural=True).names == ["structural.0", "structural.1"]


def test_a_shared_weight_may_bear_another_modules_name(monkeypatch):
    body = CALLED_AGAIN.replace("B2", "B")
    names = {"A": "one.lora_A.weight", "A2": "two.lora_A.weight", "B": "one.lora_B.weight"}
    monkeypatch.setitem(WEIGHTS, "A2", WEIGHTS["A"] + 1)
    assert find_sites(model(body, names=names)).names == ["one", "two"]


def test_the_adapters_name_comes_from_whichever_claim_has_it():
    proto = scoped(model(ONE + " y = Identity(p)", names=ONE_NAME), {"l": "fc.lora_A.style"})
    assert [(site.name, site.adapter) for site in find_sites(proto)] == [("fc", "style")]


@pytest.mark.parametrize(("scope", "agrees"), [("fc", True), ("encoder.fc", True), ("efc", False), ("fc.fc2", False)])
def test_claims_agree_when_one_is_the_end_of_the_other_in_whole_parts(scope, agrees):
    proto = scoped(model(ONE + " y = Identity(p)", names=ONE_NAME), {"l": f"base_model.model.{scope}.lora_A.default"})
    if agrees:
        assert find_sites(proto).names == ["fc"]
    else:
        with pytest.raises(ModelError, match="'fc' by its initializer but"):
            find_sites(proto)


@pytest.mark.parametrize(("change", "same"), [(0, True), (1, False)])
def test_two_branches_of_one_name_are_one_module_only_if_their_weights_are_equal(monkeypatch, change, same):
    for name in "AB":
        monkeypatch.setitem(WEIGHTS, f"{name}2", WEIGHTS[name] + change)
    proto = scoped(
        model(CALLED_AGAIN, names={}),
        {"l": "fc.lora_A.default", "z": "fc.lora_B.default", "m": "fc.lora_A.default", "w": "fc.lora_B.default"},
    )
    if same:
        assert [len(found.branches) for found in find(ir.from_proto(proto)).found] == [2]
    else:
        with pytest.raises(ModelError, match="two different low-rank branches"):
            find_sites(proto)


def test_two_branches_of_one_name_and_another_scale_are_not_one_module():
    body = CALLED_AGAIN.replace("A2", "A").replace("B2)", "B)\n v = Mul(w, s)").replace("Add(c, w)", "Add(c, v)")
    with pytest.raises(ModelError, match="two different low-rank branches"):
        find_sites(model(body, names=ONE_NAME))


def test_sites_come_in_the_order_of_the_graph_wherever_their_names_came_from(monkeypatch):
    for name in "AB":
        monkeypatch.setitem(WEIGHTS, f"{name}2", WEIGHTS[name] + 1)
    proto = model(CALLED_AGAIN, names={"A2": "fc.lora_A.weight", "B2": "fc.lora_B.weight"})
    assert find_sites(proto, structural=True).names == ["structural.0", "fc"]
    finding = find(ir.from_proto(proto), structural=True)
    assert finding.left == ()
    assert len(find(ir.from_proto(proto)).left) == 1


def test_by_structure_goes_only_what_runs_beside_a_base():
    alone = "b = MatMul(other, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n y = Add(b, z)"
    with pytest.raises(NoAdaptersFound, match="looked at"):
        find_sites(model(alone, names={}, x="N, 6] other, float[N, 6"), structural=True)


def test_by_structure_goes_only_what_is_of_low_rank(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "A", WEIGHTS["W"])
    monkeypatch.setitem(WEIGHTS, "B", WEIGHTS["W"][:4])
    with pytest.raises(NoAdaptersFound, match="looked at"):
        find_sites(model(ONE + " y = Identity(p)", names={}), structural=True)
