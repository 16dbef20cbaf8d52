"""AdapterSession against numpy, in every kind of port."""

import dataclasses
import gc
import threading
import weakref

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import FeedError, FormatError, MismatchError, ModelError, OptionError, UnknownAdapter
from adapterx.formats import save_adapter
from adapterx.manifest import KEY, MASK, Manifest
from adapterx.port_dtype import in_dtype
from adapterx.runtime.options import entry
from adapterx.runtime.session import AdapterSession
from adapterx.site import AdapterSite, SiteTable
from tests.runtime.chain import LAYERS, NAMES, Chain, adapter_of, low_rank_add, rows

PORTS = ("input", "packed", "external")
FORMS = [
    pytest.param(Chain(port=port, dynamic_rank=dynamic, optional=optional), id=f"{port}-{dynamic}-{optional}")
    for port in PORTS
    for dynamic in (True, False)
    for optional in (True, False)
]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def options() -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = 1
    made.log_severity_level = 3
    return made


def opened(chain: Chain, **adapters: Adapter) -> AdapterSession:
    return AdapterSession(chain.model(), adapters=adapters, session_options=options())


def base_of(chain: Chain, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(chain.model(plain=True).SerializeToString(), options()).run(None, feeds)[0]


@pytest.mark.parametrize("chain", FORMS)
def test_every_port_gives_the_base_bit_for_bit_and_each_adapter_as_numpy(chain):
    session = opened(chain, one=adapter_of(1), two=adapter_of(2))
    feeds = rows()
    base = session.run(None, feeds)[0]
    assert np.array_equal(base, base_of(chain, feeds))
    for name, adapter in session.adapters.items():
        result = session.run(["y"], feeds, adapter=name)[0]
        np.testing.assert_allclose(result, chain.reference(feeds["x"], adapter), **CLOSE)
        assert not np.allclose(result, base, atol=0.01)
    assert np.array_equal(session.run(None, feeds)[0], base)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("port", PORTS)
def test_half_ports_take_float32_adapters_and_float_ports_take_half_ones(port, dtype):
    half, full = Chain(port=port, dtype=dtype), Chain(port=port)
    feeds = rows()
    for chain, adapter in ((half, adapter_of(1)), (full, adapter_of(1, dtype=dtype))):
        session = AdapterSession(chain.model(), {"it": adapter})
        fitted = session.adapters["it"]
        assert {low_rank.dtype.name for low_rank in fitted.sites.values()} == {chain.dtype}
        np.testing.assert_allclose(
            session.run(None, feeds, adapter="it")[0], chain.reference(feeds["x"], fitted), **CLOSE
        )


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 6), min_size=1), st.integers(0, 9))
def test_any_ranks_at_any_sites_equal_numpy_in_every_dynamic_port(sessions, ranks, seed):
    adapter, feeds = adapter_of(seed, ranks=ranks), rows()
    wanted = Chain().reference(feeds["x"], adapter)
    for session in sessions:
        session.load_adapter("it", adapter)
        np.testing.assert_allclose(session.run(None, feeds, adapter="it")[0], wanted, **CLOSE)


@pytest.fixture(scope="module")
def sessions():
    return [opened(Chain(port=port, optional=optional)) for port in PORTS for optional in (True, False)]


def test_a_fixed_rank_takes_lower_ranks_and_missing_sites_as_rows_of_zeros():
    for port in ("input", "packed"):
        chain = Chain(port=port, dynamic_rank=False)
        session = opened(chain, low=adapter_of(3, ranks={NAMES[0]: 1, NAMES[3]: 2}))
        feeds = rows()
        wanted = chain.reference(feeds["x"], session.adapters["low"])
        np.testing.assert_allclose(session.run(None, feeds, adapter="low")[0], wanted, **CLOSE)


def test_zero_b_is_the_base_bit_for_bit():
    zero = Adapter({n: LowRank(a=np.ones((2, i), "f"), b=np.zeros((2, o), "f")) for n, i, o in LAYERS})
    for port in PORTS:
        session = opened(Chain(port=port), zero=zero)
        assert np.array_equal(session.run(None, rows(), adapter="zero")[0], session.run(None, rows())[0])


