"""``sites``, ``extract``: adapters found in a model, and taken out of it."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import enum
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterx.cli.adapters import facts, in_words
from adapterx.cli.options import (
    DynamicRank,
    Exported,
    Json,
    MakeInputs,
    OfPorts,
    OptionalInputs,
    PackInputs,
    Structural,
)
from adapterx.cli.report import new_table, print_json, print_table, printable, say, size

if TYPE_CHECKING:
    from adapterx.graph.extract import Extraction
    from adapterx.site import SiteTable


class AdapterFormat(enum.StrEnum):
    """What ``extract`` can write an adapter as."""

    safetensors = "safetensors"
    onnx_adapter = "onnx_adapter"
    npz = "npz"


def sites(
    model: Annotated[Path, typer.Argument(help="An exported or extracted ONNX model.")],
    *,
    adapter: Exported = None,
    structural: Structural = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page on them: layer by layer, with sizes and norms; needs adapterx[report]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the places where adapters act: operation, shape, rank, scale, dtype, and what told the name."""
    from adapterx.graph.sites import find_sites
    from adapterx.site import unmixed_lines

    if html is None:
        found = find_sites(model, adapter=adapter, structural=structural)
    else:
        found = _reported_sites(model, html, adapter=adapter, structural=structural)
    if as_json:
        reasons = found.unmixed
        print_json(
            [site.as_dict() | ({"unmixed": reasons[site.name]} if site.name in reasons else {}) for site in found]
        )
        return
    print_table(found.table())
    adapters = sorted({name for site in found for name in site.adapter.split("+") if name})
    named = f"; adapters by name: {printable(', '.join(adapters))}" if adapters else ""
    say(f"{len(found)} sites{named}")
    for line in found.left:
        say(f"left out: {printable(line)}")
    for line in unmixed_lines(found.unmixed):
        say(printable(line))
    if html is not None:
        say(f"wrote {html}")


def _reported_sites(model: Path, html: Path, *, adapter: Path | None, structural: bool) -> SiteTable:
    """What ``find_sites`` gives, after a page on it was written."""
    from adapterx.errors import OptionError
    from adapterx.report import survey, write_page

    if html.suffix.lower() not in {".html", ".htm"}:
        raise OptionError(f"--html writes a web page, so its name must end in .html; got {str(html)!r}")
    found = survey(model, adapter=adapter, structural=structural)
    write_page(found, html)
    return found.sites


def extract(  # noqa: PLR0913 - the options of the command, all by name
    model: Annotated[Path, typer.Argument(help="The exported model; it is not changed.")],
    output_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the model and the adapter.")],
    *,
    make_inputs: MakeInputs = False,
    pack_inputs: PackInputs = False,
    dynamic_rank: DynamicRank = True,
    optional_inputs: OptionalInputs = True,
    adapter_format: Annotated[AdapterFormat, typer.Option(help="Of the adapter file.")] = AdapterFormat.safetensors,
    adapter: Exported = None,
    structural: Structural = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave adapter weights that cannot be taken in the model.")
    ] = False,
    keep_quantized: Annotated[
        bool,
        typer.Option("--keep-quantized", help="Leave an adapter that was quantized in its codes; with --external."),
    ] = False,
    allow_static_qdq: Annotated[
        bool,
        typer.Option("--allow-static-qdq", help="Take adapters whose activations have ranges measured with them."),
    ] = False,
    adapter_dtype: OfPorts = None,
    as_json: Json = False,
) -> None:
    """Take the adapters out of an exported model and leave ports in their place."""
    from adapterx.graph.extract import extract_adapters

    out = extract_adapters(
        model,
        output_dir,
        make_inputs=make_inputs,
        pack_inputs=pack_inputs,
        dynamic_rank=dynamic_rank,
        optional_inputs=optional_inputs,
        adapter_format=adapter_format.value,
        adapter=adapter,
        structural=structural,
        partial=partial,
        quantized="keep" if keep_quantized else "float",
        static_qdq="allow" if allow_static_qdq else "refuse",
        adapter_dtype=None if adapter_dtype is None else adapter_dtype.value,
    )
    given = [] if adapter is None else ["--adapter", str(adapter)]
    following = shlex.join(["adapterx", "verify", str(model), str(out.model_path), *given])
    if as_json:
        _print_extraction(out, adapter_format.value, following)
        return
    table = new_table("file", "size")
    for path in _files_of(out, adapter_format.value):
        table.add_row(str(path), size(path.stat().st_size))
    print_table(table)
    for note in out.notes:
        say(f"inexact: {printable(note)}")
    say(f"{in_words(out.adapter)}\nnext: {following}")


def _print_extraction(out: Extraction, suffix: str, following: str) -> None:
    print_json(
        {
            "model": out.model_path,
            "adapter": {"path": out.adapter_path, **facts(out.adapter)},
            "adapters": {name: facts(one) for name, one in out.adapters.items()},
            "sites": [site.as_dict() for site in out.sites],
            "notes": out.notes,
            "files": [{"path": path, "bytes": path.stat().st_size} for path in _files_of(out, suffix)],
            "next": following,
        }
    )


def _files_of(out: Extraction, suffix: str) -> list[Path]:
    """Every file of an extraction: the model, its weights, the adapter, and each adapter where there are several."""
    folder = out.model_path.parent
    parts = [folder / f"adapter.{name}.{suffix}" for name in out.adapters] if len(out.adapters) > 1 else []
    return [*files_of_model(out.model_path), *(path for path in (out.adapter_path, *parts) if path.exists())]


def files_of_model(model: Path) -> list[Path]:
    """A model and the data files that it names and that are there: in external mode one is meant to be absent."""
    from adapterx.external_data import external_tensors
    from adapterx.graph.load import read_proto

    data = sorted({model.parent / tensor.location for tensor in external_tensors(read_proto(model))})
    return [path for path in (model, *data) if path.exists()]
