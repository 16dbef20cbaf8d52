"""Every module of a model and what became of it: matched, skipped, or refused and why."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

import onnx_ir as ir

from adapterx.graph.bases import Base
from adapterx.graph.operations import operation
from adapterx.graph.sites import Finding
from adapterx.report.survey import Module, Row, State

_TOKEN = re.compile(r"[\w.\-]+")
# Paths of real modules are shorter, and all stretches of a very long one would take minutes.
_DEEPEST = 40


def reasons(finding: Finding) -> dict[str, ir.Node | None]:
    """What cannot be taken, in words, and the base operation that it is about, where the graph tells."""
    found: dict[str, ir.Node | None] = dict.fromkeys(finding.unsupported)
    for branch in finding.left:
        line = next((line for line in finding.unsupported if line.startswith(f"{branch.place}:")), None)
        shape = f"{branch.a.d_in} -> {branch.rank} -> {branch.b.d_out}"
        found[line or f"{branch.place}: {shape}, low-rank, but nothing shows it to be an adapter"] = branch.base_op
    return found


def modules(
    bases: list[Base], rows: list[tuple[Base | None, Row]], refused: Mapping[str, ir.Node | None]
) -> tuple[Module, ...]:
    """Every base that has a name, in graph order, and after them the sites whose base is none of these.

    Args:
        bases: of the model, without factors of adapters
        rows: sites in numbers, each with its base
        refused: as :func:`reasons` gives it
    """
    sites: dict[str, list[Row]] = {}
    hosted: dict[Base, dict[str, None]] = {}
    for host, row in rows:
        sites.setdefault(row.site.name, []).append(row)
        if host is not None:
            hosted.setdefault(host, {})[row.site.name] = None
    why = _spoken_of(refused, bases)
    found: dict[str, Module] = {}
    for base in bases:
        for name in hosted.get(base) or filter(None, [base.name]):
            state: State = "matched" if name in sites else "refused" if name in why else "skipped"
            module = Module(name, state, _storage(base), tuple(sites.get(name, ())), why.get(name, ""))
            # A module that is called several times has several bases of one name.
            found.setdefault(name, module)
    for name, members in sites.items():
        found.setdefault(name, Module(name, "matched", "", tuple(members)))
    return tuple(found.values())


def _storage(base: Base) -> str:
    """How a quantized weight is stored, in words; ``""`` for floats."""
    weight = base.weight
    if weight is None:
        step = operation(base.op)
        tensor = None if step is None else ir.convenience.get_const_tensor(step.root)
        return "" if tensor is None or tensor.dtype.is_floating_point() else f"quantized ({base.op.op_type})"
    blocks = f" in blocks of {weight.block_size}" if weight.block_size else ""
    return f"quantized to {weight.bits} bits{blocks}" if weight.quantized else ""


def _spoken_of(refused: Mapping[str, ir.Node | None], bases: Iterable[Base]) -> dict[str, str]:
    """Module name -> reason, for reasons that are about a base operation or begin with a module's path."""
    names = {base.op: base.name for base in bases if base.name}
    known = frozenset(names.values())
    found: dict[str, str] = {}
    for line, op in refused.items():
        name = _longest(line.partition(": ")[0], known) if op is None else names.get(op, "")
        if name:
            found.setdefault(name, line)
    return found


def _longest(text: str, names: Container[str]) -> str:
    """The longest path among ``names`` that stands in ``text``, alone or inside a tensor's name."""
    best = ""
    for token in _TOKEN.findall(text):
        parts = token.split(".")[:_DEEPEST]
        stretches = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        best = max((best, *(path for path in stretches if path in names)), key=len)
    return best
