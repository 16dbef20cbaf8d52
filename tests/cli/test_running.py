"""``run``: on given feeds and on made ones."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import adapterx as ax
from adapterx.cli.rows import named
from adapterx.cli.running import _described, _write_arrays, read_feeds
from tests.cli.conftest import Type
from tests.zoo import Built


@pytest.fixture
def feeds(mlp: Built, tmp_path: Path) -> Path:
    np.savez(tmp_path / "feeds.npz", **mlp.feeds)
    return tmp_path / "feeds.npz"


@pytest.mark.parametrize("label", ["base", "b", "c"])
def test_outputs_are_those_of_torch(run: Type, mlp: Built, extracted: Path, feeds: Path, label: str) -> None:
    given = () if label == "base" else ("--adapter", mlp.adapters[label])
    result = run("run", extracted, "--feeds", feeds, "--output", feeds.with_name("out.npz"), *given)
    assert result.exit_code == 0
    with np.load(feeds.with_name("out.npz")) as stored:
        (name,) = stored.files
        np.testing.assert_allclose(stored[name], mlp.expected[label][0], rtol=1e-4, atol=1e-4)


def test_json_describes_inputs_outputs_and_times(run: Type, mlp: Built, extracted: Path, feeds: Path) -> None:
    told = json.loads(run("run", extracted, "--feeds", feeds, "--json").stdout)
    expected = mlp.expected["base"][0]
    (row,) = told["outputs"]
    assert (row["shape"], row["dtype"]) == (list(expected.shape), "float32")
    assert row["mean"] == pytest.approx(expected.mean(), abs=1e-4)
    assert row["max"] == pytest.approx(expected.max(), abs=1e-4)
    assert told["inputs"] == [{"input": "x", "shape": list(mlp.feeds["x"].shape), "dtype": "float32"}]
    assert told["run_ms"] > 0
    assert told["load_ms"] > 0
    assert told["providers"] == ["CPUExecutionProvider"]


def test_without_feeds_it_makes_some_and_says_so(run: Type, extracted: Path) -> None:
    result = run("run", extracted, "--seed", 3)
    assert "no --feeds" in result.stderr
    assert "seed 3" in result.stderr
    assert "x float32 [2, 40]" in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["output", "y"]


def test_a_provider_that_is_not_there_is_named_with_those_that_are(run: Type, extracted: Path) -> None:
    result = run("run", extracted, "--provider", "CPUExecutionProvidr")
    assert result.exit_code == 1
    assert "nearest is CPUExecutionProvider" in result.stderr


def test_an_adapter_of_another_model_is_refused_under_its_own_name(run: Type, extracted: Path, nameless: Built) -> None:
    result = run("run", extracted, "--adapter", nameless.adapters["b"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: MismatchError: adapter 'b' does not fit this model")


def test_a_model_without_ports_is_sent_to_extract(run: Type, mlp: Built) -> None:
    result = run("run", mlp.model)
    assert result.exit_code == 1
    assert "adapterx extract" in result.stderr


def test_a_feed_of_a_wrong_name_is_refused(run: Type, mlp: Built, extracted: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", X=mlp.feeds["x"])
    result = run("run", extracted, "--feeds", tmp_path / "feeds.npz")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: FeedError:")
    assert "'x'" in result.stderr


def broken_npz(path: Path) -> Path:
    np.savez(path, x=np.zeros(100))
    content = path.read_bytes()
    path.write_bytes(content[:80] + b"\0" * 40 + content[120:])
    return path


def object_npz(path: Path) -> Path:
    np.savez(path, x=np.array([{}], dtype=object))
    return path


def text_file(path: Path) -> Path:
    path.write_text("x")
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("make", [pipe, broken_npz, object_npz, text_file, Path, lambda path: path.parent])
def test_feeds_that_are_no_arrays_by_name_are_refused(make, run: Type, extracted: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "feeds.npz")
    result = run("run", extracted, "--feeds", path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: FeedError: {path}")


def test_a_folder_that_is_not_there_is_no_place_for_outputs(run: Type, extracted: Path, tmp_path: Path) -> None:
    result = run("run", extracted, "--output", tmp_path / "missing" / "out.npz")
    assert result.exit_code == 1
    assert str(tmp_path / "missing") in result.stderr


def test_outputs_of_any_name_and_of_bf16_can_be_written(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "/a/b:0": np.array([1.5, -2], ml_dtypes.bfloat16), "s": np.float32(1)}
    _write_arrays(tmp_path / "out.npz", arrays)
    stored = read_feeds(tmp_path / "out.npz")
    assert set(stored) == set(arrays)
    assert stored["/a/b:0"].dtype == np.float32
    assert stored["/a/b:0"].tolist() == [1.5, -2]


def test_what_has_no_mean_has_none() -> None:
    assert _described("y", np.array([1.0, np.nan]))["mean"] is None
    assert _described("y", np.zeros((0, 3)))["max"] is None
    assert _described("y", np.array(["a"], dtype=object))["min"] is None
    assert _described("y", np.array([1, 3], ml_dtypes.bfloat16))["mean"] == 2


@pytest.mark.parametrize(
    ("path", "name"), [("a/fr.safetensors", "fr"), ("mein Adapter!.npz", "mein-Adapter-"), ("...", "adapter")]
)
def test_an_adapter_goes_by_a_name_that_the_session_allows(path: str, name: str, extracted: Path) -> None:
    assert named([path]) == {name: Path(path)}
    session = ax.AdapterSession(extracted)
    session.load_adapter(name, extracted.parent / "adapter.safetensors")
