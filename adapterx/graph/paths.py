"""Canonical site names: the module path of the source checkpoint, whatever wrapped the model on its way here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir

from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES, listed
from adapterx.graph.view import all_nodes

_PEFT_ROOT = "base_model.model."
# A checkpoint may keep everything below one of these; any other single name at the top is an export wrapper's.
_CHECKPOINT_ROOTS = frozenset(
    {"encoder", "decoder", "transformer", "bert", "roberta", "distilbert", "electra", "deberta", "vit", "gpt_neox"}
    | {"text_model", "vision_model", "language_model", "backbone"}
)
_GENAI = "onnxruntime-genai"


@dataclasses.dataclass(frozen=True, slots=True)
class Paths:
    """What one model's own names tell of where its checkpoint's module tree begins.

    Args:
        wrapper: leading parts of dotted names that belong to the export, not to the checkpoint
        node_wrapper: the same for node paths
        modules: dotted paths of modules whose weights kept their names, wrapper removed
        genai: the model comes from the genai builder, which renames ``self_attn``
    """

    wrapper: tuple[str, ...]
    node_wrapper: tuple[str, ...]
    modules: frozenset[str]
    genai: bool

    @classmethod
    def of(cls, model: ir.Model) -> Paths:
        """Read them off ``model``."""
        dotted = list(_dotted_names(model))
        plain = [name.split(".") for name in dotted if _PEFT_ROOT not in name]
        wrapper = _common_wrapper(plain, _CHECKPOINT_ROOTS | {"model"})
        nodes = [
            [part for part in name.split("/") if part] for node in all_nodes(model) if "/" in (name := node.name or "")
        ]
        node_wrapper = _common_wrapper([parts[:-1] for parts in nodes if len(parts) > 1], _CHECKPOINT_ROOTS)
        bare = cls(wrapper, node_wrapper, frozenset(), genai=(model.producer_name or "").startswith(_GENAI))
        modules = {module for name in dotted for module in _ancestors(bare.canonical(name))}
        return dataclasses.replace(bare, modules=frozenset(modules))

    def canonical(self, module: str) -> str:
        """``module``, as a claim spells it, as the checkpoint's path.

        Example:
            >>> Paths((), ("m", "model"), frozenset({"model.layers.0"}), genai=False).canonical(
            ...     "m/model/model/layers.0/self_attn/q_proj")
            'model.layers.0.self_attn.q_proj'
        """
        path = self._from_node(module.split("/")) if "/" in module else self._from_dotted(module)
        return path.replace(".attn.", ".self_attn.") if self.genai else path

    def _from_dotted(self, module: str) -> str:
        _, root, rest = module.partition(_PEFT_ROOT)
        if root:
            return rest
        parts = module.split(".")
        depth = len(self.wrapper)
        return ".".join(parts[depth:] if tuple(parts[:depth]) == self.wrapper and len(parts) > depth else parts)

    def _from_node(self, parts: list[str]) -> str:
        best = max(range(len(parts)), key=lambda skip: (self._depth(parts[skip:]), -skip))
        if self._depth(parts[best:]):
            return ".".join(parts[best:])
        if "base_model" in parts[:-1]:
            rest = parts[parts.index("base_model") + 1 :]
            return ".".join(rest[1:] if rest[0] == "model" and len(rest) > 1 else rest)
        depth = len(self.node_wrapper)
        return ".".join(parts[depth:] if tuple(parts[:depth]) == self.node_wrapper else parts)

    def _depth(self, parts: list[str]) -> int:
        """How many leading parts of a node path lead to a module that is known by name (0: none)."""
        known = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.modules)
        return next(known, 0)


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")[:-1]
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _dotted_names(model: ir.Model) -> Iterable[str]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            names = [value.name or "", *listed(value.metadata_props.get(FOLDED_FROM))]
            yield from (name for name in names if name.endswith((".weight", ".bias")))
    for node in all_nodes(model):
        scopes = listed(node.metadata_props.get(NAME_SCOPES))
        yield from (f"{scope}.weight" for scope in scopes[-2:-1] if scope)


def _common_wrapper(names: list[list[str]], keep: frozenset[str]) -> tuple[str, ...]:
    """Leading parts that all names share, up to the first that a checkpoint would have itself."""
    if not names:
        return ()
    shared: list[str] = []
    for column in zip(*names, strict=False):
        if len(set(column)) > 1 or column[0] in keep:
            break
        shared.append(column[0])
    return tuple(shared)
