"""verify_mixed: prove that a batch whose rows have different adapters equals its rows one by one.

There are two references, both of one adapter that is fed as it is, without a mask and without a bank: each row alone,
in a batch of one; and the same batch with that adapter for all of its rows. A weighted sum is compared with the one
adapter that is this sum.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Adapter, Array
from adapterx.combination import combine
from adapterx.errors import FeedError, MismatchError, ModelError, OptionError
from adapterx.graph.example_feeds import example_feeds
from adapterx.graph.load import load_model
from adapterx.graph.view import attribute
from adapterx.manifest import Manifest, manifest_of
from adapterx.runtime.kernels import find_kernels
from adapterx.runtime.rows import RowAdapter
from adapterx.runtime.session import AdapterSession
from adapterx.site import unmixed_lines
from adapterx.verification import TOLERANCE, Row, Verification
from adapterx.verify_merged import random_adapter
from adapterx.verify_rows import Batch, RowProof, outputs_of, row_axes

_ROWS, _LENGTH, _LONGEST = 6, 5, 16
# Powers of two, so that no element type rounds what they weigh.
_SUM = {"full": 0.5, "wider": -0.25}
_HALF = {"full": 0.5}
_SEVERAL: tuple[RowAdapter, ...] = ("full", None, "wider", _SUM, "some", "full")
_ONE: tuple[RowAdapter, ...] = ("full", None, _HALF, "full", _HALF, None)

# What takes one scale for all rows, and what rounds each by itself. There a last bit that differs, which is nothing,
# may become a whole step of eight bits.
_SHARING = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_ROUNDING = frozenset({"QuantizeLinear", "QLinearMatMul", "QLinearConv", "QGemm"})
_OF_SHARED, _OF_ROUNDED = 1e-1, 2e-2
_INT8 = 4


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    path: Path
    graph: ir.Model
    manifest: Manifest

    @property
    def shares(self) -> bool:
        """Whether a row's activations are rounded by what others have."""
        return any(node.op_type in _SHARING for node in self._nodes())

    @property
    def bound(self) -> float:
        """The largest error allowed."""
        rounded = any(
            node.op_type in _ROUNDING
            or (node.op_type == "MatMulNBits" and attribute(node, "accuracy_level", 0) == _INT8)
            for node in self._nodes()
        )
        of_base = _OF_SHARED if self.shares else _OF_ROUNDED if rounded else 0.0
        ports = {name for names in self.manifest.tensor_names().values() for name in names}
        weights = (value for value in self.graph.graph.initializers.values() if value.name not in ports)
        # Sites of float32 may lie in a base that computes in less.
        dtypes = {
            value.dtype.numpy().name for value in weights if value.dtype is not None and len(value.shape or ()) > 1
        }
        dtypes |= {site.x_dtype for site in self.manifest.sites}
        return max(of_base, *(TOLERANCE[dtype] for dtype in dtypes & TOLERANCE.keys()))

    def _nodes(self) -> Iterator[ir.Node]:
        roots: list[ir.Graph | ir.Function] = [self.graph.graph, *self.graph.functions.values()]
        for root in roots:
            yield from ir.traversal.RecursiveGraphIterator(root)


