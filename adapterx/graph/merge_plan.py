"""Which base of a model takes which part of an adapter, before anything is changed."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from adapterx.adapter import MAGNITUDE, PROMPT, WHOLE_BIAS, Adapter, Array, LowRank
from adapterx.base_weight import read_weight
from adapterx.errors import MismatchError, nearest
from adapterx.fused import fused_sites, joined, parts_of_fused, split
from adapterx.graph.base_names import gets_bias_later
from adapterx.graph.bases import Base
from adapterx.graph.operations import factor_of
from adapterx.graph.stored import tensor_reader
from adapterx.graph.targets import FOLDED
from adapterx.graph.weights import read
from adapterx.kinds import shaped
from adapterx.kinds.merged import Merger, merger
from adapterx.kinds.saved import needs_base
from adapterx.pipeline import for_model
from adapterx.renaming import renaming
from adapterx.site import AdapterSite

_SHOWN = 50
_READ_ONLY = ("nf4", "fp4")
_CODES = ("int32", "int8", "uint8")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """One base and what is merged into it.

    Args:
        base: the operation
        merger: the change beside its weight and bias
        keep_grid: the scale of a quantized bias depends on that of the weight, which so has to stay
    """

    base: Base
    merger: Merger
    keep_grid: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is to be merged.

    Args:
        adapter: as a reader made it
        amount: how much of it
        undo: take it out of a model that it was merged into
        elsewhere: sites that the adapter may have and this file does not
        partial: any site may be in another file
        required: sites whose base is not in the graph, by name
    """

    adapter: Adapter
    amount: float
    undo: bool = False
    elsewhere: Sequence[str] = ()
    partial: bool = False
    required: Mapping[str, AdapterSite] = dataclasses.field(default_factory=dict)


def plan(bases: Iterable[Base], values: Mapping[str, ir.Value], request: Request) -> list[Planned]:
    """What becomes of each base that the adapter speaks of.

    Args:
        bases: of the model; one name may have several
        values: everything that a stored weight names
        request: what is to be merged

    Raises:
        MismatchError: sites that the model does not have, or that do not fit; all faults at once.
    """
    by_name: dict[str, list[Base]] = defaultdict(list)
    folded: set[str] = set()
    for base in bases:
        if base.folded:
            folded.add(base.folded)
        if base.name:
            by_name[base.name].append(base)
    faults: list[tuple[str, str]] = []
    planned: list[Planned] = []
    for name, change in _changes(by_name, folded, request, faults).items():
        if name in request.required and (lost := needs_base(change, request.required[name], request.adapter.metadata)):
            faults.append((name, lost))
            continue
        for base in by_name[name]:
            try:
                done = _merger(base, change, values, request)
                planned.append(Planned(base, done, keep_grid=_bias_dtype(base) in _CODES))
            except ValueError as fault:
                faults.append((name, str(fault)))
    if faults:
        raise MismatchError(_message(request.adapter, list(dict.fromkeys(faults)), by_name))
    return planned


