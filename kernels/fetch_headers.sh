#!/bin/sh
# The C and C++ headers of ONNX Runtime, which its Python wheels do not carry, on a Debian machine: without root, and
# without touching the machine's own package lists.
#
#     kernels/fetch_headers.sh .cache/ort-headers     # .cache/ort-headers/usr/include/onnxruntime/*.h, in seconds
#
# They are those of Debian 13 on every Debian: ONNX Runtime 1.21, API 21. A library that was built with old headers runs on
# every newer ONNX Runtime, and never on an older one. Signatures are checked; whatever mirror and proxy the
# machine's apt is set up for is used.
set -eu
SUITE=trixie
PACKAGE=libonnxruntime-dev

give_up() {
  echo "no headers of ONNX Runtime: $1" >&2
  echo "Get them in one of these ways, and say where they are:
  Debian 13 or newer   apt install $PACKAGE
  conda                conda install -c conda-forge onnxruntime-cpp      (CONDA_PREFIX is looked into)
  anywhere             unpack onnxruntime-<system>-<version>.tgz of https://github.com/microsoft/onnxruntime/releases
                       and set ONNXRUNTIME_ROOT to the folder that holds its include/" >&2
  exit 1
}

[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
FOLDER=$1
[ ! -f "$FOLDER/usr/include/onnxruntime/onnxruntime_c_api.h" ] || exit 0
for tool in apt-get dpkg-deb; do
  command -v $tool >/dev/null || give_up "this machine has no $tool"
done
CODENAME=$(. /etc/os-release; [ "${ID:-}" != debian ] || echo "${VERSION_CODENAME:-}")
[ -n "$CODENAME" ] || give_up "this machine is no Debian release"

mkdir -p "$FOLDER"
APT=$(mktemp -d "$(cd "$FOLDER" && pwd)/apt.XXXXXX")
trap 'rm -rf "$APT"' EXIT
mkdir -p "$APT/sources" "$APT/state/lists/partial" "$APT/cache/archives/partial" "$APT/x"
: > "$APT/status"
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
  [ ! -f "$list" ] || sed "s/\b$CODENAME\b/$SUITE/g" "$list" > "$APT/sources/$(basename "$list")"
done
# Read after the machine's own configuration, of which the proxy and the keys stay. The hooks would clean its caches.
cat > "$APT/apt.conf" <<END
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "2";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$APT/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$APT/state";
Dir::State::status "$APT/status";
Dir::Cache "$APT/cache";
END
# A third party's source that has nothing for this suite fails the update, and does not matter.
apt-get -q -c "$APT/apt.conf" update > "$APT/log" 2>&1 || true
(cd "$APT" && apt-get -q -c "$APT/apt.conf" download $PACKAGE) >> "$APT/log" 2>&1 || {
  tail -n 5 "$APT/log" >&2
  give_up "apt did not get $PACKAGE of Debian $SUITE (its last words are above)"
}
dpkg-deb -x "$APT"/$PACKAGE*.deb "$APT/x"
rm -rf "$FOLDER/usr"
mv "$APT/x/usr" "$FOLDER/usr"
echo "headers of ONNX Runtime: $(basename "$APT"/$PACKAGE*.deb .deb) in $FOLDER"
