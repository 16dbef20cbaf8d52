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
