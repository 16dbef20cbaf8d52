"""DoRA, (IA)3, VeRA, LoHa and LoKr beside bases that were quantized afterwards, their own numbers left in float."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from adapterx.errors import AdapterxError
from adapterx.graph.bases import find_bases
from adapterx.graph.extract import extract_adapters
from adapterx.graph.load import load_model
from adapterx.runtime.session import AdapterSession
from tests.zoo import build
from tests.zoo.quantizers import QUANTIZERS

KINDS = (
    "ts_dora_normed",
    "dy_dora_normed",
    "ts_ia3_normed",
    "dy_ia3_normed",
    "dy_vera",
    "ts_loha_normed",
    "dy_lokr_normed",
)


def quantized(name, form, folder, *, adapter_too=False):
    """The export with its base in codes; what a quantizer makes keeps neither paths nor metadata."""
    built = build(name)
    sites = {site.name for site in built.truth}
    bases = {base.op.name for base in find_bases(load_model(built.model)) if base.name in sites}
    products = [n.name for n in onnx.load(built.model).graph.node if n.op_type in {"MatMul", "Gemm"}]
    excluded = [] if adapter_too else [product for product in products if product not in bases]
    onnx.save(QUANTIZERS[form](built.model, excluded, built.feeds), folder / "model.onnx")
    return built, folder / "model.onnx"


def distance(got, want):
    return max(float(np.abs(one - other).max()) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["int4", "int8_dynamic"])
@pytest.mark.parametrize("name", KINDS)
def test_the_exported_adapter_is_exact_and_others_are_as_near_as_the_base(name, form, tmp_path):
    built, path = quantized(name, form, tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    itself = ort.InferenceSession(str(path), options).run(None, built.feeds)
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert out.sites[0].op in {"MatMulNBits", "MatMulInteger"}
    session = AdapterSession(out.model_path, adapters={"exported": out.adapter})
    assert distance(session.run(None, built.feeds, adapter="exported"), itself) < 2e-6
    rounding = distance(session.run(None, built.feeds), built.expected["base"])
    assert rounding < 0.6
    for adapter in ("b", "c"):
        session.load_adapter("other", built.adapters[adapter])
        error = distance(session.run(None, built.feeds, adapter="other"), built.expected[adapter])
        assert error < 2 * rounding, adapter


@pytest.mark.parametrize("form", ["int4", "int4_qdq", "int8_dynamic"])
def test_a_norm_that_was_quantized_too_is_refused(form, tmp_path):
    """TorchScript computes DoRA's norm from A and B at each run; in codes they would give another one."""
    _, path = quantized("ts_dora_normed", form, tmp_path, adapter_too=True)
    with pytest.raises(AdapterxError, match="lora_magnitude_vector"):
        extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()
