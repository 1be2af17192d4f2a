"""The modules of fastrnn.torch against torch.nn's: parameters, outputs, states, every gradient, and the exceptions."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import fastrnn.torch as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, I, H = 7, 4, 5, 6
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 5e-4, "atol": 5e-5}}

KINDS = [
    pytest.param("RNN", {}, id="rnn-tanh"),
    pytest.param("RNN", {"nonlinearity": "relu"}, id="rnn-relu"),
    pytest.param("LSTM", {}, id="lstm"),
    pytest.param("LSTM", {"proj_size": 3}, id="lstm-projected"),
    pytest.param("GRU", {}, id="gru"),
]
OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.4},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    {"num_layers": 2, "batch_first": True, "dropout": 1.0, "bias": False},
]
each_kind = pytest.mark.parametrize(("kind", "own"), KINDS)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads take long for small things where others use the machine, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(kind, sizes=(I, H), dtype=torch.float64, **options):
    """torch.nn's layer and ours, of the same seed."""
    layers = []
    for module in (torch.nn, ours):
        torch.manual_seed(1)
        layers.append(getattr(module, kind)(*sizes, **options, dtype=dtype))
    for (name, theirs), (same, own) in zip(*(layer.named_parameters() for layer in layers), strict=True):
        assert name == same
        assert torch.equal(theirs, own)
    return layers


def states_of(layer, batch, seed=5):
    torch.manual_seed(seed)
    K, (W, size) = len(layer.all_weights), (layer.proj_size or layer.hidden_size, layer.hidden_size)
    dtype = layer.weight_ih_l0.dtype
    h, c = (torch.randn(K, *batch, s, dtype=dtype, requires_grad=True) for s in (W, size))
    return (h, c) if layer.mode == "LSTM" else h


def listed(value):
    return list(value) if isinstance(value, tuple) else [value]


def results(layer, x, hx=None, **options):
    """Output, last states, and the gradients of everything from random gradients of all of these."""
    torch.manual_seed(2)  # of dropout
    output, last = layer(x, hx, **options)
    data = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
    outputs = [data, *listed(last)]
    torch.manual_seed(3)
    inputs = [*([x] if isinstance(x, torch.Tensor) else []), *([] if hx is None else listed(hx)), *layer.parameters()]
    gradients = torch.autograd.grad(outputs, inputs, [torch.randn_like(value) for value in outputs])
    return output, [*outputs, *gradients]


def compare(actual, expected, dtype):
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **TOLERANCE[dtype], msg=lambda m, i=i: f"result {i}: {m}")


def run_and_compare(layers, shape, batch, with_state=True, dtype=torch.float64):
    torch.manual_seed(4)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    hx = states_of(layers[0], batch) if with_state else None
    expected, actual = (results(layer, x, hx)[1] for layer in layers)
    compare(actual, expected, dtype)
    for layer in layers:
        layer.eval()
    with torch.no_grad():
        for _ in range(2):  # the second call takes a shorter way
            compare([layers[1](x, hx)[0]], [layers[0](x, hx)[0]], dtype)


@each_kind
@each_option
@each_dtype
def test_batch(kind, own, options, dtype):
    shape = (B, T, I) if options.get("batch_first") else (T, B, I)
    run_and_compare(pair(kind, dtype=dtype, **own, **options), shape, (B,), dtype=dtype)


@each_kind
@each_option
def test_one_sequence_without_a_batch(kind, own, options):
    run_and_compare(pair(kind, **own, **options), (T, I), ())


@each_kind
def test_no_state(kind, own):
    run_and_compare(pair(kind, num_layers=2, **own), (T, B, I), (B,), with_state=False)


@each_kind
def test_random_sizes(kind, own):
    random = np.random.default_rng(0)
    for _ in range(4):
        sizes = [int(n) for n in random.integers([1, 4, 1, 1], [40, 50, 30, 40])]
        options = {"bidirectional": bool(random.integers(2)), "num_layers": int(random.integers(1, 3))}
        run_and_compare(pair(kind, sizes[:2], **own, **options), (sizes[2], sizes[3], sizes[0]), (sizes[3],))


