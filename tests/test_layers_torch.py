"""The layers against torch.nn's, with the same arguments and the same parameters: outputs, states, every gradient."""

import numpy as np
import pytest

import fastrnn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, I, H = 9, 5, 4, 6
TOLERANCE = {"float64": {"rtol": 1e-10, "atol": 1e-12}, "float32": {"rtol": 2e-4, "atol": 2e-5}}

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
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "dropout": 0.0},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
]
each_kind = pytest.mark.parametrize(("kind", "own"), KINDS)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
each_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])


class Pair:
    """torch.nn's layer and ours with its parameters, and the same random numbers for both."""

    def __init__(self, kind, dtype, batch=B, **options):
        torch.manual_seed(0)
        self.random = np.random.default_rng(0)
        self.dtype, self.batch = dtype, batch
        self.torch = getattr(torch.nn, kind)(I, H, **options, dtype=getattr(torch, dtype))
        self.layer = getattr(fastrnn, kind)(I, H, **options, dtype=dtype)
        self.layer.load_state_dict(self.torch.state_dict())

    def numbers(self, *shape):
        return self.random.uniform(-1, 1, shape).astype(self.dtype)

    def state(self):
        K, W = len(self.layer._parts), self.layer._spec.output_size
        batch = () if self.batch is None else (self.batch,)
        arrays = tuple(self.numbers(K, *batch, size) for size in self.layer._spec.state_sizes)
        assert arrays[0].shape[-1] == W
        return arrays if len(arrays) == 2 else arrays[0]

    def compare(self, what, actual, expected):
        for one, other in zip(listed(actual), listed(expected), strict=True):
            other = other.detach().numpy() if isinstance(other, torch.Tensor) else other
            assert one.shape == other.shape, what
            assert one.dtype == other.dtype, what
            np.testing.assert_allclose(one, other, **TOLERANCE[self.dtype], err_msg=what)

    def compare_gradients(self, gradients, x, state):
        self.compare("x", gradients.x, x.grad)
        self.compare("state", gradients.state, [array.grad for array in listed(state)])
        assert list(gradients.params) == [name for name, _ in self.torch.named_parameters()]
        for name, parameter in self.torch.named_parameters():
            self.compare(name, gradients.params[name], parameter.grad)


def listed(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def leaf(value):
    """The same numbers as tensors that collect gradients."""
    if isinstance(value, tuple):
        return tuple(map(leaf, value))
    return torch.tensor(value, requires_grad=True)


def go_back(outputs, gradients):
    """Propagate those gradients that are there."""
    pairs = [(o, torch.tensor(g)) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))


def run_and_compare(pair, x, given=("output", "state"), with_state=True):
    state = pair.state()
    tensor, tensors = leaf(x), leaf(state)
    expected, expected_last = pair.torch(tensor, tensors)
    output, last, tape = pair.layer.forward(x, state)
    pair.compare("output", output, expected)
    pair.compare("last", last, expected_last)
    pair.compare("called", listed(pair.layer(x, state)[1]), listed(expected_last))
    d_output = pair.numbers(*output.shape) if "output" in given else None
    d_state = pair.state() if "state" in given else None
    d_parts = listed(d_state) if d_state is not None else [None] * len(listed(last))
    go_back([expected, *listed(expected_last)], [d_output, *d_parts])
    for parameter in [*pair.torch.parameters(), tensor, *listed(tensors)]:
        if parameter.grad is None:  # of what d_state alone does not reach
            parameter.grad = torch.zeros_like(parameter)
    pair.compare_gradients(pair.layer.backward(tape, d_output, d_state), tensor, tensors)


@each_kind
@each_option
@each_dtype
def test_batch(kind, own, options, dtype):
    pair = Pair(kind, dtype, **own, **options)
    shape = (B, T, I) if options.get("batch_first") else (T, B, I)
    run_and_compare(pair, pair.numbers(*shape))


@each_kind
@each_option
def test_one_sequence_without_a_batch(kind, own, options):
    pair = Pair(kind, "float64", batch=None, **own, **options)
    run_and_compare(pair, pair.numbers(T, I))


@each_kind
@pytest.mark.parametrize("given", [("output",), ("state",)])
def test_one_gradient_alone(kind, own, given):
    pair = Pair(kind, "float64", num_layers=2, bidirectional=True, **own)
    run_and_compare(pair, pair.numbers(T, B, I), given)


@each_kind
@pytest.mark.parametrize("shape", [(1, 1, I), (1, B, I), (T, 1, I), (40, 2, I)])
def test_other_sizes(kind, own, shape):
    pair = Pair(kind, "float64", batch=shape[1], **own)
    run_and_compare(pair, pair.numbers(*shape))


