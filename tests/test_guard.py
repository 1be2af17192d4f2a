"""What looks at every call of a kernel while tests run, and sees what would write into somebody else's memory."""

import gc

import numpy as np
import pytest

from fastrnn import GRU, LSTM
from fastrnn.kernels import guard, native, records

pytestmark = pytest.mark.skipif(not guard.ENABLED, reason="FASTRNN_CHECK_CALLS is 0")


def x_of(T, B, I):
    return np.random.default_rng(0).standard_normal((T, B, I)).astype(np.float32)


def test_the_address_of_an_array_that_has_gone_is_an_error():
    layer, x = GRU(5, 7, seed=0), x_of(6, 2, 5)
    layer(x)
    (plan,) = layer._prepared[0]._plans
    gone = np.arange(2)
    plan.jobs.records["order"] = records.address(gone)
    del gone
    gc.collect()
    with pytest.raises(AssertionError, match="order is the address"):
        layer(x)


def test_anything_but_the_address_of_a_record_is_an_error():
    kernel = native.find("checksum", np.dtype(np.float32))
    for other in (np.zeros(3, np.float32), None, 3.0, np.int64(3)):
        with pytest.raises(AssertionError, match="checksum is called with"):
            kernel.function(*kernel.prefix, other)


OPTIONS = [{"recompute": True}, {"lengths": [6, 2]}, {"reset": np.eye(6, 2) > 0}, {}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_a_plan_that_is_kept_names_no_array_of_a_call(options):
    layer, x = GRU(5, 7, seed=0), x_of(6, 2, 5)
    output, _, tape = layer.forward(x, **options)
    layer.backward(tape, output)
    layer(x)
    (prepared,) = layer._prepared
    kept = [(plan, records.OF_A_CALL) for plan in prepared._plans]
    kept += [(plan, records.OF_A_BACK_CALL) for plan in prepared.back_plans]
    assert kept
    for plan, names in kept:
        for name in names:
            assert not plan.jobs.records[name].any(), name


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


@pytest.mark.parametrize("read_only", [0, 1])
def test_states_that_differ_in_flags(read_only):
    """A kernel has one form, whatever it is given."""
    layer, x = LSTM(5, 7, seed=0), x_of(6, 2, 5)
    state = np.ones((1, 2, 7), np.float32), np.ones((1, 2, 7), np.float32)
    expected = layer(x, state)[0].tobytes()
    state[read_only].flags.writeable = False
    for _ in range(2):
        assert layer(x, state)[0].tobytes() == expected
