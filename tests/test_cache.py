"""Compiled kernels are kept between processes, an edit to any of their sources is noticed, and no file is trusted."""

import concurrent.futures
import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import config

from fastrnn.kernels import cached, native, shipped

PROGRAM = """
import numpy as np
from fastrnn.kernels import cpu, walk
one = np.ones((1, 1), np.float32)
params = {"weight_ih": one, "weight_hh": one}
output, _, _ = cpu.forward("rnn_relu", np.full((1, 1, 1), 3, np.float32), params, (one,))
print(float(output[0, 0, 0]), sum(walk.forward.stats.cache_hits.values()))
"""


def run(folder):
    environment = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    value, hits = result.stdout.split()
    return float(value), int(hits)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, apart from any installation."""
    kernels = shipped.FOLDER.parent
    package = Path(sys.modules["fastrnn"].__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(package, tmp_path / "fastrnn", ignore=ignore)
    shutil.copytree(kernels, tmp_path / "fastrnn" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_an_edit_to_a_cell_is_noticed(copy):
    assert run(copy) == (4.0, 0)
    assert run(copy) == (4.0, 1)
    cells = copy / "fastrnn" / "kernels" / "cells.py"
    text = cells.read_text()
    edited = text.replace("h = relu(gates[0])", "h = relu(gates[0]) + 1")
    assert edited != text
    cells.write_text(edited)
    assert run(copy) == (5.0, 0)


USUAL_CALLS = """
import numpy as np
import fastrnn
from fastrnn.kernels import packing, walk
fastrnn.set_num_threads(2)
for dtype in DTYPES:
    x = np.ones((9, 3, 5), dtype)
    for kind, options in MADE:
        layer = kind(5, 7, num_layers=2, dtype=dtype, **options)
        state = layer(x)[1]
        layer(x, lengths=[3, 9, 0], reset=np.ones((9, 3), bool))
        layer.step(x[0])
        for training in ({}, {"recompute": True}, {"lengths": [3, 9, 0]}, {"reset": np.ones((9, 3), bool)}):
            output, state, tape = layer.forward(x, **training)
            for gradients in ((output, None), (None, state), (output, state)):
                layer.backward(tape, *gradients)
        large = kind(300, 300, dtype=dtype, **options)  # and threads that share its units
        output, state, tape = large.forward(np.ones((40, 1, 300), dtype))
        large.backward(tape, output)
kernels = [value for module in (walk, packing) for value in vars(module).values() if hasattr(value, "stats")]
print(sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels), len(kernels))
"""


@pytest.mark.parametrize(
    ("cell", "made", "dtypes"),
    [
        ("rnn_relu", '[(fastrnn.RNN, {"nonlinearity": "relu"})]', ["float32"]),
        pytest.param("rnn_tanh", "[(fastrnn.RNN, {})]", ["float32", "float64"], marks=pytest.mark.slow),
        pytest.param("lstm_projected", '[(fastrnn.LSTM, {"proj_size": 4})]', ["float32"], marks=pytest.mark.slow),
    ],
)
def test_warmup_leaves_nothing_to_compile(cell, made, dtypes, tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for program in (
        f"import fastrnn; fastrnn.warmup([{cell!r}], {dtypes})",
        USUAL_CALLS.replace("MADE", made).replace("DTYPES", repr(dtypes)),
    ):
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    compiled, kernels = map(int, result.stdout.split())
    assert kernels == len(native.RECORDS)
    assert compiled == 0


def test_every_source_of_the_kernels_is_watched():
    """The checksum covers each module that walk.py, where the kernels stand, takes code from."""
    folder = shipped.FOLDER.parent
    # walk.py takes nothing from these
    others = (
        "__init__ cached compiled cpu general guard loading native notice ptx reference threads train turns xla".split()
    )
    assert {path.stem for path in folder.glob("*.py")} - set(others) == set(shipped.SOURCES)


# ---- small kernels, each dispatcher as in a process of its own


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cached, "_warned", False)
    return tmp_path


def call(function, x):
    """Its value, as a new process would have it, and whether it came from a file."""
    kernel = cached.kernel(function)
    return kernel(x), sum(kernel.stats.cache_hits.values()) == 1


def kept(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_one_file_for_each_type(folder):
    assert call(double, 2) == (4, False)
    assert call(double, 2.5) == (5.0, False)
    assert call(double, 2) == (4, True)
    assert call(double, 2.5) == (5.0, True)
    assert [path.suffix for path in kept(folder)] == [".nbc", ".nbc"]


def damaged(content):
    for size in (0, 1, 31, 32, 33, len(content) // 2, len(content) - 1):
        yield content[:size]
    for place in (0, 32, 40, len(content) // 3, len(content) // 2, len(content) - 1):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield content + b"\0"
    yield bytes(len(content))
    yield pickle.dumps("something else")


def test_a_damaged_file_is_compiled_anew_and_written_over(folder):
    call(double, 2)
    (file,) = kept(folder)
    for content in damaged(file.read_bytes()):
        file.write_bytes(content)
        assert call(double, 2) == (4, False)
        assert call(double, 2) == (4, True)
    assert kept(folder) == [file]


def test_a_file_of_another_kernel_or_type_is_not_taken(folder):
    call(double, 2)
    (file,) = kept(folder)
    for function, x in ((triple, 2), (double, 2.5)):
        call(function, x)
        (other,) = set(kept(folder)) - {file}
        file.write_bytes(other.read_bytes())
        assert call(double, 2) == (4, False)
        other.unlink()


def test_a_file_of_another_numba_is_not_taken(folder, monkeypatch):
    call(double, 2)
    with monkeypatch.context() as patch:
        patch.setattr(numba, "__version__", "0.0.0")
        assert call(double, 2) == (4, False)
    assert call(double, 2) == (4, False)
    assert call(double, 2) == (4, True)
    assert len(kept(folder)) == 1


def test_a_folder_in_the_place_of_a_file(folder):
    call(double, 2)
    (file,) = kept(folder)
    file.unlink()
    file.mkdir()
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        assert call(double, 2) == (4, False)
    assert kept(folder) == []


def test_a_full_disk_warns_once_and_leaves_no_half_file(folder, monkeypatch):
    def write_bytes(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(type(folder), "write_bytes", write_bytes)
    with pytest.warns(RuntimeWarning, match=r"NUMBA_CACHE_DIR.*no space left") as warned:
        assert [call(function, 2) for function in (double, triple)] == [(4, False), (6, False)]
    assert len(warned) == 1
    assert kept(folder) == []


def test_what_numba_cannot_hand_over_is_not_kept(folder, monkeypatch):
    """After an exception in the middle of LLVM's work it has the function, and not its machine code."""

    def reduce(self):
        raise RuntimeError("no compiled object yet")

    monkeypatch.setattr(cached.compiler.CompileResult, "_reduce", reduce)
    assert call(double, 2) == (4, False)
    assert kept(folder) == []


