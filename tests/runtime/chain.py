"""A chain of linear layers with ports, as extraction writes it, and the same chain in numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from adapterx.adapter import Adapter, LowRank, tensor_name
from adapterx.manifest import KEY, MASK, Manifest, Pack
from adapterx.site import AdapterSite, SiteTable

LAYERS = (
    ("model.layers.0.q_proj", 8, 8),
    ("model.layers.1.q_proj", 8, 8),
    ("model.layers.2.q_proj", 8, 8),
    ("model.head", 8, 5),
)
NAMES = tuple(name for name, _, _ in LAYERS)
RANK = 3
DOMAIN = "ai.adapterx"
LOCATION = "chain.adapter"


@dataclasses.dataclass(frozen=True)
class Chain:
    """What a test may vary: the kind of port, the layers, the element type."""

    port: str = "input"
    dynamic_rank: bool = True
    optional: bool = True
    layers: tuple[tuple[str, int, int], ...] = LAYERS
    dtype: str = "float32"
    seed: int = 0
    fingerprint: str = "f" * 64

    def weights(self) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return [rng.standard_normal((i, o)).astype(np.float32) / np.float32(i**0.5) for _, i, o in self.layers]

    def sites(self) -> SiteTable:
        return SiteTable(
            AdapterSite(name, "default", "lora", "MatMul", i, o, RANK, 1.0, self.dtype, "initializer", f"{name}/y")
            for name, i, o in self.layers
        )

    def manifest(self) -> Manifest:
        queries = tuple(name for name, _, _ in self.layers if name.endswith("q_proj"))
        packs = tuple(Pack(f"q_proj.{side}.weight.packed", side, queries) for side in ("lora_A", "lora_B"))
        return Manifest(
            self.sites(),
            self.port,
            self.dynamic_rank,
            self.optional,
            self.fingerprint,
            packs=packs if self.port == "packed" else (),
            mask=None if self.port == "external" else MASK,
            location=LOCATION if self.port == "external" else None,
            batch=("x",),
        )

    def reference(self, x: np.ndarray, adapter: Adapter | None = None) -> np.ndarray:
        """The chain in float64."""
        x = x.astype(np.float64)
        for (name, _, _), weight in zip(self.layers, self.weights(), strict=True):
            y = x @ weight
            if adapter is not None and name in adapter.sites:
                change = adapter.sites[name]
                y = y + (x @ change.a.T.astype(np.float64)) @ change.b.astype(np.float64)
            x = np.tanh(y)
        return x

    def model(self, *, plain: bool = False) -> onnx.ModelProto:
        """The model; ``plain`` is the base before anyone put adapters in."""
        manifest = self.manifest()
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", self.layers[0][1]])]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "t", self.layers[-1][2]])
        nodes, weights = _layers(self, plain=plain)
        if not plain:
            ports = _ports(self, manifest)
            inputs, weights, nodes = inputs + ports[0], weights + ports[1], ports[2] + nodes
        graph = helper.make_graph(nodes, "chain", inputs, [output], weights)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, functions=[low_rank_add()], ir_version=10)
        if not plain:
            helper.set_model_props(model, {KEY: manifest.dumps()})
        return model

    def save(self, folder: Path) -> Path:
        """Written to a file, the base weights to another next to it."""
        model, start = self.model(), 0
        with (folder / "chain.data").open("wb") as data:
            for tensor in model.graph.initializer:
                if tensor.name.startswith("W:"):
                    start += data.write(point_at(tensor, "chain.data", start))
        (folder / "chain.onnx").write_bytes(model.SerializeToString())
        return folder / "chain.onnx"


def point_at(tensor: TensorProto, location: str, offset: int = 0) -> bytes:
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": str(len(raw))}.items():
        tensor.external_data.add(key=key, value=value)
    return raw


def low_rank_add() -> onnx.FunctionProto:
    nodes = [
        helper.make_node("Transpose", ["a"], ["at"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "at"], ["low"]),
        helper.make_node("Mul", ["low", "mask"], ["masked"]),
        helper.make_node("MatMul", ["masked", "b"], ["delta"]),
        helper.make_node("Add", ["base", "delta"], ["y"]),
    ]
    names = ["base", "x", "a", "b", "mask"]
    return helper.make_function(DOMAIN, "LowRankAdd", names, ["y"], nodes, [helper.make_opsetid("", 18)])


def _layers(chain: Chain, *, plain: bool) -> tuple[list[Any], list[Any]]:
    nodes, last, x = [], len(chain.layers) - 1, "x"
    weights = [
        numpy_helper.from_array(w, f"W:{layer[0]}") for layer, w in zip(chain.layers, chain.weights(), strict=True)
    ]
    cast = chain.dtype != "float32"
    for index, (name, _, _) in enumerate(chain.layers):
        a, b = (tensor_name(name, side) for side in ("lora_A", "lora_B"))
        nodes.append(helper.make_node("MatMul", [x, f"W:{name}"], [f"{name}/base"]))
        if not plain:
            if cast:
                nodes += [helper.make_node("Cast", [port], [f"{port}/f"], to=TensorProto.FLOAT) for port in (a, b)]
                a, b = f"{a}/f", f"{b}/f"
            operands = [f"{name}/base", x, a, b, "one" if chain.port == "external" else "mask3"]
            nodes.append(helper.make_node("LowRankAdd", operands, [f"{name}/y"], domain=DOMAIN))
        x = "y" if index == last else f"{name}/out"
        nodes.append(helper.make_node("Tanh", [f"{name}/base" if plain else f"{name}/y"], [x]))
    return nodes, weights


def _ports(chain: Chain, manifest: Manifest) -> tuple[list[Any], list[Any], list[Any]]:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(chain.dtype))
    one = numpy_helper.from_array(np.ones((1, 1), np.float32), manifest.mask or "one")
    inputs, weights, nodes = [], [one], []
    if manifest.mask:
        inputs.append(helper.make_tensor_value_info(MASK, TensorProto.FLOAT, ["n_mask", "R"]))
        weights.append(numpy_helper.from_array(np.array([1]), "axis"))
        nodes.append(helper.make_node("Unsqueeze", [MASK, "axis"], ["mask3"]))
    packed = {(site, pack.side): pack.name for pack in manifest.packs for site in pack.sites}
    ports = {}
    for name, d_in, d_out in chain.layers:
        for side, width in (("lora_A", d_in), ("lora_B", d_out)):
            ports[packed.get((name, side), tensor_name(name, side))] = (f"{name}.rank", width)
    for pack in manifest.packs:
        members = [tensor_name(site, pack.side) for site in pack.sites]
        # ONNX Runtime splits no rows only when it is told the sizes, not when it is told how many parts.
        rows, each, sizes = (f"{pack.name}.{part}" for part in ("rows", "each", "sizes"))
        weights.append(numpy_helper.from_array(np.array([len(members)]), f"{pack.name}.count"))
        nodes.append(helper.make_node("Shape", [pack.name], [rows], start=0, end=1))
        nodes.append(helper.make_node("Div", [rows, f"{pack.name}.count"], [each]))
        nodes.append(helper.make_node("Concat", [each] * len(members), [sizes], axis=0))
        nodes.append(helper.make_node("Split", [pack.name, sizes], members, axis=0))
    for port, (symbol, width) in ports.items():
        if chain.port == "external":
            tensor = TensorProto(name=port, dims=(RANK, width), data_type=kind)
            point_at(tensor, LOCATION)
            del tensor.external_data[1:]
            weights.append(tensor)
            continue
        rank = f"{symbol}s" if ".packed" in port else symbol
        fixed = RANK * (len(chain.layers) - 1 if ".packed" in port else 1)
        inputs.append(helper.make_tensor_value_info(port, kind, [rank if chain.dynamic_rank else fixed, width]))
        if chain.optional:
            empty = np.zeros((0 if chain.dynamic_rank else fixed, width), np.dtype(chain.dtype))
            weights.append(numpy_helper.from_array(empty, port))
    return inputs, weights, nodes


def adapter_of(
    seed: int = 1,
    rank: int = RANK,
    *,
    layers: tuple[tuple[str, int, int], ...] = LAYERS,
    dtype: str = "float32",
    ranks: dict[str, int] | None = None,
) -> Adapter:
    """A random adapter; ``ranks`` by site overrides ``rank`` and leaves the other sites out."""
    rng = np.random.default_rng(seed)

    def matrix(r: int, d: int) -> np.ndarray:
        return (rng.standard_normal((r, d)) * 0.5).astype(np.dtype(dtype))

    wanted = {name: rank for name, _, _ in layers} if ranks is None else ranks
    return Adapter({n: LowRank(a=matrix(wanted[n], i), b=matrix(wanted[n], o)) for n, i, o in layers if n in wanted})


def rows(n: int = 2, t: int = 3, d: int = 8, *, seed: int = 7) -> dict[str, np.ndarray]:
    """Feeds for a chain."""
    return {"x": np.random.default_rng(seed).standard_normal((n, t, d)).astype(np.float32)}
