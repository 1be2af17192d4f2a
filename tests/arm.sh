#!/usr/bin/env bash
# The tests on a 64-bit ARM processor that QEMU emulates, process by process: `make test-arm ARGS='tests/test_bits.py -k gru'`.
#
# It needs Linux on another processor, and apt for packages of Debian; no rights of root, no chroot and no mounts. QEMU runs
# the Python of a Debian system for arm64 that is unpacked into a folder, together with the packages that the tests need,
# and looks into that folder first whenever the process opens a file. What the tests have installed on this machine (VENV)
# serves to fetch those packages and to compile kernels, which would take minutes for each cell under emulation.
#
# Arguments go to pytest; without any, a few tests run. Emulation is slow: tests of how long something takes fail.
# Variables:
#   ARM_ROOT     the folder, made once (build/arm); ARM_ROOT/cache is where kernels are kept that are compiled there
#   ARM_CELLS    whose kernels to compile on this machine beforehand (lstm gru); others are compiled when a test needs them
#   ARM_SOURCES  a file for apt, .list or .sources, that names packages for arm64, where this machine's own do not (Ubuntu's)
#   VENV         the environment with what the tests need (.venv)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'tests/arm.sh: %s\n' "$@" >&2
    exit 1
}

mkdir -p "${ARM_ROOT:=build/arm}"
root=$(cd "$ARM_ROOT" && pwd)
here=${VENV:-.venv}/bin/python
read -ra cells <<<"${ARM_CELLS-lstm gru}"
# Every kind of test, of float32: vectors, the kernels against the reference, the same bits however the work is cut.
[ $# -gt 0 ] || set -- \
    tests/test_vectors.py tests/test_kernels.py tests/test_bits.py \
    -k 'test_vectors or (float32 and (lstm or gru) and not projected and not before and (test_sizes or test_chunks_in_time))'

[ "$(uname -s)" = Linux ] || fail "QEMU emulates processes of Linux alone, and this is $(uname -s)"
case $(uname -m) in aarch64 | arm64) fail "this machine is 64-bit ARM itself: make test" ;; esac
"$here" -c 'import pytest, fastrnn' 2>/dev/null || fail "$here has not what the tests need: make test-arm installs it"

# ---- QEMU: the machine's own, or the package's, unpacked

unpack() { # PACKAGES... TARGET. Symbolic links to folders stay: Debian's /lib is one.
    local target=${!#}
    for package in "${@:1:$#-1}"; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$target"
    done
}

need_apt() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        fail "no apt-get and dpkg-deb here: packages come from Debian's archive" "on other systems, run it in a container of Debian"
}

find_qemu() {
    for name in qemu-aarch64-static qemu-aarch64; do
        PATH=$PATH:$root/host/usr/bin command -v $name && return
    done
}

if ! find_qemu >/dev/null; then
    need_apt
    echo "Unpacking QEMU into $root/host (once)"
    mkdir -p "$root/host"
    (cd "$root/host" && apt-get -qq -o APT::Sandbox::User=root download qemu-user-static qemu-user) ||
        fail "apt cannot fetch qemu-user-static: apt-get update, or install a qemu-aarch64"
    unpack "$root"/host/*.deb "$root/host"
    find "$root/host" -type f ! -name 'qemu-aarch64*' -delete  # it emulates every other processor too
fi
qemu=$(find_qemu) || fail "there is no qemu-aarch64 in the packages qemu-user-static and qemu-user"

# ---- Debian's Python for arm64, and what it needs

if [ ! -e "$root/.system" ]; then
    need_apt
    echo "Unpacking Python for arm64 into $root/system (once)"
    rm -rf "$root/system" "$root/apt"
    mkdir -p "$root"/apt/{lists,archives}/partial "$root"/system/{usr/bin,usr/sbin,usr/lib,proc}
    for folder in bin sbin lib; do ln -s usr/$folder "$root/system/$folder"; done
    : >"$root/apt/status"
    apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
        -o Dir::State="$root/apt" -o Dir::State::status="$root/apt/status" -o Dir::Cache="$root/apt")
    [ -z "${ARM_SOURCES-}" ] || apt+=(-o Dir::Etc::SourceList="$(realpath "$ARM_SOURCES")" -o Dir::Etc::SourceParts=-)
    # Of libraries, libstdc++ is what wheels expect a system to have.
    "${apt[@]}" update && "${apt[@]}" --yes --no-install-recommends --download-only install python3 libstdc++6 ||
        fail "apt finds no Python for arm64: name sources that have it, ARM_SOURCES=FILE"
    unpack "$root"/apt/archives/*.deb "$root/system"
    rm -r "$root/apt"
    # LLVM finds the processor's name here. Older versions of QEMU would show this machine's.
    cat >"$root/system/proc/cpuinfo" <<'END'
processor	: 0
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1
END
    touch "$root/.system"
fi

# As a script, it can be sys.executable too: tests that start processes need no registration with the kernel.
there=$root/python
cat >"$there" <<END
#!/bin/sh
exec '$qemu' -cpu neoverse-n1 -L '$root/system' '$root/system/usr/bin/python3' "\$@"
END
chmod +x "$there"

# ---- wheels for arm64

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
version=$(version "$there") || fail "QEMU cannot run $root/system/usr/bin/python3: $qemu"
site=$root/system/usr/local/lib/python$version/dist-packages
if [ ! -e "$root/.wheels" ] || [ pyproject.toml -nt "$root/.wheels" ]; then
    echo "Installing what the tests need into $site (once)"
    rm -rf "$site" "$root/cache"
    mkdir -p "$site"
    "$here" - >"$root/requirements.txt" <<'END'
from importlib.metadata import requires

for line in requires("fastrnn"):
    requirement, _, marker = line.partition(";")
    if marker.strip() in ("", 'extra == "test"'):
        print(requirement)
END
    "$here" -m pip install --quiet --disable-pip-version-check --no-input --only-binary=:all: \
        --python-version "$version" $(printf -- '--platform manylinux_2_%s_aarch64 ' {28..17}) \
        --target "$site" --requirement "$root/requirements.txt"
    touch "$root/.wheels"
fi
# The sources stay where they are: the same editable installation as here.
rm -rf "$site"/*fastrnn*
cp -r "${VENV:-.venv}"/lib/python*/site-packages/*fastrnn* "$site"
echo "import sys; sys.executable = '$there'" >"$site/zz_fastrnn_executable.pth"

# ---- kernels, compiled on this machine: the very library that wheels carry

export NUMBA_CACHE_DIR=$root/cache FASTRNN_SHIPPED=0
if [ ${#cells[@]} -gt 0 ]; then
    "$here" -m pip install --quiet --disable-pip-version-check --no-input ziglang
    "$here" -m fastrnn.kernels.shipped.build --target linux-aarch64 --cells "${cells[@]}"
    export FASTRNN_SHIPPED=linux-aarch64
fi

# ---- the tests

exec "$there" -m pytest -p no:cacheprovider --benchmark-disable "$@"
