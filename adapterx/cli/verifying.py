"""``verify``: the proof that an extraction is right, and that rows of a batch do not get what is another's."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterx.cli.options import Exported, Feeds, Json, Seed
from adapterx.cli.report import finite, print_json, print_table, printable, say

if TYPE_CHECKING:
    from adapterx.verification import Verification


def verify(
    original: Annotated[Path, typer.Argument(help="The exported model; with --mixed, it may be the extracted one.")],
    extracted: Annotated[
        Path | None, typer.Argument(help="What `adapterx extract` made of it: the model or its folder.")
    ] = None,
    *,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Prove that rows of one batch can have different adapters.")
    ] = False,
    adapter: Exported = None,
    feeds: Feeds = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Prove an extraction: random adapters through it, against a computation on the original graph.

    With --mixed also that a batch whose rows have different adapters is its rows one by one; with --mixed and one
    model, extracted or injected, only that.
    """
    from adapterx.cli.running import read_feeds
    from adapterx.verification import Verification
    from adapterx.verify import verify_extraction
    from adapterx.verify_batch import verify_mixed

    if extracted is None and not mixed:
        raise typer.BadParameter("expected ORIGINAL EXTRACTED, or one model and --mixed; got one model")
    if extracted is None and adapter is not None:
        raise typer.BadParameter("--adapter names the sites of an exported model, and --mixed was given none")
    given = None if feeds is None else read_feeds(feeds)
    outcomes = []
    model = _only_model(original) if extracted is None else extracted
    if extracted is not None:
        model = extracted / original.name if extracted.is_dir() else extracted
        outcomes.append(verify_extraction(original, model, adapter=adapter, feeds=given, seed=seed))
    if mixed:
        outcomes.append(verify_mixed(model, feeds=given, seed=seed))
    rows = tuple(row for outcome in outcomes for row in outcome.rows)
    _print(Verification(rows, tuple(note for outcome in outcomes for note in outcome.notes)), as_json=as_json)


def _only_model(path: Path) -> Path:
    """A model, or the one that a folder has."""
    from adapterx.errors import ModelError

    if not path.is_dir():
        return path
    models = sorted(path.glob("*.onnx"))
    if len(models) != 1:
        names = ", ".join(model.name for model in models)
        raise ModelError(f"{path} has {len(models)} models ({names or 'no .onnx file'}); name the one that is meant")
    return models[0]


def _print(outcome: Verification, *, as_json: bool) -> None:
    """Raises typer.Exit when a check failed."""
    if as_json:
        rows = [
            {"check": r.check, "max_error": finite(r.max_error), "tolerance": r.tolerance, "passed": r.passed}
            for r in outcome.rows
        ]
        print_json({"passed": outcome.passed, "rows": rows, "notes": outcome.notes})
    else:
        print_table(outcome.table(), markup=True)
        for note in outcome.notes:
            say(printable(note))
    if not outcome.passed:
        failed = [row.check for row in outcome.rows if not row.passed]
        say(f"{len(failed)} of {len(outcome.rows)} checks failed: {', '.join(failed)}")
        raise typer.Exit(1)