def test_the_two_parameter_case_of_onnx_runtime_comes_out_as_published_also_through_its_own_lora_adapter(tmp_path):
    site = AdapterSite("fc", "", "lora", "MatMul", 4, 4, 1, 1.0, "float32", "structure", "fc")
    manifest = Manifest(SiteTable([site]), "input", True, True, "")
    names = ["fc.lora_A.weight", "fc.lora_B.weight"]
    inputs = [("x", [4, 4]), (names[0], ["r", 4]), (names[1], ["r", 4]), (MASK, ["n", "R"])]
    weights = {
        "W": np.arange(1, 17).reshape(4, 4),
        names[0]: np.zeros((0, 4)),
        names[1]: np.zeros((0, 4)),
        MASK: np.ones((1, 1)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["base"]),
        helper.make_node("LowRankAdd", ["base", "x", *names, MASK], ["y"], domain="ai.adapterx"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.adapterx", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[low_rank_add()], ir_version=10)
    helper.set_model_props(model, {KEY: manifest.dumps()})
    a, b = np.arange(3, 7, dtype=np.float32).reshape(1, 4), np.arange(7, 11, dtype=np.float32).reshape(1, 4)

    session = AdapterSession(model, {"lora": Adapter({"fc": LowRank(a=a, b=b)})})
    feeds = {"x": np.ones((4, 4), np.float32)}
    assert session.run(None, feeds)[0].tolist() == [[28, 32, 36, 40]] * 4
    assert session.run(None, feeds, adapter="lora")[0].tolist() == [[154, 176, 198, 220]] * 4

    file = ort.AdapterFormat()
    file.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in zip(names, (a, b), strict=True)})
    file.export_adapter(str(tmp_path / "lora.onnx_adapter"))
    theirs, run = ort.LoraAdapter(), ort.RunOptions()
    theirs.Load(str(tmp_path / "lora.onnx_adapter"))
    run.add_active_adapter(theirs)
    plain = ort.InferenceSession(model.SerializeToString(), options())
    assert plain.run(None, feeds, run)[0].tolist() == [[154, 176, 198, 220]] * 4


def test_adapters_come_from_files_in_any_format_and_a_broken_file_changes_nothing(tmp_path):
    adapter, feeds = adapter_of(5), rows()
    paths = {suffix: tmp_path / f"it.{suffix}" for suffix in ("safetensors", "onnx_adapter", "npz")}
    for path in paths.values():
        save_adapter(adapter, path)
    session = AdapterSession(Chain().model(), {**paths, "text": str(paths["npz"])}, session_options=options())
    wanted = opened(Chain(), it=adapter).run(None, feeds, adapter="it")[0]
    for name in session.adapters:
        assert np.array_equal(session.run(None, feeds, adapter=name)[0], wanted)
    (tmp_path / "broken.safetensors").write_bytes(paths["safetensors"].read_bytes()[:-3])
    before = session.identity("npz")
    with pytest.raises(FormatError, match=r"broken\.safetensors"):
        session.load_adapter("npz", tmp_path / "broken.safetensors")
    assert session.identity("npz") == before


def test_loading_under_a_taken_name_replaces_and_gets_a_generation_of_its_own():
    session = opened(Chain(), it=adapter_of(1))
    feeds, before = rows(), session.identity("it")
    first = session.run(None, feeds, adapter="it")[0]
    session.load_adapter("it", adapter_of(2))
    assert not np.allclose(session.run(None, feeds, adapter="it")[0], first)
    session.load_adapter("it", adapter_of(1))
    assert np.array_equal(session.run(None, feeds, adapter="it")[0], first)
    after = session.identity("it")
    assert after.content_hash == before.content_hash
    assert after.generation > before.generation


def test_a_refused_adapter_leaves_the_session_as_it_was():
    session = opened(Chain(), it=adapter_of(1))
    identity, result = session.identity("it"), session.run(None, rows(), adapter="it")[0]
    with pytest.raises(MismatchError, match="no such site"):
        session.load_adapter("it", Adapter({"nowhere": LowRank(a=np.ones((1, 8)), b=np.ones((1, 8)))}))
    assert session.identity("it") == identity
    assert np.array_equal(session.run(None, rows(), adapter="it")[0], result)


def test_unloading_forgets_the_name_and_only_that():
    session = opened(Chain(), fr=adapter_of(1), de=adapter_of(2))
    session.unload_adapter("fr")
    assert list(session.adapters) == ["de"]
    for use in (lambda: session.run(None, rows(), adapter="fr"), lambda: session.unload_adapter("fr")):
        with pytest.raises(UnknownAdapter, match=r"no adapter 'fr' is loaded.*loaded: de"):
            use()


