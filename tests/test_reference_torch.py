"""The NumPy reference against PyTorch in float64: its own layers, and its autograd where it has no such layer."""

import dataclasses

import numpy as np
import pytest

from fastrnn.testing import assert_close, problem, run

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, I, H = 7, 5, 4, 6

LAYERS = [
    pytest.param("rnn_tanh", 0, lambda **o: torch.nn.RNN(I, H, **o), id="rnn_tanh"),
    pytest.param("rnn_relu", 0, lambda **o: torch.nn.RNN(I, H, nonlinearity="relu", **o), id="rnn_relu"),
    pytest.param("lstm", 0, lambda **o: torch.nn.LSTM(I, H, **o), id="lstm"),
    pytest.param("lstm", 2, lambda **o: torch.nn.LSTM(I, H, proj_size=2, **o), id="lstm_projected"),
    pytest.param("gru", 0, lambda **o: torch.nn.GRU(I, H, **o), id="gru"),
]


def leaf(array):
    return torch.tensor(array, requires_grad=True)


def loss(arrays, weights):
    return sum((array * torch.tensor(weight)).sum() for array, weight in zip(arrays, weights, strict=True))


def compare(results, expected):
    """Whole sums in float64: their order is all that may differ."""
    for name, tensor in expected.items():
        assert_close(results[name], tensor.detach().numpy(), name, scale=1)


@pytest.mark.parametrize(("cell", "P", "layer"), LAYERS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("lengths", [None, [7, 2, 1, 7, 4], [3, 3, 5, 1, 2]], ids=["all", "some-full", "none-full"])
def test_bidirectional_layer(cell, P, layer, bias, lengths):
    options = {"P": P, "bias": bias, "lengths": lengths, "dtype": "float64"}
    forward, reverse = (problem(cell, T, B, I, H, seed=s, reverse=r, **options) for s, r in [(1, False), (2, True)])
    reverse = dataclasses.replace(reverse, x=forward.x)

    module = layer(bias=bias, bidirectional=True, dtype=torch.float64)
    weights = {f"{name}_l0": w for name, w in forward.params.items()}
    weights |= {f"{name}_l0_reverse": w for name, w in reverse.params.items()}
    module.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    x = leaf(forward.x)
    state = [leaf(np.stack(pair)) for pair in zip(forward.state, reverse.state, strict=True)]
    packed = x
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, last = module(packed, tuple(state) if cell == "lstm" else state[0])
    if lengths is not None:
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=T)
    last = last if cell == "lstm" else (last,)
    d_output = np.concatenate([forward.d_output, reverse.d_output], axis=2)
    d_last = [np.stack(pair) for pair in zip(forward.d_state, reverse.d_state, strict=True)]
    loss((output, *last), (d_output, *d_last)).backward()

    both = [run("reference", one) for one in (forward, reverse)]
    W = P or H
    for d, (results, suffix) in enumerate(zip(both, ("", "_reverse"), strict=True)):
        expected = {"output": output[..., d * W : (d + 1) * W]}
        expected |= {name: array[d] for name, array in zip("hc", last, strict=False)}
        expected |= {f"d{name}": array.grad[d] for name, array in zip("hc", state, strict=False)}
        expected |= {f"d{name}": getattr(module, f"{name}_l0{suffix}").grad for name in forward.params}
        assert expected.keys() | {"dx"} == results.keys()
        compare(results, expected)
    compare({"dx": both[0]["dx"] + both[1]["dx"]}, {"dx": x.grad})


# One step of each cell, for what torch.nn's layers do not have: resets, and two of the cells.


def rnn(activation):
    def step(over_x, over_h, state, p):
        return (activation(over_x + over_h(state[0])),)

    return step


def lstm(over_x, over_h, state, p):
    h, c = state
    i, f, g, o = (over_x + over_h(h)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h @ p["weight_hr"].T if "weight_hr" in p else h, c


def gru(over_x, over_h, state, p):
    (h,) = state
    (r, z, n), (r_h, z_h, n_h) = over_x.chunk(3, 1), over_h(h).chunk(3, 1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + r * n_h).tanh()
    return ((1 - z) * n + z * h,)


def gru_reset_before(over_x, over_h, state, p):
    (h,) = state
    (r, z, n), (r_h, z_h, _) = over_x.chunk(3, 1), over_h(h).chunk(3, 1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + over_h(r * h).chunk(3, 1)[2]).tanh()
    return ((1 - z) * n + z * h,)


STEPS = [
    pytest.param("rnn_tanh", 0, rnn(torch.tanh), id="rnn_tanh"),
    pytest.param("rnn_relu", 0, rnn(torch.relu), id="rnn_relu"),
    pytest.param("rnn_sigmoid", 0, rnn(torch.sigmoid), id="rnn_sigmoid"),
    pytest.param("lstm", 0, lstm, id="lstm"),
    pytest.param("lstm", 2, lstm, id="lstm_projected"),
    pytest.param("gru", 0, gru, id="gru"),
    pytest.param("gru_reset_before", 0, gru_reset_before, id="gru_reset_before"),
]


def walk(step, x, p, state, lengths, reset, reverse):
    """All rows one by one, all steps one by one."""
    output = torch.zeros(*x.shape[:2], state[0].shape[1], dtype=torch.float64)
    ends = []
    for b in range(x.shape[1]):
        row = tuple(s[b : b + 1] for s in state)
        steps = range(lengths[b])
        for t in reversed(steps) if reverse else steps:
            if reset[t, b]:
                row = tuple(torch.zeros_like(s) for s in row)
            over_x = x[t, b : b + 1] @ p["weight_ih"].T + p.get("bias_ih", 0)
            row = step(over_x, lambda h: h @ p["weight_hh"].T + p.get("bias_hh", 0), row, p)
            output[t, b] = row[0][0]
        ends.append(row)
    return output, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))


@pytest.mark.parametrize(("cell", "P", "step"), STEPS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("sizes", [(T, B, I, H), (T, B, 1, H), (T, B, I, 1), (T, 3, 1, 1)], ids=str)
def test_steps_written_out(cell, P, step, reverse, bias, sizes):
    P = min(P, sizes[3])
    one = problem(cell, *sizes, P=P, bias=bias, lengths=True, reset=True, reverse=reverse, dtype="float64")
    assert one.reset.any()
    x, state, p = leaf(one.x), [leaf(s) for s in one.state], {name: leaf(w) for name, w in one.params.items()}
    output, last = walk(step, x, p, tuple(state), one.lengths, one.reset, reverse)
    loss((output, *last), (one.d_output, *one.d_state)).backward()
    expected = {"output": output, "dx": x.grad, **{f"d{name}": w.grad for name, w in p.items()}}
    expected |= dict(zip("hc", last, strict=False))
    expected |= {f"d{name}": array.grad for name, array in zip("hc", state, strict=False)}
    results = run("reference", one)
    assert expected.keys() == results.keys()
    compare(results, expected)
