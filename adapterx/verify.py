"""verify_extraction: prove an extracted model with adapters that were never in it.

A round trip (extract, feed back, compare) passes on many wrong extractions: exporters merge equal tensors, and fresh
adapters have zero ``B``. So a *second*, random adapter goes through the extracted model, and is compared with the
original graph into whose own nodes the same numbers were put.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from adapterx.adapter import Adapter, Array, LowRank
from adapterx.errors import AdapterxError, ModelError
from adapterx.graph.example_feeds import example_feeds
from adapterx.graph.extract import adapters_of, whole_of
from adapterx.graph.kept import keep
from adapterx.graph.load import load_model, read_proto
from adapterx.graph.quantized_linear import OF_CODES, any_linear
from adapterx.graph.sites import AdapterLike, Found, find
from adapterx.graph.stored import tensor_reader, weight_values
from adapterx.graph.view import Linear, all_nodes, attribute
from adapterx.manifest import Manifest, manifest_of
from adapterx.runtime.kept import coded
from adapterx.runtime.ports import rounded
from adapterx.runtime.session import AdapterSession
from adapterx.verification import TOLERANCE, Row, Verification, largest_error
from adapterx.verify_merged import merged_outputs, needs_merging, random_adapter

# The same for what ports of another dtype than the activations make of an adapter.
_ROUNDED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}


def verify_extraction(
    original: str | os.PathLike[str],
    extracted: str | os.PathLike[str],
    *,
    adapter: AdapterLike | None = None,
    feeds: Mapping[str, Array] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> Verification:
    """Prove that ``extracted`` does with any adapter what ``original`` would do.

    Four adapters go through the extracted model: none, the one that was exported, a random one, and a random one of
    other ranks. Each is compared with ONNX Runtime on the original graph, in which the weights at the found places
    are replaced where they stand, scale divided out; an adapter that was quantized is replaced by products of floats,
    or its codes by others, as in the extracted model. The base is the same in both, codes included, so that tolerances
    need no room for its quantization. A fifth row shows that the random adapter changes the output enough for its row
    to mean something.

    Where sites take more than two matrices (DoRA, (IA)3, convolutions, heads ...), the exported adapter is compared
    with the original graph as it stands, and the others with the same adapter merged into the base's weights.

    Args:
        original: the exported model
        extracted: what :func:`extract_adapters` made of it, in any mode
        adapter: the exported adapter, for a model that lost its names
        feeds: inputs by name; random ones are made from the graph when absent
        seed: of the random adapters and feeds
        tolerance: instead of the one in ``TOLERANCE`` for the sites' dtype

    Raises:
        ModelError: one of the models cannot be read or run, or they do not have the same sites.
    """
    manifest = _manifest(Path(extracted))
    source = load_model(original)
    finding = find(source, adapter=adapter, structural=_is_structural(manifest), where=str(original))
    adapters = list(adapters_of(finding, str(original)).values())
    exported = whole_of(adapters)
    if set(exported.sites) != {site.name for site in manifest.sites}:
        odd = sorted(set(exported.sites) ^ {site.name for site in manifest.sites})
        raise ModelError(f"{original} and {extracted} do not have the same sites; they differ in {odd[:5]}")
    feeds = example_feeds(source, seed=seed) if feeds is None else dict(feeds)
    rng = np.random.default_rng(seed + 1)
    dtype = next(iter(exported.sites.values())).dtype.name
    bound = TOLERANCE[dtype] if tolerance is None else tolerance
    if needs_merging(manifest):
        lost = [_ROUNDED[site.dtype] for site in manifest.sites if site.activations and tolerance is None]
        bounds = (bound, max([bound, *lost]))
        return _by_merging(Path(original), Path(extracted), exported, feeds, seed=seed, bounds=bounds)
    # What ports of another element type round away is no fault of the extraction, and is rounded on both sides.
    candidates: dict[str, Adapter | None] = {
        "no adapter = base": None,
        "the exported adapter": rounded(exported, manifest),
        "a random adapter": rounded(_random(exported, rng, grow=0), manifest),
        "a random adapter of other ranks": rounded(
            _random(exported, rng, grow=1 if _any_rank(manifest) else -1), manifest
        ),
    }
    session = AdapterSession(extracted)
    rows, results = [], {}
    for name, candidate in candidates.items():
        want = _on_original(Path(original), candidate, manifest, adapter=adapter, feeds=feeds)
        error = largest_error(_through(session, candidate, feeds), want)
        rows.append(Row(name, error, bound, error <= bound))
        results[name] = want
    effect = largest_error(results["a random adapter"], results["no adapter = base"])
    rows.append(Row("the random adapter changes the output", effect, 10 * bound, effect > 10 * bound))
    return Verification(tuple(rows))


def _by_merging(
    original: Path,
    extracted: Path,
    exported: Adapter,
    feeds: Mapping[str, Array],
    *,
    seed: int,
    bounds: tuple[float, float],
) -> Verification:
    """The second bound is for the exported adapter, which is compared with the graph that has its very numbers."""
    manifest, rng, session = _manifest(extracted), np.random.default_rng(seed + 1), AdapterSession(extracted)
    bound, loose = bounds

    def run(path: Path) -> list[Array]:
        return _run(load_model(path), path, feeds)

    want = run(original)
    errors = {"the exported adapter": largest_error(_through(session, exported, feeds), want)}
    candidates: dict[str, Adapter | None] = {
        "a random adapter": rounded(random_adapter(manifest, rng, grow=0), manifest),
        "a random adapter of other ranks": rounded(
            random_adapter(manifest, rng, grow=1 if _any_rank(manifest) else -1), manifest
        ),
    }
    if not manifest.required:
        candidates = {"no adapter = base": None, **candidates}
    merged, why = merged_outputs(extracted, manifest, candidates, run)
    errors |= {
        name: largest_error(_through(session, candidates[name], feeds), outputs) for name, outputs in merged.items()
    }
    allowed = {name: bound if name in merged else loose for name in errors}
    rows = [Row(name, error, allowed[name], error <= allowed[name]) for name, error in errors.items()]
    if why:
        return Verification(tuple(rows), (f"only the exported adapter was tried: {why}",))
    effect = largest_error(merged["a random adapter"], want)
    rows.append(Row("the random adapter changes the output", effect, 10 * bound, effect > 10 * bound))
    return Verification(tuple(rows))


def _manifest(path: Path) -> Manifest:
    metadata = {entry.key: entry.value for entry in read_proto(path).metadata_props}
    manifest = manifest_of(metadata, where=str(path))
    if manifest is None:
        raise ModelError(f"{path} has no adapterx manifest; give the model that `adapterx extract` wrote")
    return manifest


def _any_rank(manifest: Manifest) -> bool:
    return (manifest.dynamic_rank or manifest.port == "external") and not manifest.kept


def _is_structural(manifest: Manifest) -> bool:
    return any(site.name_source == "structure" for site in manifest.sites)


def _random(like: Adapter, rng: np.random.Generator, *, grow: int) -> Adapter:
    """An adapter of the same sites; with ``grow`` of 1 or -1, of larger or smaller ranks that differ among sites."""
    sites = {}
    for i, (name, one) in enumerate(like.sites.items()):
        rank = max(1, one.rank + grow * (1 + i % 3))
        a = rng.standard_normal((rank, one.d_in)) / np.sqrt(one.d_in)
        b = rng.standard_normal((rank, one.d_out)) / np.sqrt(rank)
        sites[name] = LowRank(a=a.astype(one.dtype), b=b.astype(one.dtype))
    return Adapter(sites)


def _on_original(
    path: Path,
    candidate: Adapter | None,
    manifest: Manifest,
    *,
    adapter: AdapterLike | None,
    feeds: Mapping[str, Array],
) -> list[Array]:
    """Run the original graph with ``candidate``'s numbers in its own nodes (zero ``B`` for ``None``)."""
    model = load_model(path)
    finding = find(model, adapter=adapter, structural=_is_structural(manifest), where=str(path))
    seen: set[str] = set()
    for found in finding.found:
        if found.site.name in manifest.kept:
            _put_codes(model, found, None if candidate is None else candidate.sites[found.site.name])
            continue
        first = found.site.name not in seen
        seen.add(found.site.name)
        for branch in found.branches:
            one = None if candidate is None or not first else candidate.sites[found.site.name]
            a = branch.a.matrix().T if one is None else one.a
            b = np.zeros((branch.rank, branch.b.d_out)) if one is None else one.b.astype(np.float64) / branch.scale
            _put(model, branch.a, a.T)
            _put(model, branch.b, b)
    RemoveUnusedNodesPass()(model)
    # Shapes that were noted for the exported rank would contradict another one.
    for value in (value for node in all_nodes(model) for value in node.outputs if not value.is_graph_output()):
        value.shape = None
    return _run(model, path, feeds)


