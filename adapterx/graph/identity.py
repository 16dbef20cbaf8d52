"""Which of the claims on a branch are believed: the module and the adapter that they name together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from adapterx.errors import ModelError
from adapterx.graph.branches import Branch
from adapterx.graph.claims import Claim, claims_of
from adapterx.graph.paths import Paths
from adapterx.site import NameSource


class Identity(NamedTuple):
    """Who a branch is.

    Args:
        module: as the believed claim spells it
        adapter: its name, ``""`` when no claim has one
        source: of the believed claim
    """

    module: str
    adapter: str
    source: NameSource


def identities(branches: Sequence[Branch], paths: Paths, *, strict: bool) -> list[Identity | None]:
    """Who each branch is by its claims; ``None`` when there are none.

    Claims that contradict each other are an error when ``strict``; else the branch counts as unnamed, for its values
    to decide.

    Raises:
        ModelError: contradictions, when ``strict``.
    """
    places = [f"the branch at {branch.place}" for branch in branches]
    return agreed([list(claims_of(branch)) for branch in branches], places, paths, strict=strict)


def agreed(
    claims: Sequence[Sequence[Claim]], places: Sequence[str], paths: Paths, *, strict: bool
) -> list[Identity | None]:
    """:func:`identities` of anything that claims are made on.

    Args:
        claims: on each thing, in the order in which they are believed
        places: what messages call each thing
        paths: how names of this model are read
        strict: contradictions are an error

    Raises:
        ModelError: contradictions, when ``strict``.
    """
    carriers = Counter(id(claim.carrier) for told in claims for claim in told)
    return [_identity(at, told, paths, carriers, strict=strict) for at, told in zip(places, claims, strict=True)]


def _identity(
    place: str, claims: Sequence[Claim], paths: Paths, carriers: Counter[int], *, strict: bool
) -> Identity | None:
    if not claims:
        return None
    # What several branches share names one of them at most: equal tensors are merged by exporters.
    own = [claim for claim in claims if carriers[id(claim.carrier)] == 1] or claims
    believed = own[0]
    name = paths.canonical(believed.module)
    for claim in own[1:]:
        other = paths.canonical(claim.module)
        if not _agree(name, other) and carriers[id(claim.carrier)] == 1:
            if not strict:
                return None
            raise ModelError(
                f"{place} is {name!r} by its {_words(believed)} but {other!r} by its "
                f"{_words(claim)}; a tool renamed one and not the other. Export again, or give the exported adapter"
            )
    # A module that is called twice shares the tensors that tell its adapter's name.
    told = (claim for claim in (*own, *claims) if claim.adapter and _agree(name, paths.canonical(claim.module)))
    adapter = next((claim.adapter for claim in told), "")
    return Identity(believed.module, adapter, believed.source)


def _words(claim: Claim) -> str:
    return claim.source.replace("_", " ")


def _agree(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith(f".{short}")
