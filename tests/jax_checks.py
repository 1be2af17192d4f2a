"""The checks of fastrnn.jax, which tests/test_jax.py runs in a process of their own, away from tests that fork.

Outside oracles: fastrnn's reference in float64, and layers that are written here with jax.lax.scan and that JAX
differentiates.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import contextlib
import doctest
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import fastrnn
import fastrnn.jax as ours
from fastrnn import functional, stack
from fastrnn.kernels import cpu

jax.config.update("jax_enable_x64", True)

T, B, I, H = 6, 3, 5, 7
XLA_ERRORS = ValueError, jax.errors.JaxRuntimeError  # either, as JAX likes
# Sums in another order: of some hundred numbers of the order of 1, and their gradients.
TOLERANCE = {np.float64: {"rtol": 1e-9, "atol": 1e-11}, np.float32: {"rtol": 5e-4, "atol": 5e-5}}

CELLS = {
    "rnn-tanh": ("rnn", {"nonlinearity": "tanh"}),
    "rnn-relu": ("rnn", {"nonlinearity": "relu"}),
    "rnn-sigmoid": ("rnn", {"nonlinearity": "sigmoid"}),
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "gru-reset-before": ("gru", {"reset_after": False}),
}
each_cell = pytest.mark.parametrize("cell", CELLS)
STACKS = [
    {},
    {"bias": False},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "proj_size": 4},
    {"bidirectional": True, "proj_size": 3, "bias": False},
]


@pytest.fixture(params=["native", "callback"])
def way(request, monkeypatch):
    """Both ways to the kernels."""
    if request.param == "callback":
        monkeypatch.setattr(ours, "_native", lambda: False)
    else:
        assert ours._native()
    jax.clear_caches()
    ours._compiled.cache_clear()
    yield request.param
    jax.clear_caches()
    ours._compiled.cache_clear()


def function(cell):
    kind, options = CELLS[cell]
    return lambda *args, **more: getattr(ours, kind)(*args, **options, **more)


def listed(state):
    return list(state) if isinstance(state, (tuple, list)) else [state]


class Problem:
    """Random arguments of a stack of layers."""

    def __init__(self, cell, dtype=np.float64, sizes=(T, B, I, H), seed=0, **stack):
        self.cell, self.kind, self.dtype, self.sizes, self.stack = cell, CELLS[cell][0], dtype, sizes, stack
        self.random = np.random.default_rng(seed)
        steps, batch, inputs, hidden = sizes
        self.params = ours.init(self.kind, jax.random.key(seed), inputs, hidden, dtype=dtype, **stack)
        self.W, D = stack.get("proj_size", 0) or hidden, 1 + stack.get("bidirectional", False)
        self.K = stack.get("num_layers", 1) * D
        self.x = self.normal(steps, batch, inputs)
        h = self.normal(self.K, batch, self.W)
        self.state = (h, self.normal(self.K, batch, hidden)) if cell == "lstm" else h
        self.d_output = self.normal(steps, batch, D * self.W)
        self.d_state = [self.normal(*s.shape) for s in listed(self.state)]

    def normal(self, *shape):
        return jnp.asarray(self.random.standard_normal(shape).astype(self.dtype))

    def loss(self, layer, results=False, **options):
        def loss(x, state, params):
            output, last = layer(x, state, params, **options)
            total = (output * self.d_output).sum()
            total += sum((s * d).sum() for s, d in zip(listed(last), self.d_state, strict=True))
            return (total, (output, last)) if results else total

        return loss

    def results(self, layer, **options):
        """Output, last states, and the gradients of x, the states and the parameters."""
        run = jax.jit(jax.grad(self.loss(layer, results=True, **options), argnums=(0, 1, 2), has_aux=True))
        gradients, results = run(self.x, self.state, self.params)
        return jax.tree.leaves((results, gradients))

    def reference(self, lengths=None, reset=None):
        """The same of fastrnn's reference in float64."""
        kind, options = CELLS[self.cell]
        layer = getattr(fastrnn, kind.upper())(
            *self.sizes[2:], **self.stack, **options, dtype="float64", backend="reference"
        )
        layer.parameters.update({name: np.asarray(value, np.float64) for name, value in self.params.items()})
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (self.x, self.state, self.d_output, self.d_state))
        x, state, d_output, d_state = wide
        output, last, tape = layer.forward(x, state, lengths=lengths, reset=reset)
        gradients = layer.backward(tape, d_output, tuple(d_state) if self.cell == "lstm" else d_state[0])
        named = {name: gradients.params[name] for name in self.params}
        return [output, *listed(last), *jax.tree.leaves((gradients.x, gradients.state, named))]


