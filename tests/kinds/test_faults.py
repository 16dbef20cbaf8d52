"""Tensors of convolutions, embeddings and whole modules that no layer of PEFT has, are refused with their shapes."""

import numpy as np
import pytest

from adapterx.kinds import conv, embedding, saved

CONV = {"lora_A.weight": (4, 6, 3, 3), "lora_B.weight": (8, 4, 1, 1)}
TABLE = {"lora_embedding_A": (2, 9), "lora_embedding_B": (5, 2)}


def tensors(sizes, **changes):
    return {name: np.ones(size, np.float32) for name, size in (sizes | changes).items() if size is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_B.weight": None}, r"its lora_B\.weight is missing; the file has lora_A\.weight"),
        ({"lora_B.weight": (8, 4)}, r"expected \[r, c_in, \*kernel\] .* got \(4, 6, 3, 3\) and \(8, 4\)"),
        ({"lora_B.weight": (8, 4, 3, 3)}, r"got \(4, 6, 3, 3\) and \(8, 4, 3, 3\)"),
        ({"lora_B.weight": (8, 3, 1, 1)}, r"got \(4, 6, 3, 3\) and \(8, 3, 1, 1\)"),
        ({"lora_B.weight": (9, 2, 1, 1)}, r"got \(4, 6, 3, 3\) and \(9, 2, 1, 1\)"),
        ({"lora_A.weight": (0, 6, 3, 3)}, r"got \(0, 6, 3, 3\) and \(8, 4, 1, 1\)"),
        ({"lora_B.weight": (8, 0, 1, 1)}, r"got \(4, 6, 3, 3\) and \(8, 0, 1, 1\)"),
    ],
)
def test_factors_of_a_convolution_that_do_not_fit_are_refused(changes, message):
    assert conv.read(tensors(CONV), lambda _: 1.0).b.shape == (4, 8)
    with pytest.raises(ValueError, match=message):
        conv.read(tensors(CONV, **changes), lambda _: 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_embedding_A": None}, "its lora_embedding_A is missing"),
        ({"lora_embedding_B": (5, 3)}, r"lora_embedding_A is \(2, 9\), lora_embedding_B is \(5, 3\)"),
        ({"lora_embedding_A": (2,)}, r"lora_embedding_A is \(2,\)"),
    ],
)
def test_factors_of_an_embedding_that_do_not_fit_are_refused(changes, message):
    assert embedding.read(tensors(TABLE), lambda _: 1.0).a.shape == (2, 9)
    with pytest.raises(ValueError, match=message):
        embedding.read(tensors(TABLE, **changes), lambda _: 1.0)


@pytest.mark.parametrize("shape", [(5,), (5, 4, 3, 3)])
def test_a_norm_or_a_convolution_trained_in_full_is_refused(shape):
    with pytest.raises(ValueError, match=r"of another kind than linear, trained in full"):
        saved.read({"weight": np.ones(shape, np.float32)})
