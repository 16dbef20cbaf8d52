"""What a graph says of an adapter of another kind than LoRA: which kind, whose module, by which name.

The same sources as of LoRA (:mod:`adapterx.graph.claims`), for parts of other names. Only PEFT wraps a layer as
``base_layer``, so what was traced beside it, in the module that holds both, is PEFT's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from adapterx.graph.bases import Base
from adapterx.graph.claims import (
    BASE_TENSOR,
    FOLDED_FROM,
    NAME_SCOPES,
    Claim,
    base_layer_depth,
    listed,
    path_parts,
    traced_in_peft,
)
from adapterx.graph.folded import Folding
from adapterx.graph.operations import operation
from adapterx.graph.quantizer_names import unquantized

_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_magnitude_vector|lora_[AB]|hada_[wt][12](?:_[ab])?|lokr_(?:w[12](?:_[ab])?|t2)"
    r"|vera_lambda_[bd]|ia3_l)(?:\.(?!weight\b)(?P<adapter>[^.]+))?(?:\.weight)?$"
)
_WRAPPED = ".base_layer"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What speaks for an adapter.

    Args:
        claims: who it is, in the order in which they are believed
        parts: names of its tensors, as PEFT has them (``hada_w1_a``)
        wrapped: the module that holds base and adapter is the claim, by its own nodes, not by the base's weight
        silent: neither paths nor metadata are there that could tell otherwise
        tuner: which of PEFT's tuners the adapter was traced in (``ia3``), ``""`` when nothing tells
    """

    claims: tuple[Claim, ...]
    parts: frozenset[str]
    wrapped: bool
    silent: bool
    tuner: str

    def speaks_of(self, *starts: str) -> bool:
        """Whether a part's name starts so."""
        return any(part.startswith(starts) for part in self.parts)


def evidence(base: Base, join: ir.Node, nodes: Sequence[ir.Node], folding: Folding) -> Evidence:
    """Everything that tells what ``nodes`` do to ``base``.

    Args:
        base: the base operation
        join: the node whose output is the adapted value
        nodes: those of the adapter, ``join`` among them
        folding: what is constant
    """
    constants = list(dict.fromkeys(v for node in nodes for operand in node.inputs for v in folding.behind(operand)))
    told = (*_by_names(constants), *_by_origins(constants), *_by_scopes(nodes))
    traced = traced_in_peft(join)
    beside = (_by_scope(base, join, traced), _by_node_path(base, join, nodes))
    claims = [*(claim for claim, _ in told), beside[0], *_by_base(base), beside[1]]
    # One carrier may speak of several parts; it is one claim all the same.
    known = tuple({id(claim.carrier): claim for claim in reversed(claims) if claim is not None}.values())[::-1]
    silent = not listed(join.metadata_props.get(NAME_SCOPES)) and not _parts(join)
    return Evidence(
        known, frozenset(part for _, part in told), bool(told or any(beside)), silent, traced[1] if traced else ""
    )


def _by_names(constants: Iterable[ir.Value]) -> Iterator[tuple[Claim, str]]:
    for value in constants:
        found = _PART.match(unquantized(value.name or ""))
        if found is not None:
            yield Claim("initializer", found["module"], found["adapter"] or "", value), found["part"]


def _by_origins(constants: Iterable[ir.Value]) -> Iterator[tuple[Claim, str]]:
    """What a constant was folded from: parts of one adapter of one module."""
    for value in constants:
        names = listed(value.metadata_props.get(FOLDED_FROM))
        found = [match for name in names if (match := _PART.match(name)) is not None]
        if len({(match["module"], match["adapter"]) for match in found}) == 1:
            claim = Claim("folded_from", found[0]["module"], found[0]["adapter"] or "", value)
            yield from ((claim, match["part"]) for match in found)


def _by_scopes(nodes: Iterable[ir.Node]) -> Iterator[tuple[Claim, str]]:
    for node in nodes:
        for scope in reversed(listed(node.metadata_props.get(NAME_SCOPES))):
            found = _PART.match(scope)
            if found is not None:
                yield Claim("name_scopes", found["module"], found["adapter"] or "", node), found["part"]
                break


def _by_scope(base: Base, join: ir.Node, traced: tuple[str, str] | None) -> Claim | None:
    """The join was traced in one of PEFT's layers, or in the module whose ``base_layer`` the base operation is."""
    inner, outer = (listed(node.metadata_props.get(NAME_SCOPES))[-2:-1] for node in (base.op, join))
    if not outer or (traced is None and inner != [outer[0] + _WRAPPED]):
        return None
    # Of a base operation that a quantizer made, no scope is left to compare.
    return Claim("name_scopes", outer[0], "", join) if inner in ([], [outer[0] + _WRAPPED]) else None


def _by_base(base: Base) -> Iterator[Claim]:
    found = operation(base.op)
    values = (*(() if found is None else found.weight), *(() if base.bias is None else (base.bias,)))
    for value in values:
        match = BASE_TENSOR.match(unquantized(value.name or ""))
        if match is not None:
            yield Claim("initializer", match["module"], "", value)


def _by_node_path(base: Base, join: ir.Node, nodes: Sequence[ir.Node]) -> Claim | None:
    """TorchScript: the join is in ``<module>``, the base in ``<module>/base_layer``, DoRA in ``<module>/<adapter>``."""
    parts, inner = _parts(join), _parts(base.op)
    depth = base_layer_depth(inner)
    if not depth:
        return None
    # Called again, `fc` is `fc_1`, and what it wraps is `fc/base_layer_1`.
    outer = [*inner[: depth - 1], inner[depth - 1] + inner[depth].removeprefix("base_layer")]
    if parts[:depth] != outer or len(parts) <= depth or base_layer_depth(parts):
        return None
    paths = [path for node in nodes if (path := _parts(node))[:depth] == outer]
    deeper = {path[depth] for path in paths if len(path) > depth + 1}
    return Claim("node_path", "/".join(inner[:depth]), deeper.pop() if len(deeper) == 1 else "", join)


def _parts(node: ir.Node) -> list[str]:
    return path_parts(unquantized(node.name or ""))
