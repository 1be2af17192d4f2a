"""`python -m fastrnn info`, `warmup` and `clear-cache`."""

import types

import fastrnn
from fastrnn import machine
from fastrnn.__main__ import main
from fastrnn.kernels import shipped
from fastrnn.kernels.cuda import compiled, device
from fastrnn.weights import CELLS


def test_info(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fastrnn"] == fastrnn.__version__
    of_packages, of_this = (
        ("python", "numpy", "numba", "llvmlite"),
        ("processor", "features", "vectors", "threads", "cache"),
    )
    for name in (*of_packages, *of_this, "kernels", "GPU"):
        assert lines[name].strip()
    assert "bits" in lines["vectors"]
    assert lines["threads"].startswith(f"{fastrnn.get_num_threads()} of ")


def test_kernels_are_shipped_or_compiled_and_why(monkeypatch):
    monkeypatch.setattr(shipped, "load", lambda: None)
    monkeypatch.setattr(shipped, "find", lambda: (None, "FASTRNN_SHIPPED is 0"))
    assert machine.kernels() == "compiled when needed: FASTRNN_SHIPPED is 0"
    library = types.SimpleNamespace(name="linux-x86-64-v3")
    monkeypatch.setattr(shipped, "load", lambda: library)
    monkeypatch.setattr(shipped, "find", lambda: (library, ""))
    assert machine.kernels() == "machine code of this package, linux-x86-64-v3: nothing is compiled"


def test_gpu_says_why_there_is_none(monkeypatch):
    def get_device():
        raise RuntimeError("no NVIDIA driver was found.")

    monkeypatch.setattr(device, "get_device", get_device)
    assert machine.gpu() == "none (no NVIDIA driver was found)"


def test_gpu_is_named(monkeypatch):
    found = types.SimpleNamespace(name="NVIDIA H200", capability=(9, 0))
    monkeypatch.setattr(device, "get_device", lambda: found)
    assert machine.gpu() == "NVIDIA H200 (compute capability 9.0)"


def test_warmup(monkeypatch, capsys):
    asked = []

    def fake(cells, dtypes, begin):
        (cell,), (dtype,) = cells, dtypes
        begin(f"{cell} {dtype}")
        assert capsys.readouterr().out.split()[-2:] == [cell, dtype]  # it is there while it is being compiled
        asked.append((cell, dtype))
        return {f"{cell} {dtype}": 1.5}

    monkeypatch.setattr(fastrnn, "warmup", fake)
    assert main(["warmup"]) == 0
    assert asked == [(cell, "float32") for cell in (*CELLS, "lstm_projected")]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["total", "10.50", "s"]
    asked.clear()
    assert main(["warmup", "--cell", "gru", "--dtype", "float64", "--dtype", "float32"]) == 0
    assert asked == [("gru", "float64"), ("gru", "float32")]


def test_cache_files_are_those_that_a_warmup_leaves():
    fastrnn.warmup(["rnn_tanh"], training=False)
    kinds = {path.suffix for path in machine.cache_files()}
    assert kinds == {".nbc"}
    assert all(path.parent == machine.cache_folder() for path in machine.cache_files())


def test_clear_cache_removes_compiled_kernels_and_nothing_else(monkeypatch, tmp_path, capsys):
    ours = ["cpu._forward_rows-115.py311.nbi", "cpu._forward_rows-115.py311.1.nbc"]  # Numba's own
    ours += [f"walk.forward_rows.py311.ab.nbc{end}" for end in ("", ".tmp.12", ".lock")]
    others = ["cpu.cpython-311.pyc", "somebody.f-3.py311.nbi", "cpu.py", "notes.nbi"]
    for name in ours + others:
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path / "cuda"])
    assert machine.cache() == f"{tmp_path}, 5 files, 0.0 MB"
    assert main(["clear-cache"]) == 0
    assert capsys.readouterr().out == f"Removed 5 files of compiled kernels from {tmp_path}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    assert main(["clear-cache"]) == 0
    assert "Removed 0 files" in capsys.readouterr().out


def test_clear_cache_says_what_it_cannot_remove(monkeypatch, tmp_path, capsys):
    (tmp_path / "walk.forward_rows.py311.ab.nbc").mkdir()
    (tmp_path / "walk.forward_rows.py311.cd.nbc").touch()
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path / "cuda"])
    assert main(["clear-cache"]) == 1
    said = capsys.readouterr()
    assert said.out == f"Removed 1 files of compiled kernels from {tmp_path}\n"
    assert "ab.nbc" in said.err
