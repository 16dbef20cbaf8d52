"""``inject``: ports for adapters in a model that never had any."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import enum
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterx.cli.extraction import files_of_model
from adapterx.cli.options import DynamicRank, Json, MakeInputs, OfPorts, OptionalInputs, PackInputs
from adapterx.cli.report import new_table, print_json, print_table, say, size

if TYPE_CHECKING:
    from adapterx.graph.inject import Injection


class AdapterKind(enum.StrEnum):
    """What ``inject`` can make a port for."""

    lora = "lora"
    dora = "dora"
    ia3 = "ia3"
    loha = "loha"
    lokr = "lokr"
    vera = "vera"
    bias = "bias"
    saved = "saved"


def inject(  # noqa: PLR0913 - the options of the command, all by name
    model: Annotated[Path, typer.Argument(help="A model without adapters; it is not changed.")],
    output_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the model with ports.")],
    *,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="A module's name, the end of one (q_proj), or all-linear; may be given again."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", help="Modules whose whole name matches this regular expression; may be given again."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="In place of targets: the sites of this adapter, as its kind needs."),
    ] = None,
    kind: Annotated[
        list[AdapterKind] | None, typer.Option("--kind", help="Of adapters that shall fit; may be given again.")
    ] = None,
    make_inputs: MakeInputs = True,
    pack_inputs: PackInputs = False,
    dynamic_rank: DynamicRank = True,
    optional_inputs: OptionalInputs = True,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of ports that have a fixed one.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="The adapter is for several files (encoder, decoder), this is one.")
    ] = False,
    adapter_dtype: OfPorts = None,
    as_json: Json = False,
) -> None:
    """Put ports for adapters into a model that never had any: exported, optimized or quantized."""
    from adapterx.graph.inject import inject_adapters

    targets = [*(target or ()), *(_compiled(one) for one in pattern or ())]
    out = inject_adapters(
        model,
        output_dir,
        targets=targets or None,
        adapter=adapter,
        kinds=[one.value for one in kind or [AdapterKind.lora]],
        make_inputs=make_inputs,
        pack_inputs=pack_inputs,
        dynamic_rank=dynamic_rank,
        optional_inputs=optional_inputs,
        rank=rank,
        partial=partial,
        adapter_dtype=None if adapter_dtype is None else adapter_dtype.value,
    )
    _print(out, "PATH" if adapter is None else str(adapter), as_json=as_json)


def _print(out: Injection, adapter: str, *, as_json: bool) -> None:
    files = files_of_model(out.model_path)
    following = shlex.join(["adapterx", "run", str(out.model_path), "--adapter", adapter])
    if as_json:
        print_json(
            {
                "model": out.model_path,
                "sites": [site.as_dict() for site in out.sites],
                "files": [{"path": path, "bytes": path.stat().st_size} for path in files],
                "next": following,
            }
        )
        return
    table = new_table("file", "size")
    for path in files:
        table.add_row(str(path), size(path.stat().st_size))
    print_table(table)
    say(f"{len(out.sites)} sites\nnext: {following}")


def _compiled(pattern: str) -> re.Pattern[str]:
    from adapterx.errors import OptionError

    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"--pattern {pattern!r} is no regular expression: {error}") from None