def verify_mixed(
    model: str | os.PathLike[str],
    *,
    feeds: Mapping[str, Array] | None = None,
    seed: int = 0,
    rows: int | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Prove that rows of one batch with different adapters get what they get one by one.

    Random adapters go through an extracted or injected model: one of the exported ranks, one of others, one that has
    only some sites; base rows and a weighted sum are among them, and the same adapter twice. Other batches are the same
    rows in another order, as many rows as tokens, and one adapter for a part of the rows. A last check shows that the
    adapters lie so far apart that a mix-up would be seen.

    Where compiled kernels are installed, they run all of it too, and are compared with standard operators.

    Bases that quantize activations by the range of a whole batch (``DynamicQuantizeLinear``) give a row something else
    in other company, with or without adapters. There, no row is compared with itself alone, and the range that the
    others' adapters change is allowed for.

    Args:
        model: what :func:`extract_adapters` or :func:`inject_adapters` wrote, its ports being inputs
        feeds: inputs by name, of two rows or more; random ones are made from the graph when absent
        seed: of the random adapters and feeds
        rows: of the batch, where feeds are made; 6 by default, or what the model fixes
        tolerance: instead of the one in ``TOLERANCE`` for the activations' dtype

    Raises:
        ModelError: the model cannot be read or run, or no rows of a batch can have different adapters in it; says why.
        OptionError: fewer than two rows.
        FeedError: feeds that do not fit the model.

    Example::

        print(ax.verify_mixed("out/model.onnx").passed)
    """
    found = _read(Path(model))
    batch = _batch(found, feeds, rows=rows, seed=seed)
    square = None if feeds is not None else _square(found, batch, seed=seed)
    adapters = _adapters(found, np.random.default_rng(seed + 1))
    sums, notes = _sums(adapters)
    reference, *others = _sessions(found.path, {**adapters, **{name: one for _, name, one in sums if one is not None}})
    base = [] if found.manifest.required else [None]
    axes, alone, told = _told_apart(reference, batch, [*base, *adapters][0], shared=found.shares)
    known = [(weights, None if one is None else name) for weights, name, one in sums]
    bound = found.bound if tolerance is None else tolerance
    checks = []
    for session in (reference, *others):
        proof = RowProof(session, reference, known, axes, alone)
        by = f"{session.kernels.isa} kernels: " if session.kernels else ""
        for check, error in _errors(proof, batch, square, [*base, *adapters]).items():
            checks.append(Row(f"{by}{check}", error, bound, error <= bound))
    distance = proof.distance(batch, [*base, *adapters])
    checks.append(Row("the adapters differ", distance, 3 * bound, distance > 3 * bound))
    return Verification(tuple(checks), (*told, *notes, *unmixed_lines(found.manifest.unmixed)))


def _sessions(path: Path, adapters: Mapping[str, Adapter]) -> list[AdapterSession]:
    """Over standard operators, and over compiled kernels where they are installed."""
    sessions = [AdapterSession(path, adapters, kernels="off")]
    if find_kernels() is not None:
        sessions.append(AdapterSession(path, adapters))
    return [session for i, session in enumerate(sessions) if not i or session.kernels]


def _read(path: Path) -> _Model:
    """Raises ModelError when nothing of the model can be mixed."""
    graph = load_model(path)
    manifest = manifest_of(graph.metadata_props, where=str(path))
    if manifest is None:
        raise ModelError(f"{path} has no adapterx manifest; give a model that was extracted or injected")
    why = ""
    if manifest.port == "external":
        why = "its adapters are initializers, one for the whole batch; extract it with make_inputs=True"
    elif not manifest.batch:
        why = "no input is known to count them; extract or inject the model again with this version"
    elif lost := [site for site in manifest.required if site in manifest.unmixed]:
        why = f"every adapter has {lost[0]}, and {manifest.unmixed[lost[0]]}"
    elif len(manifest.unmixed) == len(manifest.sites):
        why = f"none of its sites can tell them apart: {'; '.join(unmixed_lines(manifest.unmixed))}"
    elif manifest.required and not manifest.dynamic_rank:
        why = "its ports have fixed ranks, so that one adapter fills them, and without one it has no base"
    if why:
        raise ModelError(f"rows of one batch cannot have different adapters in {path}: {why}")
    return _Model(path, graph, manifest)


def _batch(
    found: _Model, feeds: Mapping[str, Array] | None, *, rows: int | None, seed: int, length: int = _LENGTH
) -> Batch:
    if rows is not None and rows < 2:
        raise OptionError(f"rows of a batch are mixed, so there must be two or more; got rows={rows}")
    if feeds is None:
        feeds = example_feeds(found.graph, seed=seed, manifest=found.manifest, rows=rows or _ROWS, length=length)
    by_row = tuple(name for name in found.manifest.batch if name in feeds and np.ndim(feeds[name]))
    if not by_row:
        raise FeedError(f"none of the inputs that count the rows of a batch is fed: {', '.join(found.manifest.batch)}")
    batch = Batch(feeds, by_row)
    if batch.size < 2:
        raise ModelError(
            f"there is nothing to mix in a batch of {batch.size} row; {by_row[0]!r} has shape "
            f"{list(np.shape(feeds[by_row[0]]))}: give feeds of two rows or more, or a model whose batch is not fixed"
        )
    return batch


def _square(found: _Model, batch: Batch, *, seed: int) -> Batch | None:
    """A batch of as many rows as its first input with two axes has tokens, where the model can have that."""
    lengths = [batch.feeds[name].shape[1] for name in batch.by_row if batch.feeds[name].ndim > 1]
    if not lengths or not 2 <= lengths[0] <= _LONGEST:
        return None
    square = _batch(found, None, rows=lengths[0], seed=seed)
    return square if square.size == lengths[0] != batch.size else None


def _adapters(found: _Model, rng: np.random.Generator) -> dict[str, Adapter]:
    """Random ones, for what can be mixed; where ranks are fixed there is room for one only."""
    manifest = found.manifest
    grown = {"full": 0, "wider": 1, "some": 2} if manifest.dynamic_rank else {"full": 0}
    adapters = {}
    for name, grow in grown.items():
        sites = random_adapter(manifest, rng, grow=grow).sites
        kept = [site for site in sites if site not in manifest.unmixed]
        if name == "some":
            kept = [site for i, site in enumerate(kept) if i % 2 == 0 or site in manifest.required]
        adapters[name] = Adapter({site: sites[site] for site in kept})
    return adapters


def _sums(adapters: Mapping[str, Adapter]) -> tuple[list[tuple[Mapping[str, float], str, Adapter | None]], list[str]]:
    """Weighted sums, each with the adapter that is it, or why there is none."""
    sums, notes = list[tuple[Mapping[str, float], str, Adapter | None]](), []
    for name, weights in (("half", _HALF), ("sum", _SUM)):
        if not weights.keys() <= adapters.keys():
            continue
        try:
            sums.append((weights, name, combine([(adapters[one], weight) for one, weight in weights.items()])))
        except MismatchError as error:
            why = str(error).splitlines()[-1].strip()
            notes.append(f"no adapter is the weighted sum {weights} ({why}); its rows were compared with such rows")
            sums.append((weights, name, None))
    return sums, notes


def _told_apart(
    session: AdapterSession, batch: Batch, adapter: str | None, *, shared: bool
) -> tuple[tuple[int | None, ...], bool, list[str]]:
    """On which axes of the outputs rows lie, whether one can be compared with itself alone, and what to say of it."""
    names = [info.name for info in session.get_outputs()]
    outputs, notes, alone = outputs_of(session, batch, adapter), list[str](), not shared
    try:
        axes = row_axes(outputs, outputs_of(session, batch.taken([0]), adapter), batch.size)
    except (ModelError, FeedError) as error:
        alone, axes = False, tuple(0 if len(np.shape(one)) and len(one) % batch.size == 0 else None for one in outputs)
        notes.append(f"no row was compared with itself alone: {str(error).splitlines()[0]}")
    if shared:
        notes.append("no row was compared with itself alone: the base quantizes activations by the range of all rows")
    if not any(axis is not None for axis in axes):
        raise ModelError(f"no output has rows of its own for each row of the batch: {', '.join(names)}")
    left = [name for name, axis in zip(names, axes, strict=True) if axis is None]
    return axes, alone, notes + ([f"not of rows, and not compared: {', '.join(left)}"] if left else [])


def _possible(entries: Sequence[RowAdapter], known: Sequence[str | None]) -> list[RowAdapter]:
    return [
        entry for entry in entries if (entry.keys() <= set(known) if isinstance(entry, Mapping) else entry in known)
    ]


def _errors(proof: RowProof, batch: Batch, square: Batch | None, known: Sequence[str | None]) -> dict[str, float]:
    """By check, the largest error; of the entries that can be had of ``known`` adapters."""
    several, one = (_possible(entries, known) for entries in (_SEVERAL, _ONE))
    errors: dict[str, float] = {}
    for entries in _filled(several, batch.size):
        for check, error in proof.errors(batch, entries).items():
            errors[check] = max(errors.get(check, 0.0), error)
    errors["rows in another order"] = max(proof.order_error(batch, entries) for entries in _filled(several, batch.size))
    errors["one adapter for some rows"] = _largest(proof, batch, one)
    if square is not None:
        errors["as many rows as axis 1 is long"] = _largest(proof, square, several)
    return errors


def _largest(proof: RowProof, batch: Batch, entries: Sequence[RowAdapter]) -> float:
    return max(max(proof.errors(batch, part).values()) for part in _filled(entries, batch.size))


def _filled(entries: Sequence[RowAdapter], size: int) -> Iterator[list[RowAdapter]]:
    """Batches of ``size`` in which every entry comes up, in turn."""
    for start in range(0, len(entries), size):
        yield [entries[(start + i) % len(entries)] for i in range(size)]
