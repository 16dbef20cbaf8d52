"""quantize_base: the base of an ONNX model in fewer bits, its adapters as they were."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.errors import ModelError
from adapterx.graph.activation_ranges import Range, activation_ranges
from adapterx.graph.apart import is_activated, take_apart
from adapterx.graph.base_methods import RTN, DynamicInt8, KQuant, Method, MethodName, StaticInt8, method_named
from adapterx.graph.load import ModelLike, check_model, load_model
from adapterx.graph.opset import raise_opset
from adapterx.graph.quantize_plan import QuantizePlan, Wish, quantize_plan
from adapterx.graph.quantized_weights import quantized_weights
from adapterx.graph.save import save_model, staged
from adapterx.graph.sites import AdapterLike, label
from adapterx.graph.stored import base_weight_of, weight_values
from adapterx.graph.targets import Target
from adapterx.graph.view import MICROSOFT
from adapterx.graph.weight_store import weight_store
from adapterx.manifest import KEY, Manifest, SiteBase, manifest_of
from adapterx.quantization_table import Quantization
from adapterx.site import SiteTable

_QDQ_OPSET, _INT8_OPSET = 21, 13
_IR_VERSION_OF_INT4 = 10


def quantize_base(  # noqa: PLR0913 - the options of the contract, all by name
    model: ModelLike,
    output: str | os.PathLike[str],
    *,
    method: Method | MethodName = RTN(),  # noqa: B008 - frozen
    layers: Mapping[Target, Method | None] | None = None,
    head: bool = False,
    embeddings: bool = False,
    calibration: Iterable[Mapping[str, Array]] = (),
    adapter: AdapterLike | None = None,
) -> Quantization:
    """Quantize the base of a model and nothing else: its linear layers, where no adapter has its own weights.

    What is an adapter's is found by dataflow, not by names: the branches of an export, the ports of a model that was
    extracted or injected. So adapters made for the float model serve the quantized one, and it can still be extracted
    or injected into. The layer that makes the logits and embeddings stay float unless asked for. What several layers
    share stays shared. Weights are read and written one after another; a model of any size takes the memory of its
    largest.

    The codes of :class:`RTN` and :class:`KQuant` are those of ``onnxruntime.quantization``, which leaves 8-bit QDQ
    float and writes HQQ models of 8 bits that fail at run; these here run.

    Args:
        model: path, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed
        output: the quantized model's file; written whole or not at all. Beside it in ``<output>.data`` its weights,
            where the model's lie in a data file
        method: one of :mod:`adapterx.graph.base_methods`, or its name for the defaults: ``rtn``, ``kquant``, ``hqq``,
            ``nf4``, ``fp4``, ``dynamic``, ``static``
        layers: exceptions: a module's name, the end of one (``"down_proj"``), a compiled expression for whole names, or
            an operator (``"Gemm"``) -> its method, ``None`` for float. Names are stronger than operators, the last
            name strongest
        head: quantize the layer that makes the logits, too
        embeddings: quantize tables of embeddings, too (4 or 8 bits, symmetric)
        calibration: for ``static``: feeds by input name, one mapping a run. Ranges are those of the model as it is: of
            an export with its adapter, of a model with ports without any
        adapter: the adapter that was exported with the model, for one that lost its names (see :func:`find_sites`)

    Returns:
        The path, a row for each weight, and what stayed float and why; prints as a table.

    Raises:
        ModelError: broken, nothing in it can be quantized, an exception that names no module or one that cannot be
            quantized, NaN among weights, an opset that the format cannot have, or ``output`` is the model itself.
        OptionError: no such method, or options of it that no kernel runs.
        FeedError: no calibration feeds, or feeds that do not fit.
        OSError: no permission, disk full.

    For example ``quantize_base("m.onnx", "int4.onnx", method=RTN(bits=4), layers={"down_proj": RTN(bits=8)})``.
    """
    chosen = method_named(method) if isinstance(method, str) else method
    loaded, where, path = load_model(model), label(model), Path(output)
    source = Path(model) if isinstance(model, str | os.PathLike) else None
    if source is not None and path.exists() and path.samefile(source):
        raise ModelError(f"{path} is the model itself; quantize into another file")
    manifest = manifest_of(loaded.metadata_props, where=where)
    plan = _planned(loaded, Wish(chosen, layers or {}, head, embeddings), where, adapter)
    ranges = _ranges(loaded, plan, calibration, manifest)
    _raise_opset(loaded, plan, where)
    location = None if manifest is None else manifest.location
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path.parent) as stage:
        with weight_store(loaded, path, stage) as store:
            done = quantized_weights(loaded, plan, ranges, store)
            store.take_over(loaded, but=_left_in_files(loaded, manifest))
        if manifest is not None:
            loaded.metadata_props[KEY] = _updated(manifest, done.ops).dumps()
        check_model(loaded, f"the model quantized from {where}")
        written = {file.name for file in stage.iterdir()}
        beside = None if source is None else source.parent
        shared = location is not None
        save_model(loaded, path, stage, ours=location, share_weights=shared, written=written, beside=beside)
    adapters = plan.adapters if manifest is None else len(manifest.sites)
    return Quantization(path, done.rows, plan.floats, adapters, done.notes)


def _planned(model: ir.Model, wish: Wish, where: str, adapter: AdapterLike | None) -> QuantizePlan:
    """The plan; activations that were fused into what it names are nodes of their own then."""
    plan = quantize_plan(model, wish, where=where, adapter=adapter)
    fused = [base.op for base, _ in plan.chosen if is_activated(base.op)]
    for op in fused:
        take_apart(op)
    return quantize_plan(model, wish, where=where, adapter=adapter) if fused else plan


def _ranges(
    model: ir.Model, plan: QuantizePlan, calibration: Iterable[Mapping[str, Array]], manifest: Manifest | None
) -> dict[str, Range]:
    read = [base.op.inputs[0] for base, method in plan.chosen if isinstance(method, StaticInt8)]
    values = [value for value in read if value is not None]
    return activation_ranges(model, values, calibration, manifest=manifest) if values else {}


def _raise_opset(model: ir.Model, plan: QuantizePlan, where: str) -> None:
    """To what the nodes that are put in need."""
    methods = [method for base, method in plan.chosen if base.kind == "linear"]
    if any(isinstance(method, RTN | KQuant) and method.format == "qdq" for method in methods):
        raise_opset(model, _QDQ_OPSET, where=where)
        model.ir_version = max(model.ir_version, _IR_VERSION_OF_INT4)
    opset = model.opset_imports.get("", 1)
    if opset < _INT8_OPSET and any(isinstance(method, DynamicInt8 | StaticInt8) for method in methods):
        raise ModelError(f"{where} is of opset {opset}, and int8 by column needs {_INT8_OPSET}; export for that")
    model.opset_imports.setdefault(MICROSOFT, 1)


def _left_in_files(model: ir.Model, manifest: Manifest | None) -> set[str]:
    """Data files of adapters: one that is not there, whose place a session fills, and codes that others replace."""
    if manifest is None:
        return set()
    values = weight_values(model)
    kept = [values[name].const_value for one in manifest.kept.values() for name in one.names]
    files = {str(tensor.location) for tensor in kept if isinstance(tensor, ir.ExternalTensor)}
    return files | ({manifest.location} if manifest.location else set())


def _updated(manifest: Manifest, ops: Mapping[str, ir.Node]) -> Manifest:
    """What the manifest says of bases, as they are now. The fingerprint stays that of the float weights."""
    sites = SiteTable(
        dataclasses.replace(site, op=ops[site.name].op_type) if site.name in ops else site for site in manifest.sites
    )
    bases = {
        name: SiteBase(base_weight_of(ops[name]), base.bias) if name in ops else base
        for name, base in manifest.bases.items()
    }
    return dataclasses.replace(manifest, sites=sites, bases=bases)
