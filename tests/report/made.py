"""Surveys made by hand, and an HTML page as a tree that a test can ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from html.parser import HTMLParser

from adapterx.report.survey import Module, Row, Survey
from adapterx.site import AdapterSite, SiteTable

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


def site(name, *, kind="lora", adapter="default", rank=16, op="MatMul", d_in=4096, d_out=4096):
    return AdapterSite(name, adapter, kind, op, d_in, d_out, rank, 2.0, "float32", "folded_from", "node")


def row(name, *, norm=1.0, base_norm=50.0, parts=(), **fields):
    one = site(name, **fields)
    return Row(one, one.rank, one.rank * (one.d_in + one.d_out) * 4, norm, base_norm, parts)


def matched(name, storage="", **fields):
    return Module(name, "matched", storage, (row(name, **fields),))


def survey(*modules, model="model.onnx", **fields):
    sites = SiteTable(r.site for module in modules for r in module.rows)
    return Survey(**{"model": model, "ports": "", "adapter": "", "sites": sites, "modules": modules, **fields})


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())

    def all(self, tag: str = "", **attributes: str) -> Iterator[Element]:
        """Every element below, in order; ``class_`` asks for one class among several."""
        wanted = attributes.pop("class_", None)
        for child in self.children:
            if isinstance(child, Element):
                same = all(child.attributes.get(key) == value for key, value in attributes.items())
                if child.tag == (tag or child.tag) and same and (wanted is None or wanted in child.classes):
                    yield child
                yield from child.all(tag, **attributes, **({} if wanted is None else {"class_": wanted}))

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found


class Tree(HTMLParser):
    """Parses strictly: an element that is not closed where it must be is an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert len(self.open) == 1, f"never closed: {[element.tag for element in self.open[1:]]}"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parsed(page: str) -> Element:
    return Tree(page).root
