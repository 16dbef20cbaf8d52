"""``convert``: an adapter in another format, and as a model takes it; and how commands describe an adapter."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from adapterx.cli.options import Json, OtherBase
from adapterx.cli.report import new_table, print_json, print_table, say, size

if TYPE_CHECKING:
    from adapterx.adapter import Adapter


def convert(  # noqa: PLR0913 - the options of the command, all by name
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER [MODEL] OUTPUT",
            help="A PEFT folder, .safetensors (ours, kohya's, diffusers'), .onnx_adapter or .npz; the model that it is "
            "for, extracted or exported; what to write, in the format of its suffix, PEFT's where there is none.",
        ),
    ],
    *,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="safetensors, onnx_adapter, npz, peft, kohya or diffusers, whatever the suffix."),
    ] = None,
    combine: Annotated[
        list[str] | None,
        typer.Option("--combine", metavar="PATH=WEIGHT", help="Add this much of another adapter; may be repeated."),
    ] = None,
    weight: Annotated[float, typer.Option(help="How much of the first adapter, with --combine.")] = 1.0,
    component: Annotated[
        str | None, typer.Option(help="Of an adapter for a pipeline, the part of this model: unet, text_encoder_2 ...")
    ] = None,
    fill_missing: Annotated[
        bool, typer.Option("--fill-missing", help="Write zeros for every site that the adapter lacks.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="The most that a site keeps, by truncated SVD.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the tensors: float32, float16 or bfloat16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Store int8 or int4, in .safetensors.")] = None,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format, and as a model takes it: its site names, its dtype, its parts."""
    from adapterx.convert import convert_adapter

    if len(paths) not in (2, 3):
        raise typer.BadParameter(f"expected ADAPTER OUTPUT or ADAPTER MODEL OUTPUT; got {len(paths)} paths")
    adapter, target, model = paths[0], paths[-1], paths[1] if len(paths) == 3 else None
    written = convert_adapter(
        _combined(adapter, weight, combine or [], allow_other_base=allow_other_base),
        model,
        target,
        format=cast(Any, file_format),
        allow_other_base=allow_other_base,
        component=component,
        fill_missing=fill_missing,
        rank=rank,
        dtype=cast(Any, dtype),
        quantize=cast(Any, quantize),
    )
    costs = _costs(written, truncated=rank is not None, quantized=quantize is not None)
    if as_json:
        print_json({"path": target, **facts(written), **costs})
        return
    table = new_table("file", "size")
    table.add_row(str(target), size(_bytes_of(target)))
    print_table(table)
    by_site = costs.pop("truncation_errors", {})
    if by_site:
        errors = new_table("site", "rank", "error")
        for site, error in by_site.items():
            errors.add_row(site, str(written.sites[site].rank), f"{error:.3g}")
        print_table(errors)
    say(in_words(written))
    for key, told in costs.items():
        say(f"{key.replace('_', ' ')}: {told}")


def _combined(adapter: Path, weight: float, others: list[str], *, allow_other_base: bool) -> Path | Adapter:
    if not others and weight == 1:
        return adapter
    from adapterx.combination import combine
    from adapterx.errors import OptionError
    from adapterx.formats import load_adapter

    members = [(load_adapter(adapter), weight)]
    for other in others:
        path, _, amount = other.rpartition("=")
        try:
            share = float(amount)
        except ValueError:
            raise OptionError(f"--combine {other}: expected PATH=WEIGHT, the weight a number; got {amount!r}") from None
        members.append((load_adapter(path), share))
    return combine(members, allow_other_base=allow_other_base)


def _costs(adapter: Adapter, *, truncated: bool, quantized: bool) -> dict[str, Any]:
    """What a conversion cost or left out, in JSON types."""
    from adapterx.convert import ERROR as QUANTIZATION
    from adapterx.pipeline import LEFT_OUT
    from adapterx.truncation import ERROR, ERRORS

    held = adapter.metadata
    told: dict[str, Any] = {}
    if LEFT_OUT in held:
        told[LEFT_OUT] = held[LEFT_OUT]
    if truncated:
        told |= {ERROR: float(held[ERROR]), ERRORS: json.loads(held[ERRORS])}
    if quantized:
        told[QUANTIZATION] = float(held[QUANTIZATION])
    return told


def _bytes_of(path: Path) -> int:
    """Of a file, or of the two that PEFT has in a folder."""
    from adapterx.formats import peft, peft_config

    files = [path / peft.WEIGHTS, path / peft_config.NAME] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


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