@pytest.mark.parametrize("port", PORTS)
def test_an_unloaded_adapter_is_freed_when_its_last_run_is_over(port):
    session = opened(Chain(port=port))
    adapter = adapter_of(1)
    memory, whole = weakref.ref(adapter.sites[NAMES[0]].a), weakref.ref(adapter)
    session.load_adapter("it", adapter)
    del adapter
    bound = session.bind("it")
    session.run(None, rows(), adapter="it")
    session.unload_adapter("it")
    gc.collect()
    assert whole() is not None, "the bound object still runs it"
    bound.rebind(None)
    gc.collect()
    assert whole() is None
    assert memory() is None


def test_unloading_during_a_run_does_not_change_its_result():
    layers = (("model.layers.0.q_proj", 8, 8),) * 1 + tuple((f"model.layers.{i}.q_proj", 8, 8) for i in range(1, 40))
    chain = Chain(layers=layers)
    session = AdapterSession(chain.model(), session_options=options())
    adapter = adapter_of(1, 64, layers=layers)
    feeds = rows(64, 64)
    session.load_adapter("it", adapter)
    wanted = session.run(None, feeds, adapter="it")[0]
    results = []
    running = threading.Thread(target=lambda: results.append(session.run(None, feeds, adapter="it")[0]))
    running.start()
    while "it" in session.adapters:
        session.load_adapter("it", adapter_of(2, 64, layers=layers))
        session.unload_adapter("it")
    gc.collect()
    running.join()
    assert np.array_equal(results[0], wanted)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".a", "x" * 65, "a\n", "a b", "\u0430", "fr\0", 3, None])
def test_names_outside_the_allow_list_are_refused(name):
    session = opened(Chain())
    with pytest.raises(OptionError, match="cannot name an adapter"):
        session.load_adapter(name, adapter_of())
    assert not session.adapters


def test_an_unknown_adapter_is_told_the_nearest_and_what_is_loaded():
    session = opened(Chain(), french=adapter_of(1))
    for use in (lambda name: session.run(None, rows(), adapter=name), session.bind, session.bind("french").rebind):
        with pytest.raises(UnknownAdapter, match="nearest is french; loaded: french"):
            use("frensh")
    with pytest.raises(UnknownAdapter):
        session.run(None, rows(), adapter=["french"])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "needs 'x'"),
        ({"X": rows()["x"]}, "no input 'X'.*'x'"),
        ({"y": 1, **rows()}, "no input 'y'; it takes 'x'"),
        ({"x": rows()["x"].astype(np.float64)}, "'x' must be float32; got float64"),
        ({"x": rows()["x"][0]}, r"'x' must have shape \[n, t, 8\]; got \[3, 8\]"),
        ({"x": rows(d=7)["x"]}, r"shape \[n, t, 8\]; got \[2, 3, 7\]"),
        ({"x": [[["a"]]]}, "'x' must be an array of float32"),
        ({"x": ort.OrtValue.ortvalue_from_numpy(np.ones((1, 1, 8)))}, r"tensor\(float\); got tensor\(double\)"),
        ({**rows(), f"{NAMES[0]}.lora_A.weight": np.ones((1, 8), "f")}, "port for adapters.*adapter="),
        ({**rows(), MASK: np.ones((1, 1), "f")}, "'adapter_mask' is a port for adapters"),
    ],
)
def test_wrong_feeds_are_named_before_onnx_runtime_sees_them(feeds, message):
    session = opened(Chain(), it=adapter_of())
    for run in (session.run, session.bind("it").run):
        with pytest.raises(FeedError, match=message):
            run(None, feeds)


def test_missing_and_unknown_feeds_are_told_in_one_error():
    with pytest.raises(FeedError, match=r"(?s)no input 'xx'.*needs 'x'"):
        opened(Chain()).run(None, {"xx": 1})


def test_unknown_outputs_are_named_with_the_nearest():
    session = opened(Chain())
    with pytest.raises(FeedError, match="no output 'yy'; nearest is y; it gives 'y'"):
        session.run(["yy"], rows())
    with pytest.raises(FeedError, match="a list"):
        session.run("y", rows())


def test_lists_fortran_order_and_ort_values_are_taken_as_feeds():
    session, x = opened(Chain(), it=adapter_of()), rows()["x"]
    wanted = session.run(None, {"x": x}, adapter="it")[0]
    for value in (x.tolist(), np.asfortranarray(x), ort.OrtValue.ortvalue_from_numpy(x)):
        for run in (lambda feeds: session.run(None, feeds, adapter="it"), lambda f: session.bind("it").run(None, f)):
            assert np.array_equal(run({"x": value})[0], wanted)


