"""``merge``."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import safetensors.numpy

import adapterx as ax
from tests.cli.conftest import Type
from tests.zoo import Built, build


def test_merge_writes_a_model_with_the_adapter_in_it(run: Type, mlp: Built, extracted: Path, tmp_path: Path) -> None:
    result = run("merge", extracted, mlp.adapters["b"], tmp_path / "merged.onnx")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["site", "fc1", "fc2", "head"]
    assert f"wrote {tmp_path / 'merged.onnx'}" in result.stderr
    got = ort.InferenceSession(str(tmp_path / "merged.onnx")).run(None, mlp.feeds)
    np.testing.assert_allclose(got[0], mlp.expected["b"][0], atol=1e-4)


def test_merge_tells_what_quantizing_again_costs(run: Type, tmp_path: Path) -> None:
    built = build("dy_normed_int4")
    command = ("merge", built.base_model, built.adapters["b"], tmp_path / "merged.onnx")
    table = run(*command).stdout
    told = json.loads(run(*command, "--json").stdout)
    assert "int4 in blocks of 32" in table
    assert told["path"] == str(tmp_path / "merged.onnx")
    for row in told["sites"]:
        assert 0 < row["rms_error"] < row["max_error"] < 1 < 10 * row["change"]
        assert f"{row['rms_error']:.3g}" in table


def test_merge_with_undo_takes_it_out_again(run: Type, mlp: Built, tmp_path: Path) -> None:
    assert run("merge", mlp.base_model, mlp.adapters["b"], tmp_path / "merged.onnx", "--weight", 0.5).exit_code == 0
    undone = run("merge", tmp_path / "merged.onnx", mlp.adapters["b"], tmp_path / "o.onnx", "--undo", "--weight", 0.5)
    assert "taken out of 3 sites" in undone.stderr
    got = ort.InferenceSession(str(tmp_path / "o.onnx")).run(None, mlp.feeds)
    np.testing.assert_allclose(got[0], mlp.expected["base"][0], atol=1e-4)


def test_merge_takes_the_folder_of_a_checkpoint(run: Type, tmp_path: Path) -> None:
    weight = np.ones((3, 4), np.float32)
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file({"fc.weight": weight}, tmp_path / "base" / "model.safetensors")
    a, b = np.ones((1, 4), np.float32), np.full((1, 3), 2, np.float32)
    ax.save_adapter(ax.Adapter({"fc": ax.LowRank(a=a, b=b)}), tmp_path / "b.npz")
    assert run("merge", tmp_path / "base", tmp_path / "b.npz", tmp_path / "out").exit_code == 0
    merged = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(merged["fc.weight"], weight + 2)
    refused = run("merge", tmp_path / "base", tmp_path / "b.npz", tmp_path / "other", "--undo")
    assert refused.exit_code == 1
    assert "--weight=-1" in refused.stderr


def test_a_merge_that_is_refused_is_one_message(run: Type, mlp: Built, nameless: Built, tmp_path: Path) -> None:
    refused = run("merge", mlp.base_model, nameless.adapters["b"], tmp_path / "merged.onnx")
    assert refused.exit_code == 1
    assert refused.stderr.count("no such module") == len(nameless.truth)
    assert not list(tmp_path.iterdir())
