"""Ctrl-C is answered within a fifth of a second, and leaves the arguments of the interrupted call as they were."""

import signal
import threading
import time

import numpy as np
import pytest

from fastrnn import functional, testing

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
