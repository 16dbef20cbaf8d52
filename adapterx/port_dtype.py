"""The element type of a model's adapter weights, where another is asked for than that of the activations.

It is a choice of bytes: a base in four bits computes in float32, and its adapters can be read in half or a quarter of
that. What a float holds, or eight bits, changes the numbers; the exact ones stay in the adapter's own file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np

from adapterx.adapter import LORA_A, LORA_B, Adapter, Array, LowRank
from adapterx.errors import MismatchError, OptionError, nearest
from adapterx.site import AdapterSite

AdapterDtype = Literal["float32", "float16", "bfloat16", "int8"]

_SHOWN = 50


def check(adapter_dtype: str | None, *, as_inputs: bool) -> None:
    """Refuse what there is not.

    Args:
        adapter_dtype: ``None`` is fine
        as_inputs: ports are graph inputs

    Raises:
        OptionError: no such type, or codes where they would save nothing.
    """
    known = get_args(AdapterDtype)
    if adapter_dtype is not None and adapter_dtype not in known:
        hint = nearest(str(adapter_dtype), known)
        raise OptionError(f"adapter_dtype must be one of {', '.join(known)}; got {adapter_dtype!r}{hint}")
    if adapter_dtype == "int8" and not as_inputs:
        raise OptionError(
            "adapter_dtype='int8' needs make_inputs=True: of initializers ONNX Runtime makes floats, once, when it "
            "opens a model, so that codes would save nothing there"
        )


def in_dtype(site: AdapterSite, adapter_dtype: AdapterDtype | None) -> AdapterSite:
    """``site`` with ``a`` and ``b`` of that type, where a ``LowRankAdd`` reads them; else as it is.

    Example:
        >>> from adapterx.site import AdapterSite
        >>> site = AdapterSite("fc", "", "lora", "MatMul", 4, 3, 2, 1.0, "float32", "structure", "")
        >>> half = in_dtype(site, "float16")
        >>> half.dtype, half.activations
        ('float16', 'float32')
        >>> in_dtype(half, "float32") == site
        True
    """
    if adapter_dtype is None or not site.is_multiplied:
        return site
    x = site.x_dtype
    return dataclasses.replace(site, dtype=adapter_dtype, activations="" if x == adapter_dtype else x)


def for_ports(adapter: Adapter, sites: Iterable[AdapterSite], adapter_dtype: AdapterDtype) -> Adapter:
    """The adapter of these sites as their ports can take it; as it is for codes, which are made when it is fed.

    Raises:
        MismatchError: it has values that a port cannot hold; names every site.
    """
    cast = {site.name: cast_for(adapter.sites[site.name], site) for site in sites if site.name in adapter.sites}
    if faults := [f"  {name}: {cause}" for name, cause in cast.items() if isinstance(cause, str)]:
        left = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise MismatchError(
            f"the adapter does not fit into ports of {adapter_dtype} at {len(faults)} of {len(cast)} sites:\n"
            + "\n".join(faults[:_SHOWN])
            + f"{left}\nbfloat16 has the range of float32; or leave adapter_dtype out."
        )
    if adapter_dtype == "int8":
        return adapter
    return Adapter({name: one for name, one in cast.items() if not isinstance(one, str)}, adapter.metadata)


def cast_for(change: LowRank, site: AdapterSite) -> LowRank | str:
    """``change`` as the ports of ``site`` can take it, or the reason why they cannot hold it.

    Beside ports of several types, and for codes, it keeps a type that holds all: what a port rounds to is rounded when
    it is fed. Overflow is refused in the type of the activations too, for the graph computes in that.
    """
    wanted = np.dtype(site.fitted_dtype)
    cast: dict[str, Array] = {}
    if site.dtype == "int8" and not (np.isfinite(change.a).all() and np.isfinite(change.b).all()):
        return "NaN and infinity have no int8 codes"
    for name, array in ((LORA_A, change.a), (LORA_B, change.b), *change.parts.items()):
        tried = {dtype: _cast(array, dtype) for dtype in (site.dtype_of(name), site.x_dtype)}
        if lost := [dtype for dtype, held in tried.items() if held is None]:
            return f"finite {array.dtype} values become infinite in the model's {lost[0]}"
        held = tried.get(wanted.name)
        cast[name] = array.astype(wanted) if held is None else held
    return change if change.dtype == wanted else LowRank(a=cast.pop(LORA_A), b=cast.pop(LORA_B), parts=cast)


def _cast(array: Array, dtype: str) -> Array | None:
    """In ``dtype``, of codes in that of their scales; ``None`` when a finite value would become infinite."""
    wanted = np.dtype("float32" if dtype == "int8" else dtype)
    if array.dtype == wanted:
        return array
    with np.errstate(over="ignore"):
        cast: Array = array.astype(wanted)
    # No float of four bytes or fewer has a value that float32 lacks.
    if wanted.itemsize >= max(4, array.dtype.itemsize):
        return cast
    return None if np.any(np.isfinite(array) & ~np.isfinite(cast)) else cast
