"""What the tests of merging share: models with ports, models in data files, and what comes out of them."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from adapterx.graph.extract import extract_adapters
from tests.zoo import CASES, build


def exported_adapter(name, built):
    return built.adapters["a"] if CASES[name].needs_adapter or CASES[name].file else None


def ported(name, folder, **options):
    built = build(name)
    options = {"make_inputs": True, "adapter": exported_adapter(name, built), **options}
    return extract_adapters(built.model, folder, **options).model_path


def run(path, feeds):
    session = ort.InferenceSession(str(path))
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in feeds.items() if name in wanted})


def assert_outputs(got, want, atol):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0, atol=atol)


def initializers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def external(path, source, *, one_file):
    """``source`` with its weights in one data file, or in one each."""
    model = onnx.load(source)
    names = {"location": "weights.bin"} if one_file else {}
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=one_file, size_threshold=512, **names)
    return path
