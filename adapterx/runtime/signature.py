"""What a model takes and gives, and the checks of a host's feeds before ONNX Runtime sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np

from adapterx.errors import FeedError, nearest
from adapterx.runtime.inference import ort, ort_values

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    f"tensor({onnx_name})": np.dtype(numpy_name)
    for onnx_name, numpy_name in {
        "float": np.float32,
        "double": np.float64,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "bool": np.bool_,
        **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    }.items()
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """A graph input or output, with the attributes of ``onnxruntime.NodeArg``.

    Args:
        name: its name
        type: as ONNX Runtime writes it, ``tensor(float)``
        shape: integers, and names or ``None`` where any size fits; empty for scalars and unknown ranks
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a model without its adapter ports.

    Args:
        inputs: what must be fed
        optional: initializers that may be overridden
        outputs: what the model gives
        ports: names that belong to adapters
    """

    inputs: Mapping[str, TensorInfo]
    optional: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    ports: frozenset[str]

    @classmethod
    def of(cls, session: ort.InferenceSession, ports: frozenset[str]) -> Signature:
        """The signature of an open session; keeps nothing of it."""
        inputs = _infos(node for node in session.get_inputs() if node.name not in ports)
        optional = _infos(node for node in session.get_overridable_initializers() if node.name not in ports)
        return cls(inputs, optional, _infos(session.get_outputs()), ports)

    def checked_outputs(self, names: Sequence[str] | None) -> list[str]:
        """``names``, or all outputs in order for ``None`` and for an empty list, as ONNX Runtime has it.

        Raises:
            FeedError: a name that the model does not give.
        """
        if isinstance(names, str):
            raise FeedError(f"output names are a list; got the string {names!r}")
        for name in names or ():
            if name not in self.outputs:
                hint = f"{nearest(str(name), self.outputs)}; it gives {_list(self.outputs)}"
                raise FeedError(f"the model has no output {name!r}{hint}")
        return list(names or self.outputs)

    def checked_feeds(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """``feeds`` as ONNX Runtime takes them: sequences become arrays, bf16 arrays ``OrtValue``.

        Raises:
            FeedError: missing, unknown, an adapter's port, or of another dtype, rank or size.
        """
        faults = [self._unknown(name) for name in feeds if name not in self.inputs and name not in self.optional]
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            met = f"; got {_list(feeds)}" if feeds else ""
            faults.append(f"the model needs {_list(missing)}{met}")
        if faults:
            raise FeedError("\n".join(faults))
        return {name: _checked(value, self.inputs.get(name) or self.optional[name]) for name, value in feeds.items()}

    def _unknown(self, name: str) -> str:
        if name in self.ports:
            return f"{name!r} is a port for adapters and is not fed by hand; use adapter=<name>"
        known = [*self.inputs, *self.optional]
        return f"the model has no input {name!r}{nearest(str(name), known)}; it takes {_list(known)}"


def _infos(nodes: Iterable[Any]) -> dict[str, TensorInfo]:
    return {node.name: TensorInfo(node.name, node.type, tuple(node.shape or ())) for node in nodes}


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _checked(value: Any, info: TensorInfo) -> Any:
    wanted = _DTYPES.get(info.type)
    if wanted is None:
        return value
    if isinstance(value, ort.OrtValue):
        if value.data_type() != info.type:
            raise FeedError(f"{info.name!r} must be {info.type}; got {value.data_type()}")
        _check_shape(tuple(value.shape()), info)
        return value
    array = value if isinstance(value, np.ndarray) else _array(value, wanted, info)
    if array.dtype != wanted:
        raise FeedError(f"{info.name!r} must be {wanted}; got {array.dtype}; cast it with .astype({wanted.name!r})")
    _check_shape(array.shape, info)
    in_order = np.asarray(array, order="C")
    return ort_values({info.name: in_order})[info.name] if wanted == ml_dtypes.bfloat16 else in_order


def _array(value: Any, wanted: np.dtype[Any], info: TensorInfo) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        array = np.asarray(value)
        # A list of Python numbers has no dtype of its own; anything that has one keeps it and is told.
        return array.astype(wanted, casting="same_kind") if isinstance(value, (list, tuple, int, float)) else array
    except (TypeError, ValueError) as error:
        raise FeedError(
            f"{info.name!r} must be an array of {wanted} or OrtValue; got {type(value).__name__}: {error}"
        ) from None


def _check_shape(shape: tuple[int, ...], info: TensorInfo) -> None:
    if not info.shape:
        return
    fits = len(shape) == len(info.shape) and all(
        size == wanted for size, wanted in zip(shape, info.shape, strict=True) if isinstance(wanted, int)
    )
    if not fits:
        wanted = ", ".join("?" if size is None else str(size) for size in info.shape)
        raise FeedError(f"{info.name!r} must have shape [{wanted}]; got {list(shape)}")
