"""What a file of each kind cannot be: half of a set, misshapen, or of a decomposition that is not known here."""

import json
import re

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from adapterx.errors import AdapterxError, UnsupportedAdapter
from adapterx.formats import load_adapter
from adapterx.kinds import lowered
from tests.kinds.peft_layers import wrapped
from tests.kinds.test_read import CASES

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = "base_model.model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sound folder of each kind, whose tensors the tests take away or change."""
    made = {}
    for name, config in CASES.items():
        made[name] = tmp_path_factory.mktemp("kinds") / "adapter"
        wrapped(config).model.save_pretrained(made[name])
    return made


def changed(folder, target, change):
    """``folder`` with ``change`` made to its tensors, at ``target``."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return target


# Each tensor that a kind cannot do without, as PEFT names it.
SETS = {
    "lora": ("q.lora_A.weight", "q.lora_B.weight"),
    "dora": ("q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector"),
    "adalora": ("q.lora_A", "q.lora_B"),
    "convolutions": ("conv1.lora_A.weight", "conv1.lora_B.weight"),
    "embedding": ("table.lora_embedding_A", "table.lora_embedding_B"),
    "loha": ("q.hada_w1_a", "q.hada_w1_b", "q.hada_w2_a", "q.hada_w2_b"),
    "lokr": ("q.lokr_w1", "q.lokr_w2"),
    "lokr by factors of factors": ("q.lokr_w1_a", "q.lokr_w1_b", "q.lokr_w2_a", "q.lokr_w2_b"),
    "vera": ("q.vera_lambda_b", "q.vera_lambda_d"),
}


@pytest.mark.parametrize(("name", "lost"), [(name, lost) for name, tensors in SETS.items() for lost in tensors])
def test_half_of_a_set_is_refused_by_site_and_tensor(name, lost, folders, tmp_path):
    folder = changed(folders[name], tmp_path / "half", lambda tensors: tensors.pop(ROOT + lost))
    site, tensor = lost.split(".", 1)
    with pytest.raises(AdapterxError, match=rf"{site}\b.*{re.escape(tensor.removesuffix('.weight'))[:7]}"):
        load_adapter(folder)


# What no longer fits the rest when its first axis is one longer.
MISSHAPEN = [
    *(("dora", t) for t in ("q.lora_A.weight", "q.lora_magnitude_vector")),
    *(("loha", t) for t in SETS["loha"]),
    *(("lokr by factors of factors", t) for t in ("q.lokr_w1_b", "q.lokr_w2_b")),
    *(("vera", t) for t in ("q.vera_lambda_d", "vera_A")),
    ("lora_bias", "q.lora_B.bias"),
    ("convolutions", "conv1.lora_A.weight"),
    ("embedding", "table.lora_embedding_A"),
]


@pytest.mark.parametrize(("name", "tensor"), MISSHAPEN)
def test_a_tensor_that_does_not_fit_the_others_is_refused_with_its_shape(name, tensor, folders, tmp_path):
    key = f"base_model.{tensor}" if tensor == "vera_A" else ROOT + tensor

    def longer(tensors):
        tensors[key] = np.concatenate([tensors[key], tensors[key][:1]])

    with pytest.raises(AdapterxError, match=r"\d+, \d+|\(\d+,\)|rank \d+"):
        load_adapter(changed(folders[name], tmp_path / "bent", longer))


def test_vera_without_its_projections_is_refused_with_the_way_out(folders, tmp_path):
    def without(tensors):
        for name in ("vera_A", "vera_B"):
            tensors.pop(f"base_model.{name}")

    with pytest.raises(UnsupportedAdapter, match="save_projection=True"):
        load_adapter(changed(folders["vera"], tmp_path / "seed", without))


@pytest.mark.parametrize(
    ("config", "tensor"),
    [
        (peft.LoHaConfig(r=2, target_modules=["conv2"], use_effective_conv2d=True), "hada_t1"),
        (peft.LoKrConfig(r=1, target_modules=["conv2"], use_effective_conv2d=True), "lokr_t2"),
    ],
)
def test_the_decomposition_of_a_kernel_is_refused_by_name(config, tensor, tmp_path):
    wrapped(config).model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedAdapter, match=rf"conv2.*{tensor}.*use_effective_conv2d"):
        load_adapter(tmp_path / "adapter")


def test_ia3_that_the_config_puts_on_the_other_side_is_refused(folders, tmp_path):
    folder = changed(folders["ia3"], tmp_path / "turned", lambda tensors: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "feedforward_modules": ["q"]}))
    with pytest.raises(UnsupportedAdapter, match="feedforward_modules names the module") as error:
        load_adapter(folder)
    assert "v: " in str(error.value), "every module that does not fit is told"


def test_dora_whose_adapted_row_is_zero_has_no_direction(folders):
    change = load_adapter(folders["dora"]).sites["q"]
    weight = -(change.b.T @ change.a)
    with pytest.raises(ValueError, match="row 0 of the adapted weight is zero"):
        lowered(change, weight, None)