def _message(adapter: Adapter, faults: list[tuple[str, str]], known: Mapping[str, object]) -> str:
    lines = [f"{site}: {fault}" for site, fault in faults[:_SHOWN]]
    lines += [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    told = "\n  ".join(lines)
    if not known:
        told += "\n  no module of the model has a name; export it again without optimization"
    where = adapter.metadata.get("source", "the adapter")
    places = len({site for site, _ in faults})
    return (
        f"{where} cannot be merged at {places} of {len(adapter.sites)} sites:\n  {told}\nNothing was written. Adapter "
        "and model must come from one checkpoint."
    )


def _changes(
    by_name: Mapping[str, Sequence[Base]], folded: Collection[str], request: Request, faults: list[tuple[str, str]]
) -> dict[str, LowRank]:
    """Changes by the name of the base; those of fused layers cut or put together."""
    sites = {name: _site(members[0]) for name, members in by_name.items()}
    fused, parts = fused_sites(sites), parts_of_fused(list(sites))
    # Sites of a pipeline's adapter that are another model's are no faults.
    shapes = dict.fromkeys({*fused, *parts}) | {name: site.shape for name, site in sites.items()}
    adapter = for_model(request.adapter, shapes)
    given = [name for name in adapter.sites if name not in request.elsewhere]
    rename = renaming(given, [*sites, *fused, *parts, *folded])
    peft_type = adapter.metadata.get("peft_type", "")
    found: dict[str, LowRank] = {}
    to_join: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for original in given:
        change, name = adapter.sites[original], rename(original)
        first = sites.get(name) or sites.get(parts.get(name, "")) or next(iter(fused.get(name, ())), None)
        if first is not None:
            change = shaped(change, first.d_in, first.kernel, peft_type=peft_type)
        if PROMPT in change.parts:
            faults.append((original, "a prompt stands beside the weights, and cannot be merged into any"))
        elif name in sites:
            found[name] = change
        elif name in parts:
            to_join[parts[name]][name.rpartition(".")[2]] = change
        elif name in fused:
            found |= _cut(original, change, fused[name], faults)
        elif name in folded:
            faults.append((original, f"the module has {FOLDED}"))
        elif not request.partial:
            faults.append((original, f"the model has no such module{nearest(original, sites)}"))
    for name, members in to_join.items():
        try:
            found[name] = joined(members, name.rpartition(".")[2], sites[name].d_out)
        except ValueError as fault:
            faults.append((name, str(fault)))
    if not found and not faults:
        faults += [(name, f"the model has no such module{nearest(name, sites)}") for name in given]
    return found


def _cut(name: str, change: LowRank, parts: Sequence[AdapterSite], faults: list[tuple[str, str]]) -> dict[str, LowRank]:
    widths = [part.d_out for part in parts]
    if sum(widths) != change.d_out:
        faults.append((name, f"the adapter gives {change.d_out} features, the model's parts {widths}"))
        return {}
    return {part.name: piece for part, piece in zip(parts, split(change, widths), strict=True)}


def _site(base: Base) -> AdapterSite:
    return AdapterSite(
        name=base.name,
        adapter="",
        kind="lora",
        op=base.op.op_type,
        d_in=base.d_in,
        d_out=base.d_out,
        rank=0,
        scale=1.0,
        dtype=base.dtype,
        name_source=base.name_source,
        node=base.op.name or "",
        kernel=base.kernel,
    )


def _merger(base: Base, change: LowRank, values: Mapping[str, ir.Value], request: Request) -> Merger:
    """The change beside this base; ValueError with the cause where they cannot be one."""
    ref = base.weight
    if ref is None:
        raise ValueError(
            f"its weight ({base.op.op_type}) is not stored in a form that can be written again (columns reordered by "
            "g_idx, packed for one device, or made by the run)"
        )
    groups = base.d_in // ref.shape[1] if base.kind == "conv" else 1
    if groups > 1 and change.rank:
        raise ValueError(
            f"a convolution in {groups} groups: its adapter reads all channels for every output, and its weight cannot"
        )
    tensor = tensor_reader(values)
    bias = _bias(base)
    change = _among_columns(base, change)
    done = merger(
        change,
        (ref.d_in, ref.d_out),
        amount=request.amount,
        weight=lambda: read_weight(ref, tensor),
        bias=bias,
        whole_rows_first=base.kind == "embedding",
    )
    if done.changes_weight and ref.storage in _READ_ONLY:
        raise ValueError(f"its weight is in {ref.storage}, which can be read but not written")
    _refuse_odd_bias(base, change, done, bias)
    if not request.undo:
        return done
    if not change.is_relative:
        raise ValueError("what it did cannot be undone from the merged weight alone; keep the base model")
    if ref.quantized:
        raise ValueError("its weight is quantized; what rounding took away cannot be undone. Keep the base model")
    return done.undone()


def _among_columns(base: Base, change: LowRank) -> LowRank:
    """The change beside the stored weight, whose columns the graph scales or puts in order first."""
    if base.columns and change.parts:
        raise ValueError("its inputs are scaled or put in order before its weight; only plain LoRA can be merged there")
    a = change.a
    for value in base.columns:
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None, "columns are constants"
        held = read(tensor)
        a = a[:, held] if np.issubdtype(held.dtype, np.integer) else a / held
    return dataclasses.replace(change, a=np.ascontiguousarray(a)) if base.columns else change


def _bias_dtype(base: Base) -> str:
    tensor = None if base.bias is None else ir.convenience.get_const_tensor(base.bias)
    return "" if tensor is None else str(tensor.dtype.numpy())


def _bias(base: Base) -> Array | None:
    """The bias as numbers; ``None`` where there is none, or codes."""
    tensor = None if base.bias is None else ir.convenience.get_const_tensor(base.bias)
    if tensor is None or _bias_dtype(base) in _CODES:
        return None
    found = read(tensor).reshape(-1)
    return np.asarray(np.broadcast_to(found, base.d_out) if found.size == 1 else found)


def _refuse_odd_bias(base: Base, change: LowRank, done: Merger, bias: Array | None) -> None:
    if done.shift is not None and bias is None and not base.pure:
        raise ValueError(
            f"it shifts the output, and {base.op.op_type} gives more than a product that a bias could be added to"
        )
    if done.shift is not None and bias is None and factor_of(base.op) != 1:
        raise ValueError(
            "it shifts the output, and an optimizer multiplies that with a number, before or after the model would add "
            "a bias; merge into the export, then optimize"
        )
    if done.changes_bias and _bias_dtype(base) in _CODES:
        raise ValueError(f"it changes the bias, which is quantized ({_bias_dtype(base)})")
    # DoRA multiplies the product and leaves the bias, wherever that is.
    scales = done.gain is not None and MAGNITUDE not in change.parts
    if (scales or WHOLE_BIAS in change.parts) and bias is None and gets_bias_later(base.output):
        raise ValueError(
            "it changes the bias, which an optimizer made part of the operation after this one; merge into the export, "
            "then optimize"
        )
