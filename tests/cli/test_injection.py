"""``inject``."""

import json
from pathlib import Path

import pytest

from adapterx.formats import load_adapter
from tests.cli.conftest import Type
from tests.zoo import Built


def test_targets_and_patterns_add_up(run: Type, mlp: Built, tmp_path: Path) -> None:
    result = run("inject", mlp.base_model, tmp_path, "--target", "fc1", "--pattern", "he.d", "--json")
    told = json.loads(result.stdout)
    assert [site["name"] for site in told["sites"]] == ["fc1", "head"]
    assert [Path(file["path"]) for file in told["files"]] == [tmp_path / "base.onnx"]


def test_the_next_command_runs_the_adapter_that_it_was_made_for(run: Type, mlp: Built, tmp_path: Path) -> None:
    result = run("inject", mlp.base_model, tmp_path, "--adapter", mlp.adapters["b"])
    assert result.stdout.splitlines()[0].split() == ["file", "size"]
    count, following = result.stderr.splitlines()
    assert count == f"{len(load_adapter(mlp.adapters['b']).sites)} sites"
    name, *arguments = following.removeprefix("next: ").split()
    assert name == "adapterx"
    assert run(*arguments).exit_code == 0


def test_ports_can_be_external_of_a_fixed_rank_and_for_other_kinds(run: Type, mlp: Built, tmp_path: Path) -> None:
    options = ("--target", "all-linear", "--external", "--rank", "4", "--kind", "dora", "--kind", "ia3", "--json")
    told = json.loads(run("inject", mlp.base_model, tmp_path, *options).stdout)
    assert {site["rank"] for site in told["sites"]} == {4}
    assert told["sites"][0]["ports"] == ["lora_A", "lora_B", "gain", "input_gain", "shift"]


def test_ports_are_of_the_element_type_that_was_asked_for(run: Type, mlp: Built, tmp_path: Path) -> None:
    for command, source, options in (
        ("inject", mlp.base_model, ("--target", "all-linear")),
        ("extract", mlp.model, ("--make-inputs",)),
    ):
        told = run(command, source, tmp_path / command, *options, "--adapter-dtype", "int8", "--json")
        sites = json.loads(told.stdout)["sites"]
        assert {(site["dtype"], site["activations"]) for site in sites} == {("int8", "float32")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --target, --pattern or --adapter"),
        (("--target", "fc9"), "nearest is fc"),
        (("--target", "fc.*"), "a regular expression is given as --pattern"),
        (("--pattern", "fc["), "is no regular expression"),
        (("--target", "fc1", "--fixed-rank"), "--fixed-rank fixes the rank of every port"),
        (
            ("--target", "fc1", "--external", "--rank", "4", "--adapter-dtype", "int8"),
            "--adapter-dtype int8 needs --make-inputs",
        ),
    ],
)  # fmt: skip
def test_a_refusal_is_said_in_words_that_can_be_typed(
    run: Type, mlp: Built, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    result = run("inject", mlp.base_model, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
