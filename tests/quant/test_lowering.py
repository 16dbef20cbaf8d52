import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterx.errors import ModelError, OptionError
from adapterx.quant.codebook import FORMATS
from adapterx.quant.linear import QuantLinear
from adapterx.quant.lowered_input import rounded_input
from adapterx.quant.lowered_product import Lowering, block_of, weight_product, width_of
from adapterx.quant.lowering import lowered, product_of
from adapterx.quant.packing import container, pack, unpack
from adapterx.quant.rounding import rounded
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import Activation, QuantWeight
from tests.quant.eager import eager_symbolic

# Of the largest result: sums of float32 in another order.
CLOSE = 1e-5
EXACT, QDQ = Lowering(exact=True), Lowering(format="qdq", exact=True)
quick = settings(max_examples=40, deadline=None)


@st.composite
def weights(draw, *, fewest=1):
    """Any affine weight: codes, groups that do not divide K, scales of either sign, zero points of every kind."""
    rows, inputs = draw(st.integers(1, 9)), draw(st.integers(fewest, 130))
    bits = draw(st.integers(1, 8))
    group = draw(st.sampled_from([8, 16, 24, 32, 48, 64, 128, inputs]).filter(lambda size: size <= inputs))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = (rows, -(-inputs // group))
    kind = draw(st.sampled_from(["middle", "whole", "float"]))
    zeros = None
    if kind == "whole":
        zeros = torch.from_numpy(random.integers(0, 2**bits, grid, dtype=np.uint8))
    elif kind == "float":
        zeros = torch.from_numpy(random.uniform(-2, 2**bits + 1, grid).astype(np.float32))
    return QuantWeight(
        codes=torch.from_numpy(random.integers(0, 2**bits, (rows, inputs), dtype=np.uint8)),
        scales=torch.from_numpy(random.normal(size=grid).astype(np.float32)),
        group=group,
        bits=bits,
        zeros=zeros,
    )


def weight_of(tensors, inputs, block):
    """MatMulNBits by its schema, in numpy: the weight ``[N, K]`` that packed tensors stand for."""
    packed = tensors["qweight"].numpy()
    rows, blocks, size = packed.shape
    bits = size * 8 // block
    codes = np.stack([(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)], -1)
    codes = codes.reshape(rows, blocks * block).astype(np.float64)
    zeros = np.full((rows, blocks), 2.0 ** (bits - 1))
    if "qzeros" in tensors:
        raw = tensors["qzeros"].numpy()
        fields = np.stack([(raw >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)], -1)
        zeros = fields.reshape(rows, -1)[:, :blocks].astype(np.float64)
    scales = tensors["scales"].numpy().astype(np.float64)
    return ((codes - zeros.repeat(block, 1)) * scales.repeat(block, 1))[:, :inputs]


def assert_close(found, expected):
    largest = float(expected.abs().max())
    worst = float((found - expected).abs().max())
    assert worst <= CLOSE * max(largest, 1e-6), f"{worst} of {largest}"


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
@quick
def test_codes_come_back_from_their_bytes_and_lie_low_bits_first(bits, length, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (3, length), dtype=np.uint8))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, length), codes)
    width = container(bits)
    expected = np.zeros((3, -(-length * width // 8)), np.uint8)
    for place in range(length):
        expected[:, place * width // 8] |= codes[:, place].numpy() << (place * width % 8)
    assert np.array_equal(packed.numpy(), expected)


@given(weights(fewest=16))
@quick
def test_matmulnbits_by_its_schema_holds_the_very_weight(quantized):
    block = block_of(quantized)
    if block is None or quantized.group not in (quantized.shape[1], 16, 32, 48, 64, 128):
        return
    product = weight_product(quantized, EXACT)
    found = weight_of(product.tensors, quantized.shape[1], block)
    if "zero_rest" in product.tensors:
        rest = product.tensors["zero_rest"].numpy().T.astype(np.float64)
        found = found + rest.repeat(quantized.group, 1)[:, : quantized.shape[1]]
    np.testing.assert_allclose(found, quantized.values().double().numpy(), rtol=1e-5, atol=1e-4)


@given(weights(), st.sampled_from([EXACT, QDQ]), st.integers(0, 1000))
@quick
def test_onnx_runtime_multiplies_as_torch_does(quantized, lowering, seed):
    x = torch.randn(2, 3, quantized.shape[1], generator=torch.Generator().manual_seed(seed))
    product = weight_product(quantized, lowering)
    with eager_symbolic():
        found = product.apply(x, product.tensors)
    assert_close(found, x @ quantized.values().T)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("group", [32, 48, -1])
def test_every_format_keeps_its_values(name, group):
    quantized = rtn(torch.randn(8, 100), RTN(Scheme(format=name, group_size=group)))
    x = torch.randn(5, 100)
    for lowering in (EXACT, QDQ):
        product = weight_product(quantized, lowering)
        with eager_symbolic():
            assert_close(product.apply(x, product.tensors), x @ quantized.values().T)


@pytest.mark.parametrize(
    ("scheme", "became"),
    [
        (Scheme(bits=4), "MatMulNBits, 4 bits, block 32"),
        (Scheme(bits=3), "MatMulNBits, 4 bits, block 32"),
        (Scheme(bits=2, group_size=48), "MatMulNBits, 2 bits, block 16"),
        (Scheme(bits=6, group_size=-1), "MatMulNBits, 8 bits, block 32"),
        (Scheme(bits=4, group_size=8), "DequantizeLinear, 4 bits, block 8"),
        (Scheme(format="nf4"), "MatMulBnb4 nf4, block 32"),
        (Scheme(format="fp4"), "MatMulBnb4 fp4, block 32"),
        (Scheme(format="mxfp4"), "MatMulNBits, 8 bits, block 32"),
        (Scheme(format="mxint8"), "MatMulNBits, 8 bits, block 32"),
        (Scheme(format="mxfp8_e4m3"), "DequantizeLinear, float8_e4m3fn, block 32"),
        (Scheme(format="mxfp6_e3m2"), "DequantizeLinear, float8_e4m3fn, block 32"),
        (Scheme(format="float8_e5m2", group_size=-1), "DequantizeLinear, float8_e5m2, a column"),
    ],
)
def test_a_scheme_becomes_the_operator_that_has_a_kernel_for_it(scheme, became):
    assert product_of(rtn(torch.randn(8, 96), RTN(scheme)), EXACT).became == became


def test_a_table_of_ones_own_is_looked_up():
    codes = torch.randint(0, 8, (6, 100), dtype=torch.uint8)
    quantized = QuantWeight(
        codes=codes, scales=torch.randn(6, 4), group=32, bits=3, format="codebook", codebook=torch.randn(8)
    )
    product = weight_product(quantized, EXACT)
    x = torch.randn(3, 100)
    with eager_symbolic():
        assert_close(product.apply(x, product.tensors), x @ quantized.values().T)
    assert product.became.startswith("Gather")


@given(
    st.sampled_from(["int8", "uint8", *(name for name in FORMATS if name not in ("nf4", "fp4"))]),
    st.sampled_from(["tensor", "token", "static", "block"]),
    st.sampled_from(["even", "nearest", "floor"]),
    st.lists(st.floats(-300, 300, width=32) | st.sampled_from([0.0, 0.75, 1.25, 2.5, 5.0, 7.0, 2.0**-9, 448.0, -6.0])),
)
@settings(max_examples=150, deadline=None)
def test_inputs_are_rounded_to_the_very_values(name, per, rounding, numbers):
    if per == "block" and name in ("int8", "uint8"):
        return
    x = torch.tensor([*numbers, *([1.0] * (-len(numbers) % 10)), *([0.5] * 10)], dtype=torch.float32).reshape(-1, 10)
    scale = torch.tensor(0.5) if per == "static" else None
    activation = Activation(name, per, scale, None, group=4, rounding=rounding)
    assert torch.equal(rounded_input(x, activation), rounded(x, activation))


@pytest.mark.parametrize(
    ("activation", "became"),
    [
        (Activation("uint8", "tensor"), "DynamicQuantizeLinear + MatMulInteger"),
        (Activation("int8", "tensor"), "MatMulInteger, inputs by tensor"),
        (Activation("int8", "token"), "MatMulInteger, inputs by token"),
        (Activation("int8", "static", torch.tensor(0.02)), "QuantizeLinear + MatMul, 8 bits"),
        (Activation("uint8", "static", torch.tensor(0.02), torch.tensor(130)), "QuantizeLinear + MatMul, 8 bits"),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_inputs_meet_rounded_weights_in_integers(activation, became, symmetric):
    quantized = rtn(torch.randn(8, 100), RTN(Scheme(bits=8, group_size=-1, symmetric=symmetric)))
    quantized = dataclasses.replace(quantized, activation=activation)
    product, x = product_of(quantized, Lowering()), torch.randn(3, 100)
    assert product.became == became
    with eager_symbolic():
        assert_close(product.apply(x, product.tensors), rounded(x, activation) @ quantized.values().T)


def test_rounding_that_no_operator_does_is_refused_by_name():
    with pytest.raises(ModelError, match="dither"):
        rounded_input(torch.ones(2, 4), Activation("mxfp4", "block", rounding="dither"))
    with pytest.raises(ModelError, match="nf4"):
        rounded_input(torch.ones(2, 4), Activation("nf4", "block"))


def test_layers_come_back_after_an_export_that_fails():
    layer = QuantLinear(rtn(torch.randn(4, 32), RTN()))
    model = torch.nn.ModuleDict({"a": layer, "b": layer})
    with contextlib.suppress(KeyError), lowered(model, Lowering()) as found:
        assert model["a"] is model["b"] is found["a"]
        raise KeyError
    assert model["a"] is model["b"] is layer


@pytest.mark.parametrize("options", [{"format": "qop"}, {"accuracy_level": 5}, {"format": "qdq", "accuracy_level": 0}])
def test_ways_that_do_not_exist_are_refused(options):
    with pytest.raises(OptionError):
        Lowering(**options)


def test_widths_are_those_with_a_kernel():
    assert [width_of(bits) for bits in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]
