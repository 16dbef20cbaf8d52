"""The kernel library: where it is found, when it is used, and what is said where it is not."""

import dataclasses
import gc
import sys
import threading
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from adapterx.errors import MissingDependency, OptionError
from adapterx.ops import DOMAIN, low_rank_add, low_rank_add_function
from adapterx.runtime import kernels
from adapterx.runtime.inference import quiet_options
from adapterx.runtime.kernels import VARIABLE, find_kernels, register_kernels

CPU = ["CPUExecutionProvider"]


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("ADAPTERX_KERNELS_ISA", raising=False)


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "adapterx_kernels", None)


class Recorded(onnxruntime.SessionOptions):
    """Options that count their libraries."""

    def __init__(self):
        super().__init__()
        self.libraries = []

    def register_custom_ops_library(self, path):
        time.sleep(0.02)  # two that do not wait for one another both come this far
        self.libraries.append(path)
        super().register_custom_ops_library(path)


class Refusing(onnxruntime.SessionOptions):
    """What an ONNX Runtime does that is older than the library's headers."""

    def register_custom_ops_library(self, _):
        raise RuntimeError("adapterx-kernels is built for a newer ONNX Runtime than this one")


def one_node():
    dims = {"base": ["n", 5], "x": ["n", 6], "a": ["R", 6], "b": ["R", 5], "mask": ["n", "R"], "y": ["n", 5]}
    *inputs, output = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in dims.items())
    node = onnx.helper.make_node("LowRankAdd", list(dims)[:5], ["y"], domain=DOMAIN)
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", inputs, [output]),
        functions=[ir.to_proto(low_rank_add_function(18))],
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    ).SerializeToString()


def operators_that_run(options, folder):
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(one_node(), options, providers=CPU)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_the_installed_library_is_found_and_says_what_it_is() -> None:
    import adapterx_kernels

    found = find_kernels()
    assert found.path == adapterx_kernels.library()
    assert found.version == adapterx_kernels.__version__
    assert found.providers == adapterx_kernels.PROVIDERS
    assert found.ort_api == adapterx_kernels.ORT_API <= 24, "the oldest onnxruntime that adapterx supports is 1.24"
    assert found.isa in {"portable", "avx2", "avx512"}


def test_the_library_that_the_environment_names_goes_before_the_installed_one(tmp_path, monkeypatch) -> None:
    copy = tmp_path / "mine.so"
    copy.write_bytes(find_kernels().path.read_bytes())
    monkeypatch.setenv(VARIABLE, str(copy))
    assert find_kernels().path == copy
    monkeypatch.setitem(sys.modules, "adapterx_kernels", None)
    assert register_kernels(quiet_options(), providers=CPU, mode="require").path == copy


def test_without_any_library_auto_goes_without_and_require_says_how_to_get_one(not_installed) -> None:
    assert find_kernels() is None
    assert register_kernels(quiet_options(), providers=CPU) is None
    with pytest.raises(MissingDependency, match=r"make kernels.*ADAPTERX_KERNELS="):
        register_kernels(quiet_options(), providers=CPU, mode="require")


