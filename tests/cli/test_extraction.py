"""``sites``, ``extract`` and ``verify``."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import adapterx as ax
from adapterx.graph.load import read_proto
from adapterx.manifest import Manifest, manifest_of
from tests.cli.conftest import Type
from tests.zoo import Built, build


def manifest_in(model: Path) -> Manifest:
    manifest = manifest_of({entry.key: entry.value for entry in read_proto(model).metadata_props}, where=str(model))
    assert manifest is not None
    return manifest


def test_sites_prints_one_line_a_site_and_nothing_else_to_stdout(run: Type, mlp: Built) -> None:
    result = run("sites", mlp.model)
    header, *lines = result.stdout.splitlines()
    assert header.split()[:4] == ["site", "adapter", "kind", "op"]
    assert [line.split()[0] for line in lines] == [site.name for site in mlp.truth]
    assert "40 -> 56" in lines[0]
    assert lines[0].endswith("initializer")
    assert result.stderr == "3 sites; adapters by name: default\n"


def test_sites_json_is_what_find_sites_gives(run: Type, mlp: Built) -> None:
    rows = json.dumps([site.as_dict() for site in ax.find_sites(mlp.model)])
    assert json.loads(run("sites", mlp.model, "--json").stdout) == json.loads(rows)


def test_sites_of_an_extracted_model_are_those_of_its_manifest(run: Type, extracted: Path) -> None:
    rows = json.loads(run("sites", extracted, "--json").stdout)
    assert [row["name"] for row in rows] == manifest_in(extracted).sites.names


def test_a_model_without_names_is_refused_in_words_that_can_be_typed(run: Type, nameless: Built) -> None:
    result = run("sites", nameless.model)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "--adapter PATH" in result.stderr
    assert "--structural" in result.stderr
    assert "structural=True" not in result.stderr


def test_the_words_it_suggests_find_the_sites(run: Type, nameless: Built) -> None:
    named = json.loads(run("sites", nameless.model, "--adapter", nameless.adapters["a"], "--json").stdout)
    assert {row["name"] for row in named} == {site.name for site in nameless.truth}
    structural = json.loads(run("sites", nameless.model, "--structural", "--json").stdout)
    assert {row["name_source"] for row in structural} == {"structure"}
    assert len(structural) == len(named)


EXTRACT_OPTIONS = {
    "none": ((), ("external", True, True)),
    "inputs": (("--make-inputs",), ("input", True, True)),
    "packed": (("--make-inputs", "--pack-inputs"), ("packed", True, True)),
    "fixed": (("--make-inputs", "--fixed-rank", "--required-inputs"), ("input", False, False)),
}


@pytest.mark.parametrize(("options", "ports"), EXTRACT_OPTIONS.values(), ids=EXTRACT_OPTIONS)
def test_extract_has_every_mode_and_lists_every_file_that_it_wrote(
    run: Type, nameless: Built, tmp_path: Path, options: tuple[str, ...], ports: tuple[str, bool, bool]
) -> None:
    given = ("--adapter", nameless.adapters["a"])
    told = json.loads(run("extract", nameless.model, tmp_path / "out", *options, *given, "--json").stdout)
    manifest = manifest_in(Path(told["model"]))
    assert (manifest.port, manifest.dynamic_rank, manifest.optional) == ports
    written = {str(path): path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {file["path"]: file["bytes"] for file in told["files"]} == written
    assert ax.load_adapter(told["adapter"]["path"]).content_hash == told["adapter"]["sha256"]


@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter", "npz"])
def test_extract_writes_the_adapter_in_the_format_asked_for(run: Type, mlp: Built, tmp_path: Path, suffix: str) -> None:
    result = run("extract", mlp.model, tmp_path, "--adapter-format", suffix)
    assert result.exit_code == 0
    assert ax.load_adapter(tmp_path / f"adapter.{suffix}").ranks == (4,)


def test_extract_ends_by_the_command_that_proves_it(run: Type, nameless: Built, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    result = run("extract", nameless.model, folder, "--make-inputs", "--adapter", nameless.adapters["a"])
    assert [line.split()[-2:] for line in result.stdout.splitlines()[1:]]
    next_line = result.stderr.splitlines()[-1]
    program, *arguments = shlex.split(next_line.removeprefix("next: "))
    assert program == "adapterx"
    assert arguments[0] == "verify"
    assert run(*arguments).exit_code == 0


def test_options_that_contradict_each_other_are_refused_and_nothing_is_written(
    run: Type, mlp: Built, tmp_path: Path
) -> None:
    result = run("extract", mlp.model, tmp_path / "out", "--pack-inputs")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: OptionError: --pack-inputs")
    assert "--make-inputs" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_format_that_does_not_exist_is_a_wrong_command_line(run: Type, mlp: Built, tmp_path: Path) -> None:
    result = run("extract", mlp.model, tmp_path / "out", "--adapter-format", "pickle")
    assert result.exit_code == 2
    assert "safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["model", "folder"])
def test_verify_passes_for_what_extract_wrote(run: Type, mlp: Built, extracted: Path, given: str) -> None:
    result = run("verify", mlp.model, extracted if given == "model" else extracted.parent)
    assert result.exit_code == 0
    assert result.stderr == ""
    header, *rows = result.stdout.splitlines()
    assert header.split()[:2] == ["check", "max"]
    assert len(rows) >= 4
    assert all(row.endswith("pass") for row in rows)


def damaged(model: Path, folder: Path) -> Path:
    """The model with its first base weights moved by a little."""
    proto = onnx.load(model)
    weight = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) in ([40, 56], [56, 40]))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
    onnx.save(proto, folder / model.name)
    return folder / model.name


def test_verify_of_a_wrong_extraction_exits_1_and_names_the_failed_checks(
    run: Type, mlp: Built, extracted: Path, tmp_path: Path
) -> None:
    wrong = damaged(extracted, tmp_path)
    result = run("verify", mlp.model, wrong)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "checks failed: no adapter = base" in result.stderr
    as_json = run("verify", mlp.model, wrong, "--json")
    assert as_json.exit_code == 1
    told = json.loads(as_json.stdout)
    assert told["passed"] is False
    assert [row["passed"] for row in told["rows"]].count(False) >= 4


def test_verify_takes_feeds_and_a_seed(run: Type, mlp: Built, extracted: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", **mlp.feeds)
    with_feeds, seeded, plain = (
        json.loads(run("verify", mlp.model, extracted, *more, "--json").stdout)
        for more in (("--feeds", tmp_path / "feeds.npz"), ("--seed", 5), ())
    )
    effects = [told["rows"][-1]["max_error"] for told in (with_feeds, seeded, plain)]
    assert all(told["passed"] for told in (with_feeds, seeded, plain))
    assert len(set(effects)) == 3


def test_sites_html_writes_a_page_that_names_every_site_beside_the_table(run: Type, mlp: Built, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("sites", mlp.model, "--html", page)
    assert result.stdout == run("sites", mlp.model).stdout
    assert result.stderr.splitlines()[-1] == f"wrote {page}"
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert all(site.name in text for site in mlp.truth)
    assert list(tmp_path.iterdir()) == [page]


def test_sites_html_measures_an_adapter_that_is_given_with_an_extracted_model(
    run: Type, mlp: Built, extracted: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert run("sites", extracted, "--html", page).exit_code == 0
    assert "‖Δ‖" not in page.read_text()
    assert run("sites", extracted, "--adapter", mlp.adapters["b"], "--html", page).exit_code == 0
    assert "‖Δ‖" in page.read_text()


def test_sites_html_never_writes_over_a_model(run: Type, mlp: Built, tmp_path: Path) -> None:
    model = shutil.copy(mlp.model, tmp_path / "model.onnx")
    before = Path(model).read_bytes()
    result = run("sites", model, "--html", model)
    assert result.exit_code == 1
    assert "must end in .html" in result.stderr
    assert Path(model).read_bytes() == before


def test_a_refused_model_leaves_no_page(run: Type, nameless: Built, tmp_path: Path) -> None:
    assert run("sites", nameless.model, "--html", tmp_path / "report.html").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_without_jinja2_the_message_says_what_to_install(
    run: Type, mlp: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("adapterx.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("sites", mlp.model, "--html", tmp_path / "report.html")
    assert result.exit_code == 1
    assert (
        result.stderr
        == 'error: MissingDependency: reports need jinja2; install it with `pip install "adapterx[report]"`\n'
    )
    assert run("sites", mlp.model).exit_code == 0


def test_extract_keeps_codes_and_takes_measured_ranges_when_it_is_told_to(run: Type, tmp_path: Path) -> None:
    kept = run("extract", build("ts_llama_int4_all").model, tmp_path / "kept", "--keep-quantized")
    assert "model.adapter.codes.bin" in kept.stdout
    model = build("ts_bert_int8_static_all").model
    refused = run("extract", model, tmp_path / "static")
    assert refused.exit_code != 0
    assert "--allow-static-qdq" in refused.stderr
    allowed = run("extract", model, tmp_path / "static", "--allow-static-qdq")
    assert "inexact: encoder.layer.0.attention.self.query: its" in allowed.stderr
