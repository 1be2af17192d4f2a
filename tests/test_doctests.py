"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import fastrnn
import fastrnn.kernels

# two folders: an editable installation takes fastrnn.kernels from one of its own
MODULES = [
    module.name
    for package in (fastrnn, fastrnn.kernels)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(".__main__")
]


@pytest.mark.parametrize("name", ["fastrnn", "fastrnn.kernels", *MODULES])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for examples that write files
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_kernels_are_among_the_modules():
    assert {"fastrnn.layers", "fastrnn.kernels.cpu", "fastrnn.kernels.reference"} <= set(MODULES)
