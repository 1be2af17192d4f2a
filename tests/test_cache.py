"""Compiled kernels are kept between processes, and an edit to any of their sources is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn.kernels import shipped

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
        ("rnn_relu", '[(fastrnn.RNN, {"nonlinearity": "relu"})]', ["float32", "float64"]),
        ("lstm_projected", '[(fastrnn.LSTM, {"proj_size": 4})]', ["float32"]),
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
    assert kernels >= 8
    assert compiled == 0


def test_every_source_of_the_kernels_is_watched():
    """The checksum covers each module that walk.py, where the kernels stand, takes code from."""
    folder = shipped.FOLDER.parent
    # walk.py takes nothing from these
    others = "__init__ compiled cpu general guard native ptx reference threads train xla".split()
    assert {path.stem for path in folder.glob("*.py")} - set(others) == set(shipped.SOURCES)
