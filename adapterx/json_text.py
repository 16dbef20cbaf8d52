"""JSON from strangers: no duplicate keys, no NaN, no depth that exhausts the stack."""

from __future__ import annotations

import collections
import json
from typing import Any, NoReturn

from adapterx.errors import FormatError


def json_object(text: bytes, *, where: str, depth: int | None = None) -> dict[str, Any]:
    """The object that ``text`` is.

    Args:
        text: JSON in UTF-8
        where: what is read, for messages
        depth: the deepest nesting that is taken; ``None`` where the caller knows each level's structure anyway

    Raises:
        FormatError: not UTF-8, not JSON, too deep, a key twice in one object, NaN or Infinity, or not an object.

    Example:
        >>> json_object(b'{"r": 8}', where="adapter_config.json", depth=16)
        {'r': 8}
    """
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: expected JSON in UTF-8; byte {error.start} is not UTF-8") from None

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(found)
        if len(table) != len(found):
            [(twice, _)] = collections.Counter(key for key, _ in found).most_common(1)
            raise FormatError(f"{where}: the key {twice!r} is there twice; which one holds cannot be known")
        return table

    def constant(name: str) -> NoReturn:
        raise FormatError(f"{where}: {name} is not JSON; write a number")

    try:
        parsed = json.loads(decoded, object_pairs_hook=pairs, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deep; nothing that belongs here is") from None
    except ValueError as error:
        raise FormatError(f"{where}: expected JSON; {error}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{where}: expected a JSON object, this is a {type(parsed).__name__}")
    if depth is not None:
        _refuse_depth(parsed, where, depth)
    return parsed


def _refuse_depth(parsed: dict[str, Any], where: str, limit: int) -> None:
    """Walk level by level: the parser itself stops at Python's recursion limit, long before the stack ends."""
    level: list[Any] = [parsed]
    for _ in range(limit):
        values = [value for one in level for value in (one.values() if isinstance(one, dict) else one)]
        level = [value for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise FormatError(f"{where}: JSON nested over {limit} deep; nothing that belongs here is")
