"""How the base of an ONNX model is quantized: one frozen method with its options, each by the name of its algorithm."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Final, Literal, TypeAlias, get_args

from adapterx.errors import OptionError, nearest

Format = Literal["matmulnbits", "qdq"]
AccuracyLevel = Literal[0, 1, 2, 3, 4]
Table = Literal["nf4", "fp4"]

_BITS: Final = (2, 4, 8)
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 256
_ROW: Final = -1


@dataclasses.dataclass(frozen=True, slots=True)
class RTN:
    """Round to nearest, on the grids of ONNX Runtime's own quantizer.

    Symmetric grids are full range with a signed scale: the largest weight of a block is the lowest code.

    Args:
        bits: 2, 4 or 8
        block_size: weights of a row that share a scale: a multiple of 16; -1 is the whole row
        symmetric: zero is the middle code; else each block has a zero point
        format: ``matmulnbits`` is one node; ``qdq`` is DequantizeLinear in front of MatMul (opset 21), which ONNX
            Runtime makes the same node of, at accuracy level 4 whatever this says
        accuracy_level: of MatMulNBits: 4 computes in int8 (fastest), 0 as exactly as the activations' type

    Raises:
        OptionError: a value that no kernel runs.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    format: Format = "matmulnbits"
    accuracy_level: AccuracyLevel = 4

    def __post_init__(self) -> None:
        _check(self, self.bits, self.block_size, self.accuracy_level)
        _check_format(self.format, self.bits)


@dataclasses.dataclass(frozen=True, slots=True)
class KQuant:
    """llama.cpp's search of scale and zero point by weighted least squares (``make_qkx2_quants``), as ORT has it.

    Args:
        bits: 2, 4 or 8
        block_size: as for :class:`RTN`
        format: as for :class:`RTN`
        accuracy_level: as for :class:`RTN`

    Raises:
        OptionError: a value that no kernel runs.
    """

    bits: int = 4
    block_size: int = 32
    format: Format = "matmulnbits"
    accuracy_level: AccuracyLevel = 4

    def __post_init__(self) -> None:
        _check(self, self.bits, self.block_size, self.accuracy_level)
        _check_format(self.format, self.bits)


@dataclasses.dataclass(frozen=True, slots=True)
class HQQ:
    """Half-quadratic quantization (Badri and Shaji, 2023): zero points under a norm that forgives outliers.

    At 4 bits zero points have fractions, which ONNX Runtime multiplies by a slower kernel. No kernel of every supported
    version takes such zero points at 2 or 8 bits; there they are whole, and the codes are chosen for that.

    Args:
        bits: 2, 4 or 8
        block_size: as for :class:`RTN`
        accuracy_level: as for :class:`RTN`; without effect at 4 bits

    Raises:
        OptionError: a value that no kernel runs.
    """

    bits: int = 4
    block_size: int = 64
    accuracy_level: AccuracyLevel = 4

    def __post_init__(self) -> None:
        _check(self, self.bits, self.block_size, self.accuracy_level)


@dataclasses.dataclass(frozen=True, slots=True)
class Bnb4:
    """bitsandbytes' 4-bit types (Dettmers et al., arXiv 2305.14314), as MatMulBnb4.

    Args:
        table: ``nf4`` or ``fp4``
        block_size: weights in a row that share a scale: 16 to 256, a power of two

    Raises:
        OptionError: a table or a block that does not exist.
    """

    table: Table = "nf4"
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.table not in get_args(Table):
            raise OptionError(f"table={self.table!r} does not exist; nf4 or fp4")
        if self.block_size not in _powers():
            raise OptionError(f"block_size={self.block_size!r} is no block of MatMulBnb4; it has {_spelled()}")


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Weights in int8, a scale a column; activations in uint8 with the range that they have in each run."""


@dataclasses.dataclass(frozen=True, slots=True)
class StaticInt8:
    """Weights in int8, a scale a column; activations in uint8 with the range that they had on calibration feeds.

    Only what a base operation reads is rounded: its result stays float, and an adapter reads floats.
    """


Blocks: TypeAlias = RTN | KQuant | HQQ
Method: TypeAlias = RTN | KQuant | HQQ | Bnb4 | DynamicInt8 | StaticInt8
MethodName = Literal["rtn", "kquant", "hqq", "nf4", "fp4", "dynamic", "static"]

_NAMED: Final[dict[str, type[Method]]] = {
    "rtn": RTN,
    "kquant": KQuant,
    "hqq": HQQ,
    "nf4": Bnb4,
    "fp4": Bnb4,
    "dynamic": DynamicInt8,
    "static": StaticInt8,
}


def method_named(name: str, **options: object) -> Method:
    """The method of that name.

    Args:
        name: ``rtn``, ``kquant``, ``hqq``, ``nf4``, ``fp4``, ``dynamic`` or ``static``
        options: its fields; ``None`` is the method's default

    Raises:
        OptionError: no such method, or an option that it does not have.

    Example:
        >>> method_named("rtn", bits=8, symmetric=None)
        RTN(bits=8, block_size=32, symmetric=True, format='matmulnbits', accuracy_level=4)
    """
    kind = _NAMED.get(name)
    if kind is None:
        raise OptionError(f"no method {name!r}{nearest(name, _NAMED)}; there are {', '.join(_NAMED)}")
    given = {key: value for key, value in options.items() if value is not None}
    known = [key for key in inspect.signature(kind).parameters if key != "table"]
    unknown = [key for key in given if key not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise OptionError(f"method {name!r} has no option {unknown[0]}{nearest(unknown[0], known)}; {takes}")
    if kind is Bnb4:
        given["table"] = name
    return kind(**given)  # type: ignore[arg-type]  # each class checks its own


def block_in_graph(group: int, width: int) -> int:
    """The block of MatMulNBits for groups of ``group`` among ``width`` weights, whose scales are repeated.

    Example:
        >>> block_in_graph(48, 2048), block_in_graph(-1, 2048), block_in_graph(-1, 40)
        (16, 256, 64)
    """
    block = _LARGEST_BLOCK if group == _ROW else min(group & -group, _LARGEST_BLOCK)
    # One block holds the whole row, which a smaller one does as well.
    while block // 2 >= max(_LEAST_BLOCK, width):
        block //= 2
    return block


def _check(method: object, bits: int, block_size: int, accuracy_level: int) -> None:
    name = type(method).__name__
    if bits not in _BITS:
        raise OptionError(f"{name}: bits={bits!r} has no kernel; ONNX Runtime multiplies weights of 2, 4 and 8 bits")
    if block_size != _ROW and (block_size < _LEAST_BLOCK or block_size % _LEAST_BLOCK):
        raise OptionError(f"{name}: block_size={block_size!r} has no kernel; give a multiple of 16, or -1 for a row")
    if accuracy_level not in get_args(AccuracyLevel):
        raise OptionError(f"{name}: accuracy_level={accuracy_level!r} does not exist; 0 (exact) to 4 (int8, fastest)")


def _check_format(form: str, bits: int) -> None:
    if form not in get_args(Format):
        raise OptionError(f"format={form!r} does not exist{nearest(form, get_args(Format))}; matmulnbits or qdq")
    if form == "qdq" and bits == _BITS[0]:
        raise OptionError("format='qdq' has no 2-bit type before opset 25; take format='matmulnbits', or 4 bits")


def _powers() -> list[int]:
    return [1 << power for power in range(4, 9)]


def _spelled() -> str:
    return ", ".join(str(power) for power in _powers())
