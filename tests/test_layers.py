"""The layers: what their arguments mean, stacks and directions, states, dropout, one step at a time, copies."""

import copy
import pickle
import warnings

import numpy as np
import pytest

from fastrnn import GRU, LSTM, RNN, functional, get_num_threads, load, set_num_threads
from fastrnn.layers import Gradients

T, B, I, H = 7, 4, 3, 5

LAYERS = [
    pytest.param(RNN, {}, id="rnn"),
    pytest.param(RNN, {"nonlinearity": "relu"}, id="relu"),
    pytest.param(RNN, {"nonlinearity": "sigmoid", "bias": False}, id="sigmoid-no-bias"),
    pytest.param(LSTM, {}, id="lstm"),
    pytest.param(LSTM, {"proj_size": 2}, id="lstm-projected"),
    pytest.param(GRU, {}, id="gru"),
    pytest.param(GRU, {"reset_after": False}, id="gru-reset-before"),
]
SHAPES = [
    pytest.param({}, id="one"),
    pytest.param({"num_layers": 3}, id="three"),
    pytest.param({"bidirectional": True}, id="both"),
    pytest.param({"num_layers": 2, "bidirectional": True}, id="two-both"),
]
each_layer = pytest.mark.parametrize(("kind", "options"), LAYERS)


