"""Saving: a file is replaced in one step, stays what it was to the system, and nothing is left behind."""

import os
import signal
import stat
import subprocess
import sys

import pytest

import fastrnn
from fastrnn import train, weights


def layer():
    return fastrnn.GRU(3, 5, seed=0)


def trainer():
    return train.Trainer(train.Sequential(train.Linear(3, 2, seed=0)), train.MeanSquaredError(), train.Adam())


def save_safetensors(path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    layer().save(path)


def export(path):
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    import fastrnn.onnx

    fastrnn.onnx.export(layer(), path)


WRITERS = {
    "layer.npz": lambda path: layer().save(path),
    "layer.safetensors": save_safetensors,
    "model.npz": lambda path: trainer().model.save(path),
    "checkpoint.npz": lambda path: trainer().save(path),
    "layer.onnx": export,
}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    """A file that is there, and what writes another in its place."""
    path = tmp_path / request.param
    WRITERS[request.param](path)
    content = path.read_bytes()
    path.write_bytes(b"old")
    return path, lambda other=path: WRITERS[request.param](other), content


def test_a_new_file_has_the_mode_that_others_have(tmp_path):
    before = os.umask(0o027)
    try:
        layer().save(tmp_path / "a.npz")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.npz").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_a_replaced_file_keeps_its_mode(written, mode):
    path, write, content = written
    path.chmod(mode)
    write()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == content


def test_what_is_secret_is_never_open_to_others(tmp_path):
    path = tmp_path / "a.npz"
    path.touch(0o600)
    with weights.replacing(str(path)) as stream:
        stream.write(b"new")
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a.npz"
    path.touch()
    os.chown(path, 1234, 1235)
    layer().save(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_one(written, there, tmp_path):
    path, write, content = written
    (tmp_path / "links").mkdir()
    first, second = tmp_path / "links" / f"a{path.suffix}", tmp_path / "links" / f"b{path.suffix}"
    first.symlink_to(path)
    second.symlink_to(first.name)
    if not there:
        path.unlink()
    write(second)
    assert first.is_symlink()
    assert second.is_symlink()
    assert path.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == sorted(["links", path.name])
    assert sorted(os.listdir(tmp_path / "links")) == [first.name, second.name]


def test_what_is_no_file_is_not_replaced(written, tmp_path):
    _, write, _ = written
    pipe, folder, loop = (tmp_path / f"{name}{written[0].suffix}" for name in ("pipe", "folder", "loop"))
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match="a device or a pipe"):
        write(pipe)
    with pytest.raises(IsADirectoryError):
        write(folder)
    with pytest.raises(OSError, match="symbolic links"):
        write(loop)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == names


SAVES = """
import sys, time
from fastrnn import weights
with weights.replacing(sys.argv[1]) as stream:
    stream.write(b"half")
    stream.flush()
    print("begun", flush=True)
    sys.stdin.read()
    stream.write(b" and half")
"""


def begin(path):
    """Start a process that saves to a path, and stops in the middle."""
    command = [sys.executable, "-c", SAVES, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def test_leftovers_of_a_killed_save_go_with_the_next(written, tmp_path):
    path, write, content = written
    others = [tmp_path / name for name in (f"other{path.name}", f"{path.name}.tmp", f"{path.name}.1a2b.tmp")]
    for other in others:
        other.touch()
    killed = [begin(path), begin(path)]
    goes_on = begin(path)
    assert len(os.listdir(tmp_path)) == 7
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.read_bytes() == b"old"
    write()
    (temporary,) = set(tmp_path.iterdir()) - {path, *others}  # of the one that goes on
    assert temporary.read_bytes() == b"half"
    assert path.read_bytes() == content
    goes_on.communicate("")
    assert goes_on.returncode == 0
    assert path.read_bytes() == b"half and half"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_a_file_that_goes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    path, lock = tmp_path / "a.npz", weights._lock

    def late(number, wait):
        if wait:
            monkeypatch.setattr(weights, "_lock", lock)
            weights._clear(str(path))  # another save, between the file and its lock
        return lock(number, wait)

    monkeypatch.setattr(weights, "_lock", late)
    layer().save(path)
    assert os.listdir(tmp_path) == ["a.npz"]
    assert fastrnn.load(path).hidden_size == 5


def test_where_nothing_can_be_locked(written, tmp_path, monkeypatch):
    path, write, content = written
    monkeypatch.setattr(weights, "_lock", lambda number, wait: False)
    process = begin(path)
    write()
    assert path.read_bytes() == content
    assert len(os.listdir(tmp_path)) == 2
    process.kill()
    process.communicate()


def test_a_system_without_locks(written, tmp_path, monkeypatch):
    path, write, content = written
    monkeypatch.setattr(weights, "fcntl", None)
    process = begin(path)
    process.kill()
    process.communicate()
    write()
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]