def compare(actual, expected, dtype=np.float64):
    assert len(actual) == len(expected)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == dtype
        np.testing.assert_allclose(one, other, **TOLERANCE[dtype], err_msg=f"result {i}")


# ---- a layer written with jax.lax.scan


def step_of(cell, p, x, state):
    a = x @ p["weight_ih"].T + p.get("bias_ih", 0)
    if cell == "lstm":
        h, c = state
        i, f, g, o = jnp.split(a + h @ p["weight_hh"].T + p.get("bias_hh", 0), 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return h @ p["weight_hr"].T if "weight_hr" in p else h, c
    (h,) = state
    if cell.startswith("gru"):
        size = h.shape[-1]
        rz = jax.nn.sigmoid((a + h @ p["weight_hh"].T + p.get("bias_hh", 0))[..., : 2 * size])
        r, z = jnp.split(rz, 2, -1)
        W, b = p["weight_hh"][2 * size :], p["bias_hh"][2 * size :] if "bias_hh" in p else 0
        inner = r * (h @ W.T + b) if cell == "gru" else (r * h) @ W.T + b
        return (z * h + (1 - z) * jnp.tanh(a[..., 2 * size :] + inner),)
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[cell.partition("-")[2]]
    return (activation(a + h @ p["weight_hh"].T + p.get("bias_hh", 0)),)


def scanned(cell):
    """The layer without lengths and reset, as `function` gives it."""

    def layer(x, state, params):
        states, lasts, k = listed(state), [], 0
        for number in itertools.count():
            outputs = []
            if f"weight_ih_l{number}" not in params:
                return x, tuple(jnp.stack(s) for s in zip(*lasts, strict=True)) if cell == "lstm" else jnp.stack(
                    [h for (h,) in lasts]
                )
            for ending in ("", "_reverse"):
                suffix = f"_l{number}{ending}"
                own = {name.removesuffix(suffix): v for name, v in params.items() if name.endswith(suffix)}
                if not own:
                    continue

                def step(state, x_t, own=own):
                    new = step_of(cell, own, x_t, state)
                    return new, new[0]

                last, output = jax.lax.scan(step, tuple(s[k] for s in states), x, reverse=bool(ending))
                outputs.append(output)
                lasts.append(last)
                k += 1
            x = jnp.concatenate(outputs, -1)

    return layer


# ---- results and gradients


@each_cell
@pytest.mark.parametrize("stack", STACKS, ids=lambda s: "-".join(s) or "plain")
def test_equals_a_scan(cell, stack):
    if ("proj_size" in stack and cell != "lstm") or ("num_layers" not in stack and cell.startswith("rnn")):
        return
    problem = Problem(cell, **stack)
    compare(problem.results(function(cell)), problem.results(scanned(cell)))


@each_cell
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_equals_the_reference(cell, dtype):
    problem = Problem(cell, dtype, sizes=(9, 5, 3, 17), num_layers=2, bidirectional=True)
    compare_with_reference(problem, with_all=cell == "lstm")


def test_both_ways(way):
    compare_with_reference(Problem("gru", np.float32, num_layers=2), with_all=False)


def compare_with_reference(problem, with_all):
    cell, dtype, (steps, batch, _, _) = problem.cell, problem.dtype, problem.sizes
    lengths = [steps, 0, 4, 1, steps][:batch]
    both = {"lengths": lengths, "reset": problem.random.random((steps, batch)) < 0.2}
    for given in ({}, {"lengths": lengths}, {"reset": both["reset"]}, both) if with_all else (both,):
        traced = {name: jnp.asarray(value) for name, value in given.items()}
        compare(problem.results(function(cell), **traced), problem.reference(**given), dtype)
        if cell == "lstm":  # values that are not known when the function is traced
            run = jax.jit(lambda options: ours.lstm(problem.x, problem.state, problem.params, **options))
            compare(jax.tree.leaves(run(traced)), problem.reference(**given)[:3], dtype)


@each_cell
def test_random_sizes(cell):
    random = np.random.default_rng(3)
    for seed in range(2):
        sizes = [int(n) for n in random.integers([1, 1, 1, 1], [30, 40, 40, 50])]
        problem = Problem(cell, sizes=sizes, seed=seed, num_layers=int(random.integers(1, 3)))
        compare(problem.results(function(cell)), problem.results(scanned(cell)))


@each_cell
def test_nothing_to_do(cell):
    for sizes in ((0, B, I, H), (T, 0, I, H)):
        problem = Problem(cell, sizes=sizes)
        compare(problem.results(function(cell)), problem.reference())


def test_finite_differences():
    from jax.test_util import check_grads

    for cell in CELLS:
        problem = Problem(cell, sizes=(3, 2, 2, 3))
        arguments = problem.x, problem.state, problem.params
        check_grads(problem.loss(function(cell)), arguments, order=1, modes=["rev"], rtol=1e-5)  # of the differences


@each_cell
def test_without_a_state(cell):
    problem, layer = Problem(cell, num_layers=2), function(cell)
    zeros = jax.tree.map(jnp.zeros_like, problem.state)
    expected, actual = (
        jax.value_and_grad(lambda p, state=state: problem.loss(layer)(problem.x, state, p))(problem.params)
        for state in (zeros, None)
    )
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batch_first_and_no_batch():
    problem = Problem("lstm", bidirectional=True)
    x, state, params = problem.x, problem.state, problem.params
    lengths, reset = jnp.array([6, 2, 0]), jnp.asarray(problem.random.random((T, B)) < 0.3)
    output, (h, c) = ours.lstm(x, state, params, lengths=lengths, reset=reset)
    other, (h2, c2) = ours.lstm(x.swapaxes(0, 1), state, params, lengths=lengths, reset=reset.T, batch_first=True)
    one, (h3, c3) = ours.lstm(
        x[:, 1], jax.tree.map(lambda s: s[:, 1], state), params, lengths=2, reset=reset[:, 1], batch_first=True
    )
    for a, b in ((other.swapaxes(0, 1), output), (h2, h), (c2, c), (one, output[:, 1]), (h3, h[:, 1]), (c3, c[:, 1])):
        np.testing.assert_array_equal(a, b)


def test_dropout():
    problem, key = Problem("gru", num_layers=3), jax.random.key(5)
    run = jax.jit(lambda key, p: ours.gru(problem.x, None, p, dropout=0.4, key=key)[0])
    assert jnp.array_equal(run(key, problem.params), run(key, problem.params))
    assert not jnp.array_equal(run(key, problem.params), run(jax.random.key(6), problem.params))
    x = problem.x  # the same by hand, layer by layer
    keys = jax.random.split(key, 2)
    for number in range(3):
        own = {name.replace(f"l{number}", "l0"): v for name, v in problem.params.items() if name.endswith(str(number))}
        x = ours.gru(x, None, own)[0]
        if number < 2:
            x = x * jax.random.bernoulli(keys[number], 0.6, x.shape) / 0.6
    np.testing.assert_allclose(run(key, problem.params), x, rtol=1e-12)
    g = jax.grad(lambda p: (run(key, p) ** 2).sum())(problem.params)["weight_ih_l0"]
    e, at = 1e-6, (3, 2)
    sides = [(run(key, {**problem.params, "weight_ih_l0": problem.params["weight_ih_l0"].at[at].add(d)}) ** 2).sum()
             for d in (e, -e)]  # fmt: skip
    np.testing.assert_allclose(g[at], (sides[0] - sides[1]) / (2 * e), rtol=1e-6)  # of the differences
    assert jnp.array_equal(ours.gru(problem.x, None, problem.params, dropout=0.0, key=key)[0],
                           ours.gru(problem.x, None, problem.params)[0])  # fmt: skip
    with pytest.warns(UserWarning, match="does nothing for one layer"):
        ours.gru(problem.x, None, Problem("gru").params, dropout=0.5, key=key)


# ---- JAX's transformations


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_vmap(cell, way):
    problem = Problem(cell, num_layers=2)
    layer, x, state, params = function(cell), problem.x, problem.state, problem.params
    expected = jax.tree.leaves(layer(x, state, params))
    lengths = jnp.array([6, 0, 3])
    for options, mapped in (({}, None), ({"lengths": lengths}, 0), ({"reset": jnp.ones((T, B), bool)}, 1)):
        name, value = next(iter(options.items()), (None, None))
        one = lambda x, s, v, name=name: layer(x, s, params, **({name: v} if name else {}))  # noqa: E731
        expected = jax.tree.leaves(layer(x, state, params, **options))
        results = jax.tree.leaves(jax.vmap(one, (1, 1, mapped), 1)(x, state, value))
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-12)
    # the gradient of a mapped function is one pass over the whole batch
    grad = jax.grad(lambda p: (jax.vmap(lambda x: layer(x, None, p)[0], 1)(x) ** 2).sum())
    direct = jax.grad(lambda p: (layer(x, None, p)[0] ** 2).sum())(params)
    assert "scan" not in str(jax.make_jaxpr(grad)(params))
    # and of a function of one sequence, mapped, the gradient for each sequence
    each = jax.vmap(jax.grad(lambda p, x: (layer(x, None, p)[0] ** 2).sum()), (None, 1))(params, x)
    for name, wanted in direct.items():
        np.testing.assert_allclose(grad(params)[name], wanted, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(each[name].sum(0), wanted, rtol=1e-10, atol=1e-12)


def test_vmap_of_parameters_and_of_vmap():
    problem = Problem("lstm", bidirectional=True)
    x, state, params = problem.x, problem.state, problem.params
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), params)
    outputs = jax.vmap(lambda p: ours.lstm(x, state, p)[0])(many)
    wide = jnp.stack([x, x + 1])
    twice = jax.vmap(jax.vmap(lambda x, p: ours.lstm(x, state, p)[0], (None, 0)), (0, None))(wide, many)
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: a[i], many)
        np.testing.assert_allclose(outputs[i], ours.lstm(x, state, own)[0], rtol=1e-12)
        for j in range(2):
            np.testing.assert_allclose(twice[j, i], ours.lstm(wide[j], state, own)[0], rtol=1e-12)
    states = jax.vmap(lambda s: ours.lstm(x, s, params)[0])(jax.tree.map(lambda s: jnp.stack([s, s * 2]), state))
    np.testing.assert_allclose(states[1], ours.lstm(x, jax.tree.map(lambda s: s * 2, state), params)[0], rtol=1e-12)
    assert jax.vmap(lambda x: ours.lstm(x, None, params)[0])(jnp.zeros((0, T, B, I))).shape == (0, T, B, 2 * H)


