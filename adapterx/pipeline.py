"""Adapters of a pipeline: one file for several models (U-Net, text encoders), of which an ONNX file is one."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterator, Mapping

from adapterx.adapter import Adapter
from adapterx.errors import MismatchError, OptionError, nearest
from adapterx.flattened import COMPONENTS, PIPELINE, diffusers_spelling, flattened, is_flattened, prefix_of
from adapterx.renaming import renaming

# In the metadata of what is left for one model: what the others would have got.
LEFT_OUT = "left_out"
Shape = tuple[int, int]
_Paths = dict[str, str]


def for_model(adapter: Adapter, sites: Mapping[str, Shape | None]) -> Adapter:
    """What of a pipeline's adapter is for one of its models, under that model's names.

    A flattened name is the site whose own name is the same when its dots are underscores. A wrapper's leading parts
    may be more or less, as in :func:`adapterx.renaming.renaming`. The model of the pipeline is the one whose sites are
    there; where those of two are (SDXL has two text encoders), shapes decide. Changes of the other models are left
    out as a whole, and the metadata ``left_out`` says so.

    Args:
        adapter: any; returned as it is when it is not a pipeline's
        sites: the model's, by name, with ``(d_in, d_out)`` where that is one site's

    Raises:
        MismatchError: a flattened name that several sites have, or changes of two models that both fit.
    """
    groups = _by_component(adapter)
    if groups is None or sum(any(site in sites for site in paths) for paths in groups.values()) > 1:
        return adapter
    aims = {model: aim for model, paths in groups.items() if (aim := _aim(paths, sites))}
    fitting = {model: aim for model, aim in aims.items() if len(aims) == 1 or _have_shapes(adapter, aim, sites)}
    if len(fitting) > 1:
        raise MismatchError(
            f"the adapter has changes for {' and '.join(fitting)}, and both fit this model; "
            f"convert it with component={next(iter(fitting))!r} or the other"
        )
    if not aims:
        return adapter
    # Where no shapes fit, the faults of the nearest tell more than none.
    [(model, aim)] = fitting.items() or [max(aims.items(), key=lambda named: len(named[1]))]
    renamed = {aim.get(site, site): adapter.sites[site] for site in groups[model]}
    if len(renamed) < len(groups[model]):
        raise MismatchError(f"several changes of the adapter are for one site: {_twice(aim)}")
    left = ", ".join(f"{other} ({len(paths)} sites)" for other, paths in groups.items() if other != model)
    return Adapter(renamed, {**adapter.metadata, **({LEFT_OUT: left} if left else {})})


def component(adapter: Adapter, model: str) -> Adapter:
    """The changes of one model of a pipeline.

    Args:
        adapter: a pipeline's
        model: ``unet``, ``text_encoder``, ``text_encoder_2`` ... (:data:`adapterx.flattened.PIPELINE`)

    Raises:
        OptionError: the adapter has none for it.
    """
    groups = _by_component(adapter) or {}
    if model not in groups:
        known = ", ".join(groups) or "none, it is no pipeline's"
        raise OptionError(f"component={model!r}: the adapter has changes for {known}{nearest(model, groups)}")
    return Adapter({site: adapter.sites[site] for site in groups[model]}, adapter.metadata)


def _by_component(adapter: Adapter) -> dict[str, _Paths] | None:
    """Model of the pipeline -> site -> path in that model, flattened or dotted; ``None`` for any other adapter."""
    groups: dict[str, _Paths] = {}
    for site in adapter.sites:
        if is_flattened(site):
            prefix = prefix_of(site)
            groups.setdefault(COMPONENTS[prefix], {})[site] = site.removeprefix(prefix)
            continue
        first, _, rest = site.partition(".")
        if first not in PIPELINE or not rest:
            return None
        groups.setdefault(first, {})[site] = rest
    # Language models have a "transformer", too.
    return None if groups.keys() == {"transformer"} and not is_flattened(next(iter(adapter.sites))) else groups


def _aim(paths: _Paths, sites: Collection[str]) -> dict[str, str]:
    """Site of the adapter -> site of the model, for those that have one."""
    if is_flattened(next(iter(paths))):
        return _unflattened(paths, sites)
    if as_they_are := {given: given for given in paths if given in sites}:
        return as_they_are
    rename = renaming(paths.values(), sites)
    return {given: rename(path) for given, path in paths.items() if rename(path) in sites}


def _unflattened(paths: _Paths, sites: Collection[str]) -> dict[str, str]:
    """As :func:`adapterx.renaming.renaming`, on names without dots."""
    spelled = {given: {flat, diffusers_spelling(flat)} for given, flat in paths.items()}
    whole, ends = collections.defaultdict(list), collections.defaultdict(list)
    for site in sites:
        whole[flattened(site)].append(site)
        for prefix, rest in _cuts(site, "."):
            ends[flattened(rest)].append((prefix, site))
    if not any(flat in whole for flats in spelled.values() for flat in flats):
        votes: collections.Counter[tuple[str, str]] = collections.Counter()
        for flats in spelled.values():
            for flat in flats:
                votes.update(("add", prefix) for prefix, _ in ends[flat])
                votes.update(("drop", prefix) for prefix, rest in _cuts(flat, "_") if rest in whole)
        match votes.most_common(2):
            case [((action, best), most), *others] if not others or others[0][1] < most:
                change = _changed(action, flattened(best))
                spelled = {given: {change(flat) for flat in flats} for given, flats in spelled.items()}
    found = {
        given: sorted({site for flat in flats for site in whole.get(flat, ())}) for given, flats in spelled.items()
    }
    for given, several in found.items():
        if len(several) > 1:
            raise MismatchError(f"{given} may be {' or '.join(several)} of this model; rename it to one of them")
    return {given: one for given, several in found.items() for one in several}


def _changed(action: str, prefix: str) -> Callable[[str], str]:
    return (lambda flat: prefix + flat) if action == "add" else (lambda flat: flat.removeprefix(prefix))


def _cuts(name: str, at: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a name in two behind ``at``."""
    end = name.find(at)
    while end >= 0:
        yield name[: end + 1], name[end + 1 :]
        end = name.find(at, end + 1)


def _have_shapes(adapter: Adapter, aim: Mapping[str, str], sites: Mapping[str, Shape | None]) -> bool:
    for given, target in aim.items():
        shape, change = sites[target], adapter.sites[given]
        if shape is not None and (change.d_in, change.d_out) != shape:
            return False
    return True


def _twice(aim: Mapping[str, str]) -> str:
    counts = collections.Counter(aim.values())
    twice = next(site for site, count in counts.items() if count > 1)
    return f"{' and '.join(given for given, site in aim.items() if site == twice)} for {twice}"
