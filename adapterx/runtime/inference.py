"""Open ONNX Runtime sessions as the host asked for, and say in our words what went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from adapterx.adapter import Array
from adapterx.errors import MissingDependency, ModelError, OptionError, nearest

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependency(
        'sessions need ONNX Runtime; install it with `pip install "adapterx[cpu]"` or `"adapterx[gpu]"`'
    ) from error

__all__ = ["Host", "Provider", "device_of", "ort", "ort_values", "quiet_options"]

Provider: TypeAlias = str | tuple[str, Mapping[str, Any]]

_BFLOAT16: Final = 16
_BF16: Final = np.dtype(ml_dtypes.bfloat16)
_DEVICES: Final = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
_ERROR: Final = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """What the embedding program wants of ONNX Runtime. Of its ``SessionOptions`` nothing changes but kernels."""

    providers: Sequence[Provider] | None = None
    provider_options: Sequence[Mapping[str, Any]] | None = None
    session_options: ort.SessionOptions | None = None

    def __post_init__(self) -> None:
        available = ort.get_available_providers()
        for name in self.names():
            if name not in available:
                hint = f"{nearest(name, available)}; it has {', '.join(available)}"
                raise OptionError(f"this onnxruntime has no provider {name!r}{hint}")

    def names(self) -> list[str]:
        """The providers that were asked for, in order; none when ONNX Runtime may choose."""
        return [entry if isinstance(entry, str) else entry[0] for entry in self.providers or ()]

    def open(
        self, model: str | bytes, *, where: str, options: ort.SessionOptions | None = None
    ) -> ort.InferenceSession:
        """A session on exactly the providers that were asked for.

        Args:
            model: a path, or bytes
            where: what messages call the model
            options: instead of the host's

        Raises:
            ModelError: ONNX Runtime cannot load it; its own words are in the message.
            OptionError: a provider is installed, but did not start.
        """
        options = options or self.session_options or quiet_options()
        try:
            # Without this ONNX Runtime answers a failing provider by a second try on the CPU, and only prints so.
            session = ort.InferenceSession(
                model, options, providers=self.providers, provider_options=self.provider_options, enable_fallback=0
            )
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot load {where}: {error}") from error
        missing = [name for name in self.names() if name not in session.get_providers()]
        if missing:
            raise OptionError(
                f"provider {missing[0]} did not start (its libraries may be missing); "
                f"the session would run on {', '.join(session.get_providers())}"
            )
        return session


def quiet_options() -> ort.SessionOptions:
    """Default options, without ONNX Runtime's warning for each port that it "will not treat as constant"."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERROR
    return options


def device_of(session: ort.InferenceSession) -> tuple[str, int]:
    """Device name and number of the session's first provider, as ``OrtValue`` spells them."""
    first = session.get_providers()[0]
    device = _DEVICES.get(first, "cpu")
    return device, int(session.get_provider_options().get(first, {}).get("device_id", 0)) if device != "cpu" else 0


def ort_values(arrays: Mapping[str, Array], *, device: tuple[str, int] = ("cpu", 0)) -> dict[str, ort.OrtValue]:
    """Arrays as ONNX Runtime takes them: the same memory on the CPU, a copy on another device.

    bf16 stays on the CPU wherever the session runs, since the Python API cannot put it anywhere else; ONNX Runtime
    then copies it in every run.
    """
    return {name: _ort_value(array, device) for name, array in arrays.items()}


def _ort_value(array: Array, device: tuple[str, int]) -> ort.OrtValue:
    if array.dtype == _BF16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    if device[0] == "cpu" or not array.size:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy(array, *device)
