"""Sizes: dimensions before the run, as products of a number and names: ``n * t * 48 / 48`` is ``n * t``."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import onnx_ir as ir

_NAME = re.compile(r"[A-Za-z_][\w.]*")
# Shape inference makes up names where it gives up; so do we, in our own way.
_INFERRED = re.compile(r"unk__\d+")
_UNKNOWN = "?"


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """``number`` times everything in ``names``.

    Args:
        number: what is known of it as a number; may be 0 or -1 where a shape is written
        names: sorted; two sizes of one name are equal in every run
    """

    number: int
    names: tuple[str, ...] = ()

    @property
    def is_number(self) -> bool:
        """Whether it is known altogether."""
        return not self.names

    @property
    def is_plain(self) -> bool:
        """Whether its names are the model's own, and nothing computed or unknown."""
        return all(_NAME.fullmatch(name) or name in ROWS.names for name in self.names)

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, tuple(sorted((*self.names, *other.names))))

    def __add__(self, other: Size) -> Size:
        if self.names == other.names:
            return Size(self.number + other.number, self.names)
        if 0 in {self.number, other.number}:
            return self if other.number == 0 else other
        return _named("({}+{})", *sorted((str(self), str(other))))

    def __sub__(self, other: Size) -> Size:
        if self.names == other.names:
            return Size(self.number - other.number, self.names)
        return self if other.number == 0 else _named("({}-{})", str(self), str(other))

    def over(self, other: Size) -> Size | None:
        """The quotient, if it is whole in every run; else ``None``."""
        mine, theirs = Counter(self.names), Counter(other.names)
        if other.number == 0 or self.number % other.number or theirs - mine:
            return None
        return Size(self.number // other.number, tuple(sorted((mine - theirs).elements())))

    def __str__(self) -> str:
        return "*".join([*([str(self.number)] if self.number != 1 or not self.names else []), *self.names])


ZERO, ONE = Size(0), Size(1)
# The number of rows of the batch, where the model leaves it open. No dimension of a model is called so.
ROWS = Size(1, ("rows of the batch",))


def named(name: str) -> Size:
    """A size of which nothing else is known."""
    return Size(1, (name,))


def unknown(value: str | None, axis: int) -> Size:
    """A dimension of which nothing is known, but that it is this one."""
    return named(f"{_UNKNOWN}{value}:{axis}")


def product(sizes: tuple[Size, ...] | list[Size]) -> Size:
    """Of no sizes: 1."""
    total = ONE
    for size in sizes:
        total = total * size
    return total


def stated(dim: int | ir.SymbolicDim, names: dict[str, Size]) -> Size | None:
    """What a model says of a dimension, or ``None`` when it says nothing.

    Args:
        dim: of a value's shape. Exporters write products and sums too: ``2*s77``, ``past + tokens``
        names: what names in it stand for, where that is known
    """
    if isinstance(dim, int):
        return Size(dim)
    if dim.value is None or _INFERRED.search(dim.value):
        return None
    text = dim.value.replace(" x ", "*")
    if text in names:
        return names[text]
    if "+" in text and "(" not in text:
        terms = [_term(part.strip(), names) for part in text.split("+")]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total
    return _term(text, names)


def _term(text: str, names: dict[str, Size]) -> Size:
    if text in names:
        return names[text]
    parts = [part.strip() for part in text.split("*")]
    if not all(part.isdigit() or _NAME.fullmatch(part) for part in parts):
        return named(text)
    return product([Size(int(part)) if part.isdigit() else names.get(part, named(part)) for part in parts])


def _named(form: str, *parts: str) -> Size:
    return named(form.format(*parts))
