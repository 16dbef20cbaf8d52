"""Which module of the checkpoint each base operation is: what names, metadata and node paths say, cross-checked.

A weight's name says whose parameter it is, a node's path or scopes which module computes. The two differ where
weights are tied (an embedding and the output head), where exporters merge equal weights, and where one module is
called several times; and any tool may have deleted either.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

import onnx_ir as ir

from adapterx.adapter import INPUT_GAIN
from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES, NO_MODULE, listed, path_parts
from adapterx.graph.operations import Operation
from adapterx.graph.paths import Paths
from adapterx.graph.view import MICROSOFT, SAME_ROWS, SAME_VALUE, STANDARD, is_op
from adapterx.graph.weights import read
from adapterx.ops import DOMAIN
from adapterx.site import PORTS, NameSource

Name: TypeAlias = tuple[str, NameSource]

REWRITTEN_BY = "pkg.onnxscript.rewriter.rule_name"
UNNAMED: Name = ("", "structure")
# The genai builder puts an operator before `weight`; quantizers and mergers of graphs put words of theirs behind.
_PARAMETER = re.compile(r"^(?P<module>.+?)(?:\.(?:MatMul|Add|Gemm|Conv|Gather))?\.(?:weight|bias|qweight)(?:_\w+)?$")
_OPERATOR = re.compile(r"(?:MatMul|Gemm|Conv|Gather|Add|Transpose|Reshape|Cast|Mul)(?:_\w+)?")
_WRAPPED = re.compile(r"[./]base_layer(?:_\d+)?$")
_ADAPTERS = re.compile(r"\.(?:lora_(?:A|B|embedding_A|embedding_B|down|up)|hada_w|lokr_w|oft_|vera_lambda)")
# ONNX Runtime's names for weights that a normalization or a product behind them was multiplied into.
_FUSED = re.compile(r"(?:ConvBn|ConvMul|MatMulBn)Fusion_[A-Z]+_(?:B_)?|MatMulBnFusion_Gemm[BC]_")
# torch.export's word for what a normalization gives, of several results the first. A product is never called so.
_NORMED = re.compile(r"getitem(_\d+)?")
_NUMBER = re.compile(r"_\d+(?=\.|$)")
# Output heads that share their weight with an embedding, so that an exporter may keep their name for both.
_HEADS = frozenset({"lm_head", "embed_out", "output_projection"})
# Fusions that take the bias of the layer before them: operator -> its slot.
_TAKES_BIAS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3, "BiasGelu": 1, "FastGelu": 1}
# And those that add up the biases of several layers, or have no name of theirs.
_ADDS_LATER = {**_TAKES_BIAS, "MultiHeadAttention": 3, "BiasDropout": 1, "BiasSplitGelu": 1, "BiasAdd": 1}
# What stands between a port and the node where it meets the base: operator -> the slot that leads to the port.
_TO_PORT = {"Unsqueeze": 0, "Transpose": 0, "MatMul": 1, "Conv": 1}
_BEHIND = tuple(port for port in PORTS if port != INPUT_GAIN)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """An operation that may be a base.

    Args:
        node: the node with the weight
        operation: what it is
        output: the value that it ends in
        bias: the constant that was added on the way
    """

    node: ir.Node
    operation: Operation
    output: ir.Value
    bias: ir.Value | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """One source's word on one base.

    Args:
        source: which kind of source
        module: as the source spells it, until it is made canonical
        carrier: what bears the name; when it serves several bases, it is believed last
        parameter: names whose the weight or bias is, not who computes
    """

    source: NameSource
    module: str
    carrier: object
    parameter: bool = True


def named(candidates: Sequence[Candidate], paths: Paths, sites: Collection[str]) -> list[Name]:
    """The name of each candidate, and what told it; ``""`` where nothing does, or where sources contradict.

    Args:
        candidates: all base operations of a model
        paths: how names of this model are read
        sites: names of the sites that the model already has ports for
    """
    claims = [[_canonical(claim, paths) for claim in claims_on(one)] for one in candidates]
    doubtful = _doubtful(candidates, claims)
    names = [_believed(told, doubtful) for told in claims]
    names = _told_apart(candidates, _called_again(candidates, names))
    return [_by_port(one, sites) or name for one, name in zip(candidates, names, strict=True)]


def is_adapters(candidate: Candidate) -> bool:
    """Whether the operation's own names say that it is a part of an adapter that the graph holds."""
    values = candidate.operation.weight
    names = [str(name) for v in values for name in (v.name, *listed(v.metadata_props.get(FOLDED_FROM)))]
    names += listed(candidate.node.metadata_props.get(NAME_SCOPES))
    return any(_ADAPTERS.search(name) for name in names)


