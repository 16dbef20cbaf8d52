"""``convert``."""

import json
from pathlib import Path

import adapterx as ax
from tests.cli.conftest import Type
from tests.zoo import Built


def test_convert_writes_a_file_that_fits_and_says_what_is_in_it(
    run: Type, mlp: Built, extracted: Path, tmp_path: Path
) -> None:
    target = tmp_path / "c.onnx_adapter"
    result = run("convert", mlp.adapters["c"], extracted, target)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].split()[0] == str(target)
    assert result.stderr.startswith("3 sites, rank 7, float32")
    told = json.loads(run("convert", mlp.adapters["c"], extracted, target, "--json").stdout)
    read = ax.load_adapter(target)
    assert (told["sha256"], told["ranks"], told["bytes"]) == (read.content_hash, list(read.ranks), read.nbytes)
    assert told["path"] == str(target)


def test_an_adapter_of_another_model_is_refused_with_every_fault(
    run: Type, extracted: Path, nameless: Built, tmp_path: Path
) -> None:
    result = run("convert", nameless.adapters["b"], extracted, tmp_path / "b.npz")
    assert result.exit_code == 1
    assert result.stderr.count("no such site") == len(nameless.truth)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_taken_only_with_the_option_that_the_message_names(
    run: Type, extracted: Path, tmp_path: Path
) -> None:
    ours = ax.load_adapter(extracted.parent / "adapter.safetensors")
    ax.save_adapter(ax.Adapter(ours.sites, {"base_fingerprint": "f" * 64}), tmp_path / "other.safetensors")
    command = ("convert", tmp_path / "other.safetensors", extracted, tmp_path / "out.npz")
    refused = run(*command)
    assert refused.exit_code == 1
    assert "--allow-other-base" in refused.stderr
    assert run(*command, "--allow-other-base").exit_code == 0
    assert run("run", extracted, "--adapter", tmp_path / "other.safetensors").exit_code == 1
    assert run("run", extracted, "--adapter", tmp_path / "other.safetensors", "--allow-other-base").exit_code == 0


def test_convert_without_a_model_changes_the_format_only(run: Type, mlp: Built, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    assert run("convert", mlp.adapters["c"], tmp_path / "c.npz").exit_code == 0
    result = run("convert", tmp_path / "c.npz", folder)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].split()[0] == str(folder)
    assert ax.load_adapter(folder) == ax.load_adapter(mlp.adapters["c"])
    assert run("convert", tmp_path / "c.npz", tmp_path / "k.bin", "--format", "safetensors").exit_code == 0
    assert ax.load_adapter(tmp_path / "k.bin") == ax.load_adapter(folder)


def test_the_command_line_is_wrong_with_one_path_or_four(run: Type, tmp_path: Path) -> None:
    for paths in (["a"], ["a", "b", "c", "d"]):
        result = run("convert", *(tmp_path / path for path in paths))
        assert result.exit_code == 2
        assert "expected ADAPTER OUTPUT or ADAPTER MODEL OUTPUT" in result.stderr


def test_what_a_smaller_rank_and_fewer_bits_cost_is_told(
    run: Type, mlp: Built, extracted: Path, tmp_path: Path
) -> None:
    options = ("--rank", 2, "--quantize", "int8", "--fill-missing")
    result = run("convert", mlp.adapters["c"], extracted, tmp_path / "c.safetensors", *options)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == ["site", "fc1", "fc2", "head"]
    assert "truncation error: 0." in result.stderr
    assert "quantization error: 0.0" in result.stderr
    told = json.loads(
        run("convert", mlp.adapters["c"], extracted, tmp_path / "c.safetensors", *options, "--json").stdout
    )
    assert set(told["truncation_errors"]) == {"fc1", "fc2", "head"}
    assert 0 < told["quantization_error"] < 0.02 < told["truncation_error"] < 1
    # What an adapter cost before is not what this conversion costs.
    again = run("convert", tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    assert "truncation" not in again.stderr + again.stdout


def test_adapters_are_combined_with_their_weights(run: Type, mlp: Built, tmp_path: Path) -> None:
    b, c = (ax.load_adapter(mlp.adapters[name]) for name in "bc")
    options = ("--weight", 0.25, "--combine", f"{mlp.adapters['c']}=-0.5")
    assert run("convert", mlp.adapters["b"], tmp_path / "sum.npz", *options).exit_code == 0
    assert ax.load_adapter(tmp_path / "sum.npz") == ax.combine([(b, 0.25), (c, -0.5)])
    result = run("convert", mlp.adapters["b"], tmp_path / "x.npz", "--combine", mlp.adapters["c"])
    assert result.exit_code == 1
    assert "expected PATH=WEIGHT" in result.stderr
