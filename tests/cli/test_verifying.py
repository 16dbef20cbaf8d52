"""``verify --mixed``: alone on a model, and beside the proof of an extraction."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Type
from tests.runtime.chain import Chain
from tests.test_verify_mixed import saved, turn_the_mask_round
from tests.zoo import Built


@pytest.mark.parametrize("given", ["model", "folder"])
def test_mixed_proves_one_model_by_itself(run: Type, extracted: Path, given: str) -> None:
    result = run("verify", "--mixed", extracted if given == "model" else extracted.parent)
    assert result.exit_code == 0, result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["check", "max", "error", "allowed"]
    assert any(row.startswith("rows of a weighted sum = each alone ") for row in rows)
    assert all(row.endswith("pass") for row in rows)


def test_mixed_with_two_models_proves_the_extraction_too(run: Type, mlp: Built, extracted: Path) -> None:
    told = json.loads(run("verify", mlp.model, extracted.parent, "--mixed", "--json").stdout)
    checks = [row["check"] for row in told["rows"]]
    assert told["passed"] is True
    assert checks.index("the exported adapter") < checks.index("rows of an adapter = each alone")


def test_a_model_that_mixes_rows_up_exits_1_and_names_the_failed_checks(run: Type, tmp_path: Path) -> None:
    wrong = saved(tmp_path, change=turn_the_mask_round)
    result = run("verify", wrong, "--mixed")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "checks failed: rows of an adapter = each alone" in result.stderr
    told = json.loads(run("verify", wrong, "--mixed", "--json").stdout)
    assert told["passed"] is False


def test_a_model_that_cannot_be_mixed_exits_1_with_what_to_type(run: Type, tmp_path: Path) -> None:
    result = run("verify", "--mixed", saved(tmp_path, Chain(port="external")))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ModelError: rows of one batch cannot have different adapters in ")
    assert "--make-inputs" in result.stderr


def test_sites_that_cannot_be_mixed_are_said_beside_the_table(run: Type, tmp_path: Path) -> None:
    path = saved(tmp_path, unmixed={"model.head": "its rows are \x1b[2Jgathered"})
    line = r"one adapter for the whole batch at model.head: its rows are \x1b[2Jgathered"
    assert line in run("sites", path).stderr
    rows = json.loads(run("sites", path, "--json").stdout)
    assert [row.get("unmixed") for row in rows] == [None, None, None, "its rows are \x1b[2Jgathered"]
    assert run("sites", path, "--html", tmp_path / "report.html").exit_code == 0
    assert "one adapter for the whole batch at model.head" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("more", [(), ("--mixed", "--adapter", "a")])
def test_what_is_missing_on_the_command_line_is_said_with_exit_code_2(run: Type, extracted: Path, more) -> None:
    result = run("verify", extracted, *more)
    assert result.exit_code == 2
    assert "--mixed" in result.stderr


def test_a_folder_of_several_models_is_no_model(run: Type, extracted: Path, tmp_path: Path) -> None:
    for name in ("encoder.onnx", "decoder.onnx"):
        shutil.copy(extracted, tmp_path / name)
    result = run("verify", "--mixed", tmp_path)
    assert result.exit_code == 1
    assert "has 2 models (decoder.onnx, encoder.onnx)" in result.stderr
