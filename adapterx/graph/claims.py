"""What a graph says about who a low-rank branch is: names of initializers, exporters' metadata, node paths.

Each source can be missing or wrong on its own: exporters rename what they fold, optimizers delete metadata, and
equal initializers are merged so that one name stands for many modules. So a claim knows its carrier, and a
carrier that serves several branches is not believed.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

import onnx_ir as ir

from adapterx.graph.branches import Branch
from adapterx.graph.quantized_linear import any_linear
from adapterx.graph.quantizer_names import unquantized
from adapterx.graph.view import MICROSOFT, QUANTIZERS, SAME_ROWS, SAME_VALUE, STANDARD, Linear, is_fixed, is_op
from adapterx.site import NameSource

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
CLASS_HIERARCHY = "pkg.torch.onnx.class_hierarchy"
_MODULE_AND_OPERATION = 2
_TUNER = re.compile(r"peft\.tuners\.(?P<tuner>\w+)\.")
# torch.export's word, among the scopes, for operations that it made outside any module.
NO_MODULE = "_empty_nn_module_stack"

Side = str

_TENSOR = re.compile(
    r"^(?P<module>.+?)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?!(?:weight|MatMul)\b)(?P<adapter>[^.]+))?(?:\.MatMul)?(?:\.weight\b.*)?$"
)
_SCOPE = re.compile(r"^(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?$")
_DIFFUSERS = re.compile(r"^(?P<module>.+?)\.lora(?:_linear_layer|_layer)?\.(?P<side>down|up)\.weight")
_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
_NUMBERED = re.compile(r"^(?P<stem>.+?)(?:_(?P<number>\d+))?$")
_BASE_LAYER = re.compile(r"base_layer(?:_\d+)?")  # numbered when a module is called again
# Only under PEFT's root: a model may have a child called base_layer of its own.
BASE_TENSOR = re.compile(r"^(?P<module>.*base_model\.model\..+)\.base_layer\.(?:weight|bias)$")
_OPERATORS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Transpose"})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One source's word on one factor of a branch.

    Args:
        source: which kind of source
        module: the module's path as the source spells it: dotted, or with ``/`` where it is a node path
        adapter: the adapter's name, ``""`` when the source has none
        carrier: the value or node that bears the name
    """

    source: NameSource
    module: str
    adapter: str
    carrier: object


def claims_of(branch: Branch) -> Iterator[Claim]:
    """Every claim on ``branch``, in the order in which sources are believed: ``a`` before ``b`` within a source."""
    both = ((branch.a, "A"), (branch.b, "B"))
    claims = [read(*one) for read in (_by_initializer, _by_folded_from, _by_name_scopes) for one in both]
    told = [claim for claim in (*claims, _by_base(branch), _by_node_path(branch)) if claim is not None]
    yield from told
    # A quantizer replaces the factors, and leaves of the branch no more than where it is added.
    if not told and (last := _by_join(branch)) is not None:
        yield last


def parse_tensor_name(name: str) -> tuple[str, str, str] | None:
    """``(module, side, adapter)`` of a LoRA weight's name, side ``"A"`` or ``"B"``; ``None`` when it is not one.

    What a quantizer appended is no part of the name.

    Example:
        >>> parse_tensor_name("m.base_model.model.fc.lora_A.default.weight")
        ('m.base_model.model.fc', 'A', 'default')
        >>> parse_tensor_name("model.layers.0.attn.q_proj.lora_B.MatMul.weight")
        ('model.layers.0.attn.q_proj', 'B', '')
    """
    name = unquantized(name)
    found = _TENSOR.match(name) or _DIFFUSERS.match(name)
    if found is None:
        return None
    adapter = found.groupdict().get("adapter") or ""
    return found["module"], _SIDES[found["side"]], "" if adapter == "MatMul" else adapter


def listed(text: str | None) -> list[str]:
    """The names in a metadata string that holds a Python list literal."""
    if not text:
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def chain(factor: Linear) -> Iterator[ir.Value]:
    """The values between a factor's node and the constant behind its weight, nearest first."""
    value = factor.node.inputs[0 if is_op(factor.node, "Gather") else 1]
    while value is not None:
        yield value
        if value is factor.weight.root:
            return
        node = value.producer()
        value = None if node is None else node.inputs[0]


def _by_initializer(factor: Linear, side: Side) -> Claim | None:
    for value in chain(factor):
        parsed = parse_tensor_name(value.name or "")
        if parsed is not None and parsed[1] == side:
            return Claim("initializer", parsed[0], parsed[2], value)
    return None


def _by_folded_from(factor: Linear, side: Side) -> Claim | None:
    for value in chain(factor):
        origins = [parse_tensor_name(name) for name in listed(value.metadata_props.get(FOLDED_FROM))]
        found = [origin for origin in origins if origin is not None]
        # A tensor folded from several LoRA weights is derived from them; it is not any one of them.
        if len(found) == 1 and found[0][1] == side:
            return Claim("folded_from", found[0][0], found[0][2], value)
    return None