def uniform(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def states(layer, batch=B, seed=1):
    """A random state, as the layer takes it."""
    sizes = (layer._spec.output_size, H) if isinstance(layer, LSTM) else (H,)
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    arrays = tuple(uniform(K, batch, size, seed=seed + i, dtype=layer.dtype) for i, size in enumerate(sizes))
    return arrays if len(arrays) == 2 else arrays[0]


def each(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def arrays_of(*values):
    """All arrays in nested results, in order."""
    found = []
    for value in values:
        if isinstance(value, Gradients):
            found += arrays_of(value.x, value.state, value.params)
        elif isinstance(value, dict):
            found += arrays_of(*value.values())
        elif isinstance(value, (tuple, list)):
            found += arrays_of(*value)
        else:
            found.append(value)
    return found


def assert_same_bits(actual, expected):
    actual, expected = arrays_of(actual), arrays_of(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_names(kind, options, shape):
    layer = kind(I, H, **options, **shape, seed=0)
    K = layer.num_layers * (D := 2 if layer.bidirectional else 1)
    W = options.get("proj_size", H)
    sizes = (W, H) if kind is LSTM else (W,)
    output, state, tape = layer.forward(uniform(T, B, I))
    assert output.shape == (T, B, D * W)
    assert [array.shape for array in arrays_of(state)] == [(K, B, size) for size in sizes]
    gradients = layer.backward(tape, output, state)
    assert gradients.x.shape == (T, B, I)
    assert type(gradients.state) is type(state)
    assert [array.shape for array in arrays_of(gradients.state)] == [(K, B, size) for size in sizes]
    assert list(gradients.params) == list(layer.parameters)
    assert [a.shape for a in gradients.params.values()] == [a.shape for a in layer.parameters.values()]
    assert all(array.dtype == np.float32 for array in arrays_of(output, state, gradients))
    assert sum(array.size for array in layer.parameters.values()) == layer.num_parameters
    assert len(layer.parameters) == layer._spec.num_arrays


def test_parameter_names_and_shapes():
    layer = LSTM(I, H, 2, bidirectional=True, proj_size=2)
    one = {"weight_ih": 4 * H, "weight_hh": 4 * H, "bias_ih": 4 * H, "bias_hh": 4 * H, "weight_hr": 2}
    names = [name + suffix for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse") for name in one]
    assert list(layer.parameters) == names
    assert [len(array) for array in layer.parameters.values()] == list(one.values()) * 4
    assert layer.parameters["weight_ih_l0_reverse"].shape == (4 * H, I)
    assert layer.parameters["weight_ih_l1"].shape == (4 * H, 2 * 2)
    assert list(GRU(I, H, bias=False).parameters) == ["weight_ih_l0", "weight_hh_l0"]


@each_layer
def test_bidirectional_layer_is_two_runs(kind, options):
    layer = kind(I, H, **options, bidirectional=True, seed=0)
    x, lengths, W = uniform(T, B, I), [7, 0, 3, 5], layer._spec.output_size
    reset = np.random.default_rng(3).random((T, B)) < 0.2
    state = states(layer)
    output, last, tape = layer.forward(x, state, lengths=lengths, reset=reset)
    d_output, d_state = uniform(*output.shape, seed=5), states(layer, seed=7)
    gradients = layer.backward(tape, d_output, d_state)
    dx = 0
    for d in range(2):
        columns = slice(d * W, (d + 1) * W)
        one, one_last, one_tape = functional.forward(
            layer.cell,
            x,
            layer._parts[d],
            [array[d] for array in arrays_of(state)],
            lengths=lengths,
            reset=reset,
            reverse=d == 1,
            training=True,
        )
        assert_same_bits(output[..., columns], one)
        assert_same_bits([array[d] for array in arrays_of(last)], one_last)
        d_own = [array[d] for array in arrays_of(d_state)]
        one_dx, one_dparams, one_dstate = functional.backward(one_tape, d_output[..., columns], d_own)
        dx = dx + one_dx
        ending = "_reverse" if d else ""
        assert_same_bits([gradients.params[f"{name}_l0{ending}"] for name in one_dparams], one_dparams)
        assert_same_bits([array[d] for array in arrays_of(gradients.state)], one_dstate)
    assert_same_bits(gradients.x, dx)


@each_layer
def test_stacked_layers_are_layers_on_layers(kind, options):
    stack = kind(I, H, 2, **options, seed=0)
    x, state = uniform(T, B, I), states(stack)
    lower = kind(I, H, **options)
    upper = kind(stack._spec.output_size, H, **options)
    for layer, index in ((lower, 0), (upper, 1)):
        suffix = f"_l{index}"
        layer.load_state_dict({n.replace(suffix, "_l0"): a for n, a in stack.parameters.items() if n.endswith(suffix)})
    below, below_last, below_tape = lower.forward(x, each(lambda a: a[:1], state))
    output, last, tape = upper.forward(below, each(lambda a: a[1:], state))
    stack_output, stack_last, stack_tape = stack.forward(x, state)
    assert_same_bits(stack_output, output)
    assert_same_bits(
        [np.concatenate(pair) for pair in zip(arrays_of(below_last), arrays_of(last), strict=True)], stack_last
    )
    d_output = uniform(*output.shape, seed=9)
    d_above = upper.backward(tape, d_output)
    d_below = lower.backward(below_tape, d_above.x)
    gradients = stack.backward(stack_tape, d_output)
    assert_same_bits(gradients.x, d_below.x)
    assert_same_bits(list(gradients.params.values()), [*d_below.params.values(), *d_above.params.values()])


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_agree(kind, options, shape):
    """(B, T, I) and one sequence without a batch are other views of the same run."""
    layer = kind(I, H, **options, **shape, seed=0)
    other = kind(I, H, **options, **shape, batch_first=True, seed=0)
    x, state, lengths = uniform(T, B, I), states(layer), [7, 2, 0, 5]
    reset = np.random.default_rng(3).random((T, B)) < 0.3
    output, last, tape = layer.forward(x, state, lengths=lengths, reset=reset)
    gradients = layer.backward(tape, output, last)

    swapped, swapped_last, tape = other.forward(x.swapaxes(0, 1), state, lengths=lengths, reset=reset.T)
    assert_same_bits([swapped.swapaxes(0, 1), swapped_last], [output, last])
    swapped_gradients = other.backward(tape, swapped, swapped_last)
    assert_same_bits(swapped_gradients.x.swapaxes(0, 1), gradients.x)
    assert_same_bits([swapped_gradients.state, swapped_gradients.params], [gradients.state, gradients.params])

    for one in (layer, other):  # batch_first means nothing without a batch, as in torch.nn
        for row in range(B):
            own = each(lambda array, row=row: array[:, row], state)
            single, single_last, tape = one.forward(x[:, row], own, lengths=lengths[row], reset=reset[:, row])
            assert_same_bits([single, single_last], [output[:, row], each(lambda a, row=row: a[:, row], last)])
            single_gradients = one.backward(tape, single, single_last)
            assert single_gradients.x.shape == (T, I)
            np.testing.assert_array_equal(single_gradients.x, gradients.x[:, row])
            assert_same_bits(single_gradients.state, each(lambda a, row=row: a[:, row], gradients.state))


@each_layer
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [1, 2, B])
def test_step_has_the_bits_of_the_whole_sequence(kind, options, num_layers, dtype, batch):
    layer = kind(I, H, num_layers, **options, seed=0, dtype=dtype)
    x, start = uniform(T, batch, I, dtype=dtype), states(layer, batch)
    output, last = layer(x, start)
    state = start
    for t in range(T):
        y, state = layer.step(x[t], state)
        assert y.shape == output[t].shape
        assert_same_bits(y, output[t])
    assert_same_bits(state, last)
    state = each(lambda array: array[:, 0], start)
    for t in range(T):
        y, state = layer.step(x[t, 0], state)
        assert y.shape == output[t, 0].shape
        assert_same_bits(y, output[t, 0])
    assert_same_bits(state, each(lambda array: array[:, 0], last))


@each_layer
@pytest.mark.parametrize("num_layers", [1, 2])
def test_step_starts_from_zeros_and_leaves_its_state_alone(kind, options, num_layers):
    layer = kind(I, H, num_layers, **options, seed=0)
    x = uniform(B, I)
    y, state = layer.step(x)
    zeros = each(np.zeros_like, state)
    assert_same_bits(layer.step(x, zeros), (y, state))
    assert not any(array.any() for array in arrays_of(zeros))
    before = copy.deepcopy(state)
    layer.step(x, state)
    assert_same_bits(state, before)
    y[:] = 9  # the caller's own
    assert_same_bits(state, before)


@each_layer
def test_chunks_in_time_have_the_bits_of_the_whole(kind, options):
    layer = kind(I, H, 2, **options, seed=0)
    x, state = uniform(T, B, I), states(layer)
    output, last = layer(x, state)
    parts = []
    for chunk in (x[:1], x[1:4], x[4:4], x[4:]):
        part, state = layer(chunk, state)
        parts.append(part)
    assert_same_bits([np.concatenate(parts), state], [output, last])


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_number_of_threads_changes_no_bit(kind, options, shape):
    layer = kind(I, 40, **options, **shape, seed=0)
    x = uniform(30, 12, I)
    before, results = get_num_threads(), []
    try:
        for number in (1, 2, 3, 7):
            set_num_threads(number)
            output, last, tape = layer.forward(x, lengths=np.arange(12) * 2)
            results.append([output, last, layer.backward(tape, output, last)])
    finally:
        set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_nan_in_one_row_stays_there(kind, options, shape):
    layer = kind(I, H, **options, **shape, seed=0)
    x, row = uniform(T, B, I), 2
    output, last, tape = layer.forward(x)
    gradients = layer.backward(tape, output, last)
    x[3, row] = np.nan
    spoilt, spoilt_last, tape = layer.forward(x)
    spoilt_gradients = layer.backward(tape, spoilt, spoilt_last)
    if options.get("nonlinearity") != "relu":  # where NaN > 0 is false, and the result 0
        assert np.isnan(spoilt[:, row]).any()
    for one, other in zip(
        arrays_of(spoilt, spoilt_last, spoilt_gradients.x, spoilt_gradients.state),
        arrays_of(output, last, gradients.x, gradients.state),
        strict=True,
    ):
        assert_same_bits(np.delete(one, row, axis=1), np.delete(other, row, axis=1))


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_no_state_is_a_state_of_zeros(kind, options, shape):
    layer = kind(I, H, **options, **shape, seed=0)
    x = uniform(T, B, I)
    assert_same_bits(layer(x), layer(x, each(np.zeros_like, states(layer))))


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("time", "batch"), [(0, B), (T, 0), (0, 0)])
def test_nothing_to_do(kind, options, shape, time, batch):
    layer = kind(I, H, **options, **shape, seed=0)
    x, state = uniform(time, batch, I), states(layer, batch)
    output, last, tape = layer.forward(x, state)
    assert output.shape == (time, batch, layer._spec.output_size * layer._spec.directions)
    if time == 0:
        assert_same_bits(last, state)
    gradients = layer.backward(tape, output, last)
    assert gradients.x.shape == x.shape
    assert not any(array.any() for array in gradients.params.values())
    if time == 0:
        assert_same_bits(gradients.state, last)
    assert layer(x)[0].shape == output.shape
    if not layer.bidirectional:
        assert layer.step(uniform(0, I))[0].shape == (0, layer._spec.output_size)


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_of_zero_pass_the_state_through(kind, options, shape):
    layer = kind(I, H, **options, **shape, seed=0)
    x, state = uniform(T, B, I), states(layer)
    x[:, 1] = np.nan
    output, last, tape = layer.forward(x, state, lengths=[7, 0, 7, 7])
    assert_same_bits(each(lambda array: array[:, 1], last), each(lambda array: array[:, 1], state))
    assert not output[:, 1].any()
    gradients = layer.backward(tape, np.where(np.isnan(x[..., :1]), x[..., :1], output), last)
    assert_same_bits(each(lambda array: array[:, 1], gradients.state), each(lambda array: array[:, 1], last))
    assert not gradients.x[:, 1].any()
    assert all(np.isfinite(array).all() for array in arrays_of(gradients))


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tape_can_be_used_again(kind, options, shape):
    layer = kind(I, H, **options, **shape, seed=0)
    x = uniform(T, B, I)
    output, last, tape = layer.forward(x)
    d_output = uniform(*output.shape, seed=4)
    first = layer.backward(tape, d_output, last)
    only_output, only_state = layer.backward(tape, d_output), layer.backward(tape, d_state=last)
    assert_same_bits(layer.backward(tape, d_output, last), first)
    for one, two, both in zip(*map(arrays_of, (only_output, only_state, first)), strict=True):
        np.testing.assert_allclose(one + two, both, rtol=1e-4, atol=1e-5)
    assert_same_bits(layer.backward(tape, d_output, each(np.zeros_like, last)), only_output)


def test_part_of_the_state_may_have_no_gradient():
    layer = LSTM(I, H, 2, bidirectional=True, seed=0)
    _, (h, c), tape = layer.forward(uniform(T, B, I))
    zero = np.zeros_like(h)
    assert_same_bits(layer.backward(tape, d_state=(h, None)), layer.backward(tape, d_state=(h, zero)))
    assert_same_bits(layer.backward(tape, d_state=(None, c)), layer.backward(tape, d_state=[zero, c]))


def test_call_and_forward_agree_and_nothing_given_is_written():
    for layer in (RNN(I, H, 2), LSTM(I, H, 2, bidirectional=True), GRU(I, H, batch_first=True)):
        x, state, lengths = uniform(B, B, I), states(layer), np.array([1, 4, 0, 2])
        reset = np.random.default_rng(0).random((B, B)) < 0.3
        given = [x, state, lengths, reset, layer.state_dict()]
        before = copy.deepcopy(given)
        output, last, tape = layer.forward(x, state, lengths=lengths, reset=reset)
        assert_same_bits(layer(x, state, lengths=lengths, reset=reset), (output, last))
        d_output, d_state = output + 1, each(np.ones_like, last)
        gradients = [d_output, d_state, output, last]
        gradients_before = copy.deepcopy(gradients)
        layer.backward(tape, d_output, d_state)
        assert_same_bits([given, layer.state_dict()], [before, before[-1]])
        assert_same_bits(gradients, gradients_before)


class TestDropout:
    def test_acts_between_layers_of_forward_only(self):
        plain, layer = LSTM(I, H, 2, seed=0), LSTM(I, H, 2, dropout=0.5, seed=0)
        x = uniform(T, B, I)
        expected = plain(x)
        assert_same_bits(layer(x), expected)
        assert_same_bits(layer.step(x[0]), plain.step(x[0]))
        output, (h, _), _ = layer.forward(x)
        assert not np.array_equal(output, expected[0])
        np.testing.assert_array_equal(h[0], expected[1][0][0])  # nothing is dropped below layer 0

    def test_is_drawn_from_the_seed(self):
        x = uniform(T, B, I)
        runs = []
        for seed in (1, 1, 2):
            layer = GRU(I, H, 3, dropout=0.3, seed=seed)
            layer.load_state_dict(GRU(I, H, 3, seed=0).state_dict())
            runs.append([layer.forward(x)[0] for _ in range(3)])
        assert_same_bits(runs[0], runs[1])
        assert not np.array_equal(runs[0][0], runs[0][1])
        assert not np.array_equal(runs[0][0], runs[2][0])

    def test_keeps_the_mean(self):
        layer = RNN(1, 1, 2, "relu", dropout=0.25, seed=0, bias=False)
        for array in layer.parameters.values():
            array[...] = 1
        layer.parameters["weight_hh_l0"] = layer.parameters["weight_hh_l1"] = np.zeros((1, 1))
        output, _, _ = layer.forward(np.ones((200, 200, 1), np.float32))
        kept = output != 0
        assert 0.745 < kept.mean() < 0.755
        np.testing.assert_allclose(output[kept], 1 / 0.75, rtol=1e-6)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_backward_uses_the_masks_of_its_forward(self, bidirectional):
        """Finite differences, with the random stream put back before every forward."""
        layer = GRU(2, 3, 3, dropout=0.5, bidirectional=bidirectional, dtype=np.float64, seed=4)
        x, start = uniform(4, 2, 2, dtype=np.float64), copy.deepcopy(layer._random)
        d_output = uniform(4, 2, 6 if bidirectional else 3, seed=2, dtype=np.float64)

        def run(x):
            layer._random = copy.deepcopy(start)
            return layer.forward(x)

        dx = layer.backward(run(x)[2], d_output).x
        for place in np.ndindex(x.shape):
            moved = [x.copy(), x.copy()]
            moved[0][place] += 1e-6
            moved[1][place] -= 1e-6
            up, down = ((run(one)[0] * d_output).sum() for one in moved)
            assert dx[place] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)

    def test_is_as_wide_in_float64(self):
        x = uniform(T, B, I)
        single, double = (GRU(I, H, 2, dropout=0.5, seed=0, dtype=dtype) for dtype in (np.float32, np.float64))
        output = double.forward(x.astype(np.float64))[0]
        assert output.dtype == np.float64
        np.testing.assert_allclose(single.forward(x)[0], output, atol=1e-5)  # the same elements are dropped


class TestInitialParameters:
    def test_are_uniform_and_drawn_in_order(self):
        layer = LSTM(I, H, 2, bidirectional=True, proj_size=2, seed=11, dtype=np.float64)
        random = np.random.default_rng(11)
        bound = 1 / np.sqrt(H)
        for name, array in layer.parameters.items():
            np.testing.assert_array_equal(array, random.uniform(-bound, bound, array.shape), err_msg=name)

    def test_fill_their_range(self):
        layer = RNN(50, 100, seed=0)
        array = layer.parameters["weight_hh_l0"]
        assert -0.1 <= array.min() < -0.0999
        assert 0.0999 < array.max() <= 0.1
        assert abs(array.mean()) < 0.002

    def test_differ_without_a_seed(self):
        assert not np.array_equal(GRU(I, H).parameters["weight_hh_l0"], GRU(I, H).parameters["weight_hh_l0"])

    def test_are_the_same_in_float32_but_for_rounding(self):
        single, double = GRU(I, H, seed=5), GRU(I, H, seed=5, dtype="float64")
        assert single.parameters["bias_ih_l0"].dtype == np.float32
        assert double.parameters["bias_ih_l0"].dtype == np.float64
        for name, array in double.parameters.items():
            np.testing.assert_array_equal(array.astype(np.float32), single.parameters[name])

    @each_layer
    def test_orthogonal(self, kind, options):
        layer = kind(I, H, 2, **options, bidirectional=True, seed=0, recurrent_init="orthogonal", dtype=np.float64)
        plain = kind(I, H, 2, **options, bidirectional=True, seed=0, dtype=np.float64)
        for name, array in layer.parameters.items():
            if not name.startswith("weight_hh"):
                np.testing.assert_array_equal(array, plain.parameters[name])
                continue
            blocks = array.reshape(-1, H, array.shape[1])
            for block in blocks:
                np.testing.assert_allclose(block.T @ block, np.eye(array.shape[1]), atol=1e-14)
            assert len(np.unique(blocks[:, 0, 0])) == len(blocks)

    def test_forget_bias(self):
        layer = LSTM(I, H, 2, bidirectional=True, seed=0, forget_bias=1)
        plain = LSTM(I, H, 2, bidirectional=True, seed=0)
        for suffix in layer._spec.suffixes():
            total = layer.parameters["bias_ih" + suffix] + layer.parameters["bias_hh" + suffix]
            np.testing.assert_array_equal(total[H : 2 * H], 1)
            for name in ("bias_ih", "bias_hh"):
                one, other = (np.delete(each.parameters[name + suffix], np.s_[H : 2 * H]) for each in (layer, plain))
                np.testing.assert_array_equal(one, other)


class TestParameters:
    def test_can_be_changed_in_place_and_by_assignment(self):
        layer = GRU(I, H, 2, seed=0)
        x = uniform(T, B, I)
        before, same = layer(x)[0], layer.parameters["weight_hh_l1"]
        layer.parameters["weight_hh_l1"] -= 0.5
        changed = layer(x)[0]
        assert not np.array_equal(changed, before)
        layer.parameters["weight_hh_l1"] = same.astype(np.float64) + 0.5  # rounded to the layer's dtype
        assert layer.parameters["weight_hh_l1"] is same
        np.testing.assert_allclose(layer(x)[0], before, atol=1e-6)
        parameters = layer.parameters
        parameters |= {"weight_hh_l1": np.zeros_like(same)}
        assert parameters is layer.parameters
        parameters.update(bias_hh_l1=np.ones(3 * H))
        assert not same.any()
        assert layer.parameters["bias_hh_l1"].all()

    def test_update_may_exchange_parameters(self):
        layer = GRU(H, H, seed=0)
        before = layer.state_dict()
        layer.parameters.update(
            weight_ih_l0=layer.parameters["weight_hh_l0"], weight_hh_l0=layer.parameters["weight_ih_l0"]
        )
        assert_same_bits(layer.parameters["weight_hh_l0"], before["weight_ih_l0"])
        assert_same_bits(layer.parameters["weight_ih_l0"], before["weight_hh_l0"])

    def test_update_changes_all_or_nothing(self):
        layer = GRU(I, H, seed=0)
        before = layer.state_dict()
        with pytest.raises(ValueError, match="bias_hh_l0 has shape"):
            layer.parameters.update(bias_ih_l0=np.ones(3 * H), bias_hh_l0=np.ones(2))
        with pytest.raises(RuntimeWarning, match="overflow"):  # an error here, a warning elsewhere
            layer.parameters.update(bias_ih_l0=np.ones(3 * H), bias_hh_l0=np.full(3 * H, 1e300))
        assert_same_bits(layer.state_dict(), before)

    def test_state_dict_is_a_copy(self):
        layer = GRU(I, H, seed=0)
        state_dict = layer.state_dict()
        assert type(state_dict) is dict
        assert isinstance(layer.parameters, dict)
        assert_same_bits(state_dict, layer.parameters)
        state_dict["weight_ih_l0"][:] = 0
        assert layer.parameters["weight_ih_l0"].all()

    def test_load_state_dict(self):
        layer, other = LSTM(I, H, 2, seed=0), LSTM(I, H, 2, seed=1)
        x = uniform(T, B, I)
        other(x)  # nothing prepared from the old parameters may survive
        assert other.load_state_dict(layer.state_dict()) == ([], [])
        assert_same_bits(other(x), layer(x))
        double = LSTM(I, H, 2, dtype=np.float64)
        double.load_state_dict(layer.state_dict())
        np.testing.assert_array_equal(double.parameters["weight_hh_l1"], layer.parameters["weight_hh_l1"])
        half = {name: array.astype(np.float16) for name, array in layer.parameters.items()}
        other.load_state_dict(half)
        np.testing.assert_array_equal(other.parameters["weight_hh_l1"], half["weight_hh_l1"])

    def test_load_state_dict_that_need_not_fit(self):
        layer = GRU(I, H, seed=0)
        before = layer.state_dict()
        keys = layer.load_state_dict({"bias_ih_l0": np.zeros(3 * H), "other": None}, strict=False)
        assert keys.missing_keys == ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]
        assert keys.unexpected_keys == ["other"]
        assert not layer.parameters["bias_ih_l0"].any()
        assert_same_bits(layer.parameters["bias_hh_l0"], before["bias_hh_l0"])
        with pytest.raises(ValueError, match="bias_ih_l0 has shape"):
            layer.load_state_dict({"bias_ih_l0": np.zeros(3)}, strict=False)


