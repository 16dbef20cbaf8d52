"""convert_adapter: what it does to an adapter beside fitting it, proven against torch where that knows the answer."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

import adapterx as ax
from adapterx.adapter import MAGNITUDE, SHIFT
from adapterx.formats import load_adapter, save_adapter
from adapterx.truncation import distance, nearest, truncated_adapter
from tests.formats.files import safetensors_of
from tests.zoo import Built, build

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FORMATS = {"p": "peft", "a.safetensors": "safetensors", "a.npz": "npz", "a.onnx_adapter": "onnx_adapter"}


def extracted(name: str, folder: Path, **options: bool) -> Path:
    return ax.extract_adapters(build(name).model, folder, make_inputs=True, **options).model_path


@pytest.fixture(scope="module")
def mlp() -> Built:
    return build("ts_mlp")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It takes plain LoRA and nothing else."""
    return extracted("ts_mlp", tmp_path_factory.mktemp("mlp"))


def output(model: Path, adapter: Path | ax.Adapter, feeds: dict) -> np.ndarray:
    (y,) = ax.AdapterSession(model, {"x": adapter}).run(None, feeds, adapter="x")
    return y


def plain_run(model: Path, file: Path, feeds: dict) -> list[np.ndarray]:
    """ONNX Runtime alone, with its own reader of adapter files."""
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(model)
    # Its Python front asks for every required input, not knowing that adapters bring some; what is behind it knows.
    return session._sess.run([output.name for output in session.get_outputs()], feeds, options)