@each_kind
@each_option
@pytest.mark.parametrize("lengths", [[7, 5, 5, 1], [3, 7, 1, 7]], ids=["sorted", "unsorted"])
def test_packed_sequences(kind, own, options, lengths):
    layers = pair(kind, **own, **options)
    first = options.get("batch_first", False)
    torch.manual_seed(4)
    x = torch.randn((B, T, I) if first else (T, B, I), dtype=torch.float64, requires_grad=True)
    kept = lengths == sorted(lengths, reverse=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, first, enforce_sorted=kept)
    hx = states_of(layers[0], (B,))
    (theirs, expected), (own_output, actual) = (results(layer, packed, hx) for layer in layers)
    compare(actual, expected, torch.float64)
    for one, other in zip(own_output[1:], theirs[1:], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    (d_theirs,), (d_own,) = (
        torch.autograd.grad(layer.eval()(packed)[0].data.sum(), x, retain_graph=True) for layer in layers
    )
    torch.testing.assert_close(d_own, d_theirs)


@each_kind
@each_option
def test_lengths_are_packed_sequences(kind, own, options):
    _, layer = pair(kind, **own, **{**options, "dropout": 0.0})
    first, lengths = options.get("batch_first", False), [3, 7, 1, 7]
    torch.manual_seed(4)
    x = torch.randn((B, T, I) if first else (T, B, I), dtype=torch.float64, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    expected, last = layer(packed)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, first, total_length=T)
    for given in (lengths, np.array(lengths), torch.tensor(lengths, dtype=torch.int32)):
        output, own_last = layer(x, lengths=given)
        compare([output, *listed(own_last)], [expected, *listed(last)], torch.float64)
    with torch.no_grad():
        compare([layer(x, lengths=lengths)[0]], [expected], torch.float64)
    gradients = [torch.autograd.grad(value.pow(2).sum(), [x, *layer.parameters()]) for value in (output, expected)]
    compare(*gradients, torch.float64)


@each_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_begins_a_new_sequence(kind, own, batch_first):
    _, layer = pair(kind, batch_first=batch_first, **own)
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(B, T, dtype=torch.bool) if batch_first else torch.zeros(T, B, dtype=torch.bool)
    time = 1 if batch_first else 0
    reset.narrow(time, 3, 1).fill_(True)
    output, last = layer(x, states_of(layer, (B,)), reset=reset)
    parts = layer(x.narrow(time, 0, 3), states_of(layer, (B,)))[0], layer(x.narrow(time, 3, T - 3))
    compare([output, *listed(last)], [torch.cat([parts[0], parts[1][0]], time), *listed(parts[1][1])], torch.float64)
    one = x.select(1 - time, 1)
    alone, _ = layer(one, reset=reset.select(1 - time, 1))
    torch.testing.assert_close(alone, layer(x, reset=reset)[0].select(1 - time, 1))


def test_no_steps_and_no_rows():
    for kind in ("RNN", "LSTM", "GRU"):
        _, layer = pair(kind, num_layers=2)
        hx = states_of(layer, (B,))
        output, last = layer(torch.zeros(0, B, I, dtype=torch.float64), hx)
        assert output.shape == (0, B, H)
        assert all(torch.equal(one, other) for one, other in zip(listed(last), listed(hx), strict=True))
        gradients = torch.autograd.grad([s.sum() for s in listed(last)], listed(hx))
        assert all((gradient == 1).all() for gradient in gradients)
        for one in (layer, getattr(ours, kind)(I, H)):
            empty = torch.zeros(T, 0, I, dtype=one.weight_ih_l0.dtype)
            assert one(empty)[0].shape == (T, 0, H)
            with torch.no_grad():
                assert [one(empty)[0].shape for _ in range(3)] == [(T, 0, H)] * 3
        zero, last = layer(torch.randn(T, B, I, dtype=torch.float64), hx, lengths=[0] * B)
        assert not zero.any()
        assert torch.equal(listed(last)[0], listed(hx)[0])


def test_frozen_parameters_and_frozen_input():
    for frozen in ("parameters", "input"):
        layers = pair("LSTM", num_layers=2)
        x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=frozen == "parameters")
        for layer in layers:
            layer.requires_grad_(frozen == "input")
        wanted = [[x] if frozen == "parameters" else list(layer.parameters()) for layer in layers]
        gradients = [
            torch.autograd.grad(layer(x)[1][1].sum(), inputs) for layer, inputs in zip(layers, wanted, strict=True)
        ]
        compare(gradients[1], gradients[0], torch.float64)


