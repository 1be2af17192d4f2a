"""What an installation holds: the wheel's files, its metadata, and that a copy of it imports."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import fastrnn

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **options):
    """Run a command and return what it printed; a failure shows it."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout: setuptools leaves files in the folder that it builds in."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the tests were copied out of their checkout")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, source)
    (path,) = folder.glob("fastrnn-*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_every_module_and_the_typing_marker(names):
    expected = [f"fastrnn/{path.name}" for path in (ROOT / "fastrnn").glob("*.py")]
    expected += [f"fastrnn/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
    expected += [
        f"fastrnn/kernels/{folder}/{path.name}"
        for folder in ("cuda", "shipped")
        for path in (ROOT / "kernels" / folder).glob("*.py")
    ]
    expected += ["fastrnn/py.typed"]
    assert {"fastrnn/__init__.py", "fastrnn/__main__.py", "fastrnn/kernels/__init__.py"} < set(expected)
    assert "fastrnn/kernels/cuda/text.py" in expected
    assert [name for name in expected if name not in names] == []


def test_wheel_holds_nothing_else(names):
    stray = [name for name in names if not re.match(r"fastrnn/|fastrnn-[\d.]+\.dist-info/", name)]
    assert stray == []
    assert [name for name in names if "test_" in name or "benchmark" in name or "/kernels/kernels" in name] == []


def test_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_metadata(wheel, names):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "fastrnn"
    assert metadata["Version"] == fastrnn.__version__ == "0.1.0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line).group() for line in required) == ["numba", "numpy"]
    assert {"cuda12", "cuda13", "safetensors"} <= set(metadata.get_all("Provides-Extra"))


def test_installed_wheel_imports_and_runs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = """
import sys
sys.path.insert(0, sys.argv[1])  # before the finder that an editable installation adds
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import numpy as np, fastrnn, fastrnn.kernels, fastrnn.kernels.cuda.text
assert fastrnn.__file__.startswith(sys.argv[1]), fastrnn.__file__
assert fastrnn.kernels.__file__.startswith(sys.argv[1]), fastrnn.kernels.__file__
assert fastrnn.kernels.cuda.text.__file__.startswith(sys.argv[1]), fastrnn.kernels.cuda.text.__file__
output, state = fastrnn.GRU(3, 4, backend="reference", seed=0)(np.zeros((5, 2, 3), np.float32))
print(output.shape, state.shape)
"""
    printed = run(sys.executable, "-c", program, tmp_path / "site", cwd=tmp_path)
    assert printed == "(5, 2, 4) (1, 2, 4)\n"
