"""One prefix between the names of an adapter and those of a model, when exactly one explains them all."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Collection, Iterator

_NUMBER = re.compile(r"_\d+(?=\.|$)")


def renaming(given: Collection[str], known: Collection[str]) -> Callable[[str], str]:
    """What turns names of an adapter into names of a model.

    A wrapper around the exported module adds or takes away leading parts of every module path. Such a difference is
    undone only when no name fits as it is and a single prefix, added to or taken off, fits more names than any other:
    with two candidates (a text and a vision tower, say) a guess could put an adapter into the wrong one. TorchScript
    numbers modules whose containers its paths leave out, so a name of the model that it has again with a number is two.

    Args:
        given: the adapter's names
        known: the model's names

    Example:
        >>> renaming(["h.0.q"], ["model.h.0.q", "model.h.1.q"])("h.0.q")
        'model.h.0.q'
        >>> renaming(["q"], ["text.q", "vision.q"])("q")
        'q'
    """
    known = set(known)
    if any(name in known for name in given):
        return str
    endings = collections.defaultdict(list)
    for name in known:
        for prefix, rest in _cuts(name):
            endings[rest].append(prefix)
    single = known - {_NUMBER.sub("", name) for name in known if _NUMBER.search(name)}
    votes: collections.Counter[tuple[str, str]] = collections.Counter()
    for name in given:
        votes.update(("add", prefix) for prefix in endings[name])
        votes.update(("drop", prefix) for prefix, rest in _cuts(name) if rest in single)
    match votes.most_common(2):
        case [((action, prefix), most), *others] if not others or others[0][1] < most:
            return (lambda name: prefix + name) if action == "add" else (lambda name: name.removeprefix(prefix))
    return str


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name in two: ``("a.", "b.c")``, ``("a.b.", "c")``."""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)