def test_strided_input_and_parameters():
    layers = pair("GRU")
    x = torch.randn(I, B, T, dtype=torch.float64).permute(2, 1, 0)[::2]
    for layer in layers:
        layer.weight_ih_l0.data = layer.weight_ih_l0.data.t().contiguous().t()
    compare([layers[1](x)[0]], [layers[0](x)[0]], torch.float64)


def test_numbers_that_are_not_written_yet():
    """PyTorch keeps what is negated, and gradients that are zero, as a promise only."""
    layer = ours.GRU(3, 5, dtype=torch.float64)
    promised = torch.randn(4, 2, 3, dtype=torch.complex128).conj().imag
    assert promised.is_neg()
    output, state = promised.new_zeros(0), torch._efficientzerotensor(1, 2, 5, dtype=torch.float64)
    for x, h in ((promised, state), (promised.resolve_neg(), torch.zeros(1, 2, 5, dtype=torch.float64))):
        before, (output, _) = output, layer(x, h)
        gradient = torch.ones(4, 2, 5, dtype=torch.complex128).mul(1j).conj().imag
        output.backward(gradient)
    assert torch.equal(before, output)


def test_parameters_that_change_between_calls_are_seen():
    layers = pair("LSTM")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    changes = [
        lambda p: p.data.mul_(1.5),
        lambda p: setattr(p, "data", p.data * 0.5),
        lambda p: setattr(p, "data", p.data[torch.arange(len(p) - 1, -1, -1)]),
        lambda p: None,
    ]
    for change in changes:
        for layer in layers:
            change(layer.weight_hh_l0)
        with torch.no_grad():
            compare([layers[1](x)[0]], [layers[0](x)[0]], torch.float64)
        compare(results(layers[1], x)[1], results(layers[0], x)[1], torch.float64)
    square = ours.RNN(H, H, dtype=torch.float64)
    with torch.no_grad():
        x = torch.randn(T, B, H, dtype=torch.float64)
        square(x)
        square.weight_ih_l0.data = square.weight_ih_l0.data.t()  # another view of the same memory
        theirs = ours.to_torch(square)
        compare([square(x)[0]], [theirs(x)[0]], torch.float64)


def test_state_dicts_go_both_ways():
    for kind, own in (("RNN", {}), ("LSTM", {"proj_size": 2}), ("GRU", {})):
        options = {"num_layers": 2, "bidirectional": True, **own}
        theirs, layer = getattr(torch.nn, kind)(I, H, **options), getattr(ours, kind)(I, H, **options)
        assert list(theirs.state_dict()) == list(layer.state_dict())
        layer.load_state_dict(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), layer.parameters(), strict=True))
        layer.reset_parameters()
        theirs.load_state_dict(layer.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), layer.parameters(), strict=True))


