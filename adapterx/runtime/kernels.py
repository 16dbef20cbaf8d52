"""Find the compiled kernels and register them, so that ONNX Runtime runs them instead of a model's own functions.

A model says of LowRankAdd what it is, as a function over standard operators; a library with an operator of the same
name, registered with the options that a session opens with, takes its place. Nothing else changes, in the file or in
what comes out beyond rounding.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from adapterx.errors import MissingDependency, OptionError, nearest
from adapterx.runtime.inference import ort

__all__ = ["VARIABLE", "KernelMode", "Kernels", "check_mode", "find_kernels", "register_kernels"]

KernelMode: TypeAlias = Literal["auto", "require", "off"]

VARIABLE: Final = "ADAPTERX_KERNELS"
_INSTALL: Final = f"`make kernels` in a clone builds and installs it, or {VARIABLE}=<path> names a library"
# It only forwards nodes to a service of that name: none of a model's others ever run there.
_IDLE: Final = "AzureExecutionProvider"

_lock = threading.Lock()
_registered: weakref.WeakSet[ort.SessionOptions] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """A library of kernels that can be loaded.

    Args:
        path: the library
        version: of the kernels
        isa: the instructions that its CPU kernels use on this machine
        providers: the execution providers that it has kernels for
        ort_api: it loads into ONNX Runtime 1.``ort_api`` and newer
    """

    path: Path
    version: str
    isa: str
    providers: tuple[str, ...]
    ort_api: int


def check_mode(mode: str) -> None:
    """Refuse what is no mode.

    Raises:
        OptionError: ``mode`` is none of auto, require, off.
    """
    modes = get_args(KernelMode)
    if mode not in modes:
        raise OptionError(f"kernels={mode!r}; expected one of {', '.join(map(repr, modes))}{nearest(mode, modes)}")


def find_kernels(environ: Mapping[str, str] = os.environ) -> Kernels | None:
    """The library that ``ADAPTERX_KERNELS`` names, else that of the installed package, else ``None``.

    Raises:
        OptionError: the named file does not exist, or the library cannot be loaded, or is none of ours.
    """
    if environ.get(VARIABLE):
        return _opened(Path(environ[VARIABLE]), f"{VARIABLE}={environ[VARIABLE]}")
    try:
        import adapterx_kernels  # noqa: PLC0415 - there may be none
    except ModuleNotFoundError as error:
        if error.name != "adapterx_kernels":
            raise
        return None
    return _opened(adapterx_kernels.library(), "the kernel library of adapterx-kernels")


def register_kernels(
    options: ort.SessionOptions, *, providers: Sequence[str], mode: KernelMode = "auto"
) -> Kernels | None:
    """Register the library with the options of a session to come: what was registered, or ``None``.

    It is registered once with the same options, however often they are used: ONNX Runtime would refuse a session
    whose options have the library twice. Options that the host made get it, too. Who has registered the library with
    them before calls this with ``"off"``.

    "auto" goes without where there is no library, and where it lacks kernels for a provider in use, since ONNX Runtime
    would move every LowRankAdd of such a session to the CPU. An installed library that does not load is a warning.

    Args:
        options: of the session; :func:`adapterx.runtime.options.copied` does not copy what is registered with them
        providers: what the session is asked to run on, none where ONNX Runtime may choose
        mode: "auto", "require": raise where the kernels would not be used, or "off"

    Raises:
        MissingDependency: "require", and there is no library.
        OptionError: no such mode; the library that ``ADAPTERX_KERNELS`` names is missing or does not load; "require",
            and the installed one does not load, or lacks kernels for a provider in use; this session is to go without,
            but an earlier one has the library registered with the same options.
    """
    check_mode(mode)
    kernels = None if mode == "off" else _usable(options, providers, mode)
    if kernels is None and options in _registered:
        raise OptionError(
            "these session_options have the kernel library from an earlier session, which this one is to go without; "
            "give each SessionOptions of its own"
        )
    return kernels


def _usable(options: ort.SessionOptions, providers: Sequence[str], mode: str) -> Kernels | None:
    """The library, registered; ``None`` where "auto" goes without."""
    try:
        kernels = find_kernels()
        if kernels is None:
            if mode == "require":
                raise MissingDependency(f'kernels="require", but there is no kernel library; {_INSTALL}')
            return None
        lacking = _lacking(kernels, options, providers)
        if lacking:
            if mode == "require":
                raise OptionError(_not_covered(kernels, lacking))
            return None
        _register(kernels, options)
    except OptionError as error:
        if mode == "require" or os.environ.get(VARIABLE):
            raise
        warnings.warn(f'{error}; sessions run without it (kernels="off" says that this is meant)', stacklevel=2)
        return None
    return kernels


def _opened(path: Path, where: str) -> Kernels:
    if not path.is_file():
        raise OptionError(f"{where}: no such file; {_INSTALL}")
    try:
        library = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise OptionError(f"{where} cannot be loaded: {error}; {_INSTALL}") from None
    try:
        library.adapterx_kernels_ort_api.restype = ctypes.c_int
        api = library.adapterx_kernels_ort_api()
        version, isa, providers = (_text(library, name) for name in ("version", "isa", "providers"))
    except AttributeError as error:
        raise OptionError(f"{where} is no kernel library of adapterx: {error}") from None
    if not isa:
        raise OptionError(
            f"ADAPTERX_KERNELS_ISA={os.environ.get('ADAPTERX_KERNELS_ISA')}: this machine does not run it"
        )
    return Kernels(path, version, isa, tuple(providers.split(",")), api)


def _text(library: ctypes.CDLL, name: str) -> str:
    function = library[f"adapterx_kernels_{name}"]
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()


def _lacking(kernels: Kernels, options: ort.SessionOptions, providers: Sequence[str]) -> list[str]:
    """Providers in use that the library has no kernels for."""
    if getattr(options, "has_providers", lambda: False)():
        return ["those added to session_options, which cannot be read back"]
    in_use = providers or ort.get_available_providers()
    return [name for name in in_use if name not in {*kernels.providers, _IDLE}]


def _not_covered(kernels: Kernels, lacking: Sequence[str]) -> str:
    advice = "pass providers= that it has kernels for"
    if "CUDAExecutionProvider" in lacking:
        advice = "`make kernels CUDA=ON` builds one with CUDA; or " + advice
    return (
        f'kernels="require", but {kernels.path} has kernels for {", ".join(kernels.providers)} only, '
        f'and the session is to run on {", ".join(lacking)}; {advice}; or kernels="auto" goes without'
    )


def _register(kernels: Kernels, options: ort.SessionOptions) -> None:
    with _lock:
        if options in _registered:
            return
        try:
            options.register_custom_ops_library(str(kernels.path.resolve()))
        except Exception as error:
            raise OptionError(
                f"onnxruntime {ort.__version__} does not load the kernel library {kernels.path}, which is for 1."
                f"{kernels.ort_api} and newer: {error}; install that, or build the kernels with headers of an older one"
            ) from error
        _registered.add(options)
