"""exp, sigmoid and tanh of vectors: within 2 units in the last place over float32; saturating; NaN stays NaN."""

import numpy as np
import pytest
from numba import njit

from fastrnn.kernels import cells, simd


@njit(error_model="numpy")
def exp(x, y):
    for i in range(0, len(x), simd.lanes(x)):
        simd.store(y, i, simd.exp(simd.load(x, i, len(x) - i)), len(x) - i)


@njit(error_model="numpy")
def sigmoid(x, y):
    for i in range(0, len(x), simd.lanes(x)):
        simd.store(y, i, cells.sigmoid(simd.load(x, i, len(x) - i)), len(x) - i)


@njit(error_model="numpy")
def tanh(x, y):
    for i in range(0, len(x), simd.lanes(x)):
        simd.store(y, i, cells.tanh(simd.load(x, i, len(x) - i)), len(x) - i)


def true_sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


FUNCTIONS = {"exp": (exp, np.exp), "sigmoid": (sigmoid, true_sigmoid), "tanh": (tanh, np.tanh)}


def distance(a, b):
    """Numbers of the format between a and b, which are both finite."""
    integer = np.int32 if a.dtype == np.float32 else np.int64

    def place(x):
        bits = x.view(integer)
        return np.where(bits < 0, np.iinfo(integer).min - bits, bits).astype(np.int64)

    return np.abs(place(a) - place(b))


def check(name, x, wider, ulps):
    function, truth = FUNCTIONS[name]
    y = np.empty_like(x)
    function(x, y)
    with np.errstate(all="ignore"):
        expected = truth(x.astype(wider)).astype(x.dtype)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(y[~finite], expected[~finite])
    apart = distance(y[finite], expected[finite])
    worst = int(np.argmax(apart))
    assert apart[worst] <= ulps, f"{name}({x[finite][worst]}) = {y[finite][worst]}, not {expected[finite][worst]}"
    return apart


def every_float32(stride):
    """Every stride-th bit pattern, and the neighbours of every power of two; no NaN."""
    patterns = np.arange(0, 2**32, stride, dtype=np.int64).astype(np.uint32)
    exponents = np.arange(0, 2**32, 2**23, dtype=np.int64)
    near = ((exponents[:, None] + np.arange(-4, 5)) % 2**32).astype(np.uint32).ravel()
    x = np.concatenate([patterns, near]).view(np.float32)
    return x[~np.isnan(x)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_of_float32(name):
    x = every_float32(stride=509)  # a prime: all mantissas come by
    apart = check(name, x, np.float64, ulps=2)
    assert apart.max() > 0  # exact everywhere would mean that nothing was compared


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(name):
    rng = np.random.default_rng(0)
    small = 10.0 ** rng.uniform(-300, 2, 100_000) * rng.choice([-1, 1], 100_000)
    x = np.concatenate([rng.uniform(-745, 709, 200_000), 3 * rng.standard_normal(200_000), small])
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no number format wider than float64 to compare with on this machine")
    check(name, x, np.longdouble, ulps=3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ends_of_the_range(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30], dtype)
    results = {}
    for name, (function, _) in FUNCTIONS.items():
        results[name] = np.empty_like(x)
        function(x, results[name])
    np.testing.assert_array_equal(results["exp"], [np.nan, np.inf, 0, 1, 1, np.inf, 0])
    np.testing.assert_array_equal(results["sigmoid"], [np.nan, 1, 0, 0.5, 0.5, 1, 0])
    np.testing.assert_array_equal(results["tanh"], [np.nan, 1, -1, 0, 0, 1, -1])
    assert np.signbit(results["tanh"][4])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_is_odd_and_exact_near_zero(dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.concatenate([np.random.default_rng(1).standard_normal(1000), [1e-20, tiny]]).astype(dtype)
    plus, minus = np.empty_like(x), np.empty_like(x)
    tanh(x, plus)
    tanh(-x, minus)
    np.testing.assert_array_equal(plus, -minus)
    np.testing.assert_array_equal(plus[-2:], x[-2:])


def test_the_plain_functions_agree():
    """What the cells' formulas do as plain Python, the vectors do."""
    x = np.linspace(-30, 30, 101)
    for name, plain in (("sigmoid", cells.sigmoid), ("tanh", cells.tanh)):
        y = np.empty_like(x)
        FUNCTIONS[name][0](x, y)
        np.testing.assert_allclose(y, [plain(v) for v in x], rtol=1e-14)
