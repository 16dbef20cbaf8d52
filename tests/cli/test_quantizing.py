"""``quantize``."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import adapterx as ax
from tests.cli.conftest import Type
from tests.zoo import Built, build


def test_quantize_writes_the_base_in_fewer_bits_and_says_what_stayed(run: Type, mlp: Built, tmp_path: Path) -> None:
    options = ("--bits", "8", "--layer", "fc2=4", "--keep", "head", "--asymmetric")
    result = run("quantize", mlp.model, tmp_path / "q.onnx", *options, "--exact")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["module", "fc1", "fc2"]
    assert "uint8 in blocks of 32" in result.stdout
    assert "uint4 in blocks of 32" in result.stdout
    assert "float: head (Gemm): as asked for" in result.stderr
    assert "3 sites of adapters stay as they were" in result.stderr
    assert f"wrote {tmp_path / 'q.onnx'}" in result.stderr
    assert len(ax.find_sites(tmp_path / "q.onnx")) == 3


def test_json_has_the_same_in_numbers(run: Type, mlp: Built, tmp_path: Path) -> None:
    told = json.loads(run("quantize", mlp.base_model, tmp_path / "q.onnx", "--json").stdout)
    assert [row["module"] for row in told["layers"]] == ["fc1", "fc2", "head"]
    assert told["bytes_after"] == sum(row["bytes_after"] for row in told["layers"]) < told["bytes_before"]
    assert told["float"] == []
    assert told["path"] == str(tmp_path / "q.onnx")


def test_static_is_calibrated_on_feeds_from_a_file(run: Type, mlp: Built, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", **mlp.feeds)
    command = ("quantize", mlp.base_model, tmp_path / "q.onnx", "--method", "static")
    assert run(*command, "--calibration", tmp_path / "feeds.npz").exit_code == 0
    got = ort.InferenceSession(str(tmp_path / "q.onnx")).run(None, mlp.feeds)
    assert 0 < np.abs(got[0] - mlp.expected["base"][0]).max() < 0.1
    refused = run(*command)
    assert refused.exit_code == 1
    assert "(--calibration FILE.npz)" in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep", "fc9"), "nearest is fc"),
        (("--method", "gptq"), "give the folder of the Hugging Face checkpoint"),
        (("--method", "dynamic", "--bits", "4"), "has no option bits"),
        (("--bits", "3"), "ONNX Runtime multiplies weights of 2, 4 and 8 bits"),
        (("--bits", "2", "--format", "qdq"), "take --format matmulnbits"),
        (("--group-size", "24"), "--group-size=24 has no kernel"),
        (("--layer", "fc1"), "is not NAME=BITS"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_is_written(
    options: tuple[str, ...], said: str, run: Type, mlp: Built, tmp_path: Path
) -> None:
    refused = run("quantize", mlp.base_model, tmp_path / "out" / "q.onnx", *options)
    assert refused.exit_code == 1
    assert said in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_method_that_does_not_exist_is_a_wrong_command_line(run: Type, mlp: Built, tmp_path: Path) -> None:
    assert run("quantize", mlp.base_model, tmp_path / "q.onnx", "--method", "gtpq").exit_code == 2


def test_options_are_spelled_as_they_are_typed(run: Type, tmp_path: Path) -> None:
    said = run("quantize", build("dy_llama_stripped").model, tmp_path / "q.onnx").stderr
    assert "an embedding (--embeddings quantizes it)" in said
    assert "it makes the logits (--head quantizes it)" in said
    assert "give that (--adapter PATH), or name the layer with --layer" in said


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=64, max_position_embeddings=32, **sizes)
    folder = tmp_path_factory.mktemp("checkpoint")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    np.savez(folder / "ids.npz", input_ids=np.random.default_rng(0).integers(0, 64, (4, 12)))
    return folder


def test_a_checkpoint_becomes_an_onnx_file_by_a_method_of_torch(run: Type, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--method", "gptq", "--keep", "down_proj", "--exact", "--json")
    result = run("quantize", checkpoint, tmp_path / "q.onnx", *options, "--calibration", checkpoint / "ids.npz")
    told = json.loads(result.stdout)
    assert {row["op"] for row in told["layers"]} == {"MatMulNBits"}
    assert len(told["layers"]) == 6
    kept = {row["module"] for row in told["float"]}
    assert kept == {"model.embed_tokens", "model.layers.0.mlp.down_proj", "lm_head"}
    session = ort.InferenceSession(str(tmp_path / "q.onnx"))
    names = {value.name for value in session.get_inputs()}
    feeds = {"input_ids": np.ones((2, 5), np.int64), "attention_mask": np.ones((2, 5), np.int64)}
    assert session.run(None, {name: feeds[name] for name in names})[0].shape == (2, 5, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "awq"), "needs calibration data"),
        (("--keep", "donw_proj"), "nearest is down_proj"),
        (("--method", "kquant"), "is for an ONNX file"),
        (("--method", "awq", "--calibration", "config.json"), "has no tokenizer"),
    ],
)
def test_a_checkpoint_is_refused_in_one_message(
    options: tuple[str, ...], said: str, run: Type, checkpoint: Path, tmp_path: Path
) -> None:
    typed = [checkpoint / option if option == "config.json" else option for option in options]
    refused = run("quantize", checkpoint, tmp_path / "q.onnx", *typed)
    assert refused.exit_code == 1
    assert said in refused.stderr
    assert not list(tmp_path.iterdir())
