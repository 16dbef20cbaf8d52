"""``convert``: an adapter as a file that fits a model; and how commands describe an adapter."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterx.cli.options import Json, OtherBase
from adapterx.cli.report import new_table, print_json, print_table, say, size

if TYPE_CHECKING:
    from adapterx.adapter import Adapter


def convert(
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder, .safetensors, .onnx_adapter or .npz.")],
    model: Annotated[Path, typer.Argument(help="The model that it is for, extracted or exported.")],
    output: Annotated[Path, typer.Argument(help="The file to write; its suffix is the format.")],
    *,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as a file that fits a model: its site names, its dtype, the format of the suffix."""
    from adapterx.convert import convert_adapter

    written = convert_adapter(adapter, model, output, allow_other_base=allow_other_base)
    if as_json:
        print_json({"path": output, **facts(written)})
        return
    table = new_table("file", "size")
    table.add_row(str(output), size(output.stat().st_size))
    print_table(table)
    say(in_words(written))


def facts(adapter: Adapter) -> dict[str, Any]:
    """An adapter in JSON types."""
    return {
        "sites": len(adapter.sites),
        "ranks": adapter.ranks,
        "dtypes": _dtypes(adapter),
        "bytes": adapter.nbytes,
        "sha256": adapter.content_hash,
    }


def in_words(adapter: Adapter) -> str:
    """An adapter in one line."""
    ranks, dtypes = ", ".join(map(str, adapter.ranks)), "/".join(_dtypes(adapter))
    return f"{len(adapter.sites)} sites, rank {ranks}, {dtypes}, {size(adapter.nbytes)} of adapter weights"


def _dtypes(adapter: Adapter) -> list[str]:
    return sorted({low_rank.dtype.name for low_rank in adapter.sites.values()})
