"""Canonical site names: the module path of the source checkpoint, whatever wrapped the model on its way here."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES, NO_MODULE, listed, path_parts
from adapterx.graph.view import all_nodes
from adapterx.manifest import manifest_of

_PEFT_ROOT = "base_model.model."
# A checkpoint may keep everything below one of these; any other single name at the top is an export wrapper's.
_CHECKPOINT_ROOTS = frozenset(
    {"encoder", "decoder", "transformer", "bert", "roberta", "distilbert", "electra", "deberta", "vit", "gpt_neox"}
    | {"text_model", "vision_model", "language_model", "backbone"}
)
_GENAI = "onnxruntime-genai"
_GENAI_WEIGHT = re.compile(r"\.MatMul\.q?weight(?:_\w+)?$")
# Quantizers and mergers of graphs put a word of theirs behind a parameter's name.
_PARAMETER = re.compile(r"^(?P<name>.+\.(?:weight|bias))(?:_\w+)?$")
# One part in common ("model") is met by chance; two are a place in a module tree.
_SURE = 2
# A child of a list, the second call of which has a number more.
_NUMBERED_CHILD = re.compile(r"(\.\d+)+(_\d+)?")
# torch.export's word for a part of a ModuleList: `model.layers.slice(None, 2, None).0`.
_SLICE = re.compile(r"\.slice\([^()]*\)(?=\.)")


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
        paths = [path_parts(node.name or "")[:-1] for node in all_nodes(model)]
        if len({tuple(name[:-1]) for name in plain}) == 1:
            # One module alone shares all of its name with itself.
            plain += [parts for parts in paths if parts]
        wrapper = _common_wrapper(plain, _CHECKPOINT_ROOTS | {"model"})
        bare = cls(wrapper, (), frozenset(), genai=_from_genai(model))
        modules = frozenset(module for name in dotted for module in _ancestors(bare.canonical(name)))
        named = dataclasses.replace(bare, modules=modules)
        nodes = [named._unrepeated(parts) for parts in paths if parts]
        return dataclasses.replace(named, node_wrapper=named._node_wrapper(nodes))

    def _node_wrapper(self, nodes: list[list[str]]) -> tuple[str, ...]:
        """Leading parts of node paths that belong to the export: those that most nodes of known modules have."""
        votes = Counter(
            tuple(parts[:skip]) for parts in nodes if self._depth(parts[(skip := self._skip(parts)) :]) >= _SURE
        )
        if votes:
            return votes.most_common(1)[0][0]
        return _common_wrapper(nodes, _CHECKPOINT_ROOTS)

    def _skip(self, parts: list[str]) -> int:
        """How many leading parts to leave out so that the rest leads deepest into known modules."""
        return max(range(len(parts)), key=lambda skip: (self._depth(parts[skip:]), -skip))

    def canonical(self, module: str) -> str:
        """``module``, as a claim spells it, as the checkpoint's path.

        Example:
            >>> Paths((), (), frozenset({"model.layers.0"}), genai=False).canonical(
            ...     "m/model/model/layers.0/self_attn/q_proj")
            'model.layers.0.self_attn.q_proj'
        """
        module = _SLICE.sub("", module)
        dotted = "/" not in module or _PEFT_ROOT in module
        path = self._from_dotted(module) if dotted else self._from_node(self._unrepeated(module.split("/")))
        return path.replace(".attn.", ".self_attn.") if self.genai else path

    def _unrepeated(self, parts: list[str]) -> list[str]:
        """Single names, without the parts that the next one repeats: a Sequential and its child are ``net/net.0``.

        A module that holds a list of its own name looks the same and keeps both, where weights say that it is so.
        """
        following = [*parts[1:], ""]
        once = [part for part, after in zip(parts, following, strict=True) if not self._repeats(part, after)]
        return [name for part in once for name in part.split(".")]

    def _repeats(self, part: str, after: str) -> bool:
        if not (after.startswith(part) and _NUMBERED_CHILD.fullmatch(after.removeprefix(part))):
            return False
        doubled = f"{part}.{part}"
        return not any(module == doubled or module.endswith(f".{doubled}") for module in self.modules)

    def _from_dotted(self, module: str) -> str:
        _, root, rest = module.partition(_PEFT_ROOT)
        if root:
            return rest
        parts = module.split(".")
        depth = len(self.wrapper)
        return ".".join(parts[depth:] if tuple(parts[:depth]) == self.wrapper and len(parts) > depth else parts)

    def _from_node(self, parts: list[str]) -> str:
        depth = min(len(self.node_wrapper), len(parts) - 1)
        if depth and tuple(parts[:depth]) == self.node_wrapper[:depth]:
            rest = parts[depth:]
            head = "" if self._depth(rest) else self._head(rest)
            return ".".join([head, *rest] if head else rest)
        skip = self._skip(parts)
        if self._depth(parts[skip:]) >= _SURE:
            return ".".join(parts[skip:])
        if head := self._head(parts):
            return ".".join([head, *parts])
        if "base_model" in parts[:-1]:
            rest = parts[parts.index("base_model") + 1 :]
            return ".".join(rest[1:] if rest[0] == "model" and len(rest) > 1 else rest)
        return ".".join(parts)

    def _head(self, parts: list[str]) -> str:
        """What the exporter left out before ``parts``, when weights that kept their names agree on it."""
        for n in range(len(parts) - 1, 0, -1):
            tail = "." + ".".join(parts[:n])
            heads = {module.removesuffix(tail) for module in self.modules if module.endswith(tail)}
            if heads:
                return heads.pop() if len(heads) == 1 else ""
        return ""

    def _depth(self, parts: list[str]) -> int:
        """How many leading parts of a node path lead to a module that is known by name (0: none)."""
        known = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.modules)
        return next(known, 0)


def _from_genai(model: ir.Model) -> bool:
    if (model.producer_name or "").startswith(_GENAI):
        return True
    # Optimizers overwrite the producer; no other exporter ends weights like this.
    return any(_GENAI_WEIGHT.search(name) for graph in model.graphs() for name in graph.initializers)


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")[:-1]
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _dotted_names(model: ir.Model) -> Iterable[str]:
    manifest = manifest_of(model.metadata_props, where="the model")
    # Ports of our own bear canonical names, whatever wraps those of the model.
    ports = frozenset() if manifest is None else frozenset(n for pair in manifest.tensor_names().values() for n in pair)
    for graph in model.graphs():
        for value in graph.initializers.values():
            names = [value.name or "", *listed(value.metadata_props.get(FOLDED_FROM))]
            found = (_PARAMETER.match(name) for name in names if name not in ports)
            yield from (match["name"] for match in found if match is not None)
    for node in all_nodes(model):
        scopes = listed(node.metadata_props.get(NAME_SCOPES))
        yield from (f"{scope}.weight" for scope in scopes[-2:-1] if scope and not scope.startswith(NO_MODULE))


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
