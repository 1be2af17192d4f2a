"""Losses, decoding and metrics of the training kit, without a framework: definitions, brute force, bad input."""

import functools
import itertools
import math

import numpy as np
import pytest

from fastrnn import train


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def slopes(loss, output, step=1e-5):
    """The gradient of a loss by differences of its values."""
    found = np.empty_like(output)
    for index in np.ndindex(output.shape):
        values = []
        for sign in (1, -1):
            moved = output.copy()
            moved[index] += sign * step
            values.append(loss(moved).value)
        found[index] = (values[0] - values[1]) / (2 * step)
    return found


MASK = np.random.default_rng(5).random((4, 3)) < 0.6
LABELS = np.random.default_rng(6).integers(0, 5, (4, 3))
CASES = {
    "cross-entropy": (train.CrossEntropy(), LABELS, {}),
    "cross-entropy, lengths and mask": (train.CrossEntropy(), LABELS, {"lengths": [3, 1, 0, 2], "mask": MASK}),
    "cross-entropy, weights": (train.CrossEntropy(2, [0.5, 2, 0, 1, 3]), LABELS, {"mask": MASK}),
    "mean squared error": (train.MeanSquaredError(), numbers(4, 3, 5), {}),
    "mean squared error, lengths": (train.MeanSquaredError(), numbers(4, 3, 5), {"lengths": [3, 1, 0, 2]}),
    "mean squared error, mask of steps": (train.MeanSquaredError(), numbers(4, 3, 5), {"mask": MASK}),
    "binary": (train.BinaryCrossEntropy(3.0), LABELS[..., None] > np.arange(5), {"lengths": [3, 1, 0, 2]}),
    "ctc": (train.CTC(1), np.array([[2, 2, -1], [0, -1, -1], [-1, -1, -1], [4, 3, -1]]), {"lengths": [3, 1, 0, 2]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("time_first", [False, True])
def test_gradient_by_differences(case, time_first):
    loss, targets, options = CASES[case]
    output = 2 * numbers(4, 3, 5, seed=1)
    if time_first:  # the layers' order in memory
        output = np.ascontiguousarray(output.swapaxes(0, 1)).swapaxes(0, 1)
    found = loss(output, targets, **options)
    # the differences are off by about 1e-10: the step squared, and rounding by the step
    np.testing.assert_allclose(found.gradient, slopes(lambda o: loss(o, targets, **options), output), atol=1e-8)
    plain = loss(np.array(output, order="C"), targets, **options)
    assert found.value == pytest.approx(plain.value, rel=1e-14)
    np.testing.assert_allclose(found.gradient, plain.gradient, rtol=1e-13, atol=1e-16)
    assert found.gradient.shape == output.shape


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    loss, targets, options = CASES[case]
    output = numbers(4, 3, 5, seed=1)
    kept = output.copy()
    found, expected = loss(output.astype(np.float32), targets, **options), loss(output, targets, **options)
    np.testing.assert_array_equal(output, kept)
    assert found.gradient.dtype == np.float32
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    np.testing.assert_allclose(found.gradient, expected.gradient, atol=1e-6)


@pytest.mark.parametrize("case", ["cross-entropy, lengths and mask", "mean squared error, lengths"])
def test_what_does_not_count_may_hold_anything(case):
    loss, targets, options = CASES[case]
    output = numbers(4, 3, 5, seed=1)
    expected = loss(output, targets, **options)
    output[2] = np.nan
    output[1, 1:] = np.inf
    with np.errstate(invalid="ignore"):
        found = loss(output, targets, **options)
    assert found.value == expected.value
    np.testing.assert_array_equal(found.gradient, expected.gradient)


def test_nothing_counts():
    value, gradient, terms = train.CrossEntropy(ignore_index=1)(numbers(2, 3), np.array([1, 1]))
    assert (value, terms) == (0.0, 0.0)
    assert not gradient.any()
    value, gradient, terms = train.MeanSquaredError()(numbers(2, 3, 1), numbers(2, 3, 1), lengths=[0, 0])
    assert (value, terms) == (0.0, 0.0)
    assert not gradient.any()


def test_large_logits():
    value, gradient, _ = train.CrossEntropy()(np.array([[1e4, -1e4]]), np.array([1]))
    assert value == 2e4
    np.testing.assert_array_equal(gradient, [[1, -1]])
    value, gradient, _ = train.BinaryCrossEntropy()(np.array([[1e4, -1e4]]), np.array([[1, 1]]))
    assert value == 5e3
    np.testing.assert_array_equal(gradient, [[0, -0.5]])
    np.testing.assert_array_equal(train.softmax(np.array([1e4, 0.0])), [1, 0])
    np.testing.assert_array_equal(train.log_softmax(np.array([1e4, 0.0])), [0, -1e4])


# ---- CTC by counting every path


def paths(logits, blank):
    """The probability of every labelling: the sum over all of its paths."""
    probabilities = train.softmax(logits.astype(float))
    T, K = logits.shape
    found = {}
    for path in itertools.product(range(K), repeat=T):
        labels = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)
        found[labels] = found.get(labels, 0.0) + math.prod(probabilities[t, k] for t, k in enumerate(path))
    return found


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_by_counting_paths(blank):
    logits = 2 * numbers(5, 3, seed=7)
    every = paths(logits, blank)
    assert sum(every.values()) == pytest.approx(1.0)
    for labels, probability in every.items():
        found = train.CTC(blank)(logits[None], np.array([labels], np.int64).reshape(1, -1))
        assert found.value * max(len(labels), 1) == pytest.approx(-math.log(probability), rel=1e-12)


def test_rows_without_steps():
    from fastrnn.kernels import train as kernels

    losses, gradient = np.full(3, np.nan), np.full((2, 3, 2), np.nan)
    labels, zero = np.array([[1], [1], [1]]), np.zeros(3, np.int64)
    kernels.ctc(np.log(np.full((2, 3, 2), 0.5)), labels, zero, np.array([0, 1, 0]), 0, losses, gradient)
    np.testing.assert_array_equal(losses, [0, np.inf, 0])
    assert not gradient.any()
    value, gradient, _ = train.CTC(zero_infinity=True)(numbers(3, 2, 2), [[1], [1], [-1]], lengths=[0, 0, 0])
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("seed", range(5))
def test_decoding_by_counting_paths(seed):
    logits = numbers(5, 3, seed=seed)
    every = paths(logits, 0)
    best = list(max(every, key=every.get))
    assert train.ctc_beam(logits[None], beam=1000) == [best]  # nothing is dropped: the search is complete
    path = [symbol for symbol, _ in itertools.groupby(logits.argmax(axis=-1)) if symbol]
    assert train.ctc_greedy(logits[None]) == [path]


def test_beam_finds_what_greedy_does_not():
    wins = 0
    for seed in range(30):
        logits = numbers(6, 3, seed=seed)
        every = paths(logits, 0)
        greedy, beam = (tuple(decode(logits[None])[0]) for decode in (train.ctc_greedy, train.ctc_beam))
        assert every[beam] >= every[greedy]
        wins += every[beam] > every[greedy]
    assert wins > 5


def test_decoding_with_lengths():
    logits = np.eye(4)[np.array([[1, 1, 2, 3], [3, 3, 3, 3], [2, 0, 2, 1]])] * 9
    for decode in (train.ctc_greedy, train.ctc_beam):
        assert decode(logits, [3, 0, 4]) == [[1, 2], [], [2, 2, 1]]
    assert train.ctc_greedy(logits, [3, 0, 4], blank=2) == [[1], [], [0, 1]]


# ---- metrics


def test_metrics_as_in_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    random = np.random.default_rng(0)
    for classes, predicted in ((2, 2), (5, 5), (5, 3)):  # of three, two labels are never predicted
        y, guess = random.integers(0, classes, 200), random.integers(0, predicted, 200)
        assert train.accuracy(y, guess) == pytest.approx(metrics.accuracy_score(y, guess))
        for average in ["macro", "micro", None, *(["binary"] if classes == 2 else [])]:
            for ours, theirs in (
                (train.precision, metrics.precision_score),
                (train.recall, metrics.recall_score),
                (train.f1, metrics.f1_score),
            ):
                expected = theirs(y, guess, average=average, zero_division=0)
                np.testing.assert_allclose(ours(y, guess, average), expected, rtol=1e-12)
    a, b = numbers(50), numbers(50, seed=1)
    assert train.mean_squared_error(a, b) == pytest.approx(metrics.mean_squared_error(a, b))
    assert train.mean_absolute_error(a, b) == pytest.approx(metrics.mean_absolute_error(a, b))


def test_errors_of_numbers_without_a_sign():
    for dtype in (np.uint8, np.bool_):
        a, b = np.array([0, 1, 1], dtype), np.array([1, 0, 1], dtype)
        assert train.mean_squared_error(a, b) == train.mean_absolute_error(a, b) == 2 / 3


def test_edit_distance_by_recursion():
    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    random = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(random.choice(list("abc"), random.integers(0, 8))) for _ in range(2))
        assert train.edit_distance(a, b) == distance(a, b)


def test_error_rates():
    assert train.word_error_rate(["a b c d", "e"], ["a c d", "f g"]) == 3 / 5
    assert train.error_rate([[1, 2], [3]], [[1, 2], []]) == 1 / 3
    assert train.perplexity(1e9) == math.inf


# ---- bad input

O = np.zeros((2, 3, 4))
Y = np.zeros((2, 3), int)
BAD = [
    (lambda: train.CrossEntropy()(O, Y + 4), ValueError, r"targets\[0, 0\] is 4, expected 0 to 3"),
    (lambda: train.CrossEntropy(-7)(O, Y - 1), ValueError, r"targets\[0, 0\] is -1, expected 0 to 3, or -7"),
    (lambda: train.CrossEntropy()(O, Y.astype(float)), TypeError, "targets has dtype float64, expected integers"),
    (lambda: train.CrossEntropy()(O, Y[:, :2]), ValueError, r"targets have shape \(2, 2\), expected \(2, 3\)"),
    (lambda: train.CrossEntropy(weight=[1.0, 2.0])(O, Y), ValueError, "weight has 2 entries, expected 4"),
    (lambda: train.CrossEntropy(weight=[1.0, -2.0]), ValueError, "weight must be a list of finite numbers"),
    (lambda: train.CrossEntropy(ignore_index=0.5), TypeError, "ignore_index is 0.5, expected an integer"),
    (lambda: train.CrossEntropy()(O, Y, [3, 4]), ValueError, r"lengths\[1\] is 4, expected 0 to T = 3"),
    (lambda: train.CrossEntropy()(O[:, 0], Y[:, 0], [3, 3]), ValueError, "lengths are given for targets of shape"),
    (lambda: train.CrossEntropy()(O, Y, mask=Y), TypeError, "mask has dtype int64, expected bool"),
    (lambda: train.CrossEntropy()(O, Y, mask=Y[:, :1] > 0), ValueError, r"mask has shape \(2, 1\)"),
    (lambda: train.CrossEntropy()(O.tolist(), Y), TypeError, "output is a list, expected a NumPy array"),
    (lambda: train.CrossEntropy()(O[..., :0], Y), ValueError, "expected a last axis that is not empty"),
    (lambda: train.MeanSquaredError()(O, Y), ValueError, r"targets have shape \(2, 3\), expected \(2, 3, 4\)"),
    (lambda: train.MeanSquaredError()(O, O.astype(str)), TypeError, "targets have dtype <U32, expected numbers"),
    (lambda: train.BinaryCrossEntropy()(O, O + 1.5), ValueError, r"targets\[0, 0, 0\] is 1.5, expected 0 to 1"),
    (lambda: train.BinaryCrossEntropy(0.0), ValueError, "positive_weight is 0.0, expected a finite number above 0"),
    (lambda: train.CTC()(O, np.array([[1, 1], [2, 0]])), ValueError, r"targets\[1\] holds the blank, 0"),
    (lambda: train.CTC()(O, np.array([[1, -1, 1], [2, 1, -1]])), ValueError, r"targets\[0\] has a label after a neg"),
    (lambda: train.CTC()(O, np.array([[1, 2], [4, 1]])), ValueError, r"targets\[1, 0\] is 4, expected 0 to 3"),
    (
        lambda: train.CTC()(O, np.array([[1, 2, 3], [1, 1, 2]])),
        ValueError,
        r"targets\[1\] has 3 labels, of which 1 rep",
    ),
    (lambda: train.CTC()(O, Y[0]), TypeError, r"targets are int64 \(3,\), expected integers \(B, S\)"),
    (lambda: train.CTC()(O, Y[:1] + 1), ValueError, "targets have 1 rows, expected B = 2"),
    (lambda: train.CTC(4)(O, Y + 1), ValueError, "blank is 4, expected one of the output's 4 symbols"),
    (lambda: train.CTC()(O[0], Y), ValueError, r"output has shape \(3, 4\)"),
    (lambda: train.ctc_beam(O, beam=0), ValueError, "beam is 0, expected an integer of 1 or more"),
    (lambda: train.ctc_greedy(O, [1]), ValueError, r"lengths has shape \(1,\), expected \(2,\)"),
    (lambda: train.ctc_greedy(O, blank=4), ValueError, "blank is 4, expected one of the 4 symbols of logits"),
    (lambda: train.accuracy([], []), ValueError, r"targets have shape \(0,\), expected at least one element"),
    (lambda: train.accuracy([1, 2], [1]), ValueError, r"predictions have shape \(1,\), expected \(2,\)"),
    (lambda: train.f1([1, 2], [1, 2], "all"), ValueError, "average is 'all', expected 'binary'"),
    (lambda: train.error_rate(["a"], []), ValueError, "there are 0 predictions, expected 1"),
    (lambda: train.error_rate([""], [""]), ValueError, "the targets are empty"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
