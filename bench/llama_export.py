"""A model that looks to adapterx like a TorchScript export of a PEFT Llama, of any size, made without torch.

The names are those of the exporter: node scopes ``.../q_proj/default/MatMul``, anonymous ``onnx::MatMul_N`` weights
stored transposed, the scale in a Constant, the Cast that changes nothing. The seven Linears of a layer have Llama's
shapes. What lies between them is not Llama: attention is replaced by one elementwise gate, norms by a product.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

PREFIX = "/m/model/model"
MODULES = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"


@dataclasses.dataclass(frozen=True, slots=True)
class Llama:
    """Sizes; fp32 throughout.

    Args:
        layers: how many
        d: hidden size, a multiple of ``kv``
        kv: width of keys and values
        ff: width of the feed-forward layer
        rank: rank of the adapter at all seven Linears of a layer; 0 leaves the branches out
        scale: alpha / rank
    """

    layers: int
    d: int
    kv: int
    ff: int
    rank: int = 16
    scale: float = 2.0

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path inside a layer -> ``(d_in, d_out)``."""
        widths = [(self.d, self.d), (self.d, self.kv), (self.d, self.kv), (self.d, self.d)]
        return dict(
            zip(MODULES.split(), [*widths, (self.d, self.ff), (self.d, self.ff), (self.ff, self.d)], strict=True)
        )

    def sites(self) -> dict[str, tuple[int, int]]:
        """Module path in the checkpoint -> ``(d_in, d_out)``."""
        each = range(self.layers)
        return {f"model.layers.{i}.{module}": shape for i in each for module, shape in self.shapes().items()}


class Export:
    """A graph under construction, and the weights that it will need, in order."""

    def __init__(self, sizes: Llama) -> None:
        self.sizes = sizes
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[tuple[str, tuple[int, ...]]] = []

    def node(self, op: str, scope: str, *inputs: str, **attributes: object) -> str:
        name = f"{scope}/{op}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_output_0"], name, **attributes))
        return f"{name}_output_0"

    def matmul(self, scope: str, x: str, *shape: int) -> str:
        name = f"onnx::MatMul_{700 + len(self.weights)}"
        self.weights.append((name, shape))
        return self.node("MatMul", scope, x, name)

    def norm(self, layer: int, module: str, x: str) -> str:
        """The product with a norm's weight, which keeps its name in exports."""
        name = f"m.base_model.model.model.layers.{layer}.{module}.weight"
        self.weights.append((name, (self.sizes.d,)))
        return self.node("Mul", f"{PREFIX}/layers.{layer}/{module}", x, name)

    def linear(self, layer: int, module: str, x: str) -> str:
        """One Linear of a layer with its adapter."""
        d_in, d_out = self.sizes.shapes()[module]
        scope = f"{PREFIX}/layers.{layer}/{module.replace('.', '/')}"
        if not self.sizes.rank:
            return self.matmul(scope, x, d_in, d_out)
        base = self.matmul(f"{scope}/base_layer", x, d_in, d_out)
        low = self.matmul(f"{scope}/default", x, d_in, self.sizes.rank)
        delta = self.matmul(f"{scope}/default_1", low, self.sizes.rank, d_out)
        value = helper.make_tensor("", TensorProto.FLOAT, (), [self.sizes.scale])
        scaled = self.node("Mul", scope, delta, self.node("Constant", scope, value=value))
        return self.node("Cast", scope, self.node("Add", scope, base, scaled), to=TensorProto.FLOAT)

    def layer(self, index: int, x: str) -> str:
        """A residual pair: a gate where Llama has attention, then the feed-forward part."""
        scope = f"{PREFIX}/layers.{index}"
        normal = self.norm(index, "input_layernorm", x)
        q, k, v = (self.linear(index, f"self_attn.{name}_proj", normal) for name in "qkv")
        half = self.sizes.d // self.sizes.kv // 2
        spread = self.node("Concat", f"{scope}/self_attn", *([k] * half + [v] * half), axis=-1)
        gate = self.node("Sigmoid", f"{scope}/self_attn", spread)
        mixed = self.linear(index, "self_attn.o_proj", self.node("Mul", f"{scope}/self_attn", q, gate))
        x = self.node("Add", f"{scope}/self_attn", x, mixed)
        normal = self.norm(index, "post_attention_layernorm", x)
        gate = self.node("Sigmoid", f"{scope}/mlp/act_fn", self.linear(index, "mlp.gate_proj", normal))
        product = self.node("Mul", f"{scope}/mlp", gate, self.linear(index, "mlp.up_proj", normal))
        return self.node("Add", f"{scope}/mlp", x, self.linear(index, "mlp.down_proj", product))


def write_export(path: Path, sizes: Llama, *, seed: int = 0) -> Path:
    """Write ``path`` and ``<path>.data``, which holds every weight, adapters included.

    The weights are normal random numbers, about 1 / sqrt(d): real bytes on the disk, not a sparse file.
    """
    export = Export(sizes)
    x = "x"
    for index in range(sizes.layers):
        x = export.layer(index, x)
    shape = ["n", "t", sizes.d]
    tensors = write_weights(path.with_name(f"{path.name}.data"), export.weights, seed=seed, scale=sizes.d**-0.5)
    graph = helper.make_graph(
        [*export.nodes, helper.make_node("Identity", [x], ["y"], "/m/Identity")],
        "main_graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, ir_version=8, opset_imports=opset, producer_name="pytorch")
    path.write_bytes(model.SerializeToString())
    return path


def write_weights(
    data: Path, weights: list[tuple[str, tuple[int, ...]]], *, seed: int, scale: float
) -> list[onnx.TensorProto]:
    """Write the weights one after another and give the initializers that point at them."""
    # Drawing gigabytes of random numbers takes minutes; cutting them from a block of odd length makes no two equal.
    largest = max(math.prod(dims) for _, dims in weights)
    block = np.random.default_rng(seed).standard_normal(2 * largest + 7919, np.float32) * np.float32(scale)
    tensors, offset, cut = [], 0, 0
    with data.open("wb") as file:
        for name, dims in weights:
            count = math.prod(dims)
            cut = (cut + 104_729) % (block.size - count)
            file.write(memoryview(block[cut : cut + count]).cast("B"))
            tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", 4 * count)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            offset += 4 * count
    return tensors
