"""Small models written as ONNX text, in the many spellings that exporters and optimizers give one LoRA layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

# How the product of a value and a [d_in, d_out] weight is spelled, and how its weight is stored.
FACTORS = {
    "matmul": ("{y} = MatMul({x}, {w})", False),
    "gemm": ("{y} = Gemm({x}, {w})", False),
    "gemm_transB": ("{y} = Gemm<transB=1>({x}, {w})", True),
    "fused": ("{y} = com.microsoft.FusedMatMul({x}, {w})", False),
    "fused_transB": ("{y} = com.microsoft.FusedMatMul<transB=1>({x}, {w})", True),
    "transpose": ("{y}_t = Transpose<perm=[1,0]>({w})\n  {y} = MatMul({x}, {y}_t)", True),
    "identity": ("{y}_i = Identity({w})\n  {y} = MatMul({x}, {y}_i)", False),
    "cast": ("{y}_c = Cast<to=1>({w})\n  {y} = MatMul({x}, {y}_c)", False),
}
# How the scale is spelled, from B's result {z} to the delta {y}. `{s}` is a scalar constant, `{h}` half of it.
SCALES = {
    "mul": "{y} = Mul({z}, {s})",
    "mul_left": "{y} = Mul({s}, {z})",
    "constant": "{y}_s = Constant<value_float={v}>()\n  {y} = Mul({z}, {y}_s)",
    "div": "{y} = Div({z}, {i})",
    "mul_div": "{y}_m = Mul({z}, {s2})\n  {y} = Div({y}_m, {two})",
    "absent": "{y} = Identity({z})",
    "alpha": "",
}
JOINS = {
    "add": "{y} = Add({base}, {delta})",
    "add_left": "{y} = Add({delta}, {base})",
    "cast_base": "{base}_c = Cast<to=1>({base})\n  {y} = Add({base}_c, {delta})",
    "gemm_c": "",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One LoRA layer: its weights, and how the graph says them."""

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    factor: str = "matmul"
    scale_as: str = "mul"
    join: str = "add"
    dropout: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class TextModel:
    """A model and its numbers: ``weights[name]`` is ``(w [d_in, d_out], a [r, d_in], b [r, d_out])``, unscaled."""

    proto: onnx.ModelProto
    layers: tuple[Layer, ...]
    weights: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

    def expected(self, x: np.ndarray, adapter: dict[str, tuple[np.ndarray, np.ndarray]] | None) -> np.ndarray:
        """numpy's answer with ``adapter`` (scale folded in), the base's with ``None``; float64 inside."""
        value = x.astype(np.float64)
        for layer in self.layers:
            w, _, _ = self.weights[layer.name]
            total = value @ w.astype(np.float64)
            if adapter is not None and layer.name in adapter:
                a, b = adapter[layer.name]
                total = total + (value @ a.T.astype(np.float64)) @ b.astype(np.float64)
            value = total
        return value

    def exported(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The adapter inside, scale folded in."""
        return {
            layer.name: (self.weights[layer.name][1], self.weights[layer.name][2] * layer.scale)
            for layer in self.layers
        }


def text_model(layers: tuple[Layer, ...], *, dims: int = 3, seed: int = 0, share_zero_b: bool = False) -> TextModel:
    """A chain of LoRA layers; ``dims`` of ``x``; with ``share_zero_b`` equal-shaped zero ``B`` are one tensor."""
    rng = np.random.default_rng(seed)
    lines, tensors, weights = [], {}, {}
    value = "x"
    for i, layer in enumerate(layers):
        w = rng.standard_normal((layer.d_in, layer.d_out)).astype(np.float32) / np.float32(np.sqrt(layer.d_in))
        a = rng.standard_normal((layer.rank, layer.d_in)).astype(np.float32)
        b = np.zeros((layer.rank, layer.d_out), np.float32)
        if not share_zero_b:
            b = rng.standard_normal((layer.rank, layer.d_out)).astype(np.float32)
        weights[layer.name] = (w, a, b)
        out = "y" if i == len(layers) - 1 else f"v{i}"
        lines += _layer_lines(i, layer, value, out, tensors, (w, a, b), share_zero_b=share_zero_b)
        value = out
    batch = ", ".join(["N", "T", "U"][: dims - 1])
    text = (
        f'<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>\n'
        f"g (float[{batch}, {layers[0].d_in}] x) => (float[{batch}, {layers[-1].d_out}] y) {{\n  "
        + "\n  ".join(lines)
        + "\n}"
    )
    proto = onnx.parser.parse_model(text)
    # ONNX text has no dotted names; the names that PEFT gives are put in afterwards.
    root = [f"base_model.model.{layer.name}" for layer in layers]
    dotted = {f"{s}{i}": f"{r}.lora_{s}.default.weight" for i, r in enumerate(root) for s in "AB"}
    for name, array in tensors.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), dotted.get(name, name)))
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
        node.input[:] = [dotted.get(name, name) for name in node.input]
    return TextModel(proto, layers, weights)


def _layer_lines(i, layer, x, y, tensors, arrays, *, share_zero_b):
    w, a, b = arrays
    form, flipped = FACTORS[layer.factor]
    name_a = f"A{i}"
    name_b = f"zero_{layer.rank}_{layer.d_out}_{flipped}" if share_zero_b else f"B{i}"
    tensors |= {f"w{i}": w, name_a: a if flipped else a.T, name_b: b.T if flipped else b}
    lines, low_in = [], x
    if layer.dropout:
        tensors |= {"ratio": np.float32(0.5), "training": np.bool_(True)}
        lines.append(f"d{i} = Dropout({x}, ratio, training)")
        low_in = f"d{i}"
    lines.append(form.format(y=f"l{i}", x=low_in, w=name_a))
    if layer.scale_as == "alpha":
        form = f"{{y}} = com.microsoft.FusedMatMul<alpha={float(layer.scale)}, transB={int(flipped)}>({{x}}, {{w}})"
    lines.append(form.format(y=f"z{i}", x=f"l{i}", w=name_b))
    delta = f"z{i}" if layer.scale_as == "alpha" else f"s{i}"
    constants = {"s": f"c{i}", "s2": f"c{i}_doubled", "two": "two", "i": f"c{i}_inverse", "v": float(layer.scale)}
    values = {"s": layer.scale, "s2": 2 * layer.scale, "two": 2, "i": 1 / layer.scale}
    form = SCALES[layer.scale_as]
    tensors |= {constants[k]: np.float32(v) for k, v in values.items() if f"{{{k}}}" in form}
    lines.append(form.format(y=delta, z=f"z{i}", **constants))
    if layer.join == "gemm_c":
        lines.append(f"{y} = Gemm({x}, w{i}, {delta})")
    else:
        lines.append(f"b{i} = MatMul({x}, w{i})")
        lines.append(JOINS[layer.join].format(y=y, base=f"b{i}", delta=delta))
    return [part for line in lines for part in line.split("\n  ") if part]