def test_a_broken_package_is_not_taken_for_none(tmp_path, monkeypatch) -> None:
    (tmp_path / "adapterx_kernels").mkdir()
    (tmp_path / "adapterx_kernels" / "__init__.py").write_text("import a_module_that_is_not_there")
    monkeypatch.delitem(sys.modules, "adapterx_kernels", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        find_kernels()


@pytest.mark.parametrize("mode", ["auto", "require"])
@pytest.mark.parametrize("content", [None, b"\x7fELF, but not for long"], ids=["missing", "broken"])
def test_a_named_library_that_is_none_is_an_error(content, mode, tmp_path, monkeypatch) -> None:
    path = tmp_path / "kernels.so"
    if content:
        path.write_bytes(content)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(OptionError, match="cannot be loaded" if content else "no such file") as told:
        register_kernels(quiet_options(), providers=CPU, mode=mode)
    assert f"{VARIABLE}={path}" in str(told.value)
    assert register_kernels(quiet_options(), providers=CPU, mode="off") is None


def test_a_library_of_someone_else_is_refused(monkeypatch) -> None:
    numpy_library = sys.modules["numpy._core._multiarray_umath"].__file__
    monkeypatch.setenv(VARIABLE, numpy_library)
    with pytest.raises(OptionError, match="is no kernel library of adapterx"):
        register_kernels(quiet_options(), providers=CPU)


def test_instructions_that_are_not_there_are_refused_by_name(monkeypatch) -> None:
    monkeypatch.setenv("ADAPTERX_KERNELS_ISA", "mmx")
    with pytest.raises(OptionError, match="ADAPTERX_KERNELS_ISA=mmx"):
        find_kernels()


def test_with_the_library_the_kernel_runs_and_not_the_function(tmp_path) -> None:
    options = quiet_options()
    assert register_kernels(options, providers=CPU, mode="require") == find_kernels()
    assert operators_that_run(options, tmp_path) == ["LowRankAdd"]


def test_off_leaves_the_function(tmp_path) -> None:
    options = quiet_options()
    assert register_kernels(options, providers=CPU, mode="off") is None
    assert "LowRankAdd" not in operators_that_run(options, tmp_path)


def test_kernel_and_numpy_agree() -> None:
    shapes = {"base": (3, 5), "x": (3, 6), "a": (4, 6), "b": (4, 5), "mask": (3, 4)}
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    options = quiet_options()
    register_kernels(options, providers=CPU, mode="require")
    (y,) = onnxruntime.InferenceSession(one_node(), options, providers=CPU).run(None, feeds)
    np.testing.assert_allclose(y, low_rank_add(*feeds.values()), rtol=1e-5, atol=1e-5)


def test_options_get_the_library_once_whoever_asks_how_often() -> None:
    options = Recorded()
    threads = [threading.Thread(target=register_kernels, args=[options], kwargs={"providers": CPU}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert register_kernels(options, providers=CPU, mode="require") == find_kernels()
    assert options.libraries == [str(find_kernels().path)]
    for _ in range(2):
        onnxruntime.InferenceSession(one_node(), options, providers=CPU)


def test_options_are_remembered_no_longer_than_they_live() -> None:
    options = quiet_options()
    before = len(kernels._registered)
    register_kernels(options, providers=CPU)
    assert len(kernels._registered) == before + 1
    del options
    gc.collect()
    assert len(kernels._registered) == before


@pytest.mark.parametrize("providers", [["DmlExecutionProvider", "CPUExecutionProvider"], ["TensorrtExecutionProvider"]])
def test_beside_a_provider_that_it_lacks_the_library_is_left_out(providers) -> None:
    options = Recorded()
    assert register_kernels(options, providers=providers) is None
    assert not options.libraries
    with pytest.raises(OptionError, match=providers[0]):
        register_kernels(options, providers=providers, mode="require")


def test_who_wants_cuda_is_told_how_to_build_it(monkeypatch) -> None:
    only_cpu = dataclasses.replace(find_kernels(), providers=("CPUExecutionProvider",))
    monkeypatch.setattr(kernels, "find_kernels", lambda: only_cpu)
    with pytest.raises(OptionError, match=r"CUDAExecutionProvider; `make kernels CUDA=ON`"):
        register_kernels(quiet_options(), providers=["CUDAExecutionProvider"], mode="require")


def test_where_onnx_runtime_chooses_all_that_it_has_count(monkeypatch) -> None:
    assert register_kernels(quiet_options(), providers=[], mode="require") is not None
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["DmlExecutionProvider", *CPU])
    assert register_kernels(quiet_options(), providers=[]) is None


def test_an_onnx_runtime_that_is_too_old_is_a_warning_or_with_require_an_error() -> None:
    with pytest.warns(UserWarning, match=r"onnxruntime .* is for 1\.\d+ and newer: .*newer ONNX Runtime"):
        assert register_kernels(Refusing(), providers=CPU) is None
    with pytest.raises(OptionError, match=r"is for 1\.\d+ and newer.*headers of an older one"):
        register_kernels(Refusing(), providers=CPU, mode="require")


@pytest.mark.parametrize("way", [{"providers": CPU, "mode": "off"}, {"providers": ["DmlExecutionProvider"]}], ids=str)
def test_options_that_have_the_library_cannot_serve_a_session_without(way) -> None:
    options = quiet_options()
    register_kernels(options, providers=CPU)
    with pytest.raises(OptionError, match="from an earlier session"):
        register_kernels(options, **way)


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match=r"kernels='requires'; expected one of .*nearest is require"):
        register_kernels(quiet_options(), providers=CPU, mode="requires")


def test_providers_that_were_added_to_the_options_count_as_lacking() -> None:
    options = Recorded()
    options.add_provider_for_devices(onnxruntime.get_ep_devices()[:1], {})
    assert register_kernels(options, providers=[]) is None
    with pytest.raises(OptionError, match="cannot be read back"):
        register_kernels(options, providers=[], mode="require")
