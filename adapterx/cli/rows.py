"""Adapters by name and rows of a batch, as they are typed: ``--adapter fr=a.npz --adapter de --rows fr,-,fr+de=0.3``.

A name has no ``=``, ``+`` or ``,`` in it and does not begin with ``-``, which so can stand for the base.
"""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from adapterx.runtime.rows import RowAdapter

BASE: Final = "-"


def named(given: Iterable[str]) -> dict[str, Path]:
    """Paths by name: what stands before ``=``, or else a part of the file's name.

    Raises:
        OptionError: two of one name.
    """
    from adapterx.errors import OptionError

    paths: dict[str, Path] = {}
    for one in given:
        before, equals, after = one.partition("=")
        # A file may have the sign in its own name.
        name, path = (before, Path(after)) if equals and not Path(one).exists() else (_name_for(Path(one)), Path(one))
        if name in paths:
            raise OptionError(f"two adapters are called {name!r}: {paths[name]} and {path}; name them, NAME=PATH")
        paths[name] = path
    return paths


def parsed(text: str) -> list[RowAdapter]:
    """One entry a row: a name, ``None`` for ``-``, or names with weights.

    Raises:
        OptionError: a row that is nothing of these, by its number from 0.

    Example:
        >>> parsed("fr,-,fr=0.7+de=0.3,de=0.5")
        ['fr', None, {'fr': 0.7, 'de': 0.3}, {'de': 0.5}]
    """
    return [_entry(row, entry.strip()) for row, entry in enumerate(text.split(","))]


def _entry(row: int, text: str) -> RowAdapter:
    from adapterx.errors import OptionError

    if text == BASE:
        return None
    if text and "=" not in text and "+" not in text:
        return text
    weights: dict[str, float] = {}
    for term in text.split("+"):
        name, equals, weight = (part.strip() for part in term.partition("="))
        if not name or name in weights:
            met = f"{name!r} twice" if name else "a name missing"
            raise OptionError(f"row {row}: expected a name, {BASE} for the base, or fr=0.7+de=0.3; got {text!r}, {met}")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise OptionError(f"row {row}: the weight of {name!r} must be a number; got {weight!r}") from None
    return dict(weights)


def _name_for(path: Path) -> str:
    """What the session, and so its messages, calls the adapter of a file: a part of the file's name that it allows."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem).lstrip("-._")[:64] or "adapter"
