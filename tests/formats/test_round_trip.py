"""What is written is read, by us and by the tools that the formats belong to."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from safetensors import safe_open

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import FormatError, OptionError
from adapterx.formats import load_adapter, save_adapter
from tests.formats.files import DTYPES, FORMATS, adapters, one_site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round_trip")


@pytest.mark.parametrize("suffix", FORMATS)
@given(adapter=adapters())
def test_read_of_write_is_the_same_adapter(folder: Path, suffix: str, adapter: Adapter) -> None:
    path = folder / f"a.{suffix}"
    save_adapter(adapter, path)
    loaded = load_adapter(path)
    assert loaded == adapter
    assert [(n, t.dtype) for n, t in loaded.tensors()] == [(n, t.dtype) for n, t in adapter.tensors()]
    assert loaded.metadata["source"] == str(path)
    assert loaded.metadata["format"] == suffix


@pytest.mark.parametrize("suffix", FORMATS)
@given(adapter=adapters())
def test_equal_adapters_give_equal_bytes(folder: Path, suffix: str, adapter: Adapter) -> None:
    first, second = folder / f"first.{suffix}", folder / f"second.{suffix}"
    save_adapter(adapter, first)
    backwards = Adapter(dict(reversed(list(adapter.sites.items()))), {**adapter.metadata, "source": "elsewhere"})
    save_adapter(backwards, second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_lie_aligned_in_the_file_and_need_no_copy(tmp_path: Path, suffix: str, dtype: np.dtype) -> None:
    path = tmp_path / f"a.{suffix}"
    save_adapter(one_site(dtype, rank=2, d_in=8, d_out=16), path)
    site = load_adapter(path).sites["fc"]
    buffers = [array.base if isinstance(array.base, np.ndarray) else array.base.obj for array in (site.a, site.b)]
    assert buffers[0] is buffers[1]
    assert not site.a.flags.writeable
    offset = path.read_bytes().index(site.a.tobytes())
    assert offset % 8 == 0


def test_odd_sizes_are_aligned_too_in_an_onnx_adapter(tmp_path: Path) -> None:
    adapter = one_site(np.float16, rank=3, d_in=5, d_out=7)
    save_adapter(adapter, tmp_path / "a.onnx_adapter")
    content = (tmp_path / "a.onnx_adapter").read_bytes()
    assert [content.index(array.tobytes()) % 64 for _, array in adapter.tensors()] == [0, 0]


def test_provenance_survives_safetensors(tmp_path: Path) -> None:
    adapter = Adapter(dict(one_site().sites), {"base_model": "org/model", "base_fingerprint": "ab" * 32})
    save_adapter(adapter, tmp_path / "a.safetensors")
    kept = load_adapter(tmp_path / "a.safetensors").metadata
    assert (kept["base_model"], kept["base_fingerprint"]) == ("org/model", "ab" * 32)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter"])
def test_float8_loads_exactly(tmp_path: Path, suffix: str, dtype: type) -> None:
    adapter = one_site(dtype)
    save_adapter(adapter, tmp_path / f"a.{suffix}")
    assert load_adapter(tmp_path / f"a.{suffix}") == adapter


def test_npz_refuses_float8_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"fc\.lora_A\.weight is float8_e5m2.*safetensors"):
        save_adapter(one_site(ml_dtypes.float8_e5m2), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_format_takes_float64_or_rank_zero(tmp_path: Path, suffix: str) -> None:
    empty = LowRank(a=np.ones((0, 4), np.float32), b=np.ones((0, 3), np.float32))
    adapter = Adapter({"wide": one_site(np.float64).sites["fc"], "empty": empty})
    with pytest.raises(FormatError, match="2 faults") as caught:
        save_adapter(adapter, tmp_path / f"a.{suffix}")
    assert "wide: its element type is float64" in str(caught.value)
    assert "empty: it has no elements" in str(caught.value)


def test_an_unknown_suffix_names_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"nearest is \.safetensors"):
        save_adapter(one_site(), "a.safetensor")


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    adapter = one_site(np.float16)
    save_adapter(adapter, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata()["format"] == "adapterx"
        for name, array in adapter.tensors():
            np.testing.assert_array_equal(file.get_tensor(name), array)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_reads_what_we_write_and_we_what_numpy_writes(tmp_path: Path, dtype: np.dtype) -> None:
    adapter = one_site(dtype)
    save_adapter(adapter, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        for name, array in adapter.tensors():
            np.testing.assert_array_equal(file[name].view(dtype), array)
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "b.npz", **dict(adapter.tensors()))
        assert load_adapter(tmp_path / "b.npz") == adapter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_onnxruntime_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, dtype: np.dtype) -> None:
    adapter = one_site(dtype)
    path, again = str(tmp_path / "a.onnx_adapter"), str(tmp_path / "b.onnx_adapter")
    save_adapter(adapter, path)
    ort.LoraAdapter().Load(path)
    theirs = ort.AdapterFormat.read_adapter(path)
    parameters = theirs.get_parameters()
    if dtype != DTYPES[2]:  # onnxruntime cannot hand bfloat16 to numpy
        for name, array in adapter.tensors():
            np.testing.assert_array_equal(parameters[name].numpy(), array)
    copy = ort.AdapterFormat()
    copy.set_parameters(parameters)
    copy.set_adapter_version(3)
    copy.set_model_version(7)
    copy.export_adapter(again)
    assert load_adapter(again) == adapter


def test_onnxruntime_runs_an_onnx_adapter_of_ours(tmp_path: Path) -> None:
    import onnx

    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (float[1, 4] x, float[r, 4] fc.lora_A.weight, float[r, 3] fc.lora_B.weight) => (float[1, 3] y)
        { at = Transpose(fc.lora_A.weight)
          low = MatMul(x, at)
          y = MatMul(low, fc.lora_B.weight) }""".replace("fc.lora_A.weight", "A").replace("fc.lora_B.weight", "B")
    )
    for value, name in zip(model.graph.input[1:], ("fc.lora_A.weight", "fc.lora_B.weight"), strict=True):
        for node in model.graph.node:
            node.input[:] = [name if got == value.name else got for got in node.input]
        value.name = name
    for name, shape in (("fc.lora_A.weight", (0, 4)), ("fc.lora_B.weight", (0, 3))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    adapter = one_site()
    save_adapter(adapter, tmp_path / "a.onnx_adapter")
    loaded, run = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))
    run.add_active_adapter(loaded)
    x = np.array([[1, 2, 3, 4]], np.float32)
    site = adapter.sites["fc"]
    np.testing.assert_allclose(session.run(None, {"x": x}, run)[0], x @ site.a.T @ site.b)