COPIES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "pickle-2": lambda layer: pickle.loads(pickle.dumps(layer, 2)),
    "deepcopy": copy.deepcopy,
}


@each_layer
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_of_their_own(kind, options, duplicate):
    layer = kind(I, H, 2, **options, bidirectional=True, dropout=0.5, seed=0)
    x = uniform(T, B, I)
    _, _, tape = layer.forward(x)  # a layer that has been used
    other = duplicate(layer)
    assert repr(other) == repr(layer)
    assert_same_bits(other(x), layer(x))
    (output, last, other_tape), (expected, expected_last, tape) = other.forward(x), layer.forward(x)
    assert_same_bits([output, last], [expected, expected_last])  # its dropout goes on from where the other's was
    assert_same_bits(other.backward(other_tape, output), layer.backward(tape, output))
    with pytest.raises(ValueError, match="tape is of another layer"):
        other.backward(tape, output)
    other.parameters["weight_hh_l0"] += 1
    assert not np.array_equal(other(x)[0], layer(x)[0])  # the copy sees its own parameters, and alone


def test_shallow_copy_shares_the_parameters():
    layer = GRU(I, H, seed=0)
    other = copy.copy(layer)
    other.parameters["bias_ih_l0"] = np.zeros(3 * H)
    assert not layer.parameters["bias_ih_l0"].any()
    assert_same_bits(other(uniform(T, B, I)), layer(uniform(T, B, I)))


