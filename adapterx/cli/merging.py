"""``merge``: an adapter folded into the weights of an ONNX model, or of a Hugging Face checkpoint."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterx.cli.options import Json
from adapterx.cli.report import print_json, print_table, say

if TYPE_CHECKING:
    from adapterx.merge_table import Merge


def merge(  # noqa: PLR0913 - the options of the command, all by name
    model: Annotated[Path, typer.Argument(help="An ONNX model, or the folder of a Hugging Face checkpoint.")],
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder or an adapter file.")],
    output: Annotated[Path, typer.Argument(help="The merged model's file; of a checkpoint an empty or a new folder.")],
    *,
    weight: Annotated[float, typer.Option(help="How much of the adapter.")] = 1.0,
    keep_ports: Annotated[
        bool, typer.Option("--keep-ports", help="Let the result take adapters on top of the merged one.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take an adapter that has sites in other ONNX files too.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take out of an ONNX model what was merged into it.")] = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into the base weights; what quantizing them again costs is told site by site."""
    done = _merged(model, adapter, output, weight, keep_ports=keep_ports, partial=partial, undo=undo)
    if as_json:
        print_json({"path": done.path, "sites": [dataclasses.asdict(row) for row in done.rows]})
        return
    print_table(done.table())
    verb = "taken out of" if undo else "merged into"
    say(f"{verb} {len(done.rows)} sites\nwrote {done.path}")


def _merged(
    model: Path, adapter: Path, output: Path, weight: float, *, keep_ports: bool, partial: bool, undo: bool
) -> Merge:
    from adapterx.errors import OptionError

    if model.is_dir():
        if keep_ports or partial or undo:
            raise OptionError(
                "--keep-ports, --partial and --undo are for ONNX models; for a checkpoint, --weight=-1 takes out what "
                "was merged"
            )
        from adapterx.merged_checkpoint import merge_peft

        return merge_peft(model, adapter, output, weight=weight)
    from adapterx.graph.merge import merge_adapter, unmerge_adapter

    if undo:
        return unmerge_adapter(model, adapter, output, weight=weight, partial=partial)
    return merge_adapter(model, adapter, output, weight=weight, keep_ports=keep_ports, partial=partial)
