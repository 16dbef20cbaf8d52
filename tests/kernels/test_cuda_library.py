"""The library with the kernels for CUDA, built with nvcc where there is one; nothing here needs a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from adapterx.ops import DOMAIN, low_rank_add

KERNELS = Path(__file__).parents[2] / "kernels"
# A test without nvcc says so by its name, and has nothing to do.
NVCC = [name for name in ["nvcc"] if shutil.which(name)]
compilers = pytest.mark.parametrize("nvcc", NVCC or ["there is no nvcc here"])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    # PTX of one architecture: the compiler has seen every kernel then, and assembled none, which is what takes long.
    build = tmp_path_factory.mktemp("build")
    options = ["-DADAPTERX_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-virtual", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (["cmake", "-S", KERNELS, "-B", build, *options], ["cmake", "--build", build, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "libadapterx_kernels.so"


def session(library, element):
    dims = {"base": ["n", 5], "x": ["n", 6], "a": ["R", 6], "b": ["R", 5], "mask": ["n", "R"], "y": ["n", 5]}
    *inputs, output = (onnx.helper.make_tensor_value_info(name, element, shape) for name, shape in dims.items())
    node = onnx.helper.make_node("LowRankAdd", list(dims)[:5], ["y"], domain=DOMAIN)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "one_node", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@compilers
def test_nvcc_takes_the_library_and_the_bench(nvcc, request, tmp_path):
    if NVCC:
        library = request.getfixturevalue("library")
        symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        names = [line.split()[-1] for line in symbols.stdout.splitlines()]
        assert "RegisterCustomOps" in names
        assert [name for name in names if not name.startswith("adapterx_kernels_")] == ["RegisterCustomOps"]
        providers = ctypes.CDLL(str(library)).adapterx_kernels_providers
        providers.restype = ctypes.c_char_p
        assert providers() == b"CPUExecutionProvider,CUDAExecutionProvider"
        bench = KERNELS / "harness" / "cuda_bench.cu"
        command = [nvcc, "-std=c++17", "-arch=compute_80", "-ptx", "-I", KERNELS, bench, "-o", tmp_path / "bench.ptx"]
        subprocess.run(command, check=True)


@compilers
def test_a_library_with_cuda_serves_an_onnx_runtime_without(nvcc, request):
    if NVCC:
        library = request.getfixturevalue("library")
        rng = np.random.default_rng(0)
        feeds = {"base": (3, 5), "x": (3, 6), "a": (4, 6), "b": (4, 5), "mask": (3, 4)}
        for element, dtype in {1: "float32", 10: "float16", 11: "float64"}.items():
            arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in feeds.items()}
            (y,) = session(library, element).run(None, arrays)
            expected = low_rank_add(*(array.astype("f8") for array in arrays.values()))
            room = 2e-3 if dtype == "float16" else 1e-5
            np.testing.assert_allclose(y, expected, rtol=room, atol=room)
