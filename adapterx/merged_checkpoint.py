"""merge_peft: an adapter folded into a Hugging Face checkpoint, file by file, without any model code."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterx.adapter import PROMPT, WHOLE_BIAS, WHOLE_WEIGHT, Adapter, Array, LowRank
from adapterx.ahead import ahead
from adapterx.atomic import Buffer
from adapterx.base_weight import WEIGHT, BaseWeight, Form, read_weight
from adapterx.errors import FormatError, MismatchError, OptionError, nearest
from adapterx.formats import load_adapter
from adapterx.formats.checkpoint import CONFIG, Checkpoint, read_checkpoint
from adapterx.formats.checkpoint_copy import NewTensor, write_copy
from adapterx.formats.peft_config import NAME as ADAPTER_CONFIG
from adapterx.json_text import json_object
from adapterx.kinds import shaped
from adapterx.kinds.merged import Merger, merger
from adapterx.kinds.merged_rows import merged_rows
from adapterx.merge_table import Merge, MergeRow
from adapterx.pipeline import for_model
from adapterx.renaming import renaming
from adapterx.weight_rows import row_blocks, row_span

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_HEAD = "lm_head"
_TABLES = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "embeddings"})
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_TIE = "tie_word_embeddings"


def merge_peft(
    model_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    *,
    weight: float = 1.0,
) -> Merge:
    """Fold a PEFT adapter into a checkpoint of Hugging Face: safetensors, one file or many.

    Tensor by tensor and block by block, so memory does not grow with the model, and without code of the model: modules
    are found by PEFT's paths. Sums are made in float32 and rounded once. Files keep their names, order and element
    types; config and tokenizer are copied. An output layer that shares the embedding's table gets one of its own when
    one of the two is adapted (PEFT's own merge changes both), and the config then says so.

    Args:
        model_dir: the checkpoint
        adapter_dir: a PEFT folder, an adapter file, or an ``Adapter``
        out: a folder that is empty or not there; written whole or not at all
        weight: how much of the adapter; 0.5 is half, -1 takes it out again

    Raises:
        MismatchError: the adapter does not fit the checkpoint; names every fault. Nothing is written.
        FormatError: checkpoint or adapter cannot be read, or the checkpoint is quantized.
        OptionError: ``out`` holds files, or ``weight`` is no number.
        OSError: no permission, disk full.
    """
    target = Path(out)
    if not math.isfinite(weight):
        raise OptionError(f"weight={weight!r} is no number to multiply an adapter with; 1.0 is all of it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OptionError(f"{target} is not an empty folder; give one, or a name that is not there yet")
    base = read_checkpoint(Path(model_dir))
    _refuse_quantized(base)
    adapter = adapter_dir if isinstance(adapter_dir, Adapter) else load_adapter(adapter_dir)
    # A pipeline's adapter has sites in several checkpoints.
    adapter = for_model(adapter, dict.fromkeys(_known(base)))
    rows_first, peft_type = _conv1d(adapter_dir, adapter, base), adapter.metadata.get("peft_type", "")
    plan = _Plan(base, weight, rows_first=rows_first, peft_type=peft_type)
    tensors = plan.tensors(adapter)
    write_copy(base, tensors, target, config=_untied(base.config) if plan.untied else base.config)
    dtypes = {tensor.name: tensor.dtype.name for tensor in tensors}
    rows = [(site, f"{module}.weight") for site, module in plan.modules.items()]
    return Merge(target, tuple(MergeRow(s, n * (n in dtypes), dtypes.get(n, "bias")) for s, n in rows))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model, whose output layer has a weight of its own."""
    changed = {**config, _TIE: False} if config else {}
    text = config.get("text_config")
    return {**changed, "text_config": {**text, _TIE: False}} if isinstance(text, dict) and _TIE in text else changed


def _refuse_quantized(base: Checkpoint) -> None:
    how = base.config.get("quantization_config")
    if how:
        method = how.get("quant_method", "") if isinstance(how, dict) else ""
        raise FormatError(
            f"{base.folder}: the checkpoint is quantized ({method or CONFIG}); merge into the float checkpoint that it "
            "was made of, and quantize the result"
        )


def _conv1d(adapter_dir: object, adapter: Adapter, base: Checkpoint) -> bool:
    """Whether linear weights lie ``[d_in, d_out]``: by the shapes where they tell, else as the config says."""
    votes = set()
    for site, module in _modules(adapter, base).items():
        change, stored = adapter.sites[site], base.tensors.get(f"{module}.weight")
        is_table = module.rpartition(".")[2] in _TABLES or change.a.ndim > 2
        if stored is None or is_table or not change.rank or change.d_in == change.d_out:
            continue
        if stored.shape in {(change.d_in, change.d_out), (change.d_out, change.d_in)}:
            votes.add(stored.shape == (change.d_in, change.d_out))
    if len(votes) == 1:
        return votes.pop()
    path = None if isinstance(adapter_dir, Adapter) else Path(str(adapter_dir))
    config = None if path is None else (path if path.is_dir() else path.parent) / ADAPTER_CONFIG
    if config is None or not config.is_file():
        return False
    return bool(json_object(config.read_bytes(), where=str(config)).get("fan_in_fan_out"))


def _modules(adapter: Adapter, base: Checkpoint) -> Mapping[str, str]:
    """The checkpoint's name for each site, whether it has it or not: a model class may add or leave out a prefix."""
    rename = renaming(list(adapter.sites), _known(base))
    return {site: rename(site) for site in adapter.sites}


def _known(base: Checkpoint) -> set[str]:
    return {name.rpartition(".")[0] for name in base.tensors}


@dataclasses.dataclass(slots=True)
class _Plan:
    """What becomes of each tensor; all faults are found before anything is written.

    Args:
        base: the checkpoint
        amount: how much of the adapter
        rows_first: linear weights lie ``[d_in, d_out]``
        peft_type: what the adapter's file calls its kind
        modules: site -> module of the checkpoint
        untied: the output layer does not share the embedding's table any more
    """

    base: Checkpoint
    amount: float
    rows_first: bool
    peft_type: str
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    untied: bool = False

    def tensors(self, adapter: Adapter) -> list[NewTensor]:
        """Everything that is not copied as it is.

        Raises:
            MismatchError: the adapter does not fit; all faults.
        """
        faults: list[str] = []
        found: list[NewTensor] = []
        for site, module in _modules(adapter, self.base).items():
            try:
                found += self._site(site, module, adapter.sites[site])
            except ValueError as fault:
                faults.append(f"{site}: {fault}")
        if faults:
            name = adapter.metadata.get("source", "the adapter")
            told = "\n  ".join(faults)
            raise MismatchError(
                f"{name} does not fit {self.base.folder} at {len(faults)} of {len(adapter.sites)} sites:\n  {told}\n"
                "Nothing was written. An adapter is merged into the checkpoint that it was trained on."
            )
        return found + self._own_head(found)

    def _site(self, site: str, module: str, change: LowRank) -> list[NewTensor]:
        if PROMPT in change.parts:
            raise ValueError("a prompt stands beside the weights, and cannot be merged into any")
        known = _known(self.base)
        if module not in known and site.rpartition(".")[2] == _HEAD:
            return self._head(site, change)
        if module not in known and set(change.parts) <= {WHOLE_WEIGHT, WHOLE_BIAS} and not change.rank:
            return self._added(site, change)
        if module not in known:
            raise ValueError(f"the checkpoint has no such module{nearest(site, known)}")
        self.modules[site] = module
        self.untied |= module.rpartition(".")[2] == _HEAD
        return self._merged(module, f"{module}.weight", f"{module}.weight", change)

    def _merged(self, module: str, name: str, source: str, change: LowRank) -> list[NewTensor]:
        """The weight ``name``, made of ``source``, and the module's bias."""
        stored, bias = self.base.tensors.get(source), self.base.tensors.get(f"{module}.bias")
        shape = () if stored is None else stored.shape
        if len(shape) > 1:
            d_in = shape[0] if self._lies_rows_first(source) else shape[1]
            change = shaped(change, d_in, shape[2:], peft_type=self.peft_type)
        ref = self._ref(source, shape, change)
        # Where only a bias changes, the weight may be of any shape (a norm's).
        sizes = (ref.d_in, ref.d_out) if ref is not None else (0, 0 if bias is None else math.prod(bias.shape))
        reader = self.base.read
        done = merger(
            change,
            sizes,
            amount=self.amount,
            weight=lambda: read_weight(_none(ref), reader),
            bias=None if bias is None else reader(f"{module}.bias").astype(np.float32),
        )
        found = []
        if done.changes_weight:
            if stored is None or ref is None:
                raise ValueError(f"the checkpoint has no matrix {source}")
            self._refuse_integers(source)
            found.append(NewTensor(name, stored.dtype, shape, _merged_pieces(self.base, ref, done)))
        if done.changes_bias and (bias is not None or done.shift is not None):
            if bias is None:
                raise ValueError(f"it changes the bias, and the checkpoint has no {module}.bias")
            self._refuse_integers(f"{module}.bias")
            merged = done.bias(reader(f"{module}.bias"))
            assert merged is not None, "there was a bias"
            found.append(_whole(f"{module}.bias", merged.astype(bias.dtype).reshape(bias.shape)))
        return found

    def _ref(self, source: str, shape: tuple[int, ...], change: LowRank) -> BaseWeight | None:
        if len(shape) < 2:
            return None
        form: Form = "out_in" if len(shape) == 2 else "conv"
        if WHOLE_WEIGHT not in change.parts and form == "out_in":
            tells = change.rank and shape[0] != shape[1]
            rows_first = shape == (change.d_in, change.d_out) if tells else self._lies_rows_first(source)
            form = "in_out" if rows_first else "out_in"
        return BaseWeight(form, shape, {WEIGHT: source})

    def _lies_rows_first(self, source: str) -> bool:
        return self.rows_first or source.split(".")[-2] in _TABLES

    def _refuse_integers(self, name: str) -> None:
        dtype = self.base.tensors[name].dtype.name
        if dtype not in _FLOATS:
            raise ValueError(f"{name} is {dtype}; only float32, float16 and bfloat16 can be merged into")

    def _added(self, site: str, change: LowRank) -> list[NewTensor]:
        """A module trained in full that the base does not have: a head."""
        if self.amount != 1:
            raise ValueError("the checkpoint does not have it, so there is nothing to mix it with; weight must be 1")
        self.modules[site] = site
        names = {WHOLE_WEIGHT: f"{site}.weight", WHOLE_BIAS: f"{site}.bias"}
        arrays = {names[part]: array for part, array in change.parts.items()}
        if f"{site}.bias" in arrays:
            arrays[f"{site}.bias"] = arrays[f"{site}.bias"].reshape(-1)
        return [_whole(name, array) for name, array in arrays.items()]

    # -- An output layer that shares the embedding's table ------------------------------------------------------------

    def _head(self, site: str, change: LowRank) -> list[NewTensor]:
        """The output layer, where the checkpoint only has the table that it shares."""
        self.untied, self.modules[site] = True, site
        return self._merged(site, f"{site}.weight", f"{self._table()}.weight", change)

    def _table(self) -> str:
        tables = {name.removesuffix(".weight") for name in self.base.tensors if name.split(".")[-2] in _TABLES}
        tables = {table for table in tables if f"{table}.weight" in self.base.tensors}
        if self.base.config.get(_TIE) is False or len(tables) != 1:
            raise ValueError(f"the checkpoint has no such module, and no one embedding that it would share ({tables})")
        return tables.pop()

    def _own_head(self, found: list[NewTensor]) -> list[NewTensor]:
        """The output layer as it was, where an embedding that it shares has changed."""
        names = {tensor.name for tensor in found}
        changed = sorted(name for name in names if name.split(".")[-2] in _TABLES)
        text = self.base.config.get("text_config")
        tied = self.base.config.get(_TIE, text.get(_TIE) if isinstance(text, dict) else None)
        kind = next(iter(self.base.config.get("architectures") or [""]))
        if not changed or tied is False or not kind.endswith((*_GENERATORS, *_MASKED)):
            return []
        if not kind.endswith(_GENERATORS):
            raise MismatchError(
                f"{changed[0]}: the output layer of {kind} shares it, and would change with it; save the model with "
                f"{_TIE}=False first"
            )
        self.untied = True
        if any(name.endswith(f"{_HEAD}.weight") for name in {*names, *self.base.tensors}):
            return []
        stored = self.base.tensors[changed[0]]
        ref = BaseWeight("out_in", stored.shape, {WEIGHT: changed[0]})
        return [NewTensor(f"{_HEAD}.weight", stored.dtype, stored.shape, _merged_pieces(self.base, ref, None))]


def _none(ref: BaseWeight | None) -> BaseWeight:
    if ref is None:
        raise ValueError("the checkpoint has no matrix for it")
    return ref


def _whole(name: str, array: Array) -> NewTensor:
    content = np.ascontiguousarray(array)
    return NewTensor(name, array.dtype, array.shape, lambda: iter([content.reshape(-1).view(np.uint8).data]))


def _merged_pieces(base: Checkpoint, ref: BaseWeight, done: Merger | None) -> Callable[[], Iterator[Buffer]]:
    """The bytes of a weight, merged (or as it is), a block of rows at a time."""
    [name] = ref.tensors.values()
    nbytes = base.tensors[name].last - base.tensors[name].first

    def piece(rows: slice) -> Array:
        stored = base.read(name, row_span(ref, WEIGHT, nbytes, rows))
        if done is None:
            return stored
        try:
            return merged_rows(ref, rows, done, lambda _: stored)[name]
        except ValueError as fault:
            raise MismatchError(f"{name}: {fault}. Nothing was written.") from None

    def pieces() -> Iterator[Buffer]:
        for array in ahead(piece, row_blocks(ref, {WEIGHT: nbytes})):
            yield array.reshape(-1).view(np.uint8).data

    return pieces
