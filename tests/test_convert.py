"""Any adapter file becomes one that fits the model, or nothing is written."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import adapterx as ax
from adapterx.graph.extract import Extraction, extract_adapters
from tests.zoo import Built, build

FORMATS = [".safetensors", ".onnx_adapter", ".npz"]


@pytest.fixture(scope="module")
def mlp() -> Built:
    return build("ts_mlp")


@pytest.fixture(scope="module")
def extraction(mlp: Built, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    return extract_adapters(mlp.model, tmp_path_factory.mktemp("extracted"), make_inputs=True)


def plain_run(model: Path, file: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """ONNX Runtime alone, with its own reader of adapter files."""
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(model)
    # Its Python front asks for every required input, not knowing that adapters bring some; what is behind it knows.
    (y,) = session._sess.run([output.name for output in session.get_outputs()], feeds, options)
    return y


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_peft_folder_becomes_a_file_that_runs_as_torch_does(
    mlp: Built, extraction: Extraction, tmp_path: Path, suffix: str
) -> None:
    written = ax.convert_adapter(mlp.adapters["c"], extraction.model_path, tmp_path / f"c{suffix}")
    assert ax.load_adapter(tmp_path / f"c{suffix}") == written
    session = ax.AdapterSession(extraction.model_path, {"c": tmp_path / f"c{suffix}"})
    (y,) = session.run(None, mlp.feeds, adapter="c")
    np.testing.assert_allclose(y, mlp.expected["c"][0], rtol=1e-4, atol=1e-4)


def test_the_exported_and_the_extracted_model_give_the_same_file(
    mlp: Built, extraction: Extraction, tmp_path: Path
) -> None:
    loaded = onnx.load(mlp.model)
    models = [mlp.model, str(mlp.model), loaded, ir.from_proto(loaded), extraction.model_path]
    written = [ax.convert_adapter(mlp.adapters["b"], model, tmp_path / "b.npz") for model in models]
    assert len({adapter.content_hash for adapter in written}) == 1


@pytest.mark.parametrize("port", ["optional", "required"])
@pytest.mark.parametrize("rank", ["dynamic", "fixed"])
def test_an_onnx_adapter_that_lacks_a_site_and_ranks_runs_in_onnx_runtime_alone(
    mlp: Built, tmp_path: Path, port: str, rank: str
) -> None:
    model = extract_adapters(
        mlp.model,
        tmp_path,
        make_inputs=True,
        dynamic_rank=rank == "dynamic",
        optional_inputs=port == "optional",
    ).model_path
    whole = ax.load_adapter(mlp.adapters["b"])
    small = ax.Adapter(
        {name: ax.LowRank(a=one.a[:2], b=one.b[:2]) for name, one in whole.sites.items() if name != "fc2"}
    )
    written = ax.convert_adapter(small, model, tmp_path / "small.onnx_adapter")
    session = ax.AdapterSession(model, {"small": small})
    (expected,) = session.run(None, mlp.feeds, adapter="small")
    (base,) = session.run(None, mlp.feeds)
    np.testing.assert_allclose(
        plain_run(model, tmp_path / "small.onnx_adapter", mlp.feeds), expected, rtol=1e-5, atol=1e-5
    )
    assert np.abs(expected - base).max() > 0.1
    assert (written == small) == (port == "optional" and rank == "dynamic")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_file_has_the_element_type_of_the_model(
    mlp: Built, extraction: Extraction, tmp_path: Path, dtype: type
) -> None:
    whole = ax.load_adapter(mlp.adapters["b"])
    other = ax.Adapter({n: ax.LowRank(a=one.a.astype(dtype), b=one.b.astype(dtype)) for n, one in whole.sites.items()})
    ax.convert_adapter(other, extraction.model_path, tmp_path / "b.safetensors")
    read = ax.load_adapter(tmp_path / "b.safetensors")
    assert {one.dtype.name for one in read.sites.values()} == {"float32"}
    np.testing.assert_array_equal(read.sites["fc1"].a, whole.sites["fc1"].a.astype(dtype).astype(np.float32))


def wrong_adapter(mlp: Built) -> ax.Adapter:
    whole = ax.load_adapter(mlp.adapters["b"])
    narrow = ax.LowRank(a=whole.sites["fc1"].a[:, :-1], b=whole.sites["fc1"].b)
    return ax.Adapter({"fc1": narrow, "fc22": whole.sites["fc2"]})


@pytest.mark.parametrize("model", ["exported", "extracted"])
def test_an_adapter_that_does_not_fit_leaves_what_was_there(
    mlp: Built, extraction: Extraction, tmp_path: Path, model: str
) -> None:
    target = tmp_path / "b.npz"
    target.write_text("as it was")
    with pytest.raises(ax.MismatchError, match=r"(?s)fc1: adapter is .*nearest is fc2"):
        ax.convert_adapter(wrong_adapter(mlp), mlp.model if model == "exported" else extraction.model_path, target)
    assert target.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["b.npz"]


@pytest.mark.parametrize("model", ["exported", "extracted"])
def test_an_adapter_of_another_base_is_taken_only_when_asked_for(
    mlp: Built, extraction: Extraction, tmp_path: Path, model: str
) -> None:
    path = mlp.model if model == "exported" else extraction.model_path
    ours, theirs = (
        ax.Adapter(extraction.adapter.sites, {"base_fingerprint": fingerprint})
        for fingerprint in (extraction.adapter.metadata["base_fingerprint"], "f" * 64)
    )
    ax.convert_adapter(ours, path, tmp_path / "ours.npz")
    with pytest.raises(ax.MismatchError, match="base"):
        ax.convert_adapter(theirs, path, tmp_path / "theirs.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["ours.npz"]
    ax.convert_adapter(theirs, path, tmp_path / "theirs.npz", allow_other_base=True)
    assert (tmp_path / "theirs.npz").exists()


def test_a_suffix_that_is_no_format_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ax.OptionError, match=r"nearest is \.safetensors"):
        ax.convert_adapter(tmp_path / "no adapter", tmp_path / "no model", tmp_path / "b.safetensor")


def test_a_model_without_sites_is_refused(mlp: Built, tmp_path: Path) -> None:
    with pytest.raises(ax.NoAdaptersFound):
        ax.convert_adapter(mlp.adapters["b"], mlp.base_model, tmp_path / "b.npz")
    assert not list(tmp_path.iterdir())
