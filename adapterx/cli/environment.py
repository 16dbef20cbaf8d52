"""``env``: what a bug report has to say of a machine."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

from adapterx.cli.options import Json
from adapterx.cli.report import new_table, print_json, print_table

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
        table.add_row(name, ", ".join(value) if isinstance(value, list) else value or "not installed")
    print_table(table)


def environment() -> dict[str, str | list[str] | None]:
    """What is installed here, by name; ``None`` for what is not."""
    import os
    import platform

    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        **{package: _version(package) for package in _PACKAGES},
        "providers": _providers(),
        "kernels": "none in this version: LowRankAdd runs as an ONNX function",
    }


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