def test_patterns_of_rank_and_alpha_are_heard_where_other_converters_use_one_scale(tmp_path: Path) -> None:
    case = build("ts_llama_patterns")
    model = extracted("ts_llama_patterns", tmp_path)
    config = json.loads((case.adapters["b"] / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    written = ax.convert_adapter(case.adapters["b"], model, tmp_path / "b.onnx_adapter")
    for met, expected in zip(
        plain_run(model, tmp_path / "b.onnx_adapter", case.feeds), case.expected["b"], strict=True
    ):
        np.testing.assert_allclose(met, expected, **CLOSE)
    # What the others do: alpha / r of the config, at every module.
    raw = load_adapter_without_scale(case.adapters["b"], tmp_path / "raw")
    one = config["lora_alpha"] / config["r"]
    theirs = ax.Adapter({n: ax.LowRank(a=s.a, b=s.b * np.float32(one)) for n, s in raw.sites.items()})
    ax.convert_adapter(theirs, model, tmp_path / "theirs.onnx_adapter")
    met = plain_run(model, tmp_path / "theirs.onnx_adapter", case.feeds)[0]
    assert np.abs(met - case.expected["b"][0]).max() > 0.01
    assert set(theirs.sites) == set(written.sites)


def load_adapter_without_scale(folder: Path, scratch: Path) -> ax.Adapter:
    """The tensors of a PEFT folder as they lie, by way of a config that scales by 1 everywhere."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scratch.mkdir()
    (scratch / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    alphas = {"alpha_pattern": config["rank_pattern"], "lora_alpha": config["r"]}
    (scratch / "adapter_config.json").write_text(json.dumps(config | alphas))
    return load_adapter(scratch)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_any_format_becomes_any_other_without_a_model(mlp: Built, tmp_path: Path, source: str, name: str) -> None:
    adapter = load_adapter(mlp.adapters["c"])
    (tmp_path / "in").mkdir()
    save_adapter(adapter, tmp_path / "in" / source)
    assert ax.convert_adapter(tmp_path / "in" / source, None, tmp_path / name) == adapter
    assert load_adapter(tmp_path / name) == adapter
    assert load_adapter(tmp_path / name).metadata["format"] == FORMATS[name]


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_for_a_pipeline_runs_in_the_model_that_it_has_changes_for(tmp_path: Path, format: str) -> None:
    case = build("ts_conv")
    model = extracted("ts_conv", tmp_path / "m")
    unet = {f"unet.{name}": site for name, site in load_adapter(case.adapters["c"]).sites.items()}
    text = ax.LowRank(a=np.ones((2, 4), np.float32), b=np.ones((2, 4), np.float32))
    whole = ax.Adapter({**unet, "text_encoder.text_model.encoder.layers.0.mlp.fc1": text})
    save_adapter(whole, tmp_path / "pipeline.safetensors", format=format)
    written = ax.convert_adapter(tmp_path / "pipeline.safetensors", model, tmp_path / "c.safetensors")
    assert written.metadata["left_out"] == "text_encoder (1 sites)"
    np.testing.assert_allclose(output(model, tmp_path / "c.safetensors", case.feeds), case.expected["c"][0], **CLOSE)
    np.testing.assert_allclose(
        output(model, tmp_path / "pipeline.safetensors", case.feeds), case.expected["c"][0], **CLOSE
    )
    base_output = output(case.base_model, tmp_path / "pipeline.safetensors", case.feeds)
    np.testing.assert_allclose(base_output, case.expected["c"][0], **CLOSE)
    again = ax.convert_adapter(tmp_path / "pipeline.safetensors", model, tmp_path / "c.npz", component="unet")
    assert again == written
    with pytest.raises(ax.MismatchError, match="no such site"):
        ax.convert_adapter(tmp_path / "pipeline.safetensors", model, tmp_path / "t.npz", component="text_encoder")
    assert not (tmp_path / "t.npz").exists()


def test_flattened_names_become_a_peft_folder_only_with_a_model(tmp_path: Path) -> None:
    model = extracted("ts_conv", tmp_path / "m")
    sites = {f"lora_unet_{name}": site for name, site in load_adapter(build("ts_conv").adapters["c"]).sites.items()}
    with pytest.raises(ax.FormatError, match="convert it for a model"):
        ax.convert_adapter(ax.Adapter(sites), None, tmp_path / "p")
    ax.convert_adapter(ax.Adapter(sites), model, tmp_path / "p")
    assert load_adapter(tmp_path / "p") == load_adapter(build("ts_conv").adapters["c"])


@pytest.mark.parametrize("name", ["ts_dora", "dy_loha", "dy_lokr", "ts_vera_mlp"])
def test_kinds_become_plain_lora_exactly_at_full_rank(model: Path, tmp_path: Path, name: str) -> None:
    case = build(name)
    written = ax.convert_adapter(case.adapters["c"], model, tmp_path / "c.onnx_adapter", rank=64)
    assert not any(site.parts for site in written.sites.values())
    assert float(written.metadata["truncation_error"]) < 1e-6
    (met,) = plain_run(model, tmp_path / "c.onnx_adapter", case.feeds)
    np.testing.assert_allclose(met, case.expected["c"][0], **CLOSE)
    assert np.abs(met - case.expected["base"][0]).max() > 0.05


def test_dora_at_a_small_rank_says_how_far_it_is_from_dora(model: Path, tmp_path: Path) -> None:
    case = build("ts_dora")
    full = ax.convert_adapter(case.adapters["c"], model, tmp_path / "full.npz", rank=64)
    errors, outputs = [], []
    for rank in (2, 8, 16):
        small = ax.convert_adapter(case.adapters["c"], model, tmp_path / "small.npz", rank=rank)
        assert small.ranks[-1] == rank
        errors.append(float(small.metadata["truncation_error"]))
        np.testing.assert_allclose(errors[-1], distance(full, small), rtol=1e-4)
        assert set(json.loads(small.metadata["truncation_errors"])) == set(full.sites)
        outputs.append(np.abs(output(model, tmp_path / "small.npz", case.feeds) - case.expected["c"][0]).max())
    assert errors == sorted(errors, reverse=True)
    assert outputs[-1] < outputs[0]


def test_dora_without_a_rank_or_without_a_model_is_no_plain_lora(model: Path, tmp_path: Path) -> None:
    dora = build("ts_dora").adapters["c"]
    with pytest.raises(ax.MismatchError, match="brings magnitude, the model's site takes lora_A, lora_B"):
        ax.convert_adapter(dora, model, tmp_path / "c.npz")
    with pytest.raises(ax.MismatchError, match="brings magnitude, which only a base weight"):
        ax.convert_adapter(dora, None, tmp_path / "c.npz", rank=8)
    again = ax.convert_adapter(dora, None, tmp_path / "c.npz")
    assert MAGNITUDE in load_adapter(tmp_path / "c.npz").sites["fc1"].parts
    assert again == load_adapter(dora)


def test_dora_keeps_its_gain_where_the_model_takes_one(tmp_path: Path) -> None:
    case = build("ts_dora")
    model = extracted("ts_dora", tmp_path / "m")
    written = ax.convert_adapter(case.adapters["c"], model, tmp_path / "c.safetensors")
    assert all("gain" in site.parts for site in written.sites.values())
    np.testing.assert_allclose(output(model, tmp_path / "c.safetensors", case.feeds), case.expected["c"][0], **CLOSE)


def test_what_changes_a_bias_is_no_plain_lora(model: Path, tmp_path: Path) -> None:
    for name in ("ts_ia3", "ts_lora_bias"):
        with pytest.raises(ax.MismatchError, match=r"fc1: it changes the bias by up to"):
            ax.convert_adapter(build(name).adapters["c"], model, tmp_path / "c.npz", rank=8)
    assert not list(tmp_path.iterdir())


def test_a_rank_beyond_a_fixed_port_is_refused_and_a_smaller_one_filled_up(mlp: Built, tmp_path: Path) -> None:
    fixed = extracted("ts_mlp", tmp_path / "m", dynamic_rank=False)
    with pytest.raises(ax.MismatchError, match="rank 7, the model's port takes 4"):
        ax.convert_adapter(mlp.adapters["c"], fixed, tmp_path / "c.npz")
    with pytest.raises(ax.OptionError, match="rank=5 is more than the 4 that the model's port of fc1 takes"):
        ax.convert_adapter(mlp.adapters["c"], fixed, tmp_path / "c.npz", rank=5)
    written = ax.convert_adapter(mlp.adapters["c"], fixed, tmp_path / "c.onnx_adapter", rank=2)
    assert written.ranks == (4,)
    (met,) = plain_run(fixed, tmp_path / "c.onnx_adapter", mlp.feeds)
    truth = truncated_adapter(load_adapter(mlp.adapters["c"]), 2)
    np.testing.assert_allclose(met, output(fixed, truth, mlp.feeds), **CLOSE)


@pytest.mark.parametrize("port", [{"make_inputs": True}, {"make_inputs": False}], ids=str)
def test_sites_that_are_missing_are_filled_when_that_is_asked_for(mlp: Built, tmp_path: Path, port: dict) -> None:
    model = ax.extract_adapters(mlp.model, tmp_path / "m", **port).model_path
    whole = load_adapter(mlp.adapters["b"])
    some = ax.Adapter({"fc1": whole.sites["fc1"]})
    assert ax.convert_adapter(some, model, tmp_path / "some.npz") == some
    filled = ax.convert_adapter(some, model, tmp_path / "filled.npz", fill_missing=True)
    assert list(filled.sites) == ["fc1", "fc2", "head"]
    assert not filled.sites["head"].b.any()
    np.testing.assert_array_equal(output(model, tmp_path / "filled.npz", mlp.feeds), output(model, some, mlp.feeds))
    with pytest.raises(ax.OptionError, match="there is no model"):
        ax.convert_adapter(some, None, tmp_path / "none.npz", fill_missing=True)


def test_sites_that_take_vectors_are_filled_with_zeros_of_them(tmp_path: Path) -> None:
    case = build("ts_dora")
    model = extracted("ts_dora", tmp_path / "m", optional_inputs=False)
    one = {"fc2": load_adapter(case.adapters["b"]).sites["fc2"]}
    written = ax.convert_adapter(ax.Adapter(one), model, tmp_path / "one.onnx_adapter")
    assert not written.sites["fc1"].parts["gain"].any()
    session = onnxruntime.InferenceSession(model)
    lacking = {i.name for i in session.get_inputs()} - {n for n, _ in written.tensors()} - case.feeds.keys()
    assert not lacking
    np.testing.assert_allclose(
        plain_run(model, tmp_path / "one.onnx_adapter", case.feeds)[0],
        output(model, ax.Adapter(one), case.feeds),
        **CLOSE,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_type_of_the_file_may_be_another_than_the_model_s(
    mlp: Built, model: Path, tmp_path: Path, dtype: str
) -> None:
    for target in (model, None):
        ax.convert_adapter(mlp.adapters["c"], target, tmp_path / "c.safetensors", dtype=dtype)
        read = load_adapter(tmp_path / "c.safetensors")
        assert {site.dtype.name for site in read.sites.values()} == {dtype}
        truth = mlp.expected["c"][0]
        assert np.abs(output(model, read, mlp.feeds) - truth).max() < {"bfloat16": 0.1, "float16": 0.02}.get(
            dtype, 1e-4
        )


def test_values_that_a_type_cannot_hold_are_refused_with_every_site(tmp_path: Path) -> None:
    wide = ax.LowRank(
        a=np.full((1, 2), 1e5, np.float32), b=np.ones((1, 2), np.float32), parts={SHIFT: np.ones((1, 2), "f")}
    )
    adapter = ax.Adapter({"x": wide, "y": wide, "ok": ax.LowRank(a=wide.b, b=wide.b)})
    with pytest.raises(ax.FormatError, match=r"(?s)2 faults.*x: finite values.*y: finite.*bfloat16 has the range"):
        ax.convert_adapter(adapter, None, tmp_path / "a.npz", dtype="float16")
    assert not list(tmp_path.iterdir())
    assert (
        ax.convert_adapter(adapter, None, tmp_path / "a.npz", dtype="bfloat16").sites["x"].dtype == ml_dtypes.bfloat16
    )


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.02), ("int4", 0.25)])
def test_a_quantized_file_is_near_and_says_how_near(mlp: Built, model: Path, tmp_path: Path, quantize, most) -> None:
    whole = load_adapter(mlp.adapters["c"])
    written = ax.convert_adapter(whole, model, tmp_path / "q.safetensors", quantize=quantize)
    assert written == load_adapter(tmp_path / "q.safetensors")
    error = float(written.metadata["quantization_error"])
    assert 1e-4 < error < most
    np.testing.assert_allclose(error, distance(whole, written), rtol=1e-4)
    assert np.abs(output(model, tmp_path / "q.safetensors", mlp.feeds) - mlp.expected["c"][0]).max() < 20 * error


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"dtype": "float61"}, "dtype='float61' is no option; .*nearest is float16"),
        ({"quantize": "int8", "dtype": "float16", "format": "safetensors"}, "cannot, too"),
        ({"quantize": "int8"}, r"stored in \.safetensors files"),
        ({"format": "pefd"}, "format='pefd' is no format; .*nearest is peft"),
        ({"component": "unet"}, "changes for none, it is no pipeline's"),
        ({"rank": 0}, "rank=0 is no rank"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_is_written(mlp: Built, tmp_path: Path, options, cause) -> None:
    with pytest.raises(ax.OptionError, match=cause):
        ax.convert_adapter(mlp.adapters["b"], None, tmp_path / "b.npz", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_an_adapter_for_another_base_is_refused_in_any_dialect(model: Path, tmp_path: Path, format: str) -> None:
    rows = {"down.weight": np.ones((2, 9), np.float32), "up.weight": np.ones((9, 2), np.float32)}
    stem = "lora_unet_fc1.lora_" if format == "kohya" else "unet.fc1.lora."
    (tmp_path / "x.safetensors").write_bytes(safetensors_of({stem + name: array for name, array in rows.items()}))
    with pytest.raises(ax.MismatchError, match=r"fc1: adapter is \(2, 9\) -> 9, model is 40 -> "):
        ax.convert_adapter(tmp_path / "x.safetensors", model, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_a_wide_matrix_is_cut_nearly_as_well_as_can_be() -> None:
    random = np.random.default_rng(0)
    slow = (random.normal(size=(1100, 40)) * np.exp(-np.arange(40) / 8)) @ random.normal(size=(40, 1200))
    noisy = slow + 0.05 * random.normal(size=slow.shape)
    cut = nearest(noisy, 8, np.dtype(np.float32))
    met = np.linalg.norm(noisy - cut.change.b.T.astype(np.float64) @ cut.change.a) ** 2
    np.testing.assert_allclose(cut.lost, met, rtol=1e-5)
    values = np.linalg.svd(noisy, compute_uv=False)
    assert cut.lost < 1.001 * (values[8:] ** 2).sum()
