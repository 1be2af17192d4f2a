"""The example of layers in the workers of other libraries runs, and its check holds."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "map_batches.py"


@pytest.mark.parametrize("library", ["dask", "ray"])
def test_workers_give_what_one_call_gives(library):
    pytest.importorskip({"dask": "dask.array", "ray": "ray.data"}[library], reason=f"{library} is not installed")
    options = ["--ray"] if library == "ray" else []
    done = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("the same bits")
