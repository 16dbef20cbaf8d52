"""The ranges that activations have on calibration feeds, for static quantization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.errors import FeedError, MissingDependency, ModelError
from adapterx.graph.load import LOCATION
from adapterx.graph.save import name_as_placed
from adapterx.manifest import Manifest

if TYPE_CHECKING:
    import onnxruntime as ort

Range = tuple[float, float]


def activation_ranges(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Iterable[Mapping[str, Array]],
    *,
    manifest: Manifest | None = None,
) -> dict[str, Range]:
    """Least and greatest element of each of ``values`` over all ``feeds``, by name.

    The model runs on ONNX Runtime as it is, with two more outputs a value. Ports that are external hold nothing, which
    is the base.

    Args:
        model: not changed
        values: of its main graph
        feeds: inputs by name, one mapping a run
        manifest: of a model with ports

    Raises:
        FeedError: there are no feeds, or the model cannot be run on them.
        ModelError: a value is NaN or infinite on them.
        MissingDependency: ONNX Runtime is not installed.
    """
    names = list(dict.fromkeys(str(value.name) for value in values))
    session = _session(_with_ranges(model, names, manifest), _folder(model))
    least, most = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    runs = 0
    for one in feeds:
        try:
            found = session.run([f"{name}/{end}" for end in ("least", "most") for name in names], dict(one))
        except Exception as error:  # ORT's errors have no common class but this
            raise FeedError(f"the model cannot be run on calibration feed {runs}: {error}") from None
        low, high = np.array(found, np.float64).reshape(2, -1)
        least, most = np.minimum(least, low), np.maximum(most, high)
        runs += 1
    if not runs:
        raise FeedError("static quantization needs calibration feeds (calibration=[{...}]), and there are none")
    broken = [name for name, low, high in zip(names, least, most, strict=True) if not np.isfinite([low, high]).all()]
    if broken:
        raise ModelError(f"{broken[0]}: NaN or infinite on the calibration feeds, and {len(broken)} values in all")
    return {name: (float(low), float(high)) for name, low, high in zip(names, least, most, strict=True)}


def _folder(model: ir.Model) -> Path | None:
    """Where its external data lies."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    # A tensor that was read from behind a link lies elsewhere than the link.
    plain = [tensor for tensor in external if LOCATION not in tensor.meta]
    return next((Path(tensor.base_dir) for tensor in (*plain, *external)), None)


def _with_ranges(model: ir.Model, names: Sequence[str], manifest: Manifest | None) -> ir.Model:
    looked = model.clone()
    if manifest is not None and manifest.location is not None:
        for value in looked.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == manifest.location:
                zeros = np.zeros(tuple(int(dim) for dim in tensor.shape.numpy()), tensor.dtype.numpy())
                value.const_value = ir.Tensor(zeros, dtype=tensor.dtype, name=value.name)
    known = {str(value.name): value for value in looked.graph.inputs}
    known |= {str(value.name): value for node in looked.graph for value in node.outputs}
    for name in names:
        floats = ir.node("Cast", [known[name]], {"to": ir.DataType.FLOAT.value})
        looked.graph.append(floats)
        for end, op_type in (("least", "ReduceMin"), ("most", "ReduceMax")):
            node = ir.node(op_type, floats.outputs, {"keepdims": 0})
            value = node.outputs[0]
            value.name, value.type, value.shape = f"{name}/{end}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
            looked.graph.append(node)
            looked.graph.outputs.append(value)
    name_as_placed(looked)
    return looked


def _session(model: ir.Model, folder: Path | None) -> ort.InferenceSession:
    try:
        import onnxruntime as ort  # noqa: PLC0415 - an extra; only static quantization needs it
    except ImportError as error:
        raise MissingDependency(
            'static quantization runs the model; install ONNX Runtime with `pip install "adapterx[cpu]"`'
        ) from error

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    except Exception as error:  # ORT's errors have no common class but this
        raise ModelError(f"the model cannot be run here to calibrate it: {error}") from None