def test_the_session_shows_the_models_own_inputs_and_outputs_sites_and_providers():
    for port in PORTS:
        session = opened(Chain(port=port, optional=False))
        assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("x", "tensor(float)", ("n", "t", 8))]
        assert [o.name for o in session.get_outputs()] == ["y"]
        assert session.sites.names == list(NAMES)
        assert session.manifest.port == port
        assert "CPUExecutionProvider" in session.providers


def test_a_provider_that_is_not_there_is_an_error_and_no_silent_fallback():
    with pytest.raises(OptionError, match="no provider 'CPUExecutionProvidr'; nearest is CPUExecutionProvider"):
        AdapterSession(Chain().model(), providers=["CPUExecutionProvidr"])
    session = AdapterSession(Chain().model(), providers=[("CPUExecutionProvider", {})])
    assert session.providers == ["CPUExecutionProvider"]


def test_models_that_cannot_be_opened_say_why(tmp_path):
    plain = Chain().model(plain=True)
    broken = Chain().model()
    broken.graph.node[-1].op_type = "NoSuchOp"
    lost = Chain().model()
    lost.graph.input.remove(next(i for i in lost.graph.input if i.name.startswith(NAMES[0])))
    (tmp_path / "garbage.onnx").write_bytes(b"garbage" * 9)
    for model, message in [
        (b"garbage" * 9, "no ONNX model"),
        (b"", "no ONNX model"),
        (tmp_path / "garbage.onnx", "garbage.onnx is no ONNX model"),
        (tmp_path / "none.onnx", "no such model file"),
        (tmp_path, "no such model file"),
        (plain, "adapterx extract"),
        (broken, "NoSuchOp"),
        (lost, f"no input '{NAMES[0]}.lora_A.weight'"),
    ]:
        with pytest.raises(ModelError, match=message):
            AdapterSession(model)


def test_the_hosts_session_options_are_used_and_never_changed():
    for port in PORTS:
        host = options()
        opened_with = AdapterSession(Chain(port=port).model(), {"it": adapter_of()}, session_options=host)
        opened_with.run(None, rows(), adapter="it")
        for key in ("session.disable_prepacking", "session.model_external_initializers_file_folder_path"):
            with pytest.raises(RuntimeError):
                host.get_session_config_entry(key)
        ort.InferenceSession(Chain(port="input").model().SerializeToString(), host)


def test_where_onnx_runtime_would_lose_float16_adapters_the_session_prevents_it_or_says_how(monkeypatch):
    chain, seen, create = Chain(dtype="float16"), [], ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, **k: seen.append(options) or create(model, options, **k)
    )
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    key, fusion = "optimization.disable_specified_optimizers", "FuseFp16InitializerToFp32NodeTransformer"
    AdapterSession(chain.model())
    assert seen[-1].get_session_config_entry(key) == fusion
    with pytest.raises(OptionError, match=fusion):
        AdapterSession(chain.model(), session_options=options())
    told = options()
    told.add_session_config_entry(key, fusion)
    AdapterSession(chain.model(), session_options=told)
    lower = options()
    lower.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    for harmless in (chain, Chain()):
        AdapterSession(harmless.model(), session_options=lower if harmless is chain else options())


@pytest.mark.parametrize(
    ("ports", "activations", "guarded"),
    [("float16", "float32", True), ("float32", "float16", False), ("bfloat16", "float32", False)],
)
def test_so_it_does_by_the_type_of_the_ports_whatever_the_activations_are(monkeypatch, ports, activations, guarded):
    chain, seen, create = Chain(dtype=activations), [], ort.InferenceSession
    model = chain.model()
    sites = SiteTable(in_dtype(site, ports) for site in chain.sites())
    (told,) = (told for told in model.metadata_props if told.key == KEY)
    told.value = dataclasses.replace(chain.manifest(), sites=sites).dumps()
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, **k: seen.append(options) or create(model, options, **k)
    )
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    AdapterSession(model)
    assert (entry(seen[-1], "optimization.disable_specified_optimizers") is not None) == guarded


@pytest.mark.skipif(ort.__version__ < "1.30", reason="an onnxruntime that crashes here")
def test_an_onnx_runtime_that_keeps_float16_adapters_takes_any_options():
    opened(Chain(dtype="float16"), it=adapter_of()).run(None, rows(), adapter="it")


def test_a_model_is_not_changed_by_its_session():
    for port in PORTS:
        model = Chain(port=port).model()
        before = model.SerializeToString(deterministic=True)
        AdapterSession(model, {"it": adapter_of()}).run(None, rows(), adapter="it")
        assert model.SerializeToString(deterministic=True) == before
