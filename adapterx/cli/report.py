"""How commands speak: results on stdout, messages on stderr, a refusal as one message and exit code 1."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.table import Table

P = ParamSpec("P")

INTERRUPTED: Final = 130

# Messages are written for Python; whoever typed a command is told what to type.
_SPELLINGS: Final = {
    "adapter=...": "--adapter PATH",
    "adapters=": "--rows",
    "together with adapter=": "together, with one --adapter",
    "adapter_dtype='int8'": "--adapter-dtype int8",
    "adapter_dtype": "--adapter-dtype",
    "None for the base": "- for the base",
    "allow_other_base=True": "--allow-other-base",
    "component=": "--component ",
    "a regular expression has to be compiled: re.compile(...)": "a regular expression is given as --pattern",
    "dynamic_rank=False": "--fixed-rank",
    "dynamic_rank=True": "--dynamic-rank",
    "make_inputs=False": "--external",
    "make_inputs=True": "--make-inputs",
    "keep_ports=True": "--keep-ports",
    "pack_inputs": "--pack-inputs",
    "partial=True": "--partial",
    "rank=16": "--rank 16",
    "structural=True": "--structural",
    "targets or an adapter": "--target, --pattern or --adapter",
    "static_qdq='allow'": "--allow-static-qdq",
    "pass quantized='float'": "leave out --keep-quantized",
    "quantized='keep'": "--keep-quantized",
    "or name the layer in layers": "or name the layer with --layer",
    "head=True": "--head",
    "embeddings=True": "--embeddings",
    "(calibration=[{...}])": "(--calibration FILE.npz)",
    "format='matmulnbits'": "--format matmulnbits",
    "format='qdq'": "--format qdq",
    "block_size": "--group-size",
}
_NUMERIC: Final = {"size", "mean", "min", "max"}


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose refusals, ours and the system's, are one message and exit code 1.

    Anything else is a bug, and keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if not _is_refusal(error):
                raise
            _fail(type(error).__name__, str(error), as_json=bool(kwargs.get("as_json")))

    return run


def _is_refusal(error: Exception) -> bool:
    from adapterx.errors import AdapterxError

    # ONNX Runtime's errors have no common class, and loading it to ask for them would be slow.
    runtime = type(error).__module__.startswith("onnxruntime.")
    # A reader that hangs up (`adapterx sites m.onnx | head -1`) is no error of ours; typer ends quietly.
    system = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
    return runtime or system or isinstance(error, AdapterxError)


def _fail(kind: str, message: str, *, as_json: bool) -> NoReturn:
    message = typed(message)
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
    else:
        say(f"{typer.style('error:', fg='red', bold=True)} {kind}: {printable(message)}")
    raise typer.Exit(1)


def typed(message: str) -> str:
    """A message with options as they are typed, not as Python spells them.

    Example:
        >>> typed("pass partial=True")
        'pass --partial'
    """
    for python, spelled in _SPELLINGS.items():
        message = message.replace(python, spelled)
    return message


def printable(text: str) -> str:
    r"""``text`` with control characters spelled out: a file's names must not move the cursor or rename the window.

    Example:
        >>> printable("a\x1b[2J\nb")
        'a\\x1b[2J\nb'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A message, which is not the result."""
    typer.echo(text, err=True)


def print_json(value: object) -> None:
    """The result as JSON; paths as strings."""
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def finite(value: float) -> float | None:
    """``value``, or ``None`` for what JSON has no word for."""
    return float(value) if math.isfinite(value) else None


def print_table(table: Table, *, markup: bool = False) -> None:
    """The result as a table, as wide as it is: a name that was cut cannot be copied.

    Args:
        table: what to print
        markup: whether cells hold rich's markup; names that come from files must not be taken for it
    """
    from rich.console import Console

    console = Console(markup=markup, emoji=False, highlight=False)
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def new_table(*columns: str) -> Table:
    """An empty table in the one style that all commands have."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in _NUMERIC else "left")
    return table


def size(nbytes: int) -> str:
    """Bytes as people read them.

    Example:
        >>> size(27_700)
        '27.7 kB'
    """
    from rich.filesize import decimal

    return decimal(nbytes)
