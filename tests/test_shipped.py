"""The machine code that a wheel carries: the bits of what is compiled on the spot, at once, and only where it fits."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from fastrnn.kernels import shipped

ROOT = Path(__file__).resolve().parents[1]
HERE = [
    name
    for name, target in shipped.TARGETS.items()
    if not shipped._unfit(name, target, {}).startswith(("it is for", "this"))
]
CELL = "rnn_tanh"
linkers = pytest.mark.skipif(
    not HERE or not any((Path(place) / "ziglang").is_dir() for place in sys.path),
    reason="ziglang is not installed, or nothing is shipped for this system",
)


def python(*arguments, cwd, **variables):
    """What a process prints in which a copy of the package is found first, and nothing is compiled yet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTRNN_", "NUMBA_"))}
    environment |= {"PYTHONPATH": str(cwd), "NUMBA_CACHE_DIR": str(cwd / "cache"), **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(folder):
    """The package, apart from any installation, without machine code."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "manifest.json", "kernels")
    shutil.copytree(ROOT / "fastrnn", folder / "fastrnn", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "fastrnn" / "kernels", ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """With the machine code of one cell, for each target of this system."""
    folder = copied(tmp_path_factory.mktemp("package"))
    python("-m", "fastrnn.kernels.shipped.build", "--target", *HERE, "--cells", CELL, cwd=folder, FASTRNN_SHIPPED="0")
    return folder


PROGRAM = """
import hashlib, sys, time
import numpy as np
start = time.process_time()
import fastrnn
fastrnn.set_num_threads(2)
random, digest = np.random.default_rng(0), hashlib.sha256()
for dtype in ("float32", "float64"):
    for T, B, I, H in ((1, 1, 1, 1), (5, 3, 7, 33), (40, 1, 9, 130), (9, 20, 16, 48)):
        layer = fastrnn.RNN(I, H, 2, bidirectional=True, seed=1, dtype=dtype)
        x = random.standard_normal((T, B, I)).astype(dtype)
        lengths = random.integers(0, T + 1, B)
        for options in ({}, {"lengths": lengths}, {"recompute": True}, {"reset": random.random((T, B)) < 0.2}):
            output, state, tape = layer.forward(x, **options)
            gradients = layer.backward(tape, output, state)
            for array in (output, state, gradients.x, gradients.state, *gradients.params.values()):
                digest.update(array.tobytes())
print("numba" in sys.modules, digest.hexdigest(), time.process_time() - start)
"""


@linkers
@pytest.mark.parametrize("target", HERE)
def test_the_same_bits_as_compiled_for_that_processor(package, target):
    """On the spot means: for this very processor. Where the vectors are as wide, the bits are the same."""
    numba, bits, _ = python("-c", PROGRAM, cwd=package, FASTRNN_SHIPPED=target).split()
    assert numba == "False"
    cpu = shipped.TARGETS[target]
    as_compiled = {"NUMBA_CPU_NAME": cpu.cpu, "NUMBA_CPU_FEATURES": cpu.cpu_features} if target != HERE[0] else {}
    numba, expected, _ = python("-c", PROGRAM, cwd=package, FASTRNN_SHIPPED="0", **as_compiled).split()
    assert (numba, expected) == ("True", bits)


@linkers
def test_the_first_call_is_quick_and_needs_no_compiler(package):
    program = """
import time
begin = time.process_time()
import numpy as np
numpy = time.process_time()
import fastrnn, sys
layer = fastrnn.RNN(64, 128, seed=0)
output, state, tape = layer.forward(np.ones((10, 4, 64), np.float32))
layer.backward(tape, output)
print("numba" in sys.modules, numpy - begin, time.process_time() - numpy)
"""
    best = min(
        (python("-c", program, cwd=package).split() for _ in range(5)),
        key=lambda words: float(words[2]) / float(words[1]),
    )
    assert best[0] == "False"
    assert float(best[2]) < 5 * float(best[1]), best  # some 0.1 s, as NumPy's own import


def found(cwd, **variables):
    """The name of the library that is taken, or why none is."""
    program = (
        "from fastrnn.kernels import shipped; library, why = shipped.find(); print(library.name if library else why)"
    )
    return python("-c", program, cwd=cwd, **variables).strip()


@linkers
def test_what_is_asked_for(package):
    assert found(package) == HERE[0]
    assert found(package, FASTRNN_SHIPPED=HERE[-1]) == HERE[-1]
    assert found(package, FASTRNN_SHIPPED="0") == "FASTRNN_SHIPPED is 0"
    assert found(package, FASTRNN_SHIPPED="sparc").startswith("FASTRNN_SHIPPED is 'sparc', and there is ")
    assert "asks for a certain processor" in found(package, NUMBA_CPU_NAME="haswell")
    assert HERE[0] in python("-m", "fastrnn", "info", cwd=package)


@linkers
def test_a_damaged_library_is_not_mapped(package, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    for path in (copy / "fastrnn" / "kernels" / "shipped").glob("*.so"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert found(copy).count("it is damaged: its checksum is another") == len(HERE)
    assert "it is damaged" in python("-m", "fastrnn", "info", cwd=copy)
    for path in (copy / "fastrnn" / "kernels" / "shipped").glob("*.so"):
        path.unlink()
    assert found(copy).count("it cannot be read") == len(HERE)


@linkers
def test_other_sources_are_compiled(package, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    with (copy / "fastrnn" / "kernels" / "cells.py").open("a") as file:
        file.write("\n")
    assert found(copy) == "it was made of other sources"


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Write one, and ask what is found."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "MANIFEST", tmp_path / "manifest.json")
    for name in ("FASTRNN_SHIPPED", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)

    def find(content):
        (tmp_path / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
        shipped.find.cache_clear()
        return shipped.find()

    yield find
    shipped.find.cache_clear()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        {},
        {"libraries": {}},
        {"sources": 1, "libraries": []},
        {"libraries": {"x": 3}, "sources": ""},
    ],
    ids=str,
)
def test_a_manifest_that_is_none(content, manifest):
    library, why = manifest(content)
    assert library is None
    assert re.search("cannot be read|other sources", why), why


@pytest.mark.parametrize("entry", [{}, {"sha256": 3}, {"sha256": "0" * 64}], ids=str)
def test_a_library_that_is_not_there(entry, manifest):
    library, why = manifest({"sources": shipped.CHECKSUM, "libraries": dict.fromkeys(shipped.TARGETS, entry)})
    assert library is None
    assert why


def test_a_processor_that_lacks_something(manifest, monkeypatch):
    monkeypatch.setattr(shipped, "_features", lambda: {"avx": True, "avx2": True})
    monkeypatch.setattr(shipped.platform, "system", lambda: "Linux")
    monkeypatch.setattr(shipped.platform, "machine", lambda: "x86_64")
    _, why = manifest({"sources": shipped.CHECKSUM, "libraries": {name: {} for name in shipped.TARGETS}})
    assert "linux-x86-64-v3: this processor lacks bmi, " in why
    assert "linux-aarch64: it is for another system" in why


def test_a_python_that_keeps_arrays_in_another_way(manifest, monkeypatch):
    monkeypatch.setattr(shipped.sys, "byteorder", "big")
    _, why = manifest({"sources": shipped.CHECKSUM, "libraries": {}})
    assert why == "this Python keeps arrays in another way"


@linkers
def test_a_wheel_in_a_new_environment(package, tmp_path):
    """With NumPy and Numba beside it, an empty cache, and no compiler."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "*.so", "*.dylib", "manifest.json"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    for path in (package / "fastrnn" / "kernels" / "shipped").iterdir():
        if path.suffix in (".so", ".dylib", ".json"):
            shutil.copy(path, source / "kernels" / "shipped")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("fastrnn-*.whl")
    assert wheel.stat().st_size < 12e6

    venv.create(tmp_path / "venv", with_pip=True)
    here = tmp_path / "venv" / "bin" / "python"
    site = Path(
        subprocess.check_output([here, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    (site / "others.pth").write_text(str(Path(np.__file__).parents[1]))  # NumPy and Numba; not the finder of fastrnn
    subprocess.run([here, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FASTRNN_", "NUMBA_", "PYTHON"))
    }
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([here, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "False"
    assert not (tmp_path / "cache").exists()
