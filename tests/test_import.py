"""``import fastrnn`` imports NumPy and nothing else that is large, and takes under half a second."""

import subprocess
import sys

import pytest

import fastrnn

FRAMEWORKS = ("torch", "jax", "tensorflow", "keras", "onnx", "onnxruntime", "scipy", "safetensors")


def run(program, *flags):
    command = [sys.executable, *flags, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.serial
def test_takes_under_half_a_second():
    program = "import time; start = time.perf_counter(); import fastrnn; print(time.perf_counter() - start)"
    assert min(float(run(program)) for _ in range(5)) < 0.5  # the best of some: others may use the machine too


def test_imports_numpy_and_compiles_nothing():
    program = "import sys, fastrnn; print(*sys.modules, sep='\\n')"
    modules = set(run(program).split())
    assert "numpy" in modules
    assert not modules & {*FRAMEWORKS, "numba", "llvmlite", "fastrnn.kernels", "fastrnn.testing"}


@pytest.mark.parametrize("name", ["fastrnn.functional", "fastrnn.weights", "fastrnn.backend", "fastrnn.layers"])
def test_a_layer_that_is_made_and_saved_needs_no_kernels(name, tmp_path):
    program = f"""
import sys, {name}, fastrnn
layer = fastrnn.LSTM(3, 4, recurrent_init="orthogonal")
layer.save({str(tmp_path / "a.npz")!r})
fastrnn.load({str(tmp_path / "a.npz")!r})
try:
    layer([1.0])
except TypeError:
    print("numba" in sys.modules, "fastrnn.kernels.cpu" in sys.modules)
"""
    assert run(program) == "False False\n"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_running_a_layer_imports_no_framework(backend):
    program = f"""
import sys, numpy as np, fastrnn
layer = fastrnn.GRU(3, 4, backend={backend!r})
output, _, tape = layer.forward(np.zeros((2, 1, 3), np.float32))
layer.backward(tape, output)
print(*sys.modules, sep='\\n')
"""
    modules = set(run(program).split()) - {"scipy"}  # Numba looks at its version, where JAX or another has brought it
    assert not modules & {*FRAMEWORKS, "numba.cuda"}


def test_warnings_are_errors_at_import():
    assert run("import fastrnn, fastrnn.kernels.cpu", "-W", "error") == ""


def test_names():
    assert fastrnn.__version__ == "0.1.0"
    assert all(hasattr(fastrnn, name) for name in fastrnn.__all__)
    assert {"RNN", "LSTM", "GRU", "functional", "load", "warmup", "set_num_threads", "get_num_threads"} <= set(
        fastrnn.__all__
    )


def test_threads():
    before = fastrnn.get_num_threads()
    try:
        fastrnn.set_num_threads(3)
        assert fastrnn.get_num_threads() == 3
    finally:
        fastrnn.set_num_threads(before)
    program = "import fastrnn; print(fastrnn.get_num_threads())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={"FASTRNN_NUM_THREADS": "5"}, timeout=120)
    assert done.stdout == "5\n", done.stderr


def test_warmup_tells_what_it_took():
    seconds = fastrnn.warmup(["rnn_tanh"])
    assert seconds
    assert all(isinstance(name, str) and value >= 0 for name, value in seconds.items())
