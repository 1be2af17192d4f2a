"""Who waits at a terminal for a compilation is told so, once, and nobody else is."""

import io
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from fastrnn.kernels import notice

FIRST_CALLS = """
import numpy as np
import fastrnn
layer = fastrnn.RNN(1, 1, seed=0)
output, _, tape = layer.forward(np.ones((2, 1, 1), np.float32))
layer.backward(tape, output)
print("done")
"""
WARMUP = "import fastrnn; fastrnn.warmup(['rnn_tanh']); print('done')"


def said(program, folder, **variables):
    """What a new process writes to its standard error, a terminal; the terminal ends lines in its own way."""
    pty = pytest.importorskip("pty")
    main, other = pty.openpty()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "FASTRNN_QUIET": "0", **variables}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=other
    ) as run:
        out, _ = run.communicate(timeout=300)
    os.set_blocking(main, False)
    try:
        text = os.read(main, 1 << 16).decode()
    except OSError:  # nothing is there
        text = ""
    os.close(other)
    os.close(main)
    assert (run.returncode, out) == (0, b"done\n"), text
    return text


def test_one_line_at_a_terminal_and_none_from_the_cache(tmp_path):
    (line,) = said(FIRST_CALLS, tmp_path).splitlines()
    for part in ("compiling", "rnn_tanh in float32", "kept on disk", "FASTRNN_QUIET=1", "python -m fastrnn warmup"):
        assert part in line
    assert said(FIRST_CALLS, tmp_path) == ""


@pytest.mark.parametrize(
    ("program", "variables"), [(FIRST_CALLS, {"FASTRNN_QUIET": "1"}), (WARMUP, {})], ids=["quiet", "warmup"]
)
def test_silence_where_it_is_asked_for(program, variables, tmp_path):
    assert said(program, tmp_path, **variables) == ""


def test_silence_elsewhere(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done\n", b"")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("FASTRNN_QUIET", raising=False)
    monkeypatch.setattr(notice, "_left", 0.05)
    monkeypatch.setattr(notice, "_silent", False)
    stream = Terminal()
    monkeypatch.setattr(notice, "sys", types.SimpleNamespace(stderr=stream))  # pytest sets sys.stderr anew
    return stream


def compile_for(seconds):
    with notice.while_compiling("a kernel"):
        time.sleep(seconds)


def test_short_compilations_add_up(terminal):
    compile_for(0.0)
    assert terminal.getvalue() == ""
    compile_for(0.06)
    compile_for(0.1)
    compile_for(0.1)
    assert terminal.getvalue().count("fastrnn: compiling") == terminal.getvalue().count("\n") == 1


def test_an_error_ends_it(terminal):
    with pytest.raises(ZeroDivisionError), notice.while_compiling("a kernel"):
        raise ZeroDivisionError
    time.sleep(0.1)
    assert terminal.getvalue() == ""


def test_a_system_that_starts_no_thread(terminal, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    compile_for(0.1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("stream", [None, object()])
def test_what_is_no_stream(stream, terminal, monkeypatch):
    monkeypatch.setattr(notice.sys, "stderr", stream)
    compile_for(0.1)


def test_a_terminal_that_is_closed_meanwhile(terminal):
    with notice.while_compiling("a kernel"):
        terminal.close()
        time.sleep(0.1)
    compile_for(0.1)
