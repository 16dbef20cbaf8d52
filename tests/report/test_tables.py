"""Tables and the bars in them."""

import pytest

from adapterx.report.figures import DASH, Ruler, figures
from adapterx.report.strips import strips
from adapterx.report.survey import Module
from adapterx.report.tables import Bar, sites_table, types_table
from tests.report.made import row


def column(table, label):
    (found,) = [column.cells for column in table.columns if column.label == label]
    return list(found)


def table_of(*rows):
    return sites_table(rows, Ruler.of(rows))


def test_what_every_site_shares_is_said_once_and_what_differs_keeps_its_column():
    table = table_of(row("a"), row("b", op="Gemm"))
    assert dict(table.everywhere) == {
        "adapter": "default",
        "kind": "lora",
        "scale": "2",
        "dtype": "float32",
        "named by": "names weights were folded from",
    }
    assert column(table, "op") == ["MatMul", "Gemm"]


def test_a_single_site_keeps_every_column():
    assert column(table_of(row("a")), "kind") == ["lora"]
    assert table_of(row("a")).everywhere == ()


def test_norms_stand_beside_their_share_of_the_base():
    table = table_of(row("a", norm=3.0, base_norm=30.0), row("b", norm=1.5, base_norm=50.0))
    assert column(table, "‖Δ‖") == ["3.00", "1.50"]
    assert column(table, "‖Δ‖ / ‖W‖, %") == ["10.0", "3.0"]
    assert column(table, "‖Δ‖ / ‖W‖") == [Bar(1.0), Bar(pytest.approx(0.3))]


def test_bars_show_norms_where_one_base_could_not_be_read():
    table = table_of(row("a", norm=2.0), row("b", norm=4.0, base_norm=None))
    assert column(table, "‖Δ‖ / ‖W‖, %") == ["4.00", DASH]
    assert [column.cells for column in table.columns if column.look == "bar"] == [[Bar(0.5), Bar(1.0)]]


def test_without_weights_there_is_no_column_of_norms():
    assert not [c.label for c in table_of(row("a", norm=None), row("b", norm=None)).columns if "Δ" in c.label]


def test_adapters_that_change_nothing_have_norms_and_no_bars():
    table = table_of(row("a", norm=0.0), row("b", norm=0.0))
    assert column(table, "‖Δ‖") == ["0", "0"]
    assert column(table, "‖Δ‖ / ‖W‖") == [None, None]


def test_a_weight_that_is_not_finite_is_named_and_not_drawn():
    table = table_of(row("a", norm=float("nan")), row("b", norm=1.0))
    assert column(table, "‖Δ‖") == ["not finite", "1.00"]
    assert column(table, "‖Δ‖ / ‖W‖") == [None, Bar(1.0)]


def test_parts_of_other_kinds_have_a_column_each():
    table = table_of(row("a", kind="ia3", rank=0, norm=None, parts=(("gain", 0.5),)), row("b"))
    assert column(table, "‖gain‖") == ["0.500", DASH]
    assert column(table, "rank") == [DASH, "16"]
    assert column(table, "kind") == ["ia3", "lora"]


def test_module_types_have_the_range_of_their_layers():
    modules = [
        Module(f"l.{n}.{kind}", "matched", "", (row(f"l.{n}.{kind}", rank=rank, norm=norm, base_norm=100.0),))
        for n, norm in enumerate((1.0, 2.0, 4.0))
        for kind, rank in (("q", 8), ("v", 8 + n))
    ]
    rows = [r for module in modules for r in module.rows]
    table = types_table(strips(modules), Ruler.of(rows))
    assert table is not None
    assert column(table, "module type") == ["q", "v"]
    assert column(table, "sites") == ["3", "3"]
    assert column(table, "rank") == ["8", f"8{DASH}10"]
    assert column(table, "‖Δ‖ / ‖W‖, %: least") == ["1.00", "1.00"]
    assert column(table, "median") == ["2.00", "2.00"]
    assert column(table, "largest") == ["4.00", "4.00"]
    assert column(table, "‖Δ‖ / ‖W‖") == [Bar(end=1.0, start=0.25, tick=0.5)] * 2


def test_modules_of_which_none_comes_twice_have_no_table_of_types():
    modules = [Module(name, "matched", "", (row(name),)) for name in ("fc1", "l.0.q")]
    assert types_table(strips(modules), Ruler(relative=False, top=1.0)) is None


def test_figures_of_a_column_have_the_same_decimals():
    assert figures([123.4, 7.0]) == ("123", "7")
    assert figures([0.0123, 0.00001, None]) == ("0.0123", "<0.0001", DASH)
    assert figures([1e-12]) == ("<0.000001",)
    assert figures([]) == ()
