"""The cells of fastrnn.torch against torch.nn's."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import fastrnn.torch as ours  # noqa: E402

I, H, B = 4, 6, 3
KINDS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]
each_kind = pytest.mark.parametrize(("kind", "own"), KINDS, ids=["rnn-tanh", "rnn-relu", "lstm", "gru"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(kind, dtype=torch.float64, **options):
    cells = []
    for module in (torch.nn, ours):
        torch.manual_seed(0)
        cells.append(getattr(module, kind)(I, H, **options, dtype=dtype))
    assert repr(cells[0]) == repr(cells[1])
    assert list(cells[0].state_dict()) == list(cells[1].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(cell.parameters() for cell in cells), strict=True))
    return cells


def listed(value):
    return list(value) if isinstance(value, tuple) else [value]


def steps(cell, xs, state):
    for x in xs:
        state = cell(x, state)
    return listed(state)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(B,), ()], ids=["batch", "alone"])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_steps(kind, own, bias, batch, with_state, dtype):
    cells = pair(kind, dtype, bias=bias, **own)
    torch.manual_seed(1)
    xs = torch.randn(5, *batch, I, dtype=dtype, requires_grad=True)
    h, c = (torch.randn(*batch, H, dtype=dtype, requires_grad=True) for _ in range(2))
    state = ((h, c) if kind == "LSTMCell" else h) if with_state else None
    given = listed(state) if with_state else []
    found = []
    for cell in cells:
        last = steps(cell, xs, state)
        loss = sum(s.pow(2).sum() for s in last)
        found.append([*last, *torch.autograd.grad(loss, [xs, *given, *cell.parameters()])])
        with torch.no_grad():
            found[-1] += steps(cell, xs, state)
    for one, other in zip(*found, strict=True):
        close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 5e-4, "atol": 5e-5}
        torch.testing.assert_close(one, other, **close)


@each_kind
def test_compiled_and_copied(kind, own):
    torch._dynamo.reset()
    _, cell = pair(kind, **own)
    x = torch.randn(B, I, dtype=torch.float64)
    expected = steps(cell, [x], None)
    for other in (torch.compile(cell, fullgraph=True, backend="aot_eager"), copy.deepcopy(cell)):
        assert all(torch.equal(a, b) for a, b in zip(steps(other, [x], None), expected, strict=True))


def test_wrong_arguments():
    gru, lstm, x, h = ours.GRUCell(I, H), ours.LSTMCell(I, H), torch.zeros(B, I), torch.zeros(B, H)
    for error, message, call in [
        (TypeError, "input is a list", lambda: gru([1.0])),
        (ValueError, "GRUCell: Expected input to be 1D or 2D, got 3D", lambda: gru(x[None])),
        (ValueError, "hidden to be 1D or 2D, got 3D", lambda: gru(x, h[None])),
        (RuntimeError, "input has inconsistent input_size: got 3 expected 4", lambda: gru(x[:, 1:])),
        (RuntimeError, "hidden0 has inconsistent hidden_size: got 5, expected 6", lambda: gru(x, h[:, 1:])),
        (RuntimeError, "hidden1 has inconsistent hidden_size: got 5, expected 6", lambda: lstm(x, (h, h[:, 1:]))),
        (RuntimeError, "Input batch size 3 doesn't match hidden0 batch size 2", lambda: gru(x, h[1:])),
        (RuntimeError, "hidden is 1D and input 2D", lambda: gru(x, h[0])),
        (TypeError, "hx is a Tensor, expected a tuple", lambda: lstm(x, h)),
        (ValueError, "hidden0 is torch.float64", lambda: gru(x, h.double())),
        (TypeError, "input is torch.bfloat16", lambda: gru(x.bfloat16())),
        (ValueError, "hidden_size is 0", lambda: ours.GRUCell(I, 0)),
        (TypeError, "bias is 1", lambda: ours.GRUCell(I, H, bias=1)),
        (ValueError, "Unknown nonlinearity", lambda: ours.RNNCell(I, H, nonlinearity="sigmoid")),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_module_samples_of_pytorch(kind):
    try:
        from torch.testing._internal import common_modules
    except ImportError as error:
        pytest.skip(f"PyTorch's own test inputs cannot be imported: {error}")
    (info,) = (info for info in common_modules.module_db if info.module_cls is getattr(torch.nn, kind))
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": False}
    for sample in info.module_inputs_func(info, **arguments):
        made, given, found = sample.constructor_input, sample.forward_input, []
        for module in (torch.nn, ours):
            torch.manual_seed(0)
            cell = getattr(module, kind)(*made.args, **made.kwargs, dtype=torch.float64)
            found.append(listed(cell(*given.args, **given.kwargs)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
    arguments["dtype"] = torch.float32
    for wrong in info.module_error_inputs_func(info, **arguments):
        made, given = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
        if any(isinstance(argument, str) for argument in made.args):
            continue  # "relu" in bias's place, where torch.nn takes it for True and ours refuse it
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            getattr(ours, kind)(*made.args, **made.kwargs)(*given.args, **given.kwargs)
