"""Laws of extraction, on every spelling of a LoRA layer that exporters and optimizers are known to write."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from tests.graph.text_models import FACTORS, JOINS, SCALES, Layer, text_model

small = st.integers(2, 6)


@st.composite
def models(draw):
    """A chain of one to three layers, each in a spelling of its own."""
    rank_of_x = draw(st.sampled_from([2, 3]))
    factors = sorted(FACTORS) if rank_of_x == 2 else [name for name in sorted(FACTORS) if "gemm" not in name]
    joins = sorted(JOINS) if rank_of_x == 2 else [name for name in sorted(JOINS) if name != "gemm_c"]
    widths = draw(st.lists(small, min_size=2, max_size=4))
    layers = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        scale_as = draw(st.sampled_from(sorted(SCALES)))
        layers.append(
            Layer(
                name=f"model.layers.{i}.{draw(st.sampled_from(['q_proj', 'fc']))}",
                d_in=d_in,
                d_out=d_out,
                rank=draw(st.integers(1, 4)),
                scale=1.0 if scale_as == "absent" else draw(st.sampled_from([0.25, 0.7, 2.0, 16.0])),
                factor=draw(st.sampled_from(factors)),
                scale_as=scale_as,
                join=draw(st.sampled_from(joins)),
                dropout=draw(st.booleans()),
            )
        )
    return text_model(tuple(layers), dims=rank_of_x, seed=draw(st.integers(0, 99)), share_zero_b=draw(st.booleans()))


def run(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options).run(None, feeds)[0]


def random_adapter(model, seed, grow):
    """Other numbers, and with ``grow`` another rank at every site."""
    rng = np.random.default_rng(seed)
    adapter = {}
    for i, layer in enumerate(model.layers):
        rank = layer.rank + grow * (i + 1)
        sides = (rng.standard_normal((rank, width)).astype(np.float32) for width in (layer.d_in, layer.d_out))
        adapter[layer.name] = tuple(sides)
    return adapter


def as_feeds(adapter):
    sides = ("lora_A", "lora_B")
    return {
        f"{name}.{side}.weight": array
        for name, pair in adapter.items()
        for side, array in zip(sides, pair, strict=True)
    }


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(want).max()))


def x_for(model, dims_seed=0):
    shape = [d.dim_value or 3 for d in model.proto.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(dims_seed).standard_normal(shape).astype(np.float32)


laws = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@laws
@given(models(), st.integers(0, 2), st.booleans())
def test_a_different_adapter_fed_to_the_extracted_model_gives_what_numpy_gives(model, grow, optional):
    with tempfile.TemporaryDirectory() as folder:
        out = extract_adapters(model.proto, folder, make_inputs=True, optional_inputs=optional)
        x = x_for(model)
        other = random_adapter(model, seed=7, grow=grow)
        assert_close(run(str(out.model_path), {"x": x, **as_feeds(other)}), model.expected(x, other))
        back = {name: (one.a, one.b) for name, one in out.adapter.sites.items()}
        assert_close(run(str(out.model_path), {"x": x, **as_feeds(back)}), model.expected(x, model.exported()))


@laws
@given(models(), st.booleans())
def test_no_adapter_and_a_zero_adapter_are_exactly_the_base(model, dynamic):
    with tempfile.TemporaryDirectory() as folder:
        out = extract_adapters(model.proto, folder, make_inputs=True, dynamic_rank=dynamic)
        x = x_for(model)
        none = run(str(out.model_path), {"x": x})
        assert_close(none, model.expected(x, None))
        zero = {
            layer.name: tuple(np.zeros((layer.rank, d), np.float32) for d in (layer.d_in, layer.d_out))
            for layer in model.layers
        }
        np.testing.assert_array_equal(run(str(out.model_path), {"x": x, **as_feeds(zero)}), none)


@laws
@given(models())
def test_sites_carry_the_names_shapes_ranks_and_scales_of_the_layers(model):
    rows = [(s.name, s.d_in, s.d_out, s.rank, pytest.approx(s.scale, rel=1e-5)) for s in find_sites(model.proto)]
    assert rows == [(la.name, la.d_in, la.d_out, la.rank, la.scale) for la in model.layers]


@laws
@given(models())
def test_extraction_leaves_its_argument_alone_and_writes_a_model_that_the_checker_passes(model):
    before = model.proto.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        out = extract_adapters(model.proto, Path(folder) / "out", make_inputs=True, pack_inputs=True)
        assert model.proto.SerializeToString() == before
        onnx.checker.check_model(str(out.model_path), full_check=True)
        inputs = [value.name for value in onnx.load(out.model_path).graph.input]
        assert len(inputs) == len(set(inputs))