@each_kind
@each_option
def test_attributes_and_repr_are_torchs(kind, own, options):
    theirs, layer = pair(kind, **own, **options)
    assert repr(layer) == repr(theirs)
    names = "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size training".split()
    names += ["_flat_weights_names", "_all_weights", *["nonlinearity"] * (kind == "RNN")]
    for name in names:
        assert getattr(layer, name) == getattr(theirs, name), name
    for one, other in zip(layer.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert layer.flatten_parameters() is None


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_autocast_computes_in_the_parameters_dtype():
    torch._dynamo.reset()
    layer, x = ours.LSTM(I, H, 2), torch.randn(T, B, I)
    hx = torch.zeros(2, B, H).bfloat16(), torch.zeros(2, B, H)
    narrow = x.bfloat16().requires_grad_()
    exact = narrow.detach().float().requires_grad_()
    inputs = list(layer.parameters())
    expected = layer(exact)[0]
    d_exact, *gradients = torch.autograd.grad(expected.pow(2).sum(), [exact, *inputs])
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            output, (h, c) = run(narrow, hx)
        assert output.dtype == h.dtype == c.dtype == torch.float32
        assert torch.equal(output, expected)
        d_narrow, *found = torch.autograd.grad(output.pow(2).sum(), [narrow, *inputs])
        assert d_narrow.dtype == torch.bfloat16
        assert torch.equal(d_narrow, d_exact.bfloat16())
        assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    with torch.autocast("cpu", torch.bfloat16):  # as a part of a model: what comes next chooses for itself
        assert torch.nn.Linear(H, 2)(layer(x)[0]).dtype == torch.bfloat16
        assert layer.double()(x.double())[0].dtype == torch.float64


def test_autocast_of_the_operators():
    layer, x = ours.GRU(I, H), torch.randn(T, B, I)
    params, forward = [p.detach() for p in layer.parameters()], torch.ops.fastrnn.forward.default
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, computed in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            cast = [tensor.to(dtype) for tensor in (x, *params)]
            output, *_ = forward(cast[0], None, None, cast[1:], [], None, None, "gru", 4, 1, False)
            assert output.dtype == computed
            own = ours.GRU(I, H, dtype=computed)
            own.load_state_dict(dict(zip(layer.state_dict(), cast[1:], strict=True)))
            assert torch.equal(output, own(cast[0].to(computed))[0])


# ---- exceptions


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_wrong_arguments():
    layer, x = ours.LSTM(I, H), torch.zeros(T, B, I)
    h = torch.zeros(1, B, H)
    gru = ours.GRU(I, H)
    for error, message, call in [
        (TypeError, "input is a list", lambda: layer([1.0])),
        (ValueError, "Expected input to be 2D or 3D, got 4D", lambda: layer(x[None])),
        (RuntimeError, "Expected 5, got 4", lambda: layer(x[..., 1:])),
        (ValueError, r"RNN input dtype \(torch.float64\) does not match weight dtype", lambda: layer(x.double())),
        (TypeError, r"input is torch.bfloat16.*float\(\)", lambda: layer(x.bfloat16())),
        (TypeError, r"input is torch.int64.*float\(\)", lambda: layer(x.long())),
        (TypeError, "complex numbers are not supported", lambda: layer(x.cfloat())),
        (RuntimeError, "not at the same device", lambda: layer(x.to("meta"))),
        (TypeError, "layout", lambda: layer(x.to_sparse())),
        (TypeError, "hx is a Tensor, expected a tuple", lambda: layer(x, h)),
        (RuntimeError, r"Expected hidden\[0\] size \(1, 4, 6\), got \[1, 3, 6\]", lambda: layer(x, (h[:, 1:], h))),
        (RuntimeError, r"Expected hidden\[1\] size \(1, 4, 6\), got \[1, 4, 5\]", lambda: layer(x, (h, h[..., 1:]))),
        (RuntimeError, "hx and cx should also be 3-D but got 2-D", lambda: layer(x, (h[0], h[0]))),
        (RuntimeError, "For unbatched 2-D input, hx should also be 2-D", lambda: gru(x[:, 0], h)),
        (ValueError, r"hidden is torch.float64, expected", lambda: gru(x, h.double())),
        (TypeError, "hidden is a list", lambda: gru(x, [h])),
        (ValueError, r"lengths has shape \(3,\), expected \(4,\)", lambda: layer(x, lengths=[1, 2, 3])),
        (ValueError, r"lengths\[1\] is 8, expected 0 to T = 7", lambda: layer(x, lengths=[1, 8, 3, 1])),
        (TypeError, "lengths is torch.float32, expected integers", lambda: layer(x, lengths=[1.0] * 4)),
        (TypeError, "lengths cannot be read as a tensor", lambda: layer(x, lengths="abc")),
        (TypeError, r"reset is torch.int64, expected torch.bool", lambda: layer(x, reset=torch.zeros(T, B).long())),
        (ValueError, r"reset has shape \(4, 7\), expected \(T, B\)", lambda: layer(x, reset=torch.zeros(B, T).bool())),
        (TypeError, r"model and its input with .float\(\)", lambda: copy.deepcopy(gru).bfloat16()(x.bfloat16())),
        (TypeError, "complex numbers", lambda: copy.deepcopy(gru).to(torch.complex64)(x.cfloat())),
        (ValueError, "Unknown nonlinearity 'sigmoid'", lambda: ours.RNN(I, H, nonlinearity="sigmoid")),
        (ValueError, "proj_size has to be smaller", lambda: ours.LSTM(I, H, proj_size=H)),
        (ValueError, r"range \[0, 1\]", lambda: ours.LSTM(I, H, 2, dropout=1.5)),
        (TypeError, "proj_size", lambda: ours.GRU(I, H, proj_size=2)),
    ]:
        with pytest.raises(error, match=message):
            call()
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    with pytest.raises(ValueError, match="lengths is given with a PackedSequence"):
        layer(packed, lengths=[T])
    with pytest.raises(ValueError, match="reset is given with a PackedSequence"):
        layer(packed, reset=torch.zeros(T, 1).bool())
    with pytest.raises(RuntimeError, match="weight_hh_l0 has shape"):
        torch.func.functional_call(layer, {"weight_hh_l0": torch.zeros(4, 4)}, (x,))
    with pytest.warns(UserWarning, match="dropout is 0.5, which does nothing"):
        ours.GRU(I, H, dropout=0.5)


def test_what_backward_needs_may_not_be_changed():
    layer, x = ours.GRU(I, H), torch.randn(T, B, I)
    output, _ = layer(x)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, _ = layer(x)
    loss = (output * 2).sum()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- PyTorch's own inputs for tests of these layers


def samples(kind, kind_of_input, training):
    try:
        from torch.testing._internal import common_modules
    except ImportError as error:
        pytest.skip(f"PyTorch's own test inputs cannot be imported: {error}")
    (info,) = (info for info in common_modules.module_db if info.module_cls is getattr(torch.nn, kind))
    function = getattr(info, kind_of_input)
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    return info, function, arguments


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("training", [False, True])
def test_module_samples_of_pytorch(kind, training):
    info, function, arguments = samples(kind, "module_inputs_func", training)
    count = 0
    packed = {"with_packed_sequence": True} if kind != "LSTM" else {}
    for sample in function(info, **arguments, **packed):
        made, given = sample.constructor_input, sample.forward_input
        layers = []
        for module in (torch.nn, ours):
            torch.manual_seed(0)
            layers.append(getattr(module, kind)(*made.args, **made.kwargs, dtype=torch.float64).train(training))
        found = []
        for layer in layers:
            output, last = layer(*given.args, **given.kwargs)
            values = [output.data if hasattr(output, "batch_sizes") else output, *listed(last)]
            inputs = list(layer.parameters())
            inputs += [a for arg in given.args for a in listed(arg) if torch.is_tensor(a) and a.requires_grad]
            inputs = [p for p in inputs if p.is_leaf]
            found.append([*values, *torch.autograd.grad(sum(v.pow(2).sum() for v in values), inputs)])
        compare(found[1], found[0], torch.float64)
        count += 1
    assert count >= 24


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_module_error_inputs_of_pytorch(kind):
    info, function, arguments = samples(kind, "module_error_inputs_func", False)
    count = 0
    for error in function(info, **arguments):
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(ours, kind)(*made.args, **made.kwargs)(*given.args, **given.kwargs)
        count += 1
    assert count >= 5