def _put(model: ir.Model, factor: Linear, matrix: Array) -> None:
    """Give one operation float weights ``[d_in, d_out]`` of its own; one that takes codes becomes a MatMul."""
    codes = any_linear(factor.node) if factor.node.op_type in OF_CODES else None
    flipped = codes is None and bool(attribute(factor.node, "transB", 0))
    laid = np.ascontiguousarray(matrix.T if flipped else matrix).astype(factor.weight.dtype.numpy())
    name = f"adapterx.verify.{len(model.graph.initializers)}"
    value = ir.Value(name=name, const_value=ir.tensor(laid, name=name), type=ir.TensorType(factor.weight.dtype))
    model.graph.register_initializer(value)
    if codes is None:
        factor.node.replace_input_with(1, value)
        return
    nodes = [ir.node("MatMul", [codes.x, value], name=f"{name}.MatMul")]
    if codes.addend is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], codes.addend], name=f"{name}.Add"))
    last = codes.output.producer()
    graph = None if last is None else last.graph
    assert last is not None, "a result has a producer"
    assert graph is not None, "which lies in a graph"
    graph.insert_before(last, nodes)
    codes.output.replace_all_uses_with(nodes[-1].outputs[0])


def _put_codes(model: ir.Model, found: Found, change: LowRank | None) -> None:
    """Give the factors of one site codes of their own, made of ``change`` as the graph's were made of its adapter."""
    kept, site = keep(found.branches, found.site.name), found.site
    values = weight_values(model)
    tensor = tensor_reader(values)
    a, b = (np.zeros((site.rank, width), np.dtype(site.dtype)) for width in (site.d_in, site.d_out))
    if change is not None:
        a[: change.rank], b[: change.rank] = change.a, change.b
    for name, codes in coded(kept, a, b, {name: tensor(name) for name in kept.names}).items():
        before = values[name].const_value
        assert before is not None, "an initializer has a value"
        packed = codes.shape != tuple(before.shape.numpy())
        shape = ir.Shape(before.shape.numpy())
        made = ir.PackedTensor(codes, before.dtype, shape=shape) if packed else ir.Tensor(codes, dtype=before.dtype)
        values[name].const_value = made


def _run(model: ir.Model, path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    import onnxruntime as ort  # noqa: PLC0415 - an extra; what needs it says so at its own door

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # New weights travel inside the graph; the old ones are read from where they lie.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        return [np.asarray(value) for value in session.run(None, dict(feeds))]
    except Exception as error:  # ORT's errors have no common class but this
        raise ModelError(f"{path} cannot be run here: {error}") from None


def _through(session: AdapterSession, candidate: Adapter | None, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of the extracted model; none when it cannot even run with ``candidate``."""
    if candidate is not None:
        session.load_adapter("candidate", candidate)
    try:
        return list(session.run(None, dict(feeds), adapter=None if candidate is None else "candidate"))
    except AdapterxError:
        raise
    except Exception:  # ORT's errors share no other class: shapes do not meet inside the graph
        return []
