"""Of processes that want the same kernel at once, one compiles it; nobody waits for who has gone."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastrnn.kernels import turns

fcntl = pytest.importorskip("fcntl")

FIRST_CALL = """
import numpy as np
import fastrnn
print(fastrnn.RNN(1, 1, seed=0)(np.ones((2, 1, 1), np.float32))[0].tolist())
from fastrnn.kernels import walk
print(sum(walk.forward.stats.cache_misses.values()), sum(walk.forward.stats.cache_hits.values()))
"""


def test_two_processes_compile_once(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_CALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [error for _, error in said] == ["", ""]
    (first, counts), (second, others) = (out.splitlines() for out, _ in said)
    assert first == second
    assert sorted([counts, others]) == ["0 1", "1 0"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".nbc"}


HOLDER = """
import contextlib, pathlib, sys
from fastrnn.kernels import turns
with contextlib.ExitStack() as making:
    turns.await_or_lock(lambda: None, pathlib.Path(sys.argv[1]), making)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a lock, until its standard input is closed."""
    file = tmp_path / "a.nbc.lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process, file
        process.kill()


def wait(file, look=lambda: None):
    """What is found, after how long, and whether others would wait for this process then."""
    start = time.monotonic()
    with contextlib.ExitStack() as making:
        found = turns.await_or_lock(look, file, making)
        seconds = time.monotonic() - start
        with contextlib.ExitStack() as other, open(file, "w") as stream:
            other.callback(file.unlink)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = False
            except BlockingIOError:
                locked = True
    return found, seconds, locked


def test_what_another_process_makes_is_awaited(holder):
    _, file = holder
    begin = time.monotonic()
    found, seconds, _ = wait(file, lambda: "made" if time.monotonic() - begin > 0.3 else None)
    assert found == "made"
    assert seconds >= 0.3


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_waits_for_who_was_killed(holder, ends):
    process, file = holder
    threading.Timer(0.3, process.send_signal, [ends]).start()
    found, seconds, locked = wait(file)
    assert (found, locked) == (None, False)  # who comes after such an end forms no queue
    assert 0.2 < seconds < 30
    assert wait(file)[::2] == (None, True)


def test_nobody_waits_for_ever(holder, monkeypatch):
    monkeypatch.setattr(turns, "LONGEST", 0.2)
    found, seconds, _ = wait(holder[1])
    assert found is None
    assert 0.2 <= seconds < 30


def test_where_nothing_is_locked_nobody_waits(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(37, "no locks available")

    (tmp_path / "file").touch()
    assert turns._lock(tmp_path / "file" / "a.lock") == (True, None)  # no such folder, and none can be made
    with monkeypatch.context() as patch:
        patch.setattr(turns.fcntl, "flock", flock)
        assert turns._lock(tmp_path / "a.lock") == (True, None)
    monkeypatch.setattr(turns, "fcntl", None)
    assert turns._lock(tmp_path / "a.lock") == (True, None)
    assert not (tmp_path / "a.lock").exists()


def test_a_fork_does_not_keep_a_lock(tmp_path):
    """It has its parent's open files for as long as it lives."""
    file, same = tmp_path / "a.lock", tmp_path / "same"
    _, number = turns._lock(file)
    os.link(file, same)  # the file itself is removed
    copy = os.dup(number)
    assert turns._lock(same) == (False, None)
    turns._release(file, number)
    mine, number = turns._lock(same)
    assert mine
    turns._release(same, number)
    os.close(copy)
    assert list(tmp_path.iterdir()) == []