@each_kind
@each_dtype
def test_no_state(kind, own, dtype):
    pair = Pair(kind, dtype, num_layers=2, bidirectional=True, **own)
    x = pair.numbers(T, B, I)
    tensor = leaf(x)
    expected, expected_last = pair.torch(tensor)
    output, last, tape = pair.layer.forward(x)
    pair.compare("output", output, expected)
    pair.compare("last", last, expected_last)
    d_output = pair.numbers(*output.shape)
    expected.backward(torch.tensor(d_output))
    pair.compare("x", pair.layer.backward(tape, d_output).x, tensor.grad)


@each_kind
@each_option
@each_dtype
@pytest.mark.parametrize("lengths", [[9, 7, 4, 2, 1], [3, 9, 1, 9, 5]], ids=["sorted", "unsorted"])
def test_lengths_are_packed_sequences(kind, own, options, dtype, lengths):
    pair = Pair(kind, dtype, **own, **options)
    batch_first = options.get("batch_first", False)
    x, state = pair.numbers(T, B, I), pair.state()
    x = x.swapaxes(0, 1) if batch_first else x
    tensor, tensors = leaf(np.ascontiguousarray(x)), leaf(state)
    packed = torch.nn.utils.rnn.pack_padded_sequence(tensor, torch.tensor(lengths), batch_first, enforce_sorted=False)
    packed_output, expected_last = pair.torch(packed, tensors)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(packed_output, batch_first, total_length=T)

    padding = np.arange(T)[:, None] >= np.array(lengths)
    padding = padding.T if batch_first else padding
    poisoned = x.copy()
    poisoned[padding] = np.nan
    output, last, tape = pair.layer.forward(poisoned, state, lengths=lengths)
    pair.compare("output", output, expected)
    pair.compare("last", last, expected_last)

    d_output, d_state = pair.numbers(*output.shape), pair.state()
    go_back([expected, *listed(expected_last)], [d_output, *listed(d_state)])
    d_output[padding] = np.nan
    pair.compare_gradients(pair.layer.backward(tape, d_output, d_state), tensor, tensors)


@each_kind
@each_option
def test_parameters_go_both_ways(kind, own, options):
    """Names, order, shapes; a state dict of one loads into the other."""
    layer = getattr(fastrnn, kind)(I, H, **own, **options, seed=1)
    theirs = getattr(torch.nn, kind)(I, H, **own, **options)
    assert [(name, tuple(p.shape)) for name, p in theirs.state_dict().items()] == [
        (name, array.shape) for name, array in layer.parameters.items()
    ]
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in layer.state_dict().items()})
    other = getattr(fastrnn, kind)(I, H, **own, **options, seed=2)
    other.load_state_dict(theirs.state_dict())
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], array)
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    assert layer.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())


def test_tensors_that_are_not_numbers_for_numpy_are_refused():
    layer = fastrnn.GRU(I, H)
    theirs = torch.nn.GRU(I, H)
    with pytest.raises(TypeError, match=r"weight_ih_l0 cannot be read as an array of floats: .*requires grad"):
        layer.load_state_dict(dict(theirs.named_parameters()))
    with pytest.raises(TypeError, match=r"weight_ih_l0 cannot be read as an array of floats: .*BFloat16"):
        layer.load_state_dict(theirs.bfloat16().state_dict())
    with pytest.raises(TypeError, match="x is a Tensor, expected a NumPy array of float32"):
        layer(torch.zeros(T, B, I))


@pytest.mark.parametrize(("kind", "own"), [("RNN", {}), ("LSTM", {"proj_size": 3}), ("GRU", {})])
def test_initial_parameters_have_the_same_range(kind, own):
    torch.manual_seed(0)
    ours = getattr(fastrnn, kind)(100, 100, **own, seed=0).state_dict()
    theirs = getattr(torch.nn, kind)(100, 100, **own).state_dict()
    for name, array in ours.items():
        for one in (array, theirs[name].numpy()):  # the ends of 100 numbers are within a tenth of the range
            assert -0.1 <= one.min() < -0.09, name
            assert 0.09 < one.max() <= 0.1, name


def test_repr_is_torchs():
    for kind, options in (
        ("LSTM", {}),
        ("LSTM", {"num_layers": 2, "proj_size": 3, "bias": False, "batch_first": True, "bidirectional": True}),
        ("GRU", {"num_layers": 2, "dropout": 0.5}),
        ("RNN", {"bidirectional": True}),
    ):
        ours, theirs = (repr(getattr(module, kind)(I, H, **options)) for module in (fastrnn, torch.nn))
        assert sorted(ours.strip(")").replace("(", ", ").split(", ")) == sorted(
            theirs.strip(")").replace("(", ", ").split(", ")
        )
