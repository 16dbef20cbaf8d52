"""The page: its structure, what it says without colours, and that it trusts no name."""

import base64
import hashlib
import re

import pytest

from adapterx.report.figures import DASH
from adapterx.report.page import page
from adapterx.report.survey import Module
from tests.report.made import matched, parsed, row, survey

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TYPES = (*TYPES, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
HOSTILE = ("<script>alert('x')</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "{{ 7 * 7 }}", "a\0b\n<!--")


def llama(layers):
    names = [f"model.layers.{n}.{kind}" for n in range(layers) for kind in TYPES]
    return survey(*(matched(name, "quantized to 4 bits", norm=1.0 + i) for i, name in enumerate(names)))


@pytest.fixture(scope="module")
def mixed():
    return survey(
        matched("model.layers.0.q", "quantized to 4 bits in blocks of 32", rank=8),
        Module("model.layers.1.q", "refused", why="a reason"),
        Module("model.layers.0.v", "matched", "", (row("model.layers.0.v", rank=4), row("model.layers.0.v", rank=16))),
        Module("model.layers.1.v", "skipped", "quantized to 8 bits"),
        matched("lm_head", kind="ia3", rank=0, norm=None, parts=(("gain", 0.5),)),
        refused=("model.layers.1.q: a reason",),
    )


def cells(tree):
    """Text of every drawn module by what is said of it."""
    drawn = [cell for strip in tree.all("table", class_="strip") for cell in strip.all(class_="cell")]
    return {cell.attributes["title"]: cell.text for cell in drawn}


def test_every_module_is_drawn_and_a_text_says_what_its_colour_says(mixed):
    assert cells(parsed(page(mixed))) == {
        "model.layers.0.q: matched, rank 8, quantized to 4 bits in blocks of 32": "8 q",
        "model.layers.0.v: matched, rank 4, rank 16": "4+16",
        "model.layers.1.q: refused, a reason": "✕",
        "model.layers.1.v: skipped, quantized to 8 bits": f"{DASH} q",
        "lm_head: matched, ia3": "ia3",
    }


def test_the_legend_counts_what_is_drawn(mixed):
    legend = parsed(page(mixed)).one("ul", class_="legend")
    assert [re.findall(r"\((\d+)\)", item.text) for item in legend.all("li")][:4] == [["3"], ["1"], ["1"], ["2"]]


def test_every_site_has_a_row_and_every_link_leads_to_one(mixed):
    tree = parsed(page(mixed))
    rows = {
        one.attributes["id"]: next(one.all("td")).text for one in tree.one("table", id="sites").one("tbody").all("tr")
    }
    assert sorted(rows.values()) == sorted(r.site.name for module in mixed.modules for r in module.rows)
    for link in tree.all("a"):
        assert link.attributes["title"].startswith(f"{rows[link.attributes['href'].removeprefix('#')]}: ")


def test_reasons_are_listed(mixed):
    assert [item.text for item in parsed(page(mixed)).one("ul", class_="reasons").all("li")] == list(mixed.refused)


def test_the_page_asks_for_nothing_from_anywhere(mixed):
    text = page(mixed)
    assert not re.search(r"https?:|//\w|@import|url\(|\bsrc=", text)
    assert not [one.tag for one in parsed(text).all() if one.tag in {"link", "img", "iframe", "object", "form"}]


def test_no_script_but_its_own_may_run(mixed):
    tree = parsed(page(mixed))
    digest = base64.b64encode(hashlib.sha256(tree.one("script").text.encode()).digest()).decode()
    (policy,) = [m for m in tree.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(part.split(" ", 1) for part in policy.attributes["content"].split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{digest}'"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_and_nothing_else_wherever_it_stands(name):
    modules = (
        matched(f"m.0.{name}", op=name, adapter=name),
        matched(name, kind=name),
        Module(f"m.1.{name}", "skipped"),
    )
    hostile = survey(*modules, model=name, ports=name, adapter=name, refused=(name,))
    harmless = survey(
        matched("m.0.x", op="x", adapter="x"),
        matched("x", kind="x"),
        Module("m.1.x", "skipped"),
        **{"model": "x", "ports": "x", "adapter": "x", "refused": ("x",)},
    )
    tree = parsed(page(hostile))
    # A path is broken at its dots, which makes elements of its own.
    shape = [one.tag for one in tree.all() if one.tag != "wbr"]
    assert shape == [one.tag for one in parsed(page(harmless)).all() if one.tag != "wbr"]
    assert tree.one("h1").text == name
    assert [item.text for item in tree.one("ul", class_="reasons").all("li")] == [name]


def test_a_column_that_a_stranger_named_cannot_leave_the_style_sheet():
    parts = (('"}</style><script>', 0.5),)
    tree = parsed(page(survey(matched("a", norm=None, parts=parts))))
    assert [one.tag for one in tree.all("script")] == ["script"]


def test_448_sites_make_a_small_page():
    text = page(llama(64))
    assert len(text.encode()) < 300_000
    assert len(cells(parsed(text))) == 448


def test_ids_are_unique(mixed):
    ids = [one.attributes["id"] for one in parsed(page(mixed)).all() if "id" in one.attributes]
    assert len(ids) == len(set(ids))


def test_the_longest_bar_is_that_of_the_largest_change():
    tree = parsed(page(survey(*(matched(name, norm=norm) for name, norm in (("a", 1.0), ("b", 4.0), ("c", 2.0))))))
    (strip,) = tree.all("table", class_="strip")
    assert [bar.attributes["style"] for bar in strip.all("i")] == ["--v:0.25", "--v:1", "--v:0.5"]
    meters = [one.attributes["style"] for one in tree.one("table", id="sites").all(class_="meter")]
    assert meters == ["--e:0.25", "--e:1", "--e:0.5"]


def test_a_module_of_two_adapters_has_the_bar_of_the_larger():
    two = Module("b", "matched", "", (row("b", norm=3.0), row("b", norm=1.0)))
    (strip,) = parsed(page(survey(matched("a", norm=4.0), two))).all("table", class_="strip")
    assert [bar.attributes["style"] for bar in strip.all("i")] == ["--v:1", "--v:0.75"]
