"""Strips: modules laid out as layers by module types, one strip for each stack of like layers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from adapterx.report.survey import Module

# A layer's number has a few digits; a longer one is a hash, or an attempt at Python's limit for integers.
_DIGITS = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Strip:
    """Layers that share a path but for their numbers.

    Args:
        title: the path, a star for each number; ``""`` for modules outside of numbered layers, a row each
        columns: module types, as short as they are told apart
        rows: the layer's numbers (or the module's name), and a module or ``None`` for every column
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Module | None, ...]], ...]

    @property
    def modules(self) -> tuple[Module, ...]:
        """Layer by layer."""
        return tuple(module for _, cells in self.rows for module in cells if module is not None)

    def of_type(self, column: str) -> tuple[Module, ...]:
        """The modules of one column."""
        place = self.columns.index(column)
        return tuple(module for _, cells in self.rows if (module := cells[place]) is not None)


def strips(modules: Iterable[Module]) -> tuple[Strip, ...]:
    """Every module in one strip: layers in the order of their numbers, all else in the order given.

    Example:
        >>> names = ["h.1.attn.c_proj", "h.0.attn.c_proj", "h.0.mlp.c_proj", "head"]
        >>> [(s.title, s.columns, [label for label, _ in s.rows])
        ...  for s in strips(Module(name, "skipped") for name in names)]
        [('h.*', ('attn.c_proj', 'mlp.c_proj'), ['0', '1']), ('', ('module',), ['head'])]
    """
    stacks: dict[str, dict[tuple[int, ...], dict[str, Module]]] = {}
    alone: list[Module] = []
    for module in modules:
        stack, numbers, tail = _parts(module.name)
        if not stack:
            alone.append(module)
            continue
        stacks.setdefault(stack, {}).setdefault(numbers, {})[tail] = module
    found = [_strip(stack, layers) for stack, layers in stacks.items()]
    if alone:
        found.append(Strip("", ("module",), tuple((module.name, (module,)) for module in alone)))
    return tuple(found)


def _parts(name: str) -> tuple[str, tuple[int, ...], str]:
    """``a.0.b.1.c.d`` is module type ``c.d`` of layer (0, 1) of the stack ``a.*.b.*``."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if _is_number(part)]
    if not numbered:
        return "", (), name
    head, tail = parts[: numbered[-1] + 1], parts[numbered[-1] + 1 :]
    stack = ".".join("*" if i in numbered else part for i, part in enumerate(head))
    return stack, tuple(int(parts[i]) for i in numbered), ".".join(tail)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= _DIGITS


def _strip(stack: str, layers: dict[tuple[int, ...], dict[str, Module]]) -> Strip:
    tails = list(dict.fromkeys(tail for members in layers.values() for tail in members))
    rows = tuple(
        (".".join(map(str, numbers)), tuple(members.get(tail) for tail in tails))
        for numbers, members in sorted(layers.items())
    )
    return Strip(stack, tuple(_short(tails)), rows)


def _short(tails: list[str]) -> list[str]:
    """The last parts of each, as few as no other ends with; a number alone says nothing."""
    ends = Counter(end for tail in tails for end in _ends(tail))
    return [next((end for end in _ends(tail) if ends[end] == 1 and not _is_number(end)), tail) for tail in tails]


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