def folded_into(candidate: Candidate, paths: Paths) -> str:
    """The module whose weight the operation has, multiplied with a normalization that stood behind it; else ``""``.

    ``norm(W x)`` became ``W' x``. What an adapter adds would have to be multiplied, too, and the factors are lost.
    """
    node, weight, bias = candidate.node, candidate.operation.root.name or "", candidate.bias
    added = "" if bias is None else bias.name or ""
    rule = str(node.metadata_props.get(REWRITTEN_BY, ""))
    # TorchScript's exporter folds both into new tensors; what it only turns or casts, it leaves the bias of.
    renamed = candidate.operation.kind == "conv" and added and not _PARAMETER.match(added)
    if not (
        "BatchNorm" in rule
        or _FUSED.match(weight)
        or added == f"{weight}_bias"
        or (candidate.operation.kind != "embedding" and _NORMED.fullmatch(node.outputs[0].name or ""))
        or (renamed and not _PARAMETER.match(weight))
    ):
        return ""
    first = next((_canonical(claim, paths).module for claim in claims_on(candidate)), "")
    return _FUSED.sub("", first) or weight


def claims_on(candidate: Candidate) -> Iterator[_Claim]:
    """What tells whose operation ``candidate`` is, in the order in which sources are believed."""
    for value in candidate.operation.weight:
        yield from _parameter(value, "initializer")
    for value in candidate.operation.weight:
        origins = [name for name in listed(value.metadata_props.get(FOLDED_FROM)) if _PARAMETER.match(name)]
        # A tensor folded from several weights is derived from them; it is not any one of them.
        if len(origins) == 1:
            yield _Claim("folded_from", origins[0], value)
    # The last scope is the operator; with one scope before it, the whole model is the module.
    scopes = listed(candidate.node.metadata_props.get(NAME_SCOPES))
    if len(scopes) > 2 and not scopes[-2].startswith(NO_MODULE):
        yield _Claim("name_scopes", scopes[-2], candidate.node, parameter=False)
    parts = path_parts(candidate.node.name or "")[:-1]
    while parts and _OPERATOR.fullmatch(parts[-1]):
        parts.pop()
    if parts:
        yield _Claim("node_path", "/".join(parts), candidate.node, parameter=False)
    bias = candidate.bias or absorbed_bias(candidate.output)
    if bias is not None:
        yield from _parameter(bias, "initializer")


def _parameter(value: ir.Value, source: NameSource) -> Iterator[_Claim]:
    if _PARAMETER.match(value.name or ""):
        yield _Claim(source, str(value.name), value)


def absorbed_bias(output: ir.Value) -> ir.Value | None:
    """The bias that a fusion took over from the operation; it still bears the module's name."""
    uses = list(output.uses())
    node = uses[0].node if len(uses) == 1 else None
    if node is None or uses[0].idx != 0 or not is_op(node, *_TAKES_BIAS, domain=(*STANDARD, MICROSOFT)):
        return None
    slot = _TAKES_BIAS[node.op_type]
    return node.inputs[slot] if len(node.inputs) > slot else None


def gets_bias_later(output: ir.Value) -> bool:
    """Whether a fused operation that reads ``output`` adds a bias, which then may be that of the layer."""
    values = [output]
    for value in values:
        for node, _ in value.uses():
            slot = _ADDS_LATER.get(node.op_type) if node.domain == MICROSOFT else None
            if slot is not None and len(node.inputs) > slot and node.inputs[slot] is not None:
                return True
            if is_op(node, *SAME_VALUE, *SAME_ROWS):
                values.append(node.outputs[0])
    return False


def _canonical(claim: _Claim, paths: Paths) -> _Claim:
    found = _PARAMETER.match(claim.module) if claim.parameter else None
    module = found["module"] if found else claim.module
    return dataclasses.replace(claim, module=paths.canonical(_WRAPPED.sub("", module)))


def _doubtful(candidates: Sequence[Candidate], claims: list[list[_Claim]]) -> set[int]:
    """Claims (by ``id``) that need not be about this very operation: those of parameters that serve several."""
    carriers = Counter(id(claim.carrier) for told in claims for claim in told)
    kinds: dict[str, set[bool]] = defaultdict(set)
    for one, told in zip(candidates, claims, strict=True):
        for claim in told:
            if claim.parameter:
                kinds[claim.module].add(one.operation.kind == "embedding")
    found = set()
    for one, told in zip(candidates, claims, strict=True):
        for claim in tuple(told):
            head = claim.module.rpartition(".")[2] in _HEADS
            tied = len(kinds[claim.module]) > 1 or (one.operation.kind == "embedding" and head)
            if claim.parameter and (tied or carriers[id(claim.carrier)] > 1):
                found.add(id(claim))
            if claim.parameter and tied and head == (one.operation.kind == "embedding"):
                # Of two tied modules, the weight bears the other's name.
                told.remove(claim)
    return found