def _by_name_scopes(factor: Linear, side: Side) -> Claim | None:
    for scope in reversed(listed(factor.node.metadata_props.get(NAME_SCOPES))):
        found = _SCOPE.match(scope)
        if found is not None:
            if found["side"] != side:
                return None
            return Claim("name_scopes", found["module"], found["adapter"] or "", factor.node)
    return None


def _by_join(branch: Branch) -> Claim | None:
    """The module in which the join was traced, where it is one of PEFT's layers."""
    found = traced_in_peft(branch.join)
    return None if found is None else Claim("name_scopes", found[0], "", branch.join)


def traced_in_peft(node: ir.Node) -> tuple[str, str] | None:
    """The module in which ``node`` was traced, and which of PEFT's tuners it is of (``ia3``); ``None`` for others."""
    scopes, classes = (listed(node.metadata_props.get(key)) for key in (NAME_SCOPES, CLASS_HIERARCHY))
    if min(len(scopes), len(classes)) < _MODULE_AND_OPERATION:
        return None
    found = _TUNER.match(classes[-2])
    return None if found is None else (scopes[-2], found["tuner"])


def _by_base(branch: Branch) -> Claim | None:
    """PEFT's word for what it wraps, in the names of the base's weight and bias, which tools leave alone longest."""
    base = None if branch.base_op is None else any_linear(branch.base_op)
    for value in (*(() if base is None else chain(base)), *_addends(branch, base)):
        found = BASE_TENSOR.match(unquantized(value.name or ""))
        if found is not None:
            return Claim("initializer", found["module"], "", value)
    return None


def _addends(branch: Branch, base: Linear | None) -> Iterator[ir.Value]:
    """Constants that are added to what the base operation makes, on the way to the join."""
    if branch.base_op is None:
        return
    # A bias that is all zero counts: it has a name like any other.
    yield from (value for value in branch.base_op.inputs[2:] if is_fixed(value) and value is not None)
    last = branch.base_op if base is None else base.output.producer()
    node = None if branch.base_op is branch.join else branch.base.producer()
    while node is not None and node is not last:
        operands = [value for value in node.inputs if value is not None]
        if is_op(node, "Add"):
            fixed = [value for value in operands if is_fixed(value)]
            if len(fixed) != 1:
                return
            yield fixed[0]
            operands.remove(fixed[0])
        elif not is_op(node, *SAME_VALUE, *SAME_ROWS, *QUANTIZERS, domain=(*STANDARD, MICROSOFT)):
            return
        node = operands[0].producer()


def _by_node_path(branch: Branch) -> Claim | None:
    """TorchScript paths: A under ``<module>/<adapter>``, B under ``<module>/<adapter>_1``, base under ``base_layer``.

    PEFT keeps both factors in dictionaries keyed by the adapter's name, so the exporter sees one name twice and
    numbers it. A Dropout that was exported too takes the first number.
    """
    a, b = _parts(branch.a.node), _parts(branch.b.node)
    base = [] if branch.base_op is None else _parts(branch.base_op)
    if depth := base_layer_depth(base):
        # PEFT alone puts what it wraps under this name; some of its layers compute both factors themselves.
        if not (a[:depth] == b[:depth] == base[:depth] and len(a) > depth and len(b) > depth):
            return None
        adapter = _adapter_of(a[depth:], b[depth:])
        if adapter is None and not len(a) == len(b) == depth + 1:
            return None
        return Claim("node_path", "/".join(a[:depth]), adapter or "", branch.a.node)
    depth = next((i for i, (p, q) in enumerate(zip(a, b, strict=False)) if p != q), 0)
    spoken = _adapter_of(a[depth:], b[depth:]) if depth else None
    if spoken is None:
        return None
    by_name = a[depth] == "lora_A" or (not base and b[depth] == f"{a[depth]}_1")
    return Claim("node_path", "/".join(a[:depth]), spoken, branch.a.node) if by_name else None


def base_layer_depth(parts: list[str]) -> int:
    """How many parts name the module that PEFT wrapped; 0 when the path does not lead to what it wraps."""
    return next((i for i, part in enumerate(parts) if _BASE_LAYER.fullmatch(part)), 0)


def _parts(node: ir.Node) -> list[str]:
    return path_parts(unquantized(node.name or ""))


def path_parts(name: str) -> list[str]:
    """The parts of a node's path; none when the name is no path. Optimizers put words of theirs before and behind."""
    parts = [part for part in name[name.index("/") :].split("/") if part] if "/" in name else []
    while parts and parts[-1].endswith("Fusion"):
        parts.pop()
    return parts


def _adapter_of(a: list[str], b: list[str]) -> str | None:
    if a[0] == "lora_A" and b[0] == "lora_B":
        return a[1] if len(a) > 2 and a[1] not in _OPERATORS else ""
    if b[0] == f"{a[0]}_1" and a[0] not in _OPERATORS:
        return a[0]
    first, second = _NUMBERED.match(a[0]), _NUMBERED.match(b[0])
    if first is None or second is None or first["stem"] != second["stem"] or first["stem"] in _OPERATORS:
        return None
    return first["stem"] if int(second["number"] or 0) == int(first["number"] or 0) + 1 else None
