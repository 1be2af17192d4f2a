"""The layers of fastrnn.keras with each of Keras's backends, each in a process of its own: keras_checks.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("keras_checks.py")
ROOT = CHECKS.parents[1]
# One thread each, for the machine is shared, and little of XLA's optimization, which takes longer than what it saves.
FLAGS = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


# Warnings of this library are errors there, too; what Keras and its backends deprecate among them is theirs.
OPTIONS = "-q -x -p no:cacheprovider -o filterwarnings= -W error::UserWarning -W ignore::DeprecationWarning".split()
BACKENDS = ["tensorflow", "jax", "torch", "numpy"]


def missing(backend):
    return next((name for name in ("keras", backend) if importlib.util.find_spec(name) is None), None)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The checks of every backend and what they print, begun together: each keeps one processor busy for a minute."""
    folder, begun = tmp_path_factory.mktemp("keras"), {}
    for backend in BACKENDS:
        if missing(backend) is None:
            with open(folder / backend, "w") as file:
                environment = {**os.environ, **FLAGS, "KERAS_BACKEND": backend}
                command = [sys.executable, "-m", "pytest", *OPTIONS, CHECKS]
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            begun[backend] = process, folder / backend
    yield begun
    for process, _ in begun.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layers_are_equal_to_those_of_keras(backend, processes):
    if missing(backend):
        pytest.skip(f"{missing(backend)} is not installed")
    process, printed = processes[backend]
    assert process.wait() == 0, printed.read_text()[-6000:]


def test_without_keras_the_error_says_what_to_install():
    program = "import sys; sys.modules['keras'] = None; import fastrnn; import fastrnn.keras"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: fastrnn.keras needs Keras 3, and it cannot be imported: pip install" in done.stderr