def _believed(claims: list[_Claim], doubtful: set[int]) -> Name:
    sure = [claim for claim in claims if id(claim) not in doubtful]
    if not claims or any(not _agree(one.module, other.module) for one in sure for other in sure):
        return UNNAMED
    winner = (sure or claims)[0]
    best = next(claim for claim in claims if _agree(claim.module, winner.module))
    # TorchScript's paths leave out a ModuleDict; a bias that kept its name has it.
    whole = max((claim.module for claim in sure if claim.module.endswith(f".{best.module}")), key=len, default="")
    return whole or best.module, best.source


def _agree(one: str, other: str) -> bool:
    """The same path, but for first parts that one source lost, or for last ones that a function's caller lacks."""
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith(f".{short}") or long.startswith(f"{short}.")


def _called_again(candidates: Sequence[Candidate], names: list[Name]) -> list[Name]:
    """TorchScript numbers the calls of one module (``block``, ``block_1``): with one weight they are one module."""
    groups: dict[int, set[str]] = defaultdict(set)
    for one, (name, _) in zip(candidates, names, strict=True):
        groups[id(one.operation.root)].add(name)
    again = []
    for one, (name, source) in zip(candidates, names, strict=True):
        stem = _NUMBER.sub("", name)
        again.append((stem if stem in groups[id(one.operation.root)] else name, source))
    return again


def _told_apart(candidates: Sequence[Candidate], names: list[Name]) -> list[Name]:
    """Different weights under one name: what only computes inside a module is not that module."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, (name, _) in enumerate(names):
        groups[name].append(i)
    apart = list(names)
    for name, members in groups.items():
        if name and not _same_weight([candidates[i].operation for i in members]):
            owners = [i for i in members if names[i][1] in {"initializer", "folded_from"}]
            owned = bool(owners) and _same_weight([candidates[i].operation for i in owners])
            for i in members:
                if not owned or i not in owners:
                    apart[i] = UNNAMED
    return apart


def _same_weight(operations: list[Operation]) -> bool:
    first, *others = operations
    return all(one.root is first.root or _equal(one, first) for one in others)


def _equal(one: Operation, other: Operation) -> bool:
    left, right = (ir.convenience.get_const_tensor(operation.root) for operation in (one, other))
    assert left is not None, "a root is constant"
    assert right is not None, "a root is constant"
    same = (one.kind, left.dtype, left.shape) == (other.kind, right.dtype, right.shape)
    return same and read(left).tobytes() == read(right).tobytes()


def _by_port(candidate: Candidate, sites: Collection[str]) -> Name | None:
    """The site whose ports work on the operation, in a model that adapterx made."""
    if not sites:
        return None
    above = candidate.operation.x.producer()
    while above is not None and is_op(above, *SAME_VALUE) and above.inputs[0] is not None:
        above = above.inputs[0].producer()
    if above is not None and is_op(above, "Add"):
        scaled = [product for value in above.inputs if value is not None and is_op(product := value.producer(), "Mul")]
        found = next((site for node in scaled if node and (site := _port(node.inputs, sites, (INPUT_GAIN,)))), None)
        if found is not None:
            return found, "initializer"
    output = candidate.output
    while True:
        users = [use.node for use in output.uses()]
        for node in users:
            # What the next layer's ports read is no base of theirs.
            ours = node.domain == DOMAIN and node.inputs[0] is output
            others = [value for value in node.inputs if value is not output]
            found = _port(others, sites, _BEHIND) if ours or is_op(node, "Mul", "Add") else None
            if found is not None:
                return found, "initializer"
        if len(users) != 1 or not is_op(users[0], *SAME_VALUE, *SAME_ROWS):
            return None
        output = users[0].outputs[0]


def _port(values: Sequence[ir.Value | None], sites: Collection[str], ports: Collection[str]) -> str | None:
    """The site of whose ports one is among ``values``, or behind what our own nodes make of it."""
    for value in values:
        site, _, port = ("" if value is None else value.name or "").removesuffix(".weight").rpartition(".")
        if port in ports and site in sites:
            return site
        node = None if value is None else value.producer()
        if node is not None and (node.domain == DOMAIN or is_op(node, *_TO_PORT)):
            found = _port(node.inputs[_TO_PORT.get(node.op_type, 0) :][:1], sites, ports)
            if found is not None:
                return found
    return None
