"""``env``: what a bug report has to say of a machine."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

from typing import Any, TypeAlias

from adapterx.cli.options import Json
from adapterx.cli.report import new_table, print_json, print_table

Value: TypeAlias = str | list[str] | dict[str, Any] | None

_PACKAGES = (
    "adapterx",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "peft",
)


def env(*, as_json: Json = False) -> None:
    """Show versions, execution providers and kernels, for bug reports."""
    rows = environment()
    if as_json:
        print_json(rows)
        return
    table = new_table("what", "found")
    for name, value in rows.items():
        table.add_row(name, _shown(value))
    print_table(table)


def environment() -> dict[str, Value]:
    """What is installed here, by name; ``None`` for what is not."""
    import os
    import platform

    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        **{package: _version(package) for package in _PACKAGES},
        "providers": _providers(),
        "kernels": _kernels(),
    }


def _shown(value: Value) -> str:
    if isinstance(value, dict):
        needs = f"for onnxruntime 1.{value['ort_api']} and newer"
        isa = f"{value['isa']} on this machine"
        return ", ".join([value["version"], isa, needs, *value["providers"], value["path"]])
    return ", ".join(value) if isinstance(value, list) else value or "not installed"


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError as error:
        return [f"none: {error}"]
    return list(onnxruntime.get_available_providers())


def _kernels() -> dict[str, Any] | str | None:
    """The library that a session here would use; what is wrong with it where it is broken."""
    import dataclasses

    from adapterx.errors import AdapterxError

    try:
        from adapterx.runtime.kernels import find_kernels

        kernels = find_kernels()
    except AdapterxError as error:
        return f"none: {error}"
    return None if kernels is None else {**dataclasses.asdict(kernels), "path": str(kernels.path)}
