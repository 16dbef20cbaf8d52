#!/bin/sh
# Builds the wheel of the kernels into a folder. A Python with pip is all that must be there: the headers come from
# fetch_headers.sh, CMake and Ninja from pip, and so does a compiler (zig) where the machine has none.
#
#     kernels/build.sh python3 dist                                  # ADAPTERX_CUDA=ON | AUTO: kernels for CUDA, too
set -eu
[ $# -eq 2 ] || { echo "usage: $0 PYTHON FOLDER" >&2; exit 2; }
PYTHON=$1 FOLDER=$2
HERE=$(cd "$(dirname "$0")" && pwd)
CACHE=$HERE/../.cache
PIP="$PYTHON -m pip --disable-pip-version-check -q"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT

has_headers() {
  [ -n "${ONNXRUNTIME_ROOT:-}" ] || [ -f "${CONDA_PREFIX:-/none}/include/onnxruntime/onnxruntime_cxx_api.h" ] ||
    [ -f /usr/include/onnxruntime/onnxruntime_cxx_api.h ] || [ -f /usr/local/include/onnxruntime/onnxruntime_cxx_api.h ]
}
has_headers || "$HERE/fetch_headers.sh" "$CACHE/ort-headers"

has_compiler() {
  if [ -n "${CXX:-}" ]; then return 0; fi
  for name in c++ g++ clang++; do
    if command -v $name > /dev/null; then return 0; fi
  done
  return 1
}
if ! has_compiler; then
  if [ ! -x "$CACHE/zig/ziglang/zig" ]; then
    echo "no C++ compiler here: getting zig (100 MB); \`apt install g++\` is smaller and builds faster" >&2
    $PIP install --target "$CACHE/zig" ziglang || { echo "no C++ compiler: apt install g++" >&2; exit 1; }
  fi
  # A target that is named is also a plain processor of its kind; without, zig builds for this very machine.
  CXX="$CACHE/zig/ziglang/zig c++ -target $(uname -m)-linux-gnu.2.28"
  export CXX
fi

CMAKE_ARGS="${CMAKE_ARGS:-} -DADAPTERX_CUDA=${ADAPTERX_CUDA:-OFF}" \
  $PIP wheel -v --no-deps --wheel-dir "$FOLDER" "$HERE" > "$LOG" 2>&1 || { cat "$LOG" >&2; exit 1; }
