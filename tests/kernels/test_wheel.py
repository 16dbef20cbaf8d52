"""The wheel of the kernels: what is in it, what it asks of a machine, and which ONNX Runtimes load it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPORTS = {"RegisterCustomOps"} | {f"adapterx_kernels_{name}" for name in ("version", "isa", "providers", "ort_api")}
OPENS = """
import json, sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
arrays = [np.full(shape, 2, np.float32) for shape in ((3, 5), (3, 6), (4, 6), (4, 5), (3, 4))]
(y,) = session.run(None, dict(zip(["base", "x", "a", "b", "mask"], arrays)))
print(json.dumps([onnxruntime.__version__, y.tolist()]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `make kernels` has just built; or else built now, from the files that git knows and nothing beside them."""
    listed = subprocess.run(["git", "ls-files", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    sources = [ROOT / name for name in listed.stdout.split()]
    changed = max(path.stat().st_mtime for path in sources if "harness" not in path.parts)
    fresh = [path for path in (ROOT / "build" / "kernels").glob("*.whl") if path.stat().st_mtime > changed]
    return fresh[0] if fresh else built(sources, tmp_path_factory.mktemp("clone"))


def built(sources, folder):
    for path in sources:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    headers = ROOT / ".cache" / "ort-headers" / "usr"
    env = {**os.environ, **({"ONNXRUNTIME_ROOT": str(headers)} if headers.is_dir() else {})}
    command = [folder / "kernels" / "build.sh", sys.executable, folder / "dist"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def library(unpacked):
    (path,) = (unpacked / "adapterx_kernels").glob("libadapterx_kernels.*")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import onnx

    dims = {"base": ["n", 5], "x": ["n", 6], "a": ["R", 6], "b": ["R", 5], "mask": ["n", "R"], "y": ["n", 5]}
    *inputs, output = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in dims.items())
    # No function in the model: only the library can run it.
    node = onnx.helper.make_node("LowRankAdd", list(dims)[:5], ["y"], domain="ai.adapterx")
    graph = onnx.helper.make_graph([node], "one_node", inputs, [output])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("ai.adapterx", 1)]
    path = tmp_path_factory.mktemp("model") / "one_node.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def oldest():
    """A folder with the oldest onnxruntime that adapterx supports, kept for the next time."""
    version = re.search(r'cpu = \["onnxruntime>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    folder = ROOT / ".cache" / f"onnxruntime-{version}"
    if not (folder / "onnxruntime").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"onnxruntime=={version}"], check=True)
    return version, folder


def opened(library, model, path=None):
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", OPENS, library, model]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_one_wheel_serves_every_python_on_a_platform(wheel) -> None:
    assert re.fullmatch(r"adapterx_kernels-[\d.]+-py3-none-(linux|macosx|win)_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 5e6


def test_the_wheel_holds_a_library_and_what_says_where_it_is(unpacked, library) -> None:
    names = {path.name for path in (unpacked / "adapterx_kernels").iterdir()}
    assert names == {"__init__.py", "build.py", library.name}


def test_the_package_and_its_library_tell_the_same(unpacked, library) -> None:
    ask = (
        "import adapterx_kernels as k; from adapterx.runtime.kernels import find_kernels; f = find_kernels();"
        "told = k.library(), k.__version__, k.PROVIDERS, k.ORT_API;"
        "print((f.path, f.version, f.providers, f.ort_api) == told, f.path)"
    )
    env = {**os.environ, "PYTHONPATH": f"{unpacked}{os.pathsep}{ROOT}"}
    env.pop("ADAPTERX_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(library)]


def test_kernels_have_the_version_of_the_package_beside_them(wheel) -> None:
    package = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert wheel.name.split("-")[1] == package


def test_nothing_is_exported_but_the_entry_and_what_tells_of_the_library(library) -> None:
    command = ["nm", "-D", "--defined-only", library]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[-1] for line in symbols} == EXPORTS


def test_nothing_is_linked_that_a_machine_with_onnx_runtime_lacks(library) -> None:
    shown = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", shown))
    assert needed <= {
        "libc",
        "libm",
        "libstdc++",
        "libgcc_s",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
        "libpthread",
        "libdl",
    }


def test_the_installed_onnx_runtime_loads_it(library, model) -> None:
    import onnxruntime

    assert opened(library, model) == [onnxruntime.__version__, [[386.0] * 5] * 3]


def test_the_oldest_supported_onnx_runtime_loads_it(library, model, oldest) -> None:
    version, folder = oldest
    assert opened(library, model, folder) == [version, [[386.0] * 5] * 3]


def test_without_headers_the_message_names_the_ways_to_get_them(tmp_path) -> None:
    command = ["/bin/sh", ROOT / "kernels" / "fetch_headers.sh", tmp_path / "headers"]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this machine has no apt-get" in done.stderr
    for way in ("apt install libonnxruntime-dev", "conda install", "ONNXRUNTIME_ROOT"):
        assert way in done.stderr
