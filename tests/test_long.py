"""Long sequences: the end of 100 000 steps is as right as the beginning."""

import numpy as np
import pytest

from fastrnn import functional, testing

T = 100_000


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_a_hundred_thousand_steps(reverse):
    p = testing.problem("gru", T=T, B=1, I=2, H=3, dtype="float64", seed=0)
    results = {}
    for backend in ("cpu", "reference"):
        output, state, tape = functional.forward(
            "gru", p.x, p.params, p.state, reverse=reverse, training=True, backend=backend
        )
        dx, dparams, dstate = functional.backward(tape, p.d_output, p.d_state)
        results[backend] = {"output": output, "h": state[0], "dx": dx, "dh": dstate[0], **dparams}
    for name, expected in results["reference"].items():
        testing.assert_close(results["cpu"][name], expected, name, terms=T)


def test_the_tail_has_the_bits_of_a_run_of_its_own():
    p = testing.problem("lstm", T=T, B=2, I=3, H=5, dtype="float32", seed=1)
    output, state, _ = functional.forward("lstm", p.x, p.params, p.state)
    _, before, _ = functional.forward("lstm", p.x[:-100], p.params, p.state)
    tail, after, _ = functional.forward("lstm", p.x[-100:], p.params, before)
    np.testing.assert_array_equal(output[-100:], tail)
    np.testing.assert_array_equal(state[1], after[1])
