"""External mode: a session per adapter over shared base weights."""

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from adapterx.errors import ModelError, OptionError
from adapterx.manifest import KEY
from adapterx.runtime.options import copied
from adapterx.runtime.session import AdapterSession
from adapterx.runtime.source import FOLDER_OPTION
from tests.runtime.chain import LOCATION, Chain, adapter_of, point_at, rows

CHAIN = Chain(port="external")


def quiet() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return options


def assert_runs(session: AdapterSession, name: str | None) -> None:
    feeds = rows()
    wanted = CHAIN.reference(feeds["x"], session.adapters.get(name))
    np.testing.assert_allclose(session.run(None, feeds, adapter=name)[0], wanted, rtol=1e-5, atol=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    made, create = [], ort.InferenceSession

    def counting(*args: object, **kwargs: object) -> ort.InferenceSession:
        session = create(*args, **kwargs)
        made.append(weakref.ref(session))
        return session

    monkeypatch.setattr(ort, "InferenceSession", counting)
    return made


def test_sessions_are_made_once_per_adapter_on_first_use_and_the_least_recent_is_dropped(monkeypatch):
    made = counted(monkeypatch)
    adapters = {name: adapter_of(seed) for seed, name in enumerate("abc")}
    session = AdapterSession(CHAIN.model(), adapters, max_sessions=2, session_options=quiet())
    assert len(made) == 1, "the base alone, so that a model that cannot be loaded is told at once"
    for name, count in [("a", 2), ("a", 2), (None, 2), ("b", 3), (None, 3), ("a", 4), ("b", 5), ("c", 6), ("b", 6)]:
        assert_runs(session, name)
        assert len(made) == count, name
        gc.collect()
        assert sum(ref() is not None for ref in made) <= 2


def test_an_unloaded_adapters_session_goes_with_it(monkeypatch):
    made = counted(monkeypatch)
    session = AdapterSession(CHAIN.model(), {"a": adapter_of()}, session_options=quiet())
    assert_runs(session, "a")
    session.unload_adapter("a")
    gc.collect()
    assert [ref() is not None for ref in made] == [True, False]


def test_a_bound_object_keeps_one_session_and_lets_go_of_it_on_rebind(monkeypatch):
    made = counted(monkeypatch)
    adapters = {"a": adapter_of(1), "b": adapter_of(2)}
    session = AdapterSession(CHAIN.model(), adapters, max_sessions=1, session_options=quiet())
    bound = session.bind("a")
    for name in ("b", None, "a"):
        bound.rebind(name)
        wanted = CHAIN.reference(rows()["x"], session.adapters.get(name))
        np.testing.assert_allclose(bound.run(None, rows())[0], wanted, rtol=1e-5, atol=1e-6)
        gc.collect()
        assert sum(ref() is not None for ref in made) == 1


def test_base_weights_in_a_file_next_to_the_model_are_shared_by_every_session(tmp_path):
    path = CHAIN.save(tmp_path)
    session = AdapterSession(path, {"a": adapter_of(1), "b": adapter_of(2, 7)}, session_options=quiet())
    for name in ("a", None, "b"):
        assert_runs(session, name)
    if Path("/proc/self/maps").exists():
        assert Path("/proc/self/maps").read_text().count(str(path.parent / "chain.data")) >= 3


def test_a_model_inside_the_hugging_face_cache_runs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path = CHAIN.save(tmp_path)
    for file, blob in ((path, "aa"), (tmp_path / "chain.data", "bb")):
        file.rename(blobs / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    assert_runs(AdapterSession(snapshot / "chain.onnx", {"a": adapter_of()}, session_options=quiet()), "a")


def test_bytes_with_external_data_need_the_folder_option_and_run_with_it(tmp_path):
    content = CHAIN.save(tmp_path).read_bytes()
    with pytest.raises(ModelError, match=rf"'W:.*'chain.data'.*{FOLDER_OPTION}"):
        AdapterSession(content)
    for port in ("external", "input"):
        options = quiet()
        options.add_session_config_entry(FOLDER_OPTION, str(tmp_path))
        content = Chain(port=port).save(tmp_path).read_bytes()
        assert_runs(AdapterSession(content, {"a": adapter_of()}, session_options=options), "a")


@pytest.mark.parametrize("port", ["input", "external"])
@pytest.mark.parametrize(
    ("location", "cause"),
    [("../secret", "leaves"), ("/etc/hostname", "absolute"), ("gone.data", "does not exist"), ("short", "too short")],
)
def test_external_data_that_may_not_be_read_is_refused_before_onnx_runtime_opens_it(tmp_path, port, location, cause):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "short").write_bytes(b"1")
    (tmp_path / "secret").write_bytes(bytes(4096))
    model = Chain(port=port).model()
    weight = next(t for t in model.graph.initializer if t.name.startswith("W:"))
    point_at(weight, location)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=f"(?s){weight.name}.*{cause}"):
        AdapterSession(folder / "m.onnx")


def test_a_manifest_cannot_pass_a_base_weight_off_as_an_adapter(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    model = CHAIN.model()
    point_at(next(t for t in model.graph.initializer if t.name.startswith("W:")), "../secret")
    for tensor in model.graph.initializer:
        for field in tensor.external_data:
            field.value = field.value.replace(LOCATION, "../secret")
    for entry in model.metadata_props:
        if entry.key == KEY:
            entry.value = entry.value.replace(LOCATION, "../secret")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="leaves the model's folder"):
        AdapterSession(folder / "m.onnx")


def test_shapes_that_were_inferred_for_the_exported_rank_do_not_hinder_another_rank():
    chain, options = Chain(port="external", dtype="float16"), quiet()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    model = chain.model()
    for site in chain.sites():
        inferred = onnx.helper.make_tensor_value_info(f"{site.name}.lora_A.weight/f", 1, [site.rank, site.d_in])
        model.graph.value_info.append(inferred)
    assert_runs(AdapterSession(model, {"a": adapter_of(1, 5)}, session_options=options), "a")


def test_a_manifest_that_names_no_initializer_and_a_limit_of_none_are_refused():
    model = CHAIN.model()
    model.graph.initializer.remove(next(t for t in model.graph.initializer if "lora_B" in t.name))
    with pytest.raises(ModelError, match=r"no initializer 'model\.layers\.0\.q_proj\.lora_B\.weight'"):
        AdapterSession(model)
    with pytest.raises(OptionError, match="max_sessions must be 1 or more; got 0"):
        AdapterSession(CHAIN.model(), max_sessions=0)


def test_copied_options_carry_settings_and_entries():
    host = ort.SessionOptions()
    host.intra_op_num_threads, host.graph_optimization_level = 3, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    host.add_session_config_entry("session.set_denormal_as_zero", "1")
    copy = copied(host)
    assert (copy.intra_op_num_threads, copy.graph_optimization_level) == (3, host.graph_optimization_level)
    assert copy.get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_options_with_providers_inside_cannot_be_copied_and_say_so():
    host = ort.SessionOptions()
    host.add_provider("CPUExecutionProvider", {})
    if not host.has_providers():
        host = type("Host", (), {"has_providers": lambda self: True})()
    with pytest.raises(OptionError, match="providers="):
        copied(host)
