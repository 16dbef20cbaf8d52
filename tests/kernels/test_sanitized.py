"""The same kernel under the compiler's sanitizers: no byte beside an array, nothing undefined, no data race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
# A test without the compiler says so by its name, and has nothing to do.
FOUND = [name for name in ["g++"] if shutil.which(name)]
compilers = pytest.mark.parametrize("compiler", FOUND or ["there is no g++ here"])


def done(command, **options):
    finished = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    return finished.stdout


def built(folder, compiler, target, sanitizers):
    flags = f"-O1 -g1 -fno-omit-frame-pointer -fsanitize={sanitizers} -fno-sanitize-recover=all"
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=None"]
    done(["cmake", "-S", KERNELS, "-B", folder, "-DADAPTERX_CUDA=OFF", *options])
    done(["cmake", "--build", folder, "--target", target, "--parallel", "2"])
    return folder


@compilers
def test_no_access_is_out_of_bounds_and_nothing_is_undefined(compiler, tmp_path) -> None:
    if not FOUND:
        return
    library = built(tmp_path, compiler, "adapterx_kernels", "address,undefined") / "libadapterx_kernels.so"
    loaded_first = [done([compiler, f"-print-file-name=lib{name}.so"]).strip() for name in ("asan", "ubsan")]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(loaded_first),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ADAPTERX_KERNELS": str(library),
    }
    tests = Path(__file__).with_name("test_low_rank_add.py")
    # -s: the sanitizer ends the process, and with it would end what pytest has captured.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:xdist", "-p", "no:cacheprovider", tests]
    out = done(command, cwd=ROOT, env=env)
    assert " passed" in out
    assert "skipped" not in out


@compilers
def test_many_callers_race_for_nothing(compiler, tmp_path) -> None:
    if not FOUND:
        return
    program = built(tmp_path, compiler, "adapterx_kernels_race", "thread") / "adapterx_kernels_race"
    assert "calls, 0 wrong" in done([program])
