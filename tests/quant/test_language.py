"""The small language model: it has learnt, it can be made again, and its twin computes the same."""

import dataclasses

import pytest
import torch

from adapterx.quant import RTNConfig, quantize
from tests.quant.language import Recipe, language, perplexity, text, trained, untrained


@pytest.fixture(scope="module")
def tokens():
    return text().evaluation(16, 128)


def test_training_takes_the_perplexity_from_the_vocabulary_to_what_real_text_has(tokens):
    assert perplexity(untrained(Recipe()), tokens) > 900
    assert perplexity(language(), tokens) < 80


def test_a_recipe_gives_the_same_bits_and_leaves_global_chance_alone():
    recipe = Recipe(steps=2, rows=2, length=16)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = trained(recipe).state_dict(), trained(recipe).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_field_of_a_recipe_changes_its_key():
    recipe = Recipe()
    others = [dataclasses.replace(recipe, **{field.name: 3}) for field in dataclasses.fields(recipe)]
    assert len({recipe.key(), *(other.key() for other in others)}) == len(others) + 1


def test_the_twin_computes_the_same_with_much_larger_channels(tokens):
    model, twin = language(), language(twin=True)
    with torch.no_grad():
        expected, got = (each(input_ids=tokens[:2]).logits for each in (model, twin))
    assert float((expected - got).abs().max()) < 1e-3
    gain = twin.model.layers[0].input_layernorm.weight / model.model.layers[0].input_layernorm.weight
    assert torch.allclose(gain.sort(descending=True)[0][:4], torch.tensor([30.0, 30.0, 30.0, 1.0]))


def test_its_layers_lose_what_weights_of_few_bits_lose(tokens):
    known = perplexity(language(), tokens)
    lost = {}
    for bits in (8, 4, 2):
        config = RTNConfig(bits=bits, group_size=32, use_sym=False)
        lost[bits] = perplexity(quantize(language(), config), tokens) / known - 1
    assert abs(lost[8]) < 1e-3 < lost[4] < 0.02 < lost[2]


def test_what_is_evaluated_was_never_trained_on():
    found = text()
    train = {tuple(row.tolist()) for row in found.train.unfold(0, 64, 64)}
    assert not any(tuple(row.tolist()) in train for row in found.evaluation(64, 64))
