"""The command line: one function a command, gathered here. ``docs/cli.md`` shows each with its output.

Standard output holds the result and nothing else, standard error what is said about it. The exit code is 0, or 1
where something failed or was refused, or 2 where the command line itself is wrong.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from adapterx.cli.adapters import convert
from adapterx.cli.environment import env
from adapterx.cli.extraction import extract, sites
from adapterx.cli.injection import inject
from adapterx.cli.merging import merge
from adapterx.cli.quantizing import quantize
from adapterx.cli.report import reported
from adapterx.cli.running import run
from adapterx.cli.verifying import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="adapterx",
    help="One ONNX base model, many adapters: find them, take them out, swap them, prove it.",
    epilog="Exit codes: 0 fine, 1 failed or refused, 2 wrong command line. Results go to stdout, messages to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (sites, extract, inject, quantize, verify, merge, convert, run, env):
    app.command()(reported(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        from adapterx import __version__  # noqa: PLC0415 - reading it takes longer than all else here

        typer.echo(f"adapterx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """What the console script calls."""
    try:
        app(prog_name="adapterx")
    except KeyboardInterrupt:
        sys.exit(130)
