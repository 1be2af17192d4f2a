"""Strided, read-only, byte-swapped arrays and others give the bits of plain ones, and are never written."""

import numpy as np
import pytest

from fastrnn import GRU, LSTM, RNN, backend, functional, weights

T, B, I, H = 6, 3, 4, 5


class Named(np.ndarray):
    """A subclass of the kind that libraries define."""


def misaligned(array):
    block = np.empty(array.nbytes + 1, np.uint8)
    view = block[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert view.flags.aligned == (array.itemsize == 1)
    return view


def filled(shape, dtype):
    """What must not reach a result: NaN, or whatever is all ones."""
    block = np.empty(shape, dtype)
    block.view(np.uint8)[...] = 1 if np.dtype(dtype).kind == "b" else 255
    return block


def every_other(array):
    block = filled((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    block[..., ::2] = array
    return block[..., ::2]


def in_the_middle(array):
    """A part of a larger array in every axis."""
    block = filled([n + 3 for n in array.shape], array.dtype)
    part = block[tuple(slice(1, n + 1) for n in array.shape)]
    part[...] = array
    return part


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def from_file(array, folder):
    path = folder / f"{np.random.default_rng().integers(1 << 62)}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


KINDS = {
    "strided": every_other,
    "in-the-middle": in_the_middle,
    "negative-strides": lambda array: np.flip(np.flip(array).copy()),
    "fortran": np.asfortranarray,
    "read-only": read_only,
    "misaligned": misaligned,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "subclass": lambda array: array.view(Named),
    "swapped-axes": lambda array: array.swapaxes(0, -1).copy().swapaxes(0, -1),
    "field-of-records": lambda array: np.rec.fromarrays([array, np.zeros(array.shape, np.int8)], names="value,flag")[
        "value"
    ],
}


def uniform(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def bits(value):
    """Everything in nested results as bytes."""
    if isinstance(value, dict):
        value = list(value.values())
    if hasattr(value, "params"):
        value = [value.x, value.state, list(value.params.values())]
    return [bits(one) for one in value] if isinstance(value, (list, tuple)) else value.tobytes()


def run(change, kind, dtype, **options):
    """All that a layer gives for arrays that went through `change`, and whether they were left as they were."""
    layer = kind(I, H, 2, bidirectional=True, seed=0, dtype=dtype, **options)
    K, sizes = 4, layer._spec.state_sizes
    arrays = [uniform(T, B, I, dtype=dtype), *(uniform(K, B, size, seed=1, dtype=dtype) for size in sizes)]
    arrays += [uniform(T, B, 2 * sizes[0], seed=2, dtype=dtype)]
    arrays += [np.random.default_rng(3).random((T, B)) < 0.2, np.array([6, 0, 4])]
    arrays = [change(array) for array in arrays]
    before = [array.tobytes() for array in arrays]
    x, *state, d_output, reset, lengths = arrays
    state = tuple(state) if len(state) == 2 else state[0]
    output, last, tape = layer.forward(x, state, lengths=lengths, reset=reset)
    gradients = layer.backward(tape, d_output, state)
    results = [output, last, gradients]
    assert type(output) is type(gradients.x) is np.ndarray
    assert output.dtype == gradients.x.dtype == np.dtype(dtype)
    assert output.dtype.isnative
    assert [array.tobytes() for array in arrays] == before
    return bits(results)


@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
def test_layer(change, dtype, kind):
    assert run(change, kind, dtype) == run(lambda array: array, kind, dtype)


def test_memory_map(tmp_path):
    assert run(lambda array: from_file(array, tmp_path), LSTM, "float32") == run(lambda array: array, LSTM, "float32")


@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
def test_functional(change):
    params = {name: uniform(*shape, seed=4) for name, shape in weights.cell_shapes("lstm", I, H, 2).items()}
    plain = (uniform(T, B, I), (uniform(B, 2, seed=1), uniform(B, H, seed=2)), uniform(T, B, 2, seed=3))

    def results(change):
        x, state, d_output = change(plain[0]), tuple(map(change, plain[1])), change(plain[2])
        own = {name: change(array) for name, array in params.items()}
        output, last, tape = functional.forward("lstm", x, own, state, training=True)
        return bits([output, last, *functional.backward(tape, d_output, state)])

    assert results(change) == results(lambda array: array)


@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
def test_step(change):
    layer = GRU(I, H, 2, seed=0)
    x, state = uniform(B, I), uniform(2, B, H)
    assert bits(layer.step(change(x), change(state))) == bits(layer.step(x, state))
    assert bits(layer.step(x[0], change(state[:, 0]))) == bits(layer.step(x[0], state[:, 0]))


@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_broadcast(kind):
    """Strides of 0: one number in memory for many places."""
    layer = kind(I, H, seed=0)
    x = np.broadcast_to(uniform(I), (T, B, I))
    state = np.broadcast_to(uniform(H), (1, B, H))
    state = (state, state) if kind is LSTM else state
    plain = tuple(map(np.array, state)) if kind is LSTM else np.array(state)
    output, last, tape = layer.forward(x, state)
    expected = layer.forward(np.array(x), plain)
    assert bits([output, last]) == bits(expected[:2])
    d_output = np.broadcast_to(np.float32(1), output.shape)
    assert bits(layer.backward(tape, d_output)) == bits(layer.backward(expected[2], np.array(d_output)))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix():
    """np.matrix is always 2-D: one sequence, or a batch for one step."""
    layer = GRU(I, H, seed=0)
    x = uniform(T, I)
    output, state = layer(np.matrix(x), np.matrix(uniform(1, H)))
    assert type(output) is np.ndarray
    assert bits([output, state]) == bits(layer(x, uniform(1, H)))
    assert bits(layer.step(np.matrix(x))) == bits(layer.step(x))


@pytest.mark.parametrize(
    "lengths",
    [(6, 0, 4), [6, 0, 4], np.array([6, 0, 4], np.uint8), np.array([6, 0, 4], ">i8"), np.array([6, 9, 0, 9, 4])[::2]],
)
def test_lengths(lengths):
    layer, x = GRU(I, H, bidirectional=True, seed=0), uniform(T, B, I)
    assert bits(layer(x, lengths=lengths)) == bits(layer(x, lengths=np.array([6, 0, 4])))


def test_lengths_of_no_rows():
    layer, x = GRU(I, H, seed=0), uniform(T, 0, I)
    for lengths in ([], (), np.array([], int)):
        assert layer(x, lengths=lengths)[0].shape == (T, 0, H)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_lengths_and_reset_may_change_before_backward(name):
    """The tape has what was checked."""
    layer, x = LSTM(I, H, bidirectional=True, seed=0, backend=name), uniform(T, B, I)
    lengths, reset = np.array([6, 0, 4]), np.random.default_rng(0).random((T, B)) < 0.5
    output, _, tape = layer.forward(x, lengths=lengths, reset=reset)
    expected = bits(layer.backward(tape, output))
    lengths[:] = 10**9
    reset[:] = ~reset
    assert bits(layer.backward(tape, output)) == expected


@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
@pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
def test_backends_are_given_plain_arrays_only(change, kind, monkeypatch):
    """Also where this machine's processor would forgive it."""
    given = []

    def listed(*values):
        for value in values:
            if isinstance(value, np.ndarray):
                given.append(value)
            elif isinstance(value, (tuple, dict)):
                listed(*(value.values() if isinstance(value, dict) else value))

    cpu = backend.load("cpu")

    class Recorder:
        class prepare(cpu.Prepared):
            def forward(self, *arguments, **options):
                listed(self.params, *arguments, options)
                return super().forward(*arguments, **options)

        @staticmethod
        def backward(*arguments):
            listed(*arguments)
            return cpu.backward(*arguments)

    monkeypatch.setitem(backend._loaded, "cpu", Recorder)
    run(change, kind, "float32")
    assert len(given) > 50
    for array in given:
        assert type(array) is np.ndarray
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.dtype in (np.float32, np.int64, bool)


def test_reset_as_lists():
    layer, x = GRU(I, H, seed=0), uniform(T, B, I)
    reset = np.random.default_rng(0).random((T, B)) < 0.5
    assert bits(layer(x, reset=reset.tolist())) == bits(layer(x, reset=reset))
    assert bits(layer(x, reset=reset)) != bits(layer(x))
    assert bits(layer(x[:0, 0], reset=[])) == bits(layer(x[:0, 0]))


def test_the_same_array_as_everything():
    """Arguments may share memory: they are only read."""
    layer = LSTM(H, H, seed=0)
    block = uniform(1, B, H)
    copies = [block.copy() for _ in range(3)]
    output, last, tape = layer.forward(block, (block, block))
    expected = layer.forward(copies[0], (copies[1], copies[2]))
    assert bits([output, last]) == bits(expected[:2])
    assert bits(layer.backward(tape, block, (block, block))) == bits(
        layer.backward(expected[2], *copies[:1], copies[1:])
    )
