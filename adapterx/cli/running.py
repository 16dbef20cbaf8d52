"""``run``: one run of an extracted model, on given feeds or on made ones."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterx.cli.options import Feeds, Json, OtherBase, Seed
from adapterx.cli.report import finite, new_table, print_json, print_table, say

if TYPE_CHECKING:
    from adapterx.adapter import Array
    from adapterx.runtime.rows import RowAdapter
    from adapterx.runtime.session import AdapterSession


def run(  # noqa: PLR0913 - the options of the command, all by name
    model: Annotated[Path, typer.Argument(help="An extracted model.")],
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="[NAME=]PATH", help="Run with this adapter; several are for --rows."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="For each row of the batch a name, - for the base, or a sum: fr,-,fr=0.7+de=0.3"),
    ] = None,
    feeds: Feeds = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the outputs by name to this .npz.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Execution provider; may be given again, best first.")
    ] = None,
    allow_other_base: OtherBase = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run an extracted model once, with an adapter, several, or as the base, and describe what comes out."""
    from adapterx.cli.rows import named, parsed
    from adapterx.formats import load_adapter
    from adapterx.runtime.session import AdapterSession

    paths = named(adapter or ())
    entries = None if rows is None else parsed(rows)
    chosen = _for_all_rows(paths) if entries is None else None
    begun = time.perf_counter()
    session = AdapterSession(model, providers=provider or None, allow_other_base=allow_other_base)
    for name, path in paths.items():
        session.load_adapter(name, load_adapter(path))
    times = {"load_ms": _since(begun)}
    fed = _made_feeds(model, session, seed, entries) if feeds is None else read_feeds(feeds)
    begun = time.perf_counter()
    results = session.run(None, fed, adapter=chosen, adapters=entries)
    times["run_ms"] = _since(begun)
    outputs = dict(zip((info.name for info in session.get_outputs()), results, strict=True))
    if output is not None:
        _write_arrays(output, outputs)
    described = [_described(name, value) for name, value in outputs.items()]
    if as_json:
        inputs = [{"input": name, "shape": value.shape, "dtype": value.dtype.name} for name, value in fed.items()]
        told: dict[str, Any] = {"inputs": inputs, "feeds": feeds, "adapter": None if chosen is None else paths[chosen]}
        told |= {"adapters": paths, "rows": entries, "providers": session.providers}
        print_json({"outputs": described, **told, **times})
        return
    _print_rows(described)
    if feeds is None:
        made = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in fed.items())
        say(f"no --feeds, so inputs were made from the graph (seed {seed}): {made}")
    providers = ", ".join(session.providers)
    say(f"loaded in {times['load_ms']:.1f} ms, first run in {times['run_ms']:.1f} ms on {providers}")


def _for_all_rows(paths: Mapping[str, Path]) -> str | None:
    from adapterx.errors import OptionError

    if len(paths) > 1:
        raise OptionError(
            f"{len(paths)} adapters ({', '.join(paths)}) and no --rows, which says where each of them goes"
        )
    return next(iter(paths), None)


def _since(begun: float) -> float:
    return round(1000 * (time.perf_counter() - begun), 3)


def _made_feeds(
    model: Path, session: AdapterSession, seed: int, entries: Sequence[RowAdapter] | None
) -> dict[str, Array]:
    from adapterx.graph.example_feeds import example_feeds
    from adapterx.graph.load import load_model

    rows = {} if entries is None else {"rows": len(entries)}
    return example_feeds(load_model(model), seed=seed, manifest=session.manifest, **rows)


def read_feeds(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name.

    Raises:
        FeedError: no such file, or not one of plain arrays.
    """
    import zipfile
    import zlib

    import numpy as np

    from adapterx.errors import FeedError

    # A pipe would be waited for.
    if not path.is_file() or not zipfile.is_zipfile(path):
        met = "found another file" if path.is_file() else "found no regular file" if path.exists() else "there is none"
        raise FeedError(f"{path}: expected an .npz file of inputs by name (numpy.savez), {met}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise FeedError(f"{path} is a broken .npz file, or holds more than plain arrays ({error})") from None


def _write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """An .npz file; ``numpy.savez`` takes names as keywords, and would stumble over an output called ``file``."""
    import zipfile

    import numpy as np

    from adapterx.atomic import replacing

    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # The npy format has no word for bf16; float32 holds every value of it.
            plain = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(plain), allow_pickle=False)


def _described(name: str, value: Any) -> dict[str, Any]:
    import numpy as np

    array = np.asarray(value)
    row: dict[str, Any] = {"output": name, "shape": list(array.shape), "dtype": array.dtype.name}
    if not array.size or array.dtype.kind in "OSU":
        return {**row, "mean": None, "min": None, "max": None}
    wide = array.astype(np.float64)
    return {**row, "mean": finite(wide.mean()), "min": finite(wide.min()), "max": finite(wide.max())}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = new_table("output", "shape", "dtype", "mean", "min", "max")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    print_table(table)
