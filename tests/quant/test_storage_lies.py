"""A file that lies is refused by name and changes nothing, and no file runs code."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from adapterx.errors import FormatError
from adapterx.quant import tensor_files
from adapterx.quant.configs import RTNConfig
from adapterx.quant.linear import QuantLinear, quant_layers
from adapterx.quant.storage import load, save
from adapterx.quant.verbs import quantize
from adapterx.quant.weight import DoubleScales, QuantWeight
from tests.quant import tiny

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "model"
    save(quantize(tiny.llama(tied=True, layers=1), RTNConfig(group_size=32, bits=3)), folder)
    return folder


@pytest.fixture
def saved(three_bits, tmp_path):
    """A copy to spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in three_bits.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# -- Files that lie ----------------------------------------------------------------------------------------------------


def rewritten(folder, change, name="quantization.json"):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_record(**fields):
    return lambda folder: rewritten(folder, lambda content: content["layers"][LAYER].update(fields))


def at_top(**fields):
    return lambda folder: rewritten(folder, lambda content: content.update(fields))


def retold(folder, change):
    """The header of the safetensors file, changed; the data stay."""
    path = folder / "quantized.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def in_header(change):
    return lambda folder: retold(folder, change)


def truncated(folder):
    path = folder / "quantized.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def changed(part, change):
    """A tensor with other numbers."""

    def apply(folder):
        files = tensor_files.read_tensor_files(folder)
        tensors = {name: files.read(name) for name in files.tensors}
        change(tensors[f"{LAYER}.{part}"])
        tensor_files.write_tensor_files(tensors, folder, metadata={})

    return apply


def index_to(target):
    def apply(folder):
        (folder.parent / "elsewhere.safetensors").write_bytes((folder / "quantized.safetensors").read_bytes())
        names = tensor_files.read_tensor_files(folder).tensors
        index = {"weight_map": dict.fromkeys(names, target.replace("ABS", str(folder.parent)))}
        (folder / "quantized.safetensors.index.json").write_text(json.dumps(index))

    return apply


def twice(header):
    text = json.dumps(header)
    name = f'"{LAYER}.scales"'
    return (text[:-1] + f", {name}: {json.dumps(header[LAYER + '.scales'])}}}").encode()


def deep(folder):
    (folder / "quantization.json").write_text('{"layers": ' + "[" * 4000 + "]" * 4000 + "}")


