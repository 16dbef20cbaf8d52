"""Which modules are meant: by name, by the end of a name, by regular expression, all, or those of an adapter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from adapterx.errors import ModelError, OptionError, nearest
from adapterx.fused import fused_sites, parts_of_fused
from adapterx.graph.bases import Base
from adapterx.graph.view import SAME_ROWS, SAME_VALUE, is_op

Target: TypeAlias = str | re.Pattern[str]
Targets: TypeAlias = Target | Iterable[Target]

ALL_LINEAR: Final = "all-linear"
# What may lie between the layer that makes the logits and the output: none of it has weights.
_AFTER_HEAD = (*SAME_VALUE, *SAME_ROWS, "Slice", "Gather", "Mul", "Div", "Tanh", "Softmax", "LogSoftmax", "Sigmoid")
_HEADS = frozenset({"lm_head", "embed_out"})
_OF_PATTERNS = re.compile(r"[\\*+?|^$()\[\]]")
FOLDED: Final = (
    "a normalization folded into its weight, which what an adapter adds would have to go through, too; export without "
    "that folding (optimize=False, or training=TrainingMode.PRESERVE)"
)
_SHOWN = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a model that adapters can act on.

    Args:
        named: bases by the name of their module, which has several when it is called several times
        folded: modules whose weight has a normalization folded in
        unnamed: how many more base operations there are
    """

    named: Mapping[str, tuple[Base, ...]]
    folded: frozenset[str] = frozenset()
    unnamed: int = 0

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Other names that stand for modules: a fused layer for its parts, a part for the layer it was fused in."""
        parts = {part: (whole,) for part, whole in parts_of_fused(self.named).items()}
        return {**parts, **fused_sites({name: name for name in self.named})}

    def about_unnamed(self) -> str:
        """A sentence on what has no name, or ``""``."""
        if not self.unnamed:
            return ""
        return f"{self.unnamed} more base operations have no name: a tool deleted what the exporter wrote"


def modules_of(bases: Sequence[Base], where: str) -> Modules:
    """Bases by module.

    Raises:
        ModelError: there is no base operation, or nothing names a single one.
    """
    found: dict[str, tuple[Base, ...]] = {}
    for base in bases:
        if base.name:
            found[base.name] = (*found.get(base.name, ()), base)
    folded = frozenset(base.folded for base in bases if base.folded)
    if found or folded:
        return Modules(found, folded, sum(not (base.name or base.folded) for base in bases))
    if not bases:
        raise ModelError(
            f"{where} has no linear layer, convolution or embedding with constant weights: nothing that an adapter can "
            "act on"
        )
    raise ModelError(
        f"nothing names the {len(bases)} base operations of {where}: a tool deleted the names, paths and metadata that "
        "the exporter wrote. Inject into the export first, then optimize or quantize what comes out"
    )


def targeted(modules: Modules, targets: Targets, *, where: str) -> list[str]:
    """Names of the modules that ``targets`` mean, in graph order.

    A string is a module's whole name, or its last parts (``"q_proj"``, ``"self_attn.q_proj"``); a compiled regular
    expression must match the whole name. ``"all-linear"`` is every linear layer but the one that makes the logits, as
    in PEFT. Where a model has several layers fused into one (``qkv_proj``), the name of a part means the fused layer,
    and the other way round.

    Args:
        modules: :func:`modules_of`
        targets: one, or several that add up
        where: the model's name for messages

    Raises:
        ModelError: a target that means no module, with the nearest names.
        OptionError: no targets, or something that is neither a string nor a compiled regular expression.

    Example:
        >>> targeted(Modules({"h.0.attn": (), "h.0.mlp": (), "h.1.attn": ()}), ["attn"], where="a model")
        ['h.0.attn', 'h.1.attn']
    """
    given = [targets] if isinstance(targets, str | re.Pattern) else list(targets)
    wrong = [one for one in given if not isinstance(one, str | re.Pattern) or one == ""]
    if wrong or not given:
        met = repr(wrong[0]) if wrong else "none"
        raise OptionError(f"targets are names of modules, ends of names, compiled regular expressions; got {met}")
    found: set[str] = set()
    faults = []
    for target in given:
        meant = _linear_names(modules) if target == ALL_LINEAR else _matched(modules, target)
        found |= meant
        if not meant:
            faults.append(f"  {_spelled(target)}{_hint(target, modules)}")
    if faults:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in modules.named})[:_SHOWN])
        lines = [
            f"no module of {where} is meant by",
            *faults[:_SHOWN],
            f"It has {len(modules.named)} named modules that adapters can act on, whose names end in: {kinds}",
            modules.about_unnamed(),
        ]
        raise ModelError("\n".join(line for line in lines if line))
    return [name for name in modules.named if name in found]


def _matched(modules: Modules, target: Target) -> set[str]:
    found = {name for name in modules.named if _means(target, name)}
    if found:
        return found
    return {name for alias, names in modules.aliases.items() if _means(target, alias) for name in names}


def _means(target: Target, name: str) -> bool:
    if isinstance(target, str):
        return name == target or name.endswith(f".{target}")
    return target.fullmatch(name) is not None


def _spelled(target: Target) -> str:
    return repr(target) if isinstance(target, str) else f"the regular expression {target.pattern!r}"


def _hint(target: Target, modules: Modules) -> str:
    folded = next((name for name in sorted(modules.folded) if _means(target, name)), None)
    if folded is not None:
        return f": {folded} has {FOLDED}"
    if not isinstance(target, str):
        return ""
    if _OF_PATTERNS.search(target):
        return "; a regular expression has to be compiled: re.compile(...)"
    ends = {".".join(name.split(".")[-target.count(".") - 1 :]) for name in modules.named}
    return nearest(target, ends) or nearest(target, modules.named)


def _linear_names(modules: Modules) -> set[str]:
    linear = {name: bases for name, bases in modules.named.items() if bases[0].kind == "linear"}
    return {name for name, bases in linear.items() if not any(is_head(base) for base in bases)}


def is_head(base: Base) -> bool:
    """Whether the layer makes the model's logits: by its name, or because an output of that name is what it gives."""
    if base.name.rpartition(".")[2] in _HEADS:
        return True
    value = base.output
    while not value.is_graph_output():
        users = [use.node for use in value.uses()]
        if len(users) != 1 or not is_op(users[0], *_AFTER_HEAD) or users[0].inputs[0] is not value:
            return False
        value = users[0].outputs[0]
    return "logits" in (value.name or "")
