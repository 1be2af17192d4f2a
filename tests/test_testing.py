"""What tests rely on: comparison and finite differences pass what is right and name what is wrong."""

import dataclasses

import numpy as np
import pytest

from fastrnn import functional
from fastrnn.kernels import reference
from fastrnn.testing import assert_close, gradcheck, problem, run

WRONG_PAIRS = [
    (1.0, 1.0001),
    (0.0, 1e-30),
    (np.nan, 1.0),
    (1.0, np.nan),
    (np.inf, 1.0),
    (1.0, np.inf),
    (np.inf, -np.inf),
    (1e308, -1e308),
]


@pytest.mark.parametrize(("actual", "expected"), WRONG_PAIRS)
def test_a_wrong_element_is_named(actual, expected):
    with pytest.raises(AssertionError, match=r"^h\[1, 0\] is .*, expected .*; 1 of 4 elements is wrong$"):
        assert_close(np.array([[0.5, 0], [actual, 0]]), np.array([[0.5, 0], [expected, 0]]), "h", scale=0)


def test_the_worst_element_is_named():
    with pytest.raises(AssertionError, match=r"^result\[2\] is 3.0, expected 1.0: .*; 2 of 3 elements are wrong$"):
        assert_close(np.array([1, 1.1, 3]), np.ones(3))


def test_a_wrong_shape_is_named():
    with pytest.raises(AssertionError, match=r"^h has shape \(3,\), expected \(1, 3\)$"):
        assert_close(np.ones(3), np.ones((1, 3)), "h")


def test_what_is_equal_or_rounded_agrees():
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-310])
    assert_close(special, special.copy())
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)))
    values = np.random.default_rng(0).standard_normal((100, 100))
    assert_close(values.astype(np.float32), values, terms=1)
    assert_close((values @ values).astype(np.float32), values.astype(np.float32) @ values.astype(np.float32), terms=100)


def test_tolerance_follows_the_dtype_the_length_and_the_scale():
    expected = np.array([1.0, 2.0])
    eps = np.finfo(np.float64).eps
    for terms, scale in [(1, 0), (100, 0), (1, 10), (10000, 3)]:
        allowed = 4 * np.sqrt(terms) * eps * (1 + scale)
        assert_close(np.array([1 + allowed / 2, 2]), expected, terms=terms, scale=scale)
        with pytest.raises(AssertionError):
            assert_close(np.array([1 + 2 * allowed, 2]), expected, terms=terms, scale=scale)
    assert_close(np.float32([1 + 3e-7, 2]), expected, terms=1, scale=0)
    with pytest.raises(AssertionError):
        assert_close(np.float32([1 + 6e-7, 2]), expected, terms=1, scale=0)


def test_problem_is_the_same_in_both_dtypes_and_new_for_another_seed():
    one, other, third = (problem("lstm", 4, 5, 2, 3, P=2, lengths=True, reset=True, dtype=d, seed=s)
                         for d, s in [("float32", 1), ("float64", 1), ("float64", 2)])  # fmt: skip
    for name in ("x", "d_output", "lengths", "reset"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name).astype(getattr(one, name).dtype))
        assert (getattr(other, name) != getattr(third, name)).any()
    assert {a.dtype for a in (one.x, one.d_output, *one.state, *one.d_state, *one.params.values())} == {np.dtype("f4")}
    assert set(one.lengths) >= {0, 4}
    np.testing.assert_array_equal(one.astype("float64").x, one.x)
    assert not np.shares_memory(other.astype("float64").x, other.x)
    assert one.astype("float64").reset.dtype == bool


def test_gradcheck_takes_names_modules_and_pairs():
    task = problem("gru", 3, 2, 2, 3)
    for backend in ("reference", reference, functional, (reference.forward, reference.backward)):
        gradcheck(backend, task)


def sabotaged(change):
    """The reference with wrong gradients."""

    def backward(tape, d_output, d_state):
        results = reference.backward(tape, d_output, d_state)
        change(*results)
        return results

    return reference.forward, backward


def swap_gates(array):
    first, second, *_ = np.split(array, 4)
    first[:], second[:] = second.copy(), first.copy()


WRONG_GRADIENTS = [
    ("dx", lambda dx, dparams, dstate: np.negative(dx, out=dx)),
    ("dx", lambda dx, dparams, dstate: np.multiply(dx, 1.00001, out=dx)),
    ("dx", lambda dx, dparams, dstate: dx.__setitem__(0, dx[1])),
    ("dx", lambda dx, dparams, dstate: dx.__setitem__((1, 1, 1), np.nan)),
    ("dweight_ih", lambda dx, dparams, dstate: swap_gates(dparams["weight_ih"])),
    ("dweight_hh", lambda dx, dparams, dstate: swap_gates(dparams["weight_hh"])),
    ("dweight_hh", lambda dx, dparams, dstate: dparams.update(weight_hh=dparams["weight_hh"].astype("f4"))),
    ("dweight_hr", lambda dx, dparams, dstate: dparams.update(weight_hr=dparams["weight_hr"].T.copy())),
    ("dbias_ih", lambda dx, dparams, dstate: swap_gates(dparams["bias_ih"])),
    ("dbias_hh", lambda dx, dparams, dstate: dparams["bias_hh"].fill(0)),
    ("dh", lambda dx, dparams, dstate: dstate[0].fill(0)),
    ("dc", lambda dx, dparams, dstate: np.add(dstate[1], 1e-4, out=dstate[1])),
]


@pytest.mark.parametrize(("name", "change"), WRONG_GRADIENTS)
def test_gradcheck_names_a_wrong_gradient(name, change):
    task = problem("lstm", 4, 3, 2, 4, P=2)
    with pytest.raises(AssertionError, match=rf"^{name}(\[| is )"):
        gradcheck(sabotaged(change), task)


def test_gradcheck_finds_a_forgotten_gradient_of_the_state():
    def backward(tape, d_output, d_state):
        return reference.backward(tape, d_output, None)

    with pytest.raises(AssertionError, match=r"^dx"):
        gradcheck((reference.forward, backward), problem("rnn_tanh", 3, 2, 2, 3))


def test_gradcheck_leaves_its_problem_as_it_was():
    task = problem("rnn_relu", 3, 2, 2, 3, dtype="float64")
    before = task.astype("float64")
    gradcheck("reference", task)
    assert_same_inputs(task, before)


def assert_same_inputs(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_equal(a, b)


def test_run_gives_every_result():
    task = problem("lstm", 3, 2, 2, 4, P=2)
    shapes = {name: array.shape for name, array in run("reference", task).items()}
    assert shapes == {
        "output": (3, 2, 2), "h": (2, 2), "c": (2, 4), "dx": (3, 2, 2), "dweight_ih": (16, 2), "dweight_hh": (16, 2),
        "dbias_ih": (16,), "dbias_hh": (16,), "dweight_hr": (2, 4), "dh": (2, 2), "dc": (2, 4),
    }  # fmt: skip
