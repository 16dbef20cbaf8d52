"""The page: a survey as one HTML file that needs nothing else, and no script to be read."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from rich.filesize import decimal

from adapterx.errors import MissingDependency
from adapterx.report.figures import DASH, Ruler, figures
from adapterx.report.strips import Strip, strips
from adapterx.report.survey import Module, Row, Survey
from adapterx.report.tables import sites_table, span, types_table
from adapterx.site import unmixed_lines

try:
    import jinja2
    import markupsafe  # jinja2's own
except ImportError as error:
    raise MissingDependency('reports need jinja2; install it with `pip install "adapterx[report]"`') from error

_HERE = Path(__file__).parent
_SIGNS = {"skipped": DASH, "refused": "\N{MULTIPLICATION X}"}


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A module as it is drawn: no colour without a text that says the same.

    Args:
        look: classes of the style sheet
        text: ranks, or a sign
        words: all of it, for whoever points at it
        row: number of its first site in the table
        length: of its bar, as a part of the longest
    """

    look: str
    text: str
    words: str
    row: int | None
    length: float | None


def page(survey: Survey) -> str:
    """``survey`` as HTML. Every name in it is a stranger's: all are escaped, and no script but ours may run."""
    layout = strips(survey.modules)
    modules = [module for strip in layout for module in strip.modules]
    rows = [row for module in modules for row in module.rows]
    ruler = Ruler.of(rows)
    numbers = {id(row): number for number, row in enumerate(rows, 1)}
    script = (_HERE / "sort.js").read_text(encoding="utf-8").strip()
    return _template().render(
        survey=survey,
        facts=_facts(survey, rows),
        strips=[_drawn(strip, ruler, numbers) for strip in layout],
        states=Counter(module.state for module in modules),
        quantized=sum(bool(module.storage) for module in modules),
        tables=[table for table in (types_table(layout, ruler), sites_table(rows, ruler)) if table],
        ruler=ruler,
        longest=_longest(ruler),
        unmixed=unmixed_lines(survey.sites.unmixed),
        script=markupsafe.Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=metadata.version("adapterx"),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["path"] = lambda name: markupsafe.escape(name).replace(".", markupsafe.Markup(".<wbr>"))
    environment.filters["fraction"] = lambda value: f"{value:.3f}".rstrip("0").rstrip(".")
    return environment.get_template("page.html")


def _facts(survey: Survey, rows: list[Row]) -> list[tuple[str, str]]:
    """What to know first, as label and text."""
    names = dict.fromkeys(name for row in rows for name in row.site.adapter.split("+") if name)
    matched = sum(module.state == "matched" for module in survey.modules)
    facts = [
        ("Sites", f"{matched} of {len(survey.modules)} base operations"),
        ("Rank", span(row.rank for row in rows)),
        ("Adapter weights", decimal(sum(row.nbytes for row in rows))),
        ("Element type", ", ".join(dict.fromkeys(row.site.dtype for row in rows))),
        ("Adapters by name", ", ".join(names)),
        ("Weights come from", survey.ports or "the graph, as it was exported"),
        ("Measured", survey.adapter),
        ("In other files", f"{len(survey.elsewhere)} sites of the same adapters" if survey.elsewhere else ""),
        ("Without a name", f"{survey.nameless} base operations, not drawn here" if survey.nameless else ""),
    ]
    return [(label, text) for label, text in facts if text]


def _longest(ruler: Ruler) -> str:
    return f"{figures([100 * ruler.top])[0]} %" if ruler.relative else figures([ruler.top])[0]


def _drawn(strip: Strip, ruler: Ruler, numbers: Mapping[int, int]) -> tuple[Strip, list[tuple[str, list[Cell | None]]]]:
    def cell(module: Module | None) -> Cell | None:
        return None if module is None else _cell(module, ruler, numbers)

    return strip, [(label, [cell(module) for module in modules]) for label, modules in strip.rows]


def _cell(module: Module, ruler: Ruler, numbers: Mapping[int, int]) -> Cell:
    held = [str(row.rank or row.site.kind) for row in module.rows]
    told = [f"rank {row.rank}" if row.rank else row.site.kind for row in module.rows]
    text = f"{'+'.join(held) or _SIGNS[module.state]}{' q' if module.storage else ''}"
    words = [module.state, *filter(None, (*told, module.storage, module.why))]
    longest = max((value for row in module.rows if (value := ruler.value(row)) is not None), default=None)
    return Cell(
        look=f"{module.state} quantized" if module.storage else module.state,
        text=text,
        words=f"{module.name}: {', '.join(words)}",
        row=numbers[id(module.rows[0])] if module.rows else None,
        length=ruler.length(longest),
    )
