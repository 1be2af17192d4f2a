"""What looks at every call of a kernel while tests run, and sees what would write into somebody else's memory."""

import gc

import numpy as np
import pytest

from fastrnn import GRU
from fastrnn.kernels import cpu, guard, stage
from fastrnn.kernels.walk import OF_A_CALL

pytestmark = pytest.mark.skipif(not guard.ENABLED, reason="FASTRNN_CHECK_CALLS is 0")


def x_of(T, B, I):
    return np.random.default_rng(0).standard_normal((T, B, I)).astype(np.float32)


def test_the_address_of_an_array_that_has_gone_is_an_error():
    layer, x = GRU(5, 7, seed=0), x_of(6, 2, 5)
    layer(x)
    (plan,) = layer._prepared[0]._plans
    gone = np.empty(6 * 2 * 4 * 7, np.float32)
    plan.jobs["tape"] = cpu._address(gone)
    layer(x)
    del gone
    gc.collect()
    with pytest.raises(AssertionError, match="tape is the address"):
        layer(x)


def test_an_argument_of_another_type_is_an_error():
    one = np.zeros(3, np.float32)
    stage.call(cpu.address, np.dtype(np.float32), stage.SOURCE, one)
    for other in (one[None], one.astype(np.float64), 3):
        with pytest.raises(AssertionError, match="argument 1 of address is"):
            stage.call(cpu.address, np.dtype(np.float32), stage.SOURCE, other)


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"lengths": [6, 2]}, {"reset": np.eye(6, 2) > 0}, {}], ids=str
)
def test_a_plan_that_is_kept_names_no_array_of_a_call(options):
    layer, x = GRU(5, 7, seed=0), x_of(6, 2, 5)
    output, _, tape = layer.forward(x, **options)
    layer.backward(tape, output)
    layer(x)
    for plan in layer._prepared[0]._plans:
        for name in OF_A_CALL:
            assert not plan.jobs[name].any(), name


def test_calls_after_recompute_write_into_no_memory_that_was_freed():
    layer, x = GRU(16, 24, seed=0), x_of(10, 4, 16)
    expected, expected_step = layer(x)[0].copy(), layer.step(x[0])[0].copy()
    for _ in range(50):
        output, _, tape = layer.forward(x, recompute=True)
        layer.backward(tape, output)
        assert layer(x)[0].tobytes() == expected.tobytes()
        output, _, tape = layer.forward(x[:1], recompute=True)
        layer.backward(tape, output)
        assert layer.step(x[0])[0].tobytes() == expected_step.tobytes()


def test_arrays_that_differ_in_flags_are_one_type():
    """As the process's first call of a kernel, too: a tuple with one read-only array in it."""
    first, second = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
    second.flags.writeable = False
    types_of = [stage._of_any_flags(stage.typeof(pair)) for pair in ((first, second), (second, first), (first, first))]
    assert types_of[0] == types_of[1] == types_of[2]
