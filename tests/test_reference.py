"""The NumPy reference: every gradient against finite differences, and every option against what it is defined by."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from fastrnn.testing import assert_close, gradcheck, problem, run

T, B, I, H = 6, 4, 3, 5

CELLS = [
    pytest.param("rnn_tanh", 0, id="rnn_tanh"),
    pytest.param("rnn_relu", 0, id="rnn_relu"),
    pytest.param("rnn_sigmoid", 0, id="rnn_sigmoid"),
    pytest.param("lstm", 0, id="lstm"),
    pytest.param("lstm", 2, id="lstm_projected"),
    pytest.param("gru", 0, id="gru"),
    pytest.param("gru_reset_before", 0, id="gru_reset_before"),
]
each_cell = pytest.mark.parametrize(("cell", "P"), CELLS)
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])

OPTIONS = [
    {},
    {"bias": False},
    {"lengths": True},
    {"reset": True},
    {"bias": False, "lengths": True, "reset": True},
]


def task(cell, P, **options):
    return problem(cell, T, B, I, H, P=P, dtype="float64", **options)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_close(actual[name], array, name)


@each_cell
@each_direction
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_gradients_are_differences(cell, P, reverse, options):
    gradcheck("reference", task(cell, P, reverse=reverse, **options))


@each_cell
@pytest.mark.parametrize("without", ["d_output", "d_state"])
def test_gradients_of_a_part_are_differences(cell, P, without):
    gradcheck("reference", dataclasses.replace(task(cell, P, lengths=True), **{without: None}))


@each_cell
def test_reverse_is_forward_on_flipped_time(cell, P):
    one = task(cell, P, reset=True)
    flipped = dataclasses.replace(one, x=one.x[::-1], reset=one.reset[::-1], d_output=one.d_output[::-1], reverse=True)
    results = run("reference", flipped)
    for name in ("output", "dx"):
        results[name] = results[name][::-1]
    assert_same(results, run("reference", one))


@each_cell
@each_direction
def test_lengths_are_rows_one_by_one(cell, P, reverse):
    whole = task(cell, P, reverse=reverse, lengths=[4, 0, 6, 1], reset=True)
    rows = [row_of(whole, b) for b in range(B)]
    expected = {}
    for name in rows[0]:
        if name in ("output", "dx"):
            padded = [np.pad(row[name], [(0, T - len(row[name])), (0, 0), (0, 0)]) for row in rows]
            expected[name] = np.concatenate(padded, axis=1)
        elif name in ("h", "c", "dh", "dc"):
            expected[name] = np.concatenate([row[name] for row in rows])
        else:
            expected[name] = sum(row[name] for row in rows)
    assert_same(run("reference", whole), expected)


def row_of(whole, b):
    """What row b alone gives, cut to its length."""
    steps, rows = slice(whole.lengths[b]), slice(b, b + 1)
    return run(
        "reference",
        dataclasses.replace(
            whole,
            x=whole.x[steps, rows],
            reset=whole.reset[steps, rows],
            d_output=whole.d_output[steps, rows],
            lengths=None,
            state=tuple(s[rows] for s in whole.state),
            d_state=tuple(s[rows] for s in whole.d_state),
        ),
    )


def cut(whole, steps, state, d_state):
    """Some steps of a problem."""
    return dataclasses.replace(whole, x=whole.x[steps], d_output=whole.d_output[steps], state=state, d_state=d_state)


def joined(early, late, first, last):
    """The results of a whole problem from those of its two parts; `first` is the part that is walked first."""
    expected = {name: early[name] + late[name] for name in early if name.startswith(("dweight", "dbias"))}
    expected |= {name: np.concatenate([early[name], late[name]]) for name in ("output", "dx")}
    expected |= {name: last[name] for name in ("h", "c") if name in last}
    return expected | {name: first[name] for name in ("dh", "dc") if name in first}


@each_cell
@each_direction
def test_chunks_are_the_whole_with_the_state_carried(cell, P, reverse):
    whole = task(cell, P, reverse=reverse)
    parts = [slice(0, 2), slice(2, T)]
    first_steps, last_steps = reversed(parts) if reverse else parts
    state = end_of(cut(whole, first_steps, whole.state, whole.d_state))
    last = run("reference", cut(whole, last_steps, state, whole.d_state))
    d_state = tuple(last[name] for name in ("dh", "dc") if name in last)
    first = run("reference", cut(whole, first_steps, whole.state, d_state))
    early, late = (last, first) if reverse else (first, last)
    assert_same(run("reference", whole), joined(early, late, first, last))


def end_of(part):
    results = run("reference", part)
    return tuple(results[name] for name in ("h", "c") if name in results)


@each_cell
@each_direction
def test_reset_is_a_new_run(cell, P, reverse):
    reset = np.zeros((T, B), bool)
    reset[2] = True
    whole = task(cell, P, reverse=reverse, reset=reset)
    plain = dataclasses.replace(whole, reset=None)
    zero = tuple(np.zeros_like(s) for s in whole.state)
    # step 2 is the first of the second run, whichever way time is walked
    parts = [slice(0, 3), slice(3, T)] if reverse else [slice(0, 2), slice(2, T)]
    first_steps, last_steps = reversed(parts) if reverse else parts
    first = run("reference", cut(plain, first_steps, whole.state, None))
    last = run("reference", cut(plain, last_steps, zero, whole.d_state))
    early, late = (last, first) if reverse else (first, last)
    assert_same(run("reference", whole), joined(early, late, first, last))


@each_cell
def test_reset_of_one_row_leaves_the_others(cell, P):
    reset = np.zeros((T, B), bool)
    reset[3, 1] = True
    with_reset, without = (run("reference", task(cell, P, reset=r)) for r in (reset, False))
    others = [0, 2, 3]
    assert_close(with_reset["output"][:, others], without["output"][:, others])
    assert_close(with_reset["dx"][:, others], without["dx"][:, others])
    assert_close(with_reset["output"][:3], without["output"][:3])
    assert np.abs(with_reset["output"][3, 1] - without["output"][3, 1]).max() > 1e-3
    assert np.abs(with_reset["dx"][2, 1] - without["dx"][2, 1]).max() > 1e-3


@each_cell
def test_float32_is_computed_in_float32(cell, P):
    options = {"lengths": True, "reset": True, "P": P}
    results, expected = (run("reference", problem(cell, T, B, I, H, dtype=d, **options)) for d in ("f4", "f8"))
    for name, array in expected.items():
        assert results[name].dtype == np.float32
        assert_close(results[name], array, name, scale=1)


def test_it_stands_alone():
    code = "import sys, fastrnn.kernels.reference; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fastrnn.kernels.reference" in modules
    assert not {"fastrnn.kernels.cells", "fastrnn.kernels.cpu", "numba"} & set(modules)


@each_cell
@each_direction
@pytest.mark.parametrize("sizes", [(6, 5, 3, 1), (6, 5, 1, 4), (4, 1, 1, 1), (6, 3, 1, 1), (5, 40, 2, 1)], ids=str)
def test_float32_is_float64_rounded(cell, P, reverse, sizes):
    """Sizes of 1 are where the gates' columns are strided views, and NumPy takes other loops."""
    for width in {P, min(P, 1)}:
        one = problem(cell, *sizes, P=width, lengths=True, reset=True, reverse=reverse)
        results, expected = run("reference", one), run("reference", one.astype("float64"))
        for name, array in expected.items():
            # Sums over all rows and steps; the states' rounding errors are passed on from step to step.
            assert_close(results[name], array, name, terms=4 * sizes[0] * sizes[1], scale=1)
