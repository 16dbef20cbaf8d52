"""Config fields: their defaults, and the values that each takes.

A field set to what is not implemented is an error; nothing is ignored.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """The values that a field takes.

    Args:
        holds: whether a value is one of them
        words: what is expected, for the error
        listed: the value itself is a list; else a list is one value a trial, for `autotune`
    """

    holds: Callable[[Any], bool]
    words: str
    listed: bool = False


def one_of(*values: object) -> Rule:
    """One of ``values``; True is not 1."""
    return Rule(
        lambda v: any(v == known and isinstance(v, bool) == isinstance(known, bool) for known in values),
        "one of " + ", ".join(repr(value) for value in values) if len(values) > 1 else f"only {values[0]!r}",
    )


def integer(low: int, high: int | None = None, *, also: Sequence[object] = ()) -> Rule:
    """An integer from ``low`` to ``high``, or one of ``also``."""
    words = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return Rule(
        lambda v: (type(v) is int and v >= low and (high is None or v <= high)) or any(v is a or v == a for a in also),
        words + "".join(f", or {value!r}" for value in also),
    )


def number(low: float, high: float, *, also: Sequence[object] = ()) -> Rule:
    """A number from ``low`` to ``high``, or one of ``also``."""
    return Rule(
        lambda v: (
            (isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high)
            or any(v is a or v == a for a in also)
        ),
        f"a number from {low} to {high}" + "".join(f", or {value!r}" for value in also),
    )


FLAG = one_of(True, False)
# What only says how memory or time is spent takes any value: results are the same.
ANY = Rule(lambda _: True, "anything", listed=True)
LAYERS = Rule(
    lambda v: v == "*" or (isinstance(v, list | tuple) and all(isinstance(k, str | type) for k in v)),
    "'*', or a list of names, regular expressions and module classes",
    listed=True,
)


def only(default: object, *, listed: bool = False) -> Rule:
    """Nothing but the default: what else Neural Compressor has for the field is not implemented."""

    def holds(value: Any) -> bool:
        # JSON knows no tuples.
        plain = tuple(value) if isinstance(value, list) and isinstance(default, tuple) else value
        return bool(plain == default) and isinstance(value, bool) == isinstance(default, bool)

    return Rule(holds, f"only {default!r}", listed=listed)


def option(*, default: Any, rule: Rule | None = None) -> Any:
    """A field with its default and the values that it takes; without a rule only the default."""
    listed = isinstance(default, list | dict | tuple)
    metadata = {"rule": only(default, listed=listed) if rule is None else rule}
    if listed:
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
