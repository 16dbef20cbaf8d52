"""verify_mixed passes what is right, and sees rows that get what is another's."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from adapterx.errors import FeedError, ModelError, OptionError
from adapterx.manifest import KEY, MASK, Manifest
from adapterx.runtime.kernels import Kernels, find_kernels
from adapterx.runtime.session import AdapterSession
from adapterx.verify_batch import verify_mixed
from adapterx.verify_rows import row_axes
from tests.runtime.chain import NAMES, Chain, rows

ALONE = "rows of an adapter = each alone"
WHOLE = "rows of an adapter = all rows so"
SUMS = {"rows of a weighted sum = each alone", "rows of a weighted sum = all rows so"}
BASE = {"base rows = each alone", "base rows = all rows so"}
SQUARE = "as many rows as axis 1 is long"
SOME = "one adapter for some rows"
ORDER = "rows in another order"
EVERY = {ALONE, WHOLE, *SUMS, *BASE, ORDER, SOME, SQUARE, "the adapters differ"}
KERNELS = Kernels(Path("lib.so"), "1", "avx2", ("CPUExecutionProvider",), 24)
verify_mixed_module = importlib.import_module("adapterx.verify_batch")
FORMS = {
    "input": Chain(),
    "packed": Chain(port="packed"),
    "required inputs": Chain(optional=False),
}


@pytest.fixture(autouse=True)
def _standard_operators_alone(monkeypatch):
    """What is installed here must not change what a test looks at; two tests ask for a second engine."""
    monkeypatch.setattr(verify_mixed_module, "find_kernels", lambda: None)


def saved(folder, chain=None, change=None, **manifest):
    """The chain as a file, after ``change(graph)``, its manifest changed as said."""
    model = (chain or Chain()).model()
    held = dataclasses.replace(Manifest.loads(model.metadata_props[0].value, where="it"), **manifest)
    helper.set_model_props(model, {KEY: held.dumps()})
    if change:
        change(model.graph)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def through(graph, made, op, *more, **attributes):
    """Every reader of ``made`` reads it through one more node."""
    for node in graph.node:
        node.input[:] = [f"{made}/changed" if name == made else name for name in node.input]
    names = [f"{made}/with{i}" for i in range(len(more))]
    graph.initializer.extend(
        numpy_helper.from_array(np.array(one), name) for one, name in zip(more, names, strict=True)
    )
    node = helper.make_node(op, [made, *names], [f"{made}/changed"], **attributes)
    after = next((i + 1 for i, one in enumerate(graph.node) if made in one.output), 0)
    graph.node.insert(after, node)


def turn_the_mask_round(graph):
    through(graph, MASK, "Slice", [-1], [np.iinfo(np.int64).min], [0], [-1])


def give_all_rows_the_first(graph):
    through(graph, MASK, "Slice", [0], [1], [0])


def round_weights(graph):
    through(graph, MASK, "Floor")


def mix_rows_of_the_base(graph):
    through(graph, f"{NAMES[1]}/base", "Softmax", axis=0)


def failed(verification):
    return {row.check for row in verification.rows if not row.passed}


@pytest.mark.parametrize("chain", FORMS.values(), ids=FORMS)
def test_a_right_model_passes_every_check_in_every_form_of_port(chain, tmp_path):
    outcome = verify_mixed(saved(tmp_path, chain))
    assert outcome.passed, failed(outcome)
    assert {row.check for row in outcome.rows} == EVERY
    assert not outcome.notes
    assert {row.tolerance for row in outcome.rows[:-1]} == {1e-4}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (turn_the_mask_round, {ALONE, WHOLE, *SUMS, *BASE, SOME, SQUARE}),
        (give_all_rows_the_first, {ALONE, WHOLE, *SUMS, *BASE, SOME, SQUARE}),
        (round_weights, {*SUMS, SOME, SQUARE}),
        (mix_rows_of_the_base, EVERY - {ORDER, "the adapters differ"}),
    ],
)
def test_a_model_that_gives_a_row_what_is_anothers_fails(change, failing, tmp_path):
    assert failed(verify_mixed(saved(tmp_path, change=change))) >= failing


def test_a_second_engine_is_compared_with_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_mixed_module, "find_kernels", lambda: "some")
    opened, right = [], AdapterSession

    def session(path, adapters, **options):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        opened.append(options)
        made = right(saved(other, change=round_weights) if len(opened) > 1 else path, adapters)
        monkeypatch.setattr(type(made), "kernels", property(lambda one: None if one is first[0] else KERNELS))
        first.append(made)
        return made

    first = []
    monkeypatch.setattr(verify_mixed_module, "AdapterSession", session)
    outcome = verify_mixed(saved(tmp_path))
    assert opened == [{"kernels": "off"}, {}]
    assert failed(outcome) == {f"avx2 kernels: {check}" for check in (*SUMS, SOME, SQUARE)}


def test_the_compiled_kernels_pass_every_check_too(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_mixed_module, "find_kernels", find_kernels)
    kernels = find_kernels()
    assert kernels is not None, "`make kernels` builds them"
    outcome = verify_mixed(saved(tmp_path))
    assert outcome.passed, failed(outcome)
    by = f"{kernels.isa} kernels: "
    assert {row.check.removeprefix(by) for row in outcome.rows if row.check.startswith(by)} >= {ALONE, WHOLE, *SUMS}


def test_adapters_that_change_nothing_prove_nothing_and_fail(tmp_path):
    outcome = verify_mixed(saved(tmp_path, change=lambda graph: through(graph, "y", "Identity")), tolerance=10.0)
    assert failed(outcome) == {"the adapters differ"}


def test_ports_of_a_fixed_rank_are_proven_with_one_adapter_and_the_base(tmp_path):
    outcome = verify_mixed(saved(tmp_path, Chain(dynamic_rank=False)))
    assert outcome.passed
    assert {row.check for row in outcome.rows} == EVERY - SUMS
    assert SOME in failed(verify_mixed(saved(tmp_path, Chain(dynamic_rank=False), turn_the_mask_round)))


def test_sites_that_cannot_be_mixed_are_told_with_their_reason_and_the_others_proven(tmp_path):
    why = {NAMES[0]: "its rows are gathered by 'topk'", NAMES[2]: "its rows are gathered by 'topk'"}

    def take_no_mask(graph):
        graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 1), np.float32), "one"))
        for node in graph.node:
            if node.op_type == "LowRankAdd" and node.output[0].removesuffix("/y") in why:
                node.input[4] = "one"

    outcome = verify_mixed(saved(tmp_path, change=take_no_mask, unmixed=why))
    assert outcome.passed
    assert outcome.notes == (
        f"one adapter for the whole batch at {NAMES[0]}, {NAMES[2]}: its rows are gathered by 'topk'",
    )


REFUSED = {
    "external ports": ({"chain": Chain(port="external")}, "make_inputs=True"),
    "no input that counts rows": ({"batch": ()}, "no input is known to count them"),
    "no site that tells rows apart": (
        {"unmixed": dict.fromkeys(NAMES, "its rows are gathered by 'topk'")},
        r"none of its sites .* at model.layers.0.q_proj, .*model.head: its rows are gathered by 'topk'",
    ),
    "a whole module at one that cannot": (
        {"unmixed": {NAMES[3]: "it is a prompt"}, "required": (NAMES[3],)},
        f"every adapter has {NAMES[3]}, and it is a prompt",
    ),
    "one adapter and no base": (
        {"chain": Chain(dynamic_rank=False), "required": (NAMES[3],)},
        "one adapter fills them, and without one",
    ),
}


@pytest.mark.parametrize(("how", "why"), REFUSED.values(), ids=REFUSED)
def test_a_model_in_which_nothing_can_be_mixed_is_refused_in_a_sentence(how, why, tmp_path):
    with pytest.raises(ModelError, match=f"rows of one batch cannot have different adapters in .*: .*{why}"):
        verify_mixed(saved(tmp_path, **how))


def fixed_to(n):
    def change(graph):
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = n

    return change


def test_a_batch_fixed_to_one_row_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"a batch of 1 row; 'x' has shape \[1, 5, 8\]"):
        verify_mixed(saved(tmp_path, change=fixed_to(1)))


def test_a_batch_of_fixed_size_is_proven_without_rows_alone_and_says_so(tmp_path):
    outcome = verify_mixed(saved(tmp_path, change=fixed_to(4)))
    assert outcome.passed
    assert {row.check for row in outcome.rows} == {check for check in EVERY if "alone" not in check} - {SQUARE}
    assert outcome.notes[0].startswith("no row was compared with itself alone: ")
    assert {WHOLE, SOME} <= failed(
        verify_mixed(saved(tmp_path, Chain(), lambda g: [f(g) for f in (fixed_to(4), turn_the_mask_round)]))
    )


def test_feeds_of_two_rows_meet_every_entry_in_turn(tmp_path):
    feeds = rows(n=2, t=3)
    outcome = verify_mixed(saved(tmp_path), feeds=feeds)
    assert outcome.passed
    assert {row.check for row in outcome.rows} == EVERY - {SQUARE}
    assert failed(verify_mixed(saved(tmp_path, change=turn_the_mask_round), feeds=feeds)) >= {ALONE, *SUMS, *BASE, SOME}


def test_feeds_of_one_row_and_fewer_than_two_rows_are_refused(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ModelError, match="a batch of 1 row"):
        verify_mixed(path, feeds=rows(n=1))
    with pytest.raises(OptionError, match="rows=1"):
        verify_mixed(path, rows=1)
    with pytest.raises(FeedError, match="none of the inputs that count the rows of a batch is fed: x"):
        verify_mixed(path, feeds={"y": np.zeros(3)})


def test_a_model_without_a_manifest_is_refused(tmp_path):
    onnx.save(Chain().model(plain=True), tmp_path / "plain.onnx")
    with pytest.raises(ModelError, match="no adapterx manifest"):
        verify_mixed(tmp_path / "plain.onnx")


def with_a_norm(graph):
    """A second output that is of no row."""
    graph.node.append(helper.make_node("ReduceSum", ["y"], ["total"], keepdims=0))
    graph.output.append(helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, []))


def test_an_output_that_is_of_no_row_is_left_out_and_named(tmp_path):
    outcome = verify_mixed(saved(tmp_path, change=with_a_norm))
    assert outcome.passed
    assert outcome.notes == ("not of rows, and not compared: total",)


def test_outputs_none_of_which_is_of_rows_are_refused(tmp_path):
    def only(graph):
        with_a_norm(graph)
        del graph.output[0]

    with pytest.raises(ModelError, match="no output has rows of its own for each row of the batch: total"):
        verify_mixed(saved(tmp_path, change=only))


def test_rows_may_lie_on_any_axis_and_be_several_for_each():
    many = [np.zeros((5, 6)), np.zeros((12, 5)), np.zeros((6, 6)), np.zeros(5)]
    one = [np.zeros((5, 1)), np.zeros((2, 5)), np.zeros((1, 1)), np.zeros(5)]
    assert row_axes(many, one, 6) == (1, 0, None, None)


def test_rows_on_a_later_axis_are_compared(tmp_path):
    def turned(graph):
        through(graph, "y", "Identity")
        graph.node.append(helper.make_node("Transpose", ["y"], ["turned"], perm=[1, 0, 2]))
        graph.output[0].CopyFrom(helper.make_tensor_value_info("turned", onnx.TensorProto.FLOAT, ["t", "n", 5]))

    assert verify_mixed(saved(tmp_path, change=turned)).passed

    def wrong(graph):
        turned(graph)
        turn_the_mask_round(graph)

    assert ALONE in failed(verify_mixed(saved(tmp_path, change=wrong)))
