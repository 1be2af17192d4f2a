"""Ctrl-C is answered within a fifth of a second, and leaves the arguments of the interrupted call as they were."""

import contextlib
import signal
import threading
import time

import numpy as np
import pytest

import fastrnn
from fastrnn import functional, testing
from fastrnn.kernels import threads

ANSWER = 0.2  # seconds


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer to play Ctrl-C with")
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_long_call_is_interrupted(training):
    assert threading.current_thread() is threading.main_thread()
    p = testing.problem("lstm", T=20_000, B=8, I=64, H=64, dtype="float32", seed=0)
    before = {name: value.copy() for name, value in p.params.items()} | {"x": p.x.copy()}
    fired = []

    def interrupt(*_):
        fired.append(time.perf_counter())
        raise KeyboardInterrupt

    def work():
        for _ in range(1000):
            _, _, tape = functional.forward("lstm", p.x, p.params, p.state, training=training)
            if training:
                functional.backward(tape, None, p.state)

    functional.forward("lstm", p.x[:1], p.params, p.state, training=training)  # compile first
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        with pytest.raises(KeyboardInterrupt):
            work()
        answered = time.perf_counter() - fired[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert answered < ANSWER
    for name, value in before.items():
        np.testing.assert_array_equal(p.x if name == "x" else p.params[name], value)
    # and the next call is right
    output, _, _ = functional.forward("lstm", p.x[:5], p.params, p.state)
    expected, _, _ = functional.forward("lstm", p.x[:5], p.params, p.state, backend="reference")
    testing.assert_close(output, expected, "output after an interruption")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer to play Ctrl-C with")
def test_interrupts_at_any_point_leave_nothing_behind():
    """No call waits for ever, the next one is right, and the other threads can be had again."""
    layer = fastrnn.LSTM(64, 128, seed=0)
    x = np.random.default_rng(0).standard_normal((60, 1, 64), np.float32)
    rows = np.random.default_rng(1).standard_normal((30, 32, 64), np.float32)
    expected = [layer(array)[0].tobytes() for array in (x, rows)]
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    random = np.random.default_rng(2)
    try:
        for _ in range(300):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-4, 4e-3))
                while True:
                    for array in (x, rows):
                        output, _, tape = layer.forward(array)
                        layer.backward(tape, output)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert [layer(array)[0].tobytes() for array in (x, rows)] == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert not threads._pool.taken_by
