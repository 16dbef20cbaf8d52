"""GPTQ checkpoints (Frantar et al., arXiv 2210.17323) as AutoGPTQ, GPTQModel and auto-round write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.quant.interop.bit_stream import fields, streamed
from adapterx.quant.interop.source import (
    FLOATS,
    Layer,
    Source,
    Tensors,
    finite,
    kept_zeros,
    names_with,
    source_of,
    stored,
)
from adapterx.quant.interop.source import whole as whole_number
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor
PARTS = ("qweight", "qzeros", "scales", "g_idx", "scale_bf16_to_fp8")
InputsOf = Callable[[str], int | None]
_BITS = (2, 3, 4, 8)
# What Neural Compressor puts into each layer, and nobody else.
_INC = ".scale_bf16_to_fp8"


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """How a layer lies in its tensors.

    Args:
        bits: of a code
        group: inputs that share a scale, the last group may have fewer
        inputs: ``K``
        outputs: ``N``
        stores_zero_less_one: version 1 of the format: 7 stands for a zero point of 8
        by_word: a word holds whole codes only (`bit_stream.fields`), else codes are one stream of bits
    """

    bits: int
    group: int
    inputs: int
    outputs: int
    stores_zero_less_one: bool = True
    by_word: bool = False


def read_gptq(files: Tensors, config: Mapping[str, Any], inputs_of: InputsOf) -> Source:
    """The layers of a GPTQ checkpoint.

    ``qweight`` int32 ``[K * bits / 32, N]``, ``qzeros`` int32 ``[G, N * bits / 32]``, ``scales`` ``[G, N]``, and with
    ``desc_act`` ``g_idx`` int32 ``[K]``, the group of each input, which becomes ``QuantWeight.order``. Version 1, which
    is what a config without ``checkpoint_format`` means, stores zero points less one, and a zero point of 0 as the
    largest code; ``"gptq_v2"`` stores them as they are. Widths of single layers (GPTQModel's ``dynamic``) are seen from
    their shapes.

    Raises:
        FormatError: tensors that do not belong together
        UnsupportedQuantization: another ``checkpoint_format``, width, or groups that are no ``order``
    """
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedQuantization(f"{files.folder}: checkpoint_format={form!r:.40}; gptq and gptq_v2 can be held")
    return gptq_layers(files, config, inputs_of, stores_zero_less_one=form == "gptq")


def gptq_layers(
    files: Tensors, config: Mapping[str, Any], inputs_of: InputsOf, *, stores_zero_less_one: bool
) -> Source:
    """As `read_gptq`, whatever the config calls the format."""
    layers = {
        name: gptq_layer(files, name, config, inputs_of, stores_zero_less_one=stores_zero_less_one)
        for name in names_with(files, ".qweight")
    }
    return source_of(files, layers, PARTS)


def gptq_layer(
    files: Tensors, name: str, config: Mapping[str, Any], inputs_of: InputsOf, *, stores_zero_less_one: bool = True
) -> Layer:
    """The layer ``name``, after its shapes are checked."""
    packing = _packing(files, name, config, inputs_of)
    packing = dataclasses.replace(packing, stores_zero_less_one=stores_zero_less_one)
    return Layer((packing.outputs, packing.inputs), lambda: _weight(files, name, packing))


def _weight(files: Tensors, name: str, packing: Packing) -> QuantWeight:
    """The layer ``name``.

    Raises:
        FormatError: scales that are not finite, or a group that does not exist
        UnsupportedQuantization: groups of other sizes than the format's, or scales for float8 activations
    """
    bits, group, inputs, outputs = packing.bits, packing.group, packing.inputs, packing.outputs
    unpacked = fields if packing.by_word else streamed
    codes = unpacked(files.read(f"{name}.qweight").T.contiguous(), bits)[:, :inputs]
    scales = finite(files, f"{name}.scales", files.read(f"{name}.scales")).T.contiguous()
    zeros = unpacked(files.read(f"{name}.qzeros"), bits)[:, :outputs].T
    if packing.stores_zero_less_one:
        zeros = (zeros + 1) & (2**bits - 1)
    order = None
    if f"{name}.g_idx" in files.tensors:
        stored(files, f"{name}.g_idx", torch.int32, torch.int64, shape=(inputs,))
        order = _order(files, f"{name}.g_idx", group)
    if name + _INC in files.tensors and bool((files.read(name + _INC) != 0).any()):
        raise UnsupportedQuantization(
            f"{files.folder}: {name} has a float8 scale for W4A8; its weight is not 4 bits alone"
        )
    if order is not None:
        codes = codes[:, order]
    kept = kept_zeros(zeros.contiguous(), bits)
    return QuantWeight(codes=codes.contiguous(), scales=scales, group=group, bits=bits, zeros=kept, order=order)


def _order(files: Tensors, name: str, group: int) -> Tensor | None:
    """The input behind each column, when columns are put group by group; None where they are already."""
    index = files.read(name).long()
    inputs = len(index)
    expected = torch.arange(inputs) // group
    if torch.equal(index, expected):
        return None
    order = torch.argsort(index, stable=True)
    if int(index.min()) < 0 or int(index.max()) > int(expected[-1]):
        raise FormatError(f"{files.folder}: {name}: groups {int(index.min())} to {int(index.max())} of {inputs} inputs")
    if not torch.equal(index[order], expected):
        raise UnsupportedQuantization(
            f"{files.folder}: {name}: groups are not all of {group} inputs; they cannot be held"
        )
    return order


def _packing(files: Tensors, name: str, config: Mapping[str, Any], inputs_of: InputsOf) -> Packing:
    bits = whole_number(config, "bits", _BITS, 4, where=files.folder)
    words, outputs = stored(files, f"{name}.qweight", torch.int32, shape=(None, None))
    groups, _ = stored(files, f"{name}.scales", *FLOATS, shape=(None, outputs))
    _, zero_words = stored(files, f"{name}.qzeros", torch.int32, shape=(groups, None))
    by_word = name + _INC in files.tensors
    if by_word:
        per_word = 32 // bits
        known, group = inputs_of(name), config.get("group_size", 32)
        # A model that does not fit is told of later, with every layer that does not.
        known = None if known is None or -(-known // per_word) != words else known
        if known is None and type(group) is int and group > 0:
            known = groups * group
        inputs = words * per_word if known is None else known
        fits = -(-inputs // per_word) == words and -(-outputs // per_word) == zero_words
    else:
        found = [width for width in _BITS if outputs * width == 32 * zero_words and words * 32 % width == 0]
        varied = config.get("dynamic") or config.get("extra_config")
        fits = bool(found) and (found[0] == bits or bool(varied))
        bits = found[0] if fits else bits
        inputs = words * 32 // bits
    if not fits:
        shapes = f"qweight {[words, outputs]} and qzeros {[groups, zero_words]}"
        raise FormatError(f"{files.folder}: {name}: {bits} bits do not fit {shapes}")
    return Packing(bits, _group(files, name, config, inputs, groups), inputs, outputs, by_word=by_word)


def _group(files: Tensors, name: str, config: Mapping[str, Any], inputs: int, groups: int) -> int:
    """Inputs that share a scale: as the config says, or where that does not fit this layer, as its scales do."""
    told = config.get("group_size", -1)
    if type(told) is not int or told < -1 or told == 0:
        raise FormatError(f"{files.folder}: group_size is {told!r:.40}, expected a number of inputs, or -1")
    group = inputs if told == -1 else told
    if -(-inputs // group) == groups:
        return min(group, inputs)
    if inputs % groups:
        raise FormatError(f"{files.folder}: {name}.scales: {groups} groups of {told} do not make {inputs} inputs")
    return inputs // groups
