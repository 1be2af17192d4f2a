"""Threads of our own: where none can be started, how many there may be, and what they do not bring along."""

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fastrnn
from fastrnn.kernels import cpu, threads

pytestmark = pytest.mark.serial


@pytest.fixture
def pool(monkeypatch):
    """A new pool, for the smallest piece of work."""
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads, "_borrowed", None)
    monkeypatch.setattr(threads, "_chosen", 4)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "REST_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(cpu, "THREAD_FLOPS", 1)
    yield threads._pool
    threads._pool.own.shrink(0)


def outputs():
    """Of a batch, whose rows are split, and of a row, whose hidden units are."""
    layer = fastrnn.RNN(16, 96, seed=0)
    random = np.random.default_rng(0)
    return [layer(random.standard_normal((20, batch, 16), np.float32))[0].tobytes() for batch in (16, 1)]


def alone(function):
    threads.set_num_threads(1)
    try:
        return function()
    finally:
        threads.set_num_threads(4)


# ---- threads that cannot be had


@contextlib.contextmanager
def no_more_threads():
    """The system refuses to start any: their stacks would not fit."""
    before = threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(before)


@pytest.mark.skipif(sys.maxsize < 2**47, reason="such a size cannot be said here")
@pytest.mark.parametrize("had", [0, 1])
def test_where_no_thread_can_be_started_the_caller_does_all(pool, had):
    expected = alone(outputs)
    pool.own.grow(had)
    with no_more_threads():
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
        assert outputs() == expected
        who = {}
        threads.run(lambda p, _: who.setdefault(p, threading.get_ident()), 4)
        assert sorted(who) == [0, 1, 2, 3]
        assert len(pool.own.helpers) == had
    assert outputs() == expected
    assert len(pool.own.helpers) == 3


def test_a_refusal_is_not_asked_for_again_at_once(pool, monkeypatch):
    asked = []

    def refuse(self):
        asked.append(self)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "REST_SECONDS", (60.0, 60.0))
    monkeypatch.setattr(threads._Helper, "__init__", refuse)
    pool.own.rest = threads._Rest()
    for _ in range(3):
        threads.run(lambda p, parts: None, 4)
    assert len(asked) == 1


def test_a_trial_tells_whether_threads_can_be_started():
    assert threads._can_start(3)
    assert not [thread for thread in threading.enumerate() if thread.name == "fastrnn-trial"]
    with no_more_threads():
        assert not threads._can_start(1)


# ---- how many


def test_a_number_that_must_be_a_mistake(pool):
    with pytest.raises(ValueError, match="number is 1000000000, expected an integer from 1 to 4096"):
        fastrnn.set_num_threads(10**9)
    with pytest.raises(ValueError, match="from 1 to 4096"):
        threads.set_num_threads(4097)
    assert threads.get_num_threads() == 4
    fastrnn.set_num_threads(4096)
    assert threads.get_num_threads() == 4096


def test_another_librarys_number_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(threads, "_following", lambda: 10**9)
    assert threads.get_num_threads() == threads.MOST


@pytest.mark.parametrize("text", ["1000000000", "4097", "9" * 5000, "0", "000", "-1", "x", ""])
def test_the_variable_is_refused_by_name(text, monkeypatch):
    monkeypatch.setenv("FASTRNN_NUM_THREADS", text)
    with pytest.raises(ValueError, match="FASTRNN_NUM_THREADS must be a whole number from 1 to 4096"):
        threads._read_variable()


@pytest.mark.parametrize(("text", "number"), [("4096", 4096), (" 2 ", 2), ("0002", 2)])
def test_the_variable_is_read(text, number, monkeypatch):
    monkeypatch.setenv("FASTRNN_NUM_THREADS", text)
    assert threads._read_variable() == number


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    assert condition()


def test_threads_end_when_the_number_falls(pool):
    threads.run(lambda p, parts: None, 4)
    helpers = [thread for thread in threading.enumerate() if thread.name == "fastrnn"]
    assert len(pool.own.helpers) == 3
    threads.set_num_threads(2)
    assert len(pool.own.helpers) == 1
    wait_for(lambda: sum(not thread.is_alive() for thread in helpers) >= 2)
    threads.run(lambda p, parts: None, 2)
    threads.set_num_threads(1)
    wait_for(lambda: pool.own.helpers == [])


def test_threads_end_after_the_pass_in_which_the_number_falls(pool):
    threads.run(lambda p, parts: threads.set_num_threads(1) if p == 1 else None, 4)
    assert pool.own.helpers == []


# ---- the caller's floating-point environment

needs_environment = pytest.mark.skipif(not threads._environment, reason="the C library has no fegetenv here")
AWAY = {"x86_64": 0x0C00, "AMD64": 0x0C00, "aarch64": 0xC00000, "arm64": 0xC00000}.get(platform.machine())


@contextlib.contextmanager
def towards_zero():
    """Numbers are rounded towards zero."""
    library = ctypes.CDLL(None)
    before = library.fegetround()
    assert library.fesetround(AWAY) == 0
    try:
        yield
    finally:
        library.fesetround(before)


@contextlib.contextmanager
def flushing():
    """Denormal numbers are zero, as torch.set_flush_denormal has it."""
    before, changed = threads._Environment(), threads._Environment()
    before.read()
    changed.read()
    register = ctypes.c_uint32.from_buffer(changed.state, 28)  # MXCSR in glibc's fenv_t
    register.value |= 0x8040
    changed.set()
    try:
        yield
    finally:
        before.set()


ENVIRONMENTS = [
    pytest.param(towards_zero, marks=pytest.mark.skipif(AWAY is None or os.name == "nt", reason="its name is unknown")),
    pytest.param(
        flushing, marks=pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="x86's")
    ),
]


def on_each_thread(compute):
    """What the caller and three helpers compute, each for itself."""
    results, together = [None] * 4, threading.Barrier(4)

    def part(p, parts):
        together.wait(60)
        results[p] = (threading.get_ident(), compute())

    threads.run(part, 4)
    assert len({thread for thread, _ in results}) == 4
    return [result for _, result in results]


def third_and_denormal():
    return (np.float32([1, 1e-20]) * np.float32([1 / 3, 1e-20])).tobytes() + (np.float32(1) / np.float32(-3)).tobytes()


@needs_environment
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_helpers_compute_as_their_caller_does(pool, environment):
    usual = third_and_denormal()
    with environment():
        expected = third_and_denormal()
        assert expected != usual
        assert on_each_thread(third_and_denormal) == [expected] * 4
    assert on_each_thread(third_and_denormal) == [usual] * 4


@needs_environment
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_bits_are_those_of_one_thread_in_any_environment(pool, environment):
    def small():
        layer = fastrnn.RNN(16, 96, nonlinearity="relu", seed=0)
        for name, array in layer.parameters.items():
            array *= np.float32(0 if "bias" in name else 1e-20)
        x = np.random.default_rng(0).standard_normal((8, 16, 16), np.float32) * np.float32(1e-19)
        return [layer(x[:, :batch])[0].tobytes() for batch in (16, 1)]

    usual = alone(small)
    with environment():
        expected = alone(small)
        assert expected != usual
        assert [small() for _ in range(5)] == [expected] * 5
    assert small() == usual


def test_the_variable_reaches_a_process():
    command = [sys.executable, "-c", "import fastrnn; fastrnn.get_num_threads()"]
    environment = {**os.environ, "FASTRNN_NUM_THREADS": str(10**9)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: FASTRNN_NUM_THREADS must be a whole number from 1 to")
