"""Optimisers, schedules and clipping of the training kit, without a framework: definitions and bad input."""

import numpy as np
import pytest

from fastrnn import train

A = {"a": np.ones(3)}


def test_only_parameters_with_a_gradient_move():
    parameters = {"a": np.ones(3), "b": np.ones(2)}
    train.AdamW(0.1).step(parameters, {"a": np.ones(3)})
    assert (parameters["a"] < 1).all()
    np.testing.assert_array_equal(parameters["b"], np.ones(2))


def test_float32_stays():
    for make in (train.SGD, train.RMSprop, train.Adam, train.AdamW):
        parameters, optimizer = {"a": np.ones(3, np.float32)}, make(0.1)
        array = parameters["a"]
        optimizer.step(parameters, {"a": np.full(3, 0.5, np.float32)})
        assert parameters["a"] is array
        assert array.dtype == np.float32
        assert all(own["a"].dtype == np.float32 for own in optimizer.slots.values())


def test_the_variance_of_equal_gradients_is_not_negative():
    parameters, optimizer = {"a": np.zeros(50, np.float32)}, train.RMSprop(1e-6, alpha=0.5, centered=True)
    gradient = np.linspace(0.1, 3, 50).astype(np.float32)
    for _ in range(100):  # the variance becomes less than its rounding
        optimizer.step(parameters, {"a": gradient})
    assert np.isfinite(parameters["a"]).all()


def test_weight_decay_is_added_to_the_gradient():
    parameters = {"a": np.array([2.0])}
    train.SGD(0.1, weight_decay=0.5).step(parameters, {"a": np.array([0.0])})
    np.testing.assert_allclose(parameters["a"], 2.0 - 0.1 * 0.5 * 2.0)


def test_schedule_goes_with_the_updates():
    optimizer = train.SGD(train.StepDecay(1.0, every=2, factor=0.5))
    rates, parameters = [], {"a": np.zeros(1)}
    for _ in range(5):
        rates.append(optimizer.learning_rate)
        optimizer.step(parameters, {"a": np.ones(1)})
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25]
    np.testing.assert_allclose(parameters["a"], -sum(rates))


def test_warmup_of_a_plateau():
    schedule = train.Warmup(train.ReduceOnPlateau(1.0, factor=0.5, patience=0), steps=2, start=0.5)
    schedule.observe(1.0)
    schedule.observe(1.0)
    assert [schedule(step) for step in range(4)] == [0.25, 0.375, 0.5, 0.5]
    other = train.Warmup(train.ReduceOnPlateau(1.0, factor=0.5, patience=0), steps=2, start=0.5)
    other.restore(schedule.state())
    assert other(3) == 0.5


BAD = [
    (lambda: train.Adam(-1.0), ValueError, "rate is -1.0, expected a finite number at least 0"),
    (lambda: train.Adam("fast"), TypeError, "learning_rate is a str, expected a number"),
    (lambda: train.Adam(betas=0.9), TypeError, "betas is 0.9, expected two numbers"),
    (
        lambda: train.Adam(betas=(0.9, 1.0)),
        ValueError,
        r"betas\[1\] is 1.0, expected a finite number at least 0 and below",
    ),
    (lambda: train.SGD(momentum=1.0), ValueError, "momentum is 1.0"),
    (lambda: train.SGD(nesterov=True), ValueError, "nesterov is True with momentum=0"),
    (lambda: train.RMSprop(alpha=np.nan), ValueError, "alpha is nan"),
    (lambda: train.RMSprop(epsilon=0.0), ValueError, "epsilon is 0.0, expected a finite number above 0"),
    (lambda: train.RMSprop(centered=1), TypeError, "centered is 1, expected True or False"),
    (lambda: train.AdamW(weight_decay=-1), ValueError, "weight_decay is -1"),
    (lambda: train.Adam().step(A, {"b": A["a"]}), ValueError, "gradients hold 'b', and parameters do not"),
    (
        lambda: train.Adam().step(A, {"a": np.ones(2)}),
        ValueError,
        r"gradients\['a'\] has shape \(2,\), expected \(3,\)",
    ),
    (lambda: train.Cosine(0.1, steps=0), ValueError, "steps is 0"),
    (lambda: train.StepDecay(0.1, every=1, factor=0.0), ValueError, "factor is 0.0"),
    (lambda: train.Warmup(0.1, steps=3, start=2.0), ValueError, "start is 2.0, expected a finite number .* at most 1"),
    (lambda: train.ReduceOnPlateau(0.1, factor=1.0), ValueError, "factor is 1.0"),
    (lambda: train.clip_by_norm(A, 0.0), ValueError, "limit is 0.0"),
    (lambda: train.clip_by_value(A, -1.0), ValueError, "limit is -1.0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
    np.testing.assert_array_equal(A["a"], np.ones(3))