def test_pickle_holds_the_parameters_and_little_else():
    layer = GRU(64, 64, seed=0)
    before = len(pickle.dumps(layer))
    layer.backward(layer.forward(uniform(T, B, 64))[2], uniform(T, B, 64))
    assert before <= len(pickle.dumps(layer)) + 100
    assert len(pickle.dumps(layer)) < 4 * layer.num_parameters + 2000


@pytest.mark.parametrize(
    "text",
    [
        "RNN(3, 5)",
        "RNN(3, 5, num_layers=2, nonlinearity='relu', bias=False, batch_first=True)",
        "LSTM(3, 5, num_layers=2, proj_size=2, dropout=0.5, bidirectional=True, dtype='float64')",
        "GRU(3, 5)",
        "GRU(3, 5, reset_after=False, backend='reference')",
    ],
)
def test_repr_makes_the_layer(text):
    assert repr(eval(text, {"RNN": RNN, "LSTM": LSTM, "GRU": GRU})) == text


def test_arguments_stand_where_torch_has_them():
    with warnings.catch_warnings(record=True):
        rnn = RNN(3, 5, 2, "relu", False, True, 0.5, True)
        lstm = LSTM(3, 5, 2, False, True, 0.5, True, 2)
        gru = GRU(3, 5, 2, False, True, 0.5, True, False)
    assert rnn.nonlinearity == "relu"
    assert lstm.proj_size == 2
    assert gru.reset_after is False
    for layer in (rnn, lstm, gru):
        assert (layer.input_size, layer.hidden_size, layer.num_layers, layer.bias) == (3, 5, 2, False)
        assert (layer.batch_first, layer.dropout, layer.bidirectional) == (True, 0.5, True)
        assert layer.dtype == np.float32
    assert LSTM(np.int64(3), np.int32(5), bias=np.True_, dropout=0).hidden_size == 5


@each_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree(kind, options, shape):
    layer, other = (kind(I, H, **options, **shape, seed=0, backend=name) for name in (None, "reference"))
    x, state, lengths = uniform(T, B, I), states(layer), [3, 7, 0, 6]
    results = []
    for one in (layer, other):
        output, last, tape = one.forward(x, state, lengths=lengths)
        results.append(arrays_of(output, last, one.backward(tape, np.cos(output), last)))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_load_makes_any_layer(tmp_path):
    for text in (
        "RNN(3, 5, nonlinearity='sigmoid', bias=False)",
        "LSTM(3, 5, num_layers=2, proj_size=2, dropout=0.5, bidirectional=True, dtype='float64')",
        "GRU(3, 5, reset_after=False, batch_first=True)",
    ):
        layer = eval(text, {"RNN": RNN, "LSTM": LSTM, "GRU": GRU})
        layer.save(tmp_path / "layer.npz")
        other = load(tmp_path / "layer.npz", seed=3)
        assert repr(other) == text
        assert_same_bits(other.state_dict(), layer.state_dict())
        x = uniform(T, B, I, dtype=layer.dtype)
        assert_same_bits(other(x), layer(x))