def test_scan_checkpoint_and_eager(way):
    problem = Problem("gru")
    x, state, params = problem.x, problem.state, problem.params

    def steps(x, h, p):
        h, output = jax.lax.scan(lambda h, x_t: ours.gru(x_t[None], h, p)[::-1], h, x)
        return output[:, 0], h

    expected = problem.results(ours.gru)
    compare(problem.results(steps), expected)
    compare(problem.results(jax.checkpoint(ours.gru)), expected)
    value, gradients = jax.value_and_grad(problem.loss(ours.gru), argnums=(0, 1, 2))(x, state, params)
    np.testing.assert_allclose(value, problem.loss(ours.gru)(x, state, params))
    compare(jax.tree.leaves(gradients), expected[2:])
    with jax.disable_jit():
        compare(jax.tree.leaves(ours.gru(x, state, params)), expected[:2])
    branch = jax.jit(
        lambda yes: jax.lax.cond(yes, lambda: ours.gru(x, state, params)[0], lambda: x[..., :1] * jnp.ones(H))
    )
    compare([branch(True)], expected[:1])


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_the_batch(check_vma, way):
    problem = Problem("lstm", sizes=(T, 4, I, H), bidirectional=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, every = PartitionSpec(None, "data"), PartitionSpec()
    layer = jax.shard_map(
        ours.lstm, mesh=mesh, in_specs=(rows, rows, every), out_specs=(rows, rows), check_vma=check_vma
    )
    compare(problem.results(layer), problem.results(ours.lstm))
    text = jax.jit(layer).lower(problem.x, problem.state, problem.params).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective"))


def test_many_threads_at_once():
    problems = [Problem("lstm", sizes=(20, B, I, H), seed=seed) for seed in range(6)]
    step = jax.jit(lambda x, s, p: jax.value_and_grad(lambda p: (ours.lstm(x, s, p)[0] ** 2).sum())(p))
    expected = [jax.tree.leaves(step(p.x, p.state, p.params)) for p in problems]
    wrong = []

    def work(problem, wanted):
        for _ in range(30):
            results = jax.tree.leaves(step(problem.x, problem.state, problem.params))
            if not all(jnp.array_equal(a, b) for a, b in zip(results, wanted, strict=True)):
                wrong.append(results)

    threads = [threading.Thread(target=work, args=both) for both in zip(problems, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_parameters_that_change():
    """Those of an earlier call are remembered by their addresses, where others may stand now."""
    problem = Problem("gru", np.float32, bidirectional=True)
    run = jax.jit(lambda x, p: ours.gru(x, None, p)[0], donate_argnums=())
    update = jax.jit(lambda p: jax.tree.map(lambda a: -0.9 * a, p), donate_argnums=0)
    other = jax.jit(lambda p: scanned("gru")(problem.x, jnp.zeros((2, B, H), np.float32), p)[0])
    params = jax.tree.map(jnp.copy, problem.params)
    for _ in range(40):
        np.testing.assert_allclose(run(problem.x, params), other(params), **TOLERANCE[np.float32])
        params = update(params)
    assert len(ours._stacks) <= ours._REMEMBERED


@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_at_many_places(threads, monkeypatch):
    """What was made for the first ones is taken for the next ones."""
    monkeypatch.setattr(cpu, "THREAD_FLOPS", 1)
    monkeypatch.setattr(ours, "_stacks", {})
    prepare, made = stack.prepare, []
    monkeypatch.setattr(stack, "prepare", lambda *given: made.append(given) or prepare(*given))
    before = fastrnn.get_num_threads()
    fastrnn.set_num_threads(threads)
    try:
        problem = Problem("gru", np.float32, bidirectional=True)
        run, expected = (
            jax.jit(jax.value_and_grad(lambda p, f=f: f(problem.x, problem.state, p)[0].sum()))
            for f in (ours.gru, scanned("gru"))
        )
        places = [jax.tree.map(lambda a, n=n: a * (1 - n / 25), problem.params) for n in range(50)]  # all of them stay
        for params in [*places, *places]:
            compare(jax.tree.leaves(run(params)), jax.tree.leaves(expected(params)), np.float32)
    finally:
        fastrnn.set_num_threads(before)
    assert len(made) == len(ours._stacks) == ours._REMEMBERED
    assert not ours._used


# ---- errors


def test_what_is_not_supported():
    problem = Problem("gru")
    x, state, params = problem.x, problem.state, problem.params
    layer = lambda x: ours.gru(x, state, params)[0]  # noqa: E731
    for forward in (jax.jacfwd(layer), lambda x: jax.jvp(layer, (x,), (x,)), lambda x: jax.linearize(layer, x)[1](x)):
        with pytest.raises(TypeError, match="forward-mode"):
            forward(x)
    total = lambda x: layer(x).sum()  # noqa: E731
    for second in (
        lambda x: jax.grad(lambda x: jax.grad(total)(x).sum())(x),
        jax.hessian(total),
        lambda x: jax.jvp(jax.grad(total), (x,), (x,)),
        jax.jit(lambda x: jax.jacrev(jax.grad(total))(x)),
    ):
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            second(x)
    with pytest.raises(NotImplementedError, match="on the CPU only"):
        jax.jit(layer).trace(x).lower(lowering_platforms=("cuda",))


def test_an_error_in_the_pass(way, monkeypatch):
    problem = Problem("lstm")
    run = jax.jit(lambda x: ours.lstm(x, None, problem.params)[0])
    good = run(problem.x)

    def fail(*arguments):
        raise RuntimeError("the kernel is on strike")

    with monkeypatch.context() as patch:
        patch.setattr(ours, "_compute", fail)
        with pytest.raises(XLA_ERRORS, match="RuntimeError: the kernel is on strike"):
            run(problem.x).block_until_ready()
        with pytest.raises(XLA_ERRORS, match="on strike"):
            jax.grad(lambda x: run(x).sum())(problem.x).block_until_ready()
    assert jnp.array_equal(run(problem.x), good)


def test_wrong_lengths_that_are_computed(way):
    problem = Problem("lstm")
    run = jax.jit(lambda n: ours.lstm(problem.x, None, problem.params, lengths=n)[0])
    for wrong in ([7, 1, 1], [1, -1, 1]):
        with pytest.raises(XLA_ERRORS, match=r"lengths\[[01]\] is (7|-1), expected 0 to T = 6"):
            run(jnp.array(wrong)).block_until_ready()
    for kind in (jnp.int8, jnp.uint8, jnp.int64, jnp.uint32):
        assert run(jnp.array([6, 1, 0], kind)).shape == (T, B, H)


def test_bad_arguments():
    problem = Problem("lstm", num_layers=2)
    x, (h, c), params = problem.x, problem.state, problem.params
    key = jax.random.key(0)

    def without(*names):
        return {name: value for name, value in params.items() if name not in names}

    def with_(**more):
        return {**params, **more}

    cases = [
        (ValueError, "x has shape", (x[0, 0], None, params), {}),
        (TypeError, "x is a list", (x.tolist(), None, params), {}),
        (TypeError, r"x has dtype bfloat16, .* x.astype\(jnp.float32\)", (x.astype(jnp.bfloat16), None, params), {}),
        (TypeError, "x has dtype float16", (x.astype(jnp.float16), None, params), {}),
        (TypeError, "x has dtype int", (x.astype(int), None, params), {}),
        (TypeError, "x has dtype complex", (x.astype(complex), None, params), {}),
        (ValueError, "x has shape .* last axis of 5", (x[..., :4], None, params), {}),
        (
            TypeError,
            r"params\['weight_ih_l0'\] has dtype float64, expected that of x",
            (x.astype("f4"), None, params),
            {},
        ),
        (TypeError, "params is a list", (x, None, list(params.values())), {}),
        (ValueError, "params has no 'weight_hh_l0'", (x, None, without("weight_hh_l0")), {}),
        (ValueError, "missing: 'bias_hh_l0'", (x, None, without("bias_hh_l0")), {}),
        (ValueError, "missing: 'weight_ih_l1'", (x, None, without("weight_ih_l1")), {}),
        (ValueError, "unexpected: 'weight_xh_l0'", (x, None, with_(weight_xh_l0=h)), {}),
        (
            ValueError,
            r"params\['weight_hh_l1'\] has shape",
            (x, None, with_(weight_hh_l1=params["weight_hh_l1"].T)),
            {},
        ),
        (ValueError, r"params\['weight_ih_l0'\] has shape", (x, None, with_(weight_ih_l0=jnp.zeros((27, I)))), {}),
        (TypeError, "state is an? .*expected a tuple", (x, h, params), {}),
        (ValueError, "state has 1 entries", (x, (h,), params), {}),
        (ValueError, r"state\[1\] has shape", (x, (h, c[:1]), params), {}),
        (TypeError, r"state\[0\] has dtype", (x, (h.astype("f4"), c), params), {}),
        (ValueError, r"lengths\[1\] is 7", (x, None, params), {"lengths": [0, 7, 1]}),
        (ValueError, "lengths has shape", (x, None, params), {"lengths": [1, 1]}),
        (TypeError, "lengths has dtype float", (x, None, params), {"lengths": [1.0, 1.0, 1.0]}),
        (ValueError, "reset has shape", (x, None, params), {"reset": np.zeros((B, T), bool)}),
        (TypeError, "reset has dtype", (x, None, params), {"reset": np.zeros((T, B))}),
        (TypeError, "batch_first is 1", (x, None, params), {"batch_first": 1}),
        (ValueError, "dropout is given without the other", (x, None, params), {"dropout": 0.5}),
        (ValueError, "key is given without the other", (x, None, params), {"key": key}),
        (ValueError, "dropout is 1", (x, None, params), {"dropout": 1.0, "key": key}),
        (TypeError, "dropout is a", (x, None, params), {"dropout": jnp.array(0.5), "key": key}),
    ]
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            ours.lstm(*arguments, **options)
        if not isinstance(arguments[0], list) and "key" not in options and "dropout" not in options:
            with pytest.raises(kind, match=message):
                jax.jit(lambda *a, options=options: ours.lstm(*a, **options))(*arguments)
    for name, wrong in (("lengths", jnp.ones(2, int)), ("lengths", jnp.ones(B)), ("reset", jnp.ones((B, T), bool))):
        with pytest.raises((ValueError, TypeError), match=f"{name} has"):
            jax.jit(lambda v, name=name: ours.lstm(x, None, params, **{name: v}))(wrong)
    with pytest.raises(ValueError, match="nonlinearity is 'softmax'"):
        ours.rnn(x, None, params, nonlinearity="softmax")
    with pytest.raises(ValueError, match=r"expected \(3 \* H, I\) for gru"):
        ours.gru(x, None, with_(weight_ih_l0=jnp.zeros((28, I))))
    with pytest.raises(ValueError, match="unexpected: 'weight_hr_l0'"):
        ours.gru(x, None, ours.init("gru", key, I, H, dtype="float64") | {"weight_hr_l0": jnp.zeros((3, H))})


def test_init():
    params = ours.init("lstm", jax.random.key(1), 300, 400, num_layers=2, bidirectional=True, proj_size=100)
    layer = fastrnn.LSTM(300, 400, num_layers=2, bidirectional=True, proj_size=100)
    assert {n: v.shape for n, v in params.items()} == {n: v.shape for n, v in layer.parameters.items()}
    for value in params.values():
        assert value.dtype == jnp.float32
        assert abs(float(jnp.abs(value).max()) - 0.05) < 0.001  # 1 / sqrt(400), and the most of 400 or more numbers
        assert abs(float(value.mean())) < 0.01
    assert len({float(value.ravel()[0]) for value in params.values()}) == len(params)
    for kind, message, arguments, options in (
        (ValueError, "cell is 'elman'", ("elman", jax.random.key(0), 3, 5), {}),
        (ValueError, "proj_size is 5", ("lstm", jax.random.key(0), 3, 5), {"proj_size": 5}),
        (ValueError, "a gru has no projection", ("gru", jax.random.key(0), 3, 5), {"proj_size": 2}),
        (ValueError, "hidden_size is 0", ("gru", jax.random.key(0), 3, 0), {}),
        (TypeError, "dtype is 'float16'", ("gru", jax.random.key(0), 3, 5), {"dtype": "float16"}),
    ):
        with pytest.raises(kind, match=message):
            ours.init(*arguments, **options)
    with enable_x64(False), pytest.raises(ValueError, match="dtype is float64, which JAX has to be told"):
        ours.init("gru", jax.random.key(0), 3, 5, dtype="float64")


@contextlib.contextmanager
def enable_x64(value):
    jax.config.update("jax_enable_x64", value)
    yield
    jax.config.update("jax_enable_x64", True)


def test_without_float64():
    problem = Problem("gru", np.float32)
    with enable_x64(False):
        run = jax.jit(jax.value_and_grad(lambda x: ours.gru(x, None, problem.params, lengths=[6, 2, 0])[0].sum()))
        value, dx = run(np.asarray(problem.x))
        assert value.dtype == dx.dtype == jnp.float32
        assert not dx[2:, 1].any()
        assert functional.DTYPES


def test_examples():
    with enable_x64(False):
        assert doctest.testmod(ours).failed == 0
