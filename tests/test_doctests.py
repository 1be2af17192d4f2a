"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import fastrnn
import fastrnn.kernels

# three folders: an editable installation takes fastrnn.kernels and fastrnn.kernels.cuda from others
FOLDERS = {
    "fastrnn": fastrnn.__path__,
    "fastrnn.kernels": fastrnn.kernels.__path__,
    "fastrnn.kernels.cuda": [f"{folder}/cuda" for folder in fastrnn.kernels.__path__],
}
# Their tests run their examples, in a process of their own: the threads of JAX and TensorFlow do not mix with forks.
ELSEWHERE = {"fastrnn.jax", "fastrnn.keras"}
MODULES = [
    module.name
    for package, path in FOLDERS.items()
    for module in pkgutil.iter_modules(path, f"{package}.")
    if not module.name.endswith(".__main__") and module.name not in ELSEWHERE
]

NEEDS = {
    "fastrnn.kernels.ptx": ("numba_cuda", "numba-cuda"),
    "fastrnn.onnx": ("onnx", "onnx"),
    "fastrnn.onnx_folding": ("onnx", "onnx"),
    "fastrnn.torch": ("torch", "PyTorch"),
    "fastrnn.torch_func": ("torch", "PyTorch"),
}


@pytest.mark.parametrize("name", ["fastrnn", "fastrnn.kernels", *MODULES])
def test_examples(name, tmp_path, monkeypatch):
    package, called = NEEDS.get(name, ("numpy", "NumPy"))
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{called} is not installed")
    monkeypatch.chdir(tmp_path)  # for examples that write files
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_kernels_are_among_the_modules():
    assert {"fastrnn.layers", "fastrnn.kernels.cpu", "fastrnn.kernels.reference"} <= set(MODULES)
    assert {"fastrnn.kernels.ptx", "fastrnn.kernels.cuda.text"} <= set(MODULES)
