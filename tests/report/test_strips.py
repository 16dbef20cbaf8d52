"""Modules laid out as layers by module types."""

from adapterx.report.strips import strips
from adapterx.report.survey import Module


def laid(*names):
    return {strip.title: strip for strip in strips(Module(name, "skipped") for name in names)}


def test_layers_stand_in_the_order_of_their_numbers_and_types_in_that_of_the_graph():
    found = laid(*(f"model.layers.{n}.self_attn.{p}" for n in (10, 2, 0) for p in ("q_proj", "k_proj")))[
        "model.layers.*"
    ]
    assert [label for label, _ in found.rows] == ["0", "2", "10"]
    assert found.columns == ("q_proj", "k_proj")
    assert [module.name for module in found.of_type("k_proj")] == [
        f"model.layers.{n}.self_attn.k_proj" for n in (0, 2, 10)
    ]


def test_a_layer_that_lacks_a_module_keeps_its_place_empty():
    found = laid("h.0.fc", "h.0.proj", "h.1.proj")["h.*"]
    assert [[m and m.name for m in cells] for _, cells in found.rows] == [["h.0.fc", "h.0.proj"], [None, "h.1.proj"]]


def test_types_that_end_alike_are_told_apart_by_more_of_their_path():
    found = laid("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc")["h.*"]
    assert found.columns == ("attn.c_proj", "mlp.c_proj", "c_fc")


def test_experts_are_a_stack_of_their_own():
    found = laid("l.0.q", "l.0.experts.0.w1", "l.0.experts.1.w1", "l.1.experts.0.w1")
    assert [label for label, _ in found["l.*.experts.*"].rows] == ["0.0", "0.1", "1.0"]
    assert [label for label, _ in found["l.*"].rows] == ["0"]


def test_a_number_at_the_end_names_a_module_and_no_layer():
    found = laid("blocks.0.attn.to_out.0", "net.2")
    assert found["blocks.*"].columns == ("to_out.0",)
    assert [label for label, _ in found[""].rows] == ["net.2"]


def test_every_module_is_in_one_strip_also_by_a_hostile_name():
    names = [f"m.{'9' * 5000}.q", "m.².q", "", ".", "m..0..q", "m.-1.q", "m.\u0661.q", "m.0.q"]
    drawn = [module.name for strip in laid(*names).values() for module in strip.modules]
    assert sorted(drawn) == sorted(names)