LIES = {
    "truncated": (truncated, r"(?s)quantized.safetensors.*truncated"),
    "empty file": (lambda folder: (folder / "quantized.safetensors").write_bytes(b""), "cannot be a safetensors"),
    "huge header": (
        lambda folder: (folder / "quantized.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
        "1,152,921,504,606,846,976 bytes",
    ),
    "missing layer part": (in_header(lambda header: header.pop(f"{LAYER}.scales") and None), "hole|missing"),
    "missing float": (
        lambda folder: rewritten(folder, lambda content: content["layers"].pop(LAYER)),
        rf"{LAYER}.weight: missing",
    ),
    "tensor twice": (in_header(twice), "is there twice"),
    "shape in header": (
        in_header(lambda header: header[f"{LAYER}.qweight"].update(shape=[1 << 40, 1 << 40])),
        rf"{LAYER}.qweight: shape",
    ),
    "negative size": (in_header(lambda header: header[f"{LAYER}.scales"].update(shape=[-1, 2])), "not negative"),
    "overlap": (
        in_header(
            lambda header: header[f"{LAYER}.scales"].update(
                data_offsets=[
                    0,
                    header[f"{LAYER}.scales"]["data_offsets"][1] - header[f"{LAYER}.scales"]["data_offsets"][0],
                ]
            )
        ),
        "overlaps|hole",
    ),
    "version": (at_top(version=2), "version 1, got .* version 2"),
    "version of another type": (at_top(version=True), "version True"),
    "mark": (at_top(format="other"), "got 'other'"),
    "layers are a list": (at_top(layers=[]), "expected the objects layers"),
    "a field too many": (at_top(code="import os"), "expected the objects"),
    "record is a number": (
        lambda folder: rewritten(folder, lambda content: content["layers"].update({LAYER: 4})),
        LAYER,
    ),
    "bits": (in_record(bits=9), "bits is 9"),
    "bits in words": (in_record(bits="4"), "bits is '4'"),
    "bits true": (in_record(bits=True), "bits is True"),
    "group 0": (in_record(group=0), "group is 0"),
    "group of another grid": (in_record(group=16), rf"{LAYER}.scales: expected torch.float32 \[96, 4\]"),
    "shape": (in_record(shape=[96, 65]), rf"{LAYER}"),
    "absurd shape": (in_record(shape=[1 << 30, 1 << 30]), rf"{LAYER}"),
    "format": (in_record(format="nf5"), "format is 'nf5'"),
    "bits of a format": (in_record(format="nf4", bits=8), "nf4 has 4 bits"),
    "parts": (in_record(parts=["qweight"]), "parts are qweight"),
    "parts of another layer": (in_record(parts=["qweight", "scales", "../../x"]), "parts are"),
    "activation": (in_record(activation={"format": "int8"}), "activation is"),
    "double": (in_record(double={"bits": 6, "group": 0}), "group is 0"),
    "unknown dtype": (in_record(compute_dtype="os.system"), "compute_dtype is"),
    "half dtype": (at_top(halves={"lm_head": "float8"}), "half precision is 'float8'"),
    "tied to nothing": (at_top(tied={"lm_head.weight": "model.nothing"}), "which is not there"),
    "tied to a number": (at_top(tied={"lm_head.weight": 3}), "expected a name"),
    "not JSON": (lambda folder: (folder / "quantization.json").write_bytes(b"\x80\x04"), "quantization.json"),
    "deep JSON": (deep, "nested"),
    "codes out of range": (changed("qweight", lambda tensor: tensor.fill_(0x99)), f"{LAYER}.qweight: codes of 3 bits"),
    "scales not finite": (changed("scales", lambda tensor: tensor[0].fill_(float("nan"))), f"{LAYER}.scales: not all"),
    "index to the parent": (index_to("../elsewhere.safetensors"), "no .safetensors file of this folder"),
    "index to an absolute path": (index_to("ABS/elsewhere.safetensors"), "no .safetensors file of this folder"),
    "index to another kind": (index_to("config.json"), "no .safetensors file of this folder"),
    "unknown model": (
        lambda folder: rewritten(folder, lambda c: c.update(model_type="gone"), "config.json"),
        "model_type 'gone'",
    ),
    "architecture that is none": (
        lambda folder: rewritten(folder, lambda c: c.update(architectures=["logging"]), "config.json"),
        "no architecture 'logging'",
    ),
    "config of wrong types": (
        lambda folder: rewritten(folder, lambda c: c.update(hidden_size="large"), "config.json"),
        "cannot be built",
    ),
    "a config of more layers than tensors": (
        lambda folder: rewritten(folder, lambda c: c.update(num_hidden_layers=1 << 40), "config.json"),
        r"config.json: num_hidden_layers is 1,099,511,627,776",
    ),
    "a config of absurd tables": (
        lambda folder: rewritten(folder, lambda c: c.update(hidden_size=1 << 40), "config.json"),
        r"config.json: LlamaForCausalLM cannot be built of this config: a table",
    ),
    "config of another size": (
        lambda folder: rewritten(folder, lambda c: c.update(intermediate_size=1 << 40), "config.json"),
        "the file's",
    ),
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "_"))
def test_a_file_that_lies_is_refused_by_name_and_nothing_is_changed(lie, saved):
    spoil, message = LIES[lie]
    spoil(saved)
    with pytest.raises(FormatError, match=message) as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    if "config.json" in str(caught.value) or lie == "config of another size":
        return
    model = tiny.llama(tied=True, layers=1, seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        load(saved, model)
    assert not list(quant_layers(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


NUMBERS = {
    "an input twice": (
        {"order": torch.arange(8)},
        "order",
        lambda tensor: tensor.copy_(torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])),
        "0.order: expected each of the 8 inputs once",
    ),
    "an input that is not": ({"order": torch.arange(8)}, "order", lambda tensor: tensor.add_(1), "0.order: expected"),
    "codes of no number": (
        {"bits": 8, "format": "float8_e4m3fn"},
        "qweight",
        lambda tensor: tensor.fill_(0x7F),
        "0.qweight: codes that stand for no number",
    ),
    "codes of scales": (
        {"double": DoubleScales(torch.zeros(2, 2, dtype=torch.uint8), torch.ones(1), torch.zeros(1), 2, 2, 4)},
        "scale_codes",
        lambda tensor: tensor.fill_(9),
        "0.scale_codes: codes of 2 bits go up to 9",
    ),
    "zero points": (
        {"bits": 3, "zeros": torch.ones(2, 2, dtype=torch.uint8)},
        "qzeros",
        lambda tensor: tensor.fill_(0x88),
        "0.qzeros: codes of 3 bits go up to 8",
    ),
}


@pytest.mark.parametrize("what", NUMBERS, ids=lambda what: what.replace(" ", "_"))
def test_numbers_that_cannot_be_are_refused(what, tmp_path):
    fields, part, change, message = NUMBERS[what]
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    weight = QuantWeight(**{"codes": codes, "scales": torch.ones(2, 2), "group": 4, "bits": 4, **fields})
    save(nn.Sequential(QuantLinear(weight)), tmp_path)
    assert isinstance(load(tmp_path, nn.Sequential(nn.Linear(8, 2, bias=False)))[0], QuantLinear)
    files = tensor_files.read_tensor_files(tmp_path)
    tensors = {name: files.read(name) for name in files.tensors}
    change(tensors[f"0.{part}"])
    tensor_files.write_tensor_files(tensors, tmp_path, metadata={})
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    with pytest.raises(FormatError, match=message):
        load(tmp_path, model)
    assert type(model[0]) is nn.Linear


# -- Code in files -----------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "quantized_weight.pt", "model.pkl"])
@pytest.mark.parametrize("form", ["default", "huggingface", "neural_compressor"])
def test_pickled_code_is_refused_and_does_not_run(name, form, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    state = {"lm_head.weight": Bomb(trace)}
    if name == "model.pkl":
        (folder / name).write_bytes(pickle.dumps(state))
    else:
        torch.save(state, folder / name)
    (folder / "qconfig.json").write_text("{}")
    config = tiny.llama(layers=1).config.to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(FormatError):
        load(folder, tiny.llama(layers=1), format=form)
    assert not trace.exists()
    # The bomb is one: unpickled, it runs.
    torch.save(state, tmp_path / "again.pt")
    torch.load(tmp_path / "again.pt", weights_only=False)
    assert trace.exists()


def test_code_that_a_checkpoint_brings_along_is_not_run(saved, tmp_path):
    trace = tmp_path / "ran"
    (saved / "modeling_own.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Own: ...\n")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    rewritten(saved, lambda content: content.update(auto_map=own), "config.json")
    assert load(saved).lm_head is not None
    rewritten(saved, lambda content: content.update(model_type="own", architectures=["Own"]), "config.json")
    with pytest.raises(FormatError, match="no model_type 'own'"):
        load(saved)
    assert not trace.exists()


def test_a_folder_with_nothing_to_load_says_what_it_lacks(tmp_path):
    with pytest.raises(FormatError, match=r"expected quantization\.json, or a config\.json"):
        load(tmp_path)
    with pytest.raises(FormatError, match="no such folder"):
        load(tmp_path / "gone")
