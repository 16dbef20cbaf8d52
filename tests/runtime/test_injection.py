"""A session that is given a model without ports, and adapters, puts the ports in; and imports that code only then."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from adapterx.errors import MismatchError, ModelError, UnknownAdapter
from adapterx.formats import load_adapter
from adapterx.runtime.session import AdapterSession
from tests.runtime.chain import Chain
from tests.zoo import CASES, build


def gap(got, want):
    return max(float(np.abs(one - other).max()) for one, other in zip(got, want, strict=True))


def plain(model, feeds):
    return ort.InferenceSession(model).run(None, feeds)


@pytest.mark.parametrize("name", ["ts_llama", "dy_mlp", "ts_gpt2", "ts_llama_int4", "ts_conv"])
def test_a_model_without_ports_runs_the_adapters_it_is_given_and_is_the_base_to_the_bit(name):
    built = build(name)
    session = AdapterSession(built.base_model, adapters={key: built.adapters[key] for key in ("b", "c")})
    for adapter in ("b", "c"):
        assert gap(session.run(None, built.feeds, adapter=adapter), built.expected[adapter]) <= CASES[name].atol
    assert gap(session.run(None, built.feeds), plain(built.base_model, built.feeds)) == 0.0
    session.load_adapter("later", built.adapters["a"])
    assert gap(session.run(None, built.feeds, adapter="later"), built.expected["a"]) <= CASES[name].atol


@pytest.mark.parametrize("form", [lambda path: path.read_bytes(), onnx.load], ids=["bytes", "proto"])
def test_a_model_in_memory_gets_ports_too(form):
    built = build("dy_mlp")
    session = AdapterSession(form(built.base_model), adapters={"b": load_adapter(built.adapters["b"])})
    assert gap(session.run(None, built.feeds, adapter="b"), built.expected["b"]) <= 1e-4


def test_external_data_behind_links_as_hugging_face_lays_it_out_stays_where_it_is(tmp_path):
    built, blobs, snapshot = build("ts_llama"), tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    onnx.save(onnx.load(built.base_model), blobs / "m", save_as_external_data=True, location="m.data", size_threshold=0)
    # The graph names its data as the snapshot does.
    model = onnx.load(blobs / "m", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "model.onnx.data" if entry.key == "location" else entry.value
    (blobs / "m").write_bytes(model.SerializeToString())
    for link, blob in (("model.onnx", "m"), ("model.onnx.data", "m.data")):
        (snapshot / link).symlink_to(f"../blobs/{blob}")
    session = AdapterSession(snapshot / "model.onnx", adapters={"b": built.adapters["b"]})
    assert gap(session.run(None, built.feeds, adapter="b"), built.expected["b"]) <= 1e-4
    assert {path.name for path in tmp_path.rglob("*") if not path.is_dir()} == {
        *("m", "m.data", "model.onnx", "model.onnx.data")
    }


def test_a_model_with_an_adapter_inside_is_refused_with_what_to_do():
    built = build("ts_mlp")
    with pytest.raises(ModelError, match=r"holds an adapter at 3 sites.*extract_adapters"):
        AdapterSession(built.model, adapters={"b": built.adapters["b"]})


def test_without_adapters_nothing_says_where_ports_would_be():
    with pytest.raises(ModelError, match=r"has no ports for adapters.*give a path and adapters together"):
        AdapterSession(build("ts_mlp").base_model)


def test_an_adapter_for_another_base_is_refused_at_once_and_later():
    built, other = build("ts_llama"), build("ts_mlp").adapters["b"]
    with pytest.raises(MismatchError, match="no such module"):
        AdapterSession(built.base_model, adapters={"b": built.adapters["b"], "other": other})
    session = AdapterSession(built.base_model, adapters={"b": built.adapters["b"]})
    with pytest.raises(MismatchError, match="no such site"):
        session.load_adapter("other", other)
    with pytest.raises(UnknownAdapter):
        session.run(None, built.feeds, adapter="other")


def test_a_ready_model_is_run_without_the_code_that_rewrites_graphs(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(Chain().model().SerializeToString())
    code = (
        "import sys, adapterx\n"
        f"adapterx.AdapterSession({str(path)!r})\n"
        "assert not [name for name in sys.modules if name.startswith('adapterx.graph')], 'graph was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
