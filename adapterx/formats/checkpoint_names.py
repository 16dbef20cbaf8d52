"""Which module of a checkpoint a PEFT module path means: the same, but for the prefix that a model class adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def module_names(sites: Collection[str], modules: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """The modules of a checkpoint that each site can mean: one; none; or several, which nothing tells apart.

    PEFT names modules as the class has them that it wrapped; a checkpoint names them as the class that saved it. The
    two differ in what stands in front (``bert.encoder`` and ``encoder``), and for some classes in the order of it
    (``model.language_model.layers``, ``language_model.model.layers``). One change of what stands in front has to do for
    all sites that do not have their very name in the checkpoint.

    Example:
        >>> module_names(["encoder.0.q"], ["bert.encoder.0.q", "bert.encoder.0.k"])
        {'encoder.0.q': ('bert.encoder.0.q',)}
    """
    known = set(modules)
    found: dict[str, tuple[str, ...]] = {site: (site,) if site in known else () for site in sites}
    others = [site for site in sites if site not in known]
    most: list[dict[str, str]] = [{}]
    for old, new in sorted(_changes(others, known)):
        renamed = {site: _renamed(site, old, new) for site in others}
        fits = {site: name for site, name in renamed.items() if name in known and name not in found}
        if len(fits) >= len(most[0]):
            most = [fits] if len(fits) > len(most[0]) else [*most, fits]
    for site in others:
        found[site] = tuple(sorted({fits[site] for fits in most if site in fits}))
    return found


def _renamed(site: str, old: str, new: str) -> str:
    return new + site[len(old) :] if site.startswith(old) else ""


def _changes(sites: Collection[str], modules: Collection[str]) -> set[tuple[str, str]]:
    """Changes of what stands in front that give some site the name of a module."""
    changes = set()
    for site in sites:
        parts = site.split(".")
        for module in modules:
            others = module.split(".")
            same = 0
            while same < min(len(parts), len(others)) and parts[-1 - same] == others[-1 - same]:
                same += 1
            if same:
                old, new = (".".join(p[: len(p) - same]) for p in (parts, others))
                changes.add((f"{old}." if old else "", f"{new}." if new else ""))
    return changes
