"""``quantize``: the base of an ONNX model in fewer bits, or a Hugging Face checkpoint as a quantized ONNX model."""
# ruff: noqa: PLC0415 - imports stand inside functions, so that `--help` waits for nothing that only a command needs

from __future__ import annotations

import dataclasses
import enum
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterx.cli.options import Exported, Json
from adapterx.cli.report import print_json, print_table, printable, say, size, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterx.graph.base_methods import Method
    from adapterx.quantization_table import Quantization


class QuantizeMethod(enum.StrEnum):
    """What ``quantize`` knows; the last five need the torch model."""

    rtn = "rtn"
    kquant = "kquant"
    hqq = "hqq"
    nf4 = "nf4"
    fp4 = "fp4"
    dynamic = "dynamic"
    static = "static"
    gptq = "gptq"
    awq = "awq"
    teq = "teq"
    autoround = "autoround"
    smoothquant = "smoothquant"


class QuantizeFormat(enum.StrEnum):
    """How products with codes are written."""

    matmulnbits = "matmulnbits"
    qdq = "qdq"


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What was typed, and is the same for both kinds of models; ``None`` is the method's default."""

    method: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    format: str | None
    exact: bool
    layers: dict[str, int | None]
    head: bool
    embeddings: bool


def quantize(  # noqa: PLR0913 - the options of the command, all by name
    model: Annotated[Path, typer.Argument(help="An ONNX model, or the folder of a Hugging Face checkpoint.")],
    output: Annotated[Path, typer.Argument(help="The quantized ONNX file.")],
    *,
    method: Annotated[QuantizeMethod, typer.Option(help="How codes are chosen.")] = QuantizeMethod.rtn,
    bits: Annotated[int | None, typer.Option("--bits", help="Of a weight: 2, 4 or 8.")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights that share a scale; -1 is a whole row.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Zero in the middle, or a zero point a group."),
    ] = None,
    form: Annotated[
        QuantizeFormat | None, typer.Option("--format", help="One MatMulNBits, or DequantizeLinear and MatMul.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Multiply in float, not in int8: slower.")] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Leave this layer float: a name, or the end of one; may be given again."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME=BITS", help="Other bits for it; may be given again."),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="Quantize the layer that makes the logits, too.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize tables of embeddings, too.")] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration", help="Inputs by name in an .npz, or for a checkpoint a text; may be given again."
        ),
    ] = None,
    adapter: Exported = None,
    as_json: Json = False,
) -> None:
    """Quantize the base of a model; its adapters stay float, and serve as before."""
    # Of two words on one layer, that it stays float is the safe one.
    layers = dict(_bits_of(one) for one in layer or ()) | dict.fromkeys(keep or ())
    form_name = None if form is None else form.value
    choice = Choice(method.value, bits, group_size, symmetric, form_name, exact, layers, head, embeddings)
    files = calibration or ()
    done = (
        _of_folder(model, output, choice, files, adapter)
        if model.is_dir()
        else _of_onnx(model, output, choice, files, adapter)
    )
    _print(done, exact_qdq=exact and form_name == "qdq", as_json=as_json)


def _bits_of(text: str) -> tuple[str, int]:
    from adapterx.errors import OptionError

    found = re.fullmatch(r"(.+)=(\d+)", text)
    if found is None:
        raise OptionError(f"--layer {text!r} is not NAME=BITS; for example --layer down_proj=8")
    return found[1], int(found[2])


def _of_onnx(
    model: Path, output: Path, choice: Choice, calibration: Sequence[Path], adapter: Path | None
) -> Quantization:
    from adapterx.cli.running import read_feeds
    from adapterx.graph.base_methods import HQQ, RTN, KQuant, method_named
    from adapterx.graph.quantize import quantize_base
    from adapterx.graph.targets import Target

    # nf4 and fp4 are multiplied exactly as it is.
    level = 0 if choice.exact and choice.method not in {"nf4", "fp4"} else None

    def named(bits: int | None) -> Method:
        options = {"bits": bits, "block_size": choice.group_size, "symmetric": choice.symmetric}
        return method_named(choice.method, **options, format=choice.format, accuracy_level=level)

    _refuse_of_torch(choice.method, model)
    method = named(choice.bits)
    # Codes of other methods have one width.
    other = named if isinstance(method, RTN | KQuant | HQQ) else RTN
    layers: dict[Target, Method | None] = {
        name: None if bits is None else other(bits) for name, bits in choice.layers.items()
    }
    feeds = [read_feeds(path) for path in calibration]
    return quantize_base(
        model,
        output,
        method=method,
        layers=layers,
        head=choice.head,
        embeddings=choice.embeddings,
        calibration=feeds,
        adapter=adapter,
    )


def _refuse_of_torch(method: str, model: Path) -> None:
    from typing import get_args

    from adapterx.errors import OptionError
    from adapterx.graph.base_methods import MethodName

    if method not in get_args(MethodName):
        raise OptionError(
            f"--method {method} works on the torch model: give the folder of the Hugging Face checkpoint in place of "
            f"{model}; for an ONNX file there are {', '.join(get_args(MethodName))}"
        )


def _of_folder(
    folder: Path, output: Path, choice: Choice, calibration: Sequence[Path], adapter: Path | None
) -> Quantization:
    from adapterx.cli.running import read_feeds
    from adapterx.errors import OptionError

    if adapter is not None:
        raise OptionError("--adapter names the adapter inside an ONNX file; a checkpoint has none")
    if choice.method == "kquant":
        raise OptionError("--method kquant is for an ONNX file; for a checkpoint there are gptq, awq and autoround")
    from adapterx.graph.quantized_rows import quantized_rows
    from adapterx.quant.hf_checkpoint import Wanted, export_checkpoint

    batches = [read_feeds(path) for path in calibration if path.suffix == ".npz"]
    texts = [_text(path) for path in calibration if path.suffix != ".npz"]
    export_checkpoint(folder, output, Wanted(**dataclasses.asdict(choice)), batches=batches, texts=texts)
    return quantized_rows(output)


def _text(path: Path) -> str:
    from adapterx.errors import FeedError

    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FeedError(f"{path} is neither an .npz nor text in UTF-8 ({error})") from None


def _print(done: Quantization, *, exact_qdq: bool, as_json: bool) -> None:
    notes = [*done.notes]
    if exact_qdq:
        notes.append("qdq: sessions multiply in float with the option session.qdq_matmulnbits_accuracy_level=1")
    before, after = (sum(getattr(row, f"bytes_{when}") for row in done.rows) for when in ("before", "after"))
    if as_json:
        told = {"path": done.path, "bits": round(done.bits, 4), "bytes_before": before, "bytes_after": after}
        rows = [{**dataclasses.asdict(row), "bits": round(row.bits, 4)} for row in done.rows]
        floats = [dataclasses.asdict(row) for row in done.floats]
        print_json({**told, "adapters": done.adapters, "layers": rows, "float": floats, "notes": notes})
        return
    print_table(done.table())
    for row in done.floats:
        say(printable(typed(f"float: {row.module} ({row.op}): {row.reason}")))
    for note in notes:
        say(printable(note))
    if done.adapters:
        say(f"{done.adapters} sites of adapters stay as they were")
    ratio = before / after if after else math.inf
    say(f"{len(done.rows)} weights, {size(before)} -> {size(after)} ({ratio:.1f}x less), {done.bits:.2f} bits each")
    say(f"wrote {done.path}")