def test_an_interrupt_while_writing_leaves_no_half_file(folder, monkeypatch):
    def replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        call(double, 2)
    assert kept(folder) == []


def test_a_folder_that_was_filled_and_closed_is_read(folder, monkeypatch):
    call(double, 2)
    (file,) = kept(folder)
    with monkeypatch.context() as patch:
        patch.setattr(cached.caching.CompileResultCacheImpl, "_locator_classes", [])  # none that can be written to
        assert cached.kernel(double).stats.cache_path is None
        assert call(double, 2) == (4, True)
        file.write_bytes(b"")
        with pytest.warns(RuntimeWarning, match=r"NUMBA_CACHE_DIR.*no locator"):
            assert call(double, 2) == (4, False)
    assert file.read_bytes() == b""


def test_more_places_can_be_read(folder, monkeypatch, tmp_path_factory):
    """Those that come with the package, say."""
    shipped = tmp_path_factory.mktemp("shipped")
    call(double, 2)
    (file,) = kept(folder)
    file.rename(shipped / file.name)
    monkeypatch.setattr(cached, "READ_ONLY", [lambda function: [cached.Place(function, shipped)]])
    assert call(double, 2) == (4, True)
    assert call(double, 2.5) == (5.0, False)
    assert len(kept(shipped)) == len(kept(folder)) == 1


def test_processes_that_write_at_once(folder):
    """Each finds what it has compiled or what another has, and what is left is whole."""
    values = [2, 2.5, True, 2j, np.float32(2), np.int8(2)] * 2
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(2, context, _in_folder, (str(folder),)) as pool:
        assert list(pool.map(_value, values)) == [2 * value for value in values]
    assert [call(double, value)[1] for value in values] == [True] * len(values)
    assert not [path for path in kept(folder) if path.suffix != ".nbc"]


def _in_folder(folder):
    config.CACHE_DIR = folder


def _value(x):
    return call(double, x)[0]


# ---- the package's own kernels, in processes of their own

CHECKSUM = """
import numpy as np
from fastrnn.kernels import native, records
one = np.ones(3, np.float32)
print(native.call("checksum", one.dtype, *[records.address(one)] * 5, *[3] * 5))
"""


def python(*arguments, cwd, **variables):
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(cwd), **variables}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_every_file_of_the_package_may_be_cut_short(copy):
    """As after a power cut, or a disk that was full."""
    variables = {"NUMBA_CACHE_DIR": str(copy / "cache")}
    first = python("-c", CHECKSUM, cwd=copy, **variables)
    assert first.returncode == 0, first.stderr
    for size in (0, 100):
        for path in kept(copy / "cache"):
            os.truncate(path, size)
        done = python("-c", CHECKSUM, cwd=copy, **variables)
        assert (done.returncode, done.stdout, done.stderr) == (0, first.stdout, "")
        assert all(path.stat().st_size > 100 for path in kept(copy / "cache"))


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limit on the size of files")
def test_a_disk_that_takes_nothing(copy):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))"
    done = python("-c", limited + CHECKSUM, cwd=copy, NUMBA_CACHE_DIR=str(copy / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == done.stderr.count("NUMBA_CACHE_DIR") == 1
    assert kept(copy / "cache") == []


@pytest.fixture
def closed(copy):
    """A copy where no folder can be written to, not even by root."""
    (copy / "fastrnn" / "kernels" / "__pycache__").touch()
    return copy


NOWHERE = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": "1"}


def test_an_installation_that_cannot_be_written_to(closed):
    done = python("-c", CHECKSUM, cwd=closed, **NOWHERE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout)
    assert done.stderr.count("RuntimeWarning") == done.stderr.count("NUMBA_CACHE_DIR") == 1


def test_commands_where_nothing_can_be_written_to(closed):
    info = python("-m", "fastrnn", "info", cwd=closed, **NOWHERE)
    assert (info.returncode, info.stderr) == (0, "")
    (line,) = (line for line in info.stdout.splitlines() if line.startswith("cache "))
    assert "none" in line
    assert "NUMBA_CACHE_DIR" in line
    clear = python("-m", "fastrnn", "clear-cache", cwd=closed, **NOWHERE)
    assert (clear.returncode, clear.stderr) == (0, "")
    assert clear.stdout.startswith("Removed 0 files")
