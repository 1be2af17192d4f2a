"""Embedding, Linear, Dropout, Activation, Last and models made of layers: gradients by differences, steps, files."""

import numpy as np
import pytest

import fastrnn
from fastrnn import train

F64 = {"dtype": np.float64, "seed": 0}
LENGTHS = [5, 2, 0, 4]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def labels(*shape, high=7, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape)


def every_array(value):
    """The arrays in a state, or among gradients, in order."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [array for part in value for array in every_array(part)]
    return [] if value is None else [value]


def check_gradients(model, x, state=None, entries=12, **options):
    """Compare what backward returns with differences of the sum of outputs and states times random numbers."""
    output, last, tape = model.forward(x, state, **options)
    random = np.random.default_rng(1)
    d_output = random.standard_normal(output.shape)
    d_last = [random.standard_normal(array.shape) for array in every_array(last)]

    def rebuilt(like, arrays):
        if isinstance(like, tuple):
            return tuple(rebuilt(part, arrays) for part in like)
        return None if like is None else arrays.pop(0)

    found = model.backward(tape, d_output, rebuilt(last, list(d_last)) if d_last else None)

    def loss():
        output, last = model(x, state, **options)
        pairs = zip([output, *every_array(last)], [d_output, *d_last], strict=True)
        return sum(float((array * d).sum()) for array, d in pairs)

    inputs = [array for array in every_array(x) if array.dtype.kind == "f"]
    given = [*inputs, *every_array(state), *model.parameters.values()]
    gradients = [
        *every_array(found.x),
        *(every_array(found.state) if state is not None else []),
        *found.params.values(),
    ]
    assert len(given) == len(gradients)
    assert list(found.params) == list(model.parameters)
    for array, gradient in zip(given, gradients, strict=True):
        assert array.shape == gradient.shape
        assert array.dtype == gradient.dtype
        for index in np.random.default_rng(2).permutation(array.size)[:entries]:
            at = np.unravel_index(index, array.shape)
            before, values = array[at], []
            for sign in (1, -1):
                array[at] = before + sign * 1e-5
                values.append(loss())
            array[at] = before
            # off by the step squared and by rounding divided by the step: about 1e-9 of what is of the order of 1
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[at], rel=1e-6, abs=1e-7)


LAYERS = {
    "embedding": (train.Embedding(7, 3, **F64), labels(4, 5)),
    "embedding of one step": (train.Embedding(7, 3, **F64), labels(4)),
    "embedding of a tensor": (train.Embedding(7, 3, **F64), labels(4, 5, 2)),
    "linear": (train.Linear(3, 6, **F64), numbers(4, 5, 3)),
    "linear of rows": (train.Linear(3, 6, **F64), numbers(4, 3)),
    "linear without bias": (train.Linear(3, 6, bias=False, **F64), numbers(4, 5, 3)),
    "relu": (train.Activation("relu"), numbers(4, 5, 3)),
    "tanh": (train.Activation("tanh"), numbers(4, 5, 3)),
    "sigmoid": (train.Activation("sigmoid"), numbers(4, 3)),
    "softmax": (train.Activation("softmax"), numbers(4, 5, 3)),
    "last": (train.Last(), numbers(4, 5, 6)),
    "last of both directions": (train.Last(bidirectional=True), numbers(4, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("time_first", [False, True])
def test_layer(name, time_first):
    layer, x = LAYERS[name]
    if time_first and x.ndim > 2:
        x = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    check_gradients(layer, x, entries=200)
    if isinstance(layer, train.Last):
        check_gradients(layer, x, entries=200, lengths=LENGTHS)


def test_padding_has_no_vector_and_no_gradient():
    layer = train.Embedding(7, 3, padding_index=2, **F64)
    x = np.array([[2, 1], [1, 2]])
    output, _, tape = layer.forward(x)
    assert not output[x == 2].any()
    gradient = layer.backward(tape, np.ones_like(output)).params["weight"]
    np.testing.assert_array_equal(gradient, 2.0 * (np.arange(7) == 1)[:, None] * np.ones(3))


def test_labels_that_change_after_forward_do_no_harm():
    layer, x = train.Embedding(7, 3, **F64), np.array([[2, 1], [1, 2]])
    output, _, tape = layer.forward(x)
    x[:] = 10**9  # a buffer that is used again; backward writes where its labels say
    gradient = layer.backward(tape, np.ones_like(output)).params["weight"]
    np.testing.assert_array_equal(gradient[:, 0], [0, 2, 2, 0, 0, 0, 0])


def test_gradient_of_foreign_byte_order():
    for layer, x in ((train.Embedding(7, 3, **F64), np.array([[2, 1]])), (train.Linear(2, 3, **F64), numbers(2, 2))):
        output, _, tape = layer.forward(x)
        d_output = numbers(*output.shape)
        foreign = d_output.astype(d_output.dtype.newbyteorder("S"))
        for name, array in layer.backward(tape, d_output).params.items():
            np.testing.assert_array_equal(layer.backward(tape, foreign).params[name], array, err_msg=name)


def test_dropout():
    layer, x = train.Dropout(0.3, seed=0), np.ones((40, 50, 10), np.float32)
    assert layer(x)[0] is x
    output, _, tape = layer.forward(x)
    assert output.dtype == np.float32
    np.testing.assert_allclose(np.unique(output), [0, 1 / 0.7], rtol=1e-6)
    assert abs((output == 0).mean() - 0.3) < 0.02  # four standard deviations of 20 000 draws are 0.013
    np.testing.assert_array_equal(layer.backward(tape, x).x, output)
    assert not np.array_equal(layer.forward(x)[0], output)
    np.testing.assert_array_equal(train.Dropout(0.3, seed=0).forward(x)[0], output)
    swapped = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    assert train.Dropout(0.3, seed=0).forward(swapped)[0].swapaxes(0, 1).flags.c_contiguous


def test_last_of_an_empty_row_is_zero():
    y, _ = train.Last()(numbers(4, 5, 3), lengths=LENGTHS)
    assert not y[2].any()


# ---- models


def tagger(**options):
    return train.Sequential(
        embedding=train.Embedding(7, 4, **F64),
        lstm=fastrnn.LSTM(4, 5, num_layers=2, **options, **F64),
        tanh=train.Activation("tanh"),
        gru=fastrnn.GRU(5 * (1 + options.get("bidirectional", False)), 3, batch_first=True, **F64),
        output=train.Linear(3, 6, **F64),
    )


def some_state(model, B, seed=3):
    _, state = model(labels(B, 1))
    random = np.random.default_rng(seed)

    def fill(part):
        if isinstance(part, tuple):
            return tuple(map(fill, part))
        return None if part is None else random.standard_normal(part.shape)

    return fill(state)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}])
def test_many_to_many(options):
    model = tagger(**options)
    check_gradients(model, labels(4, 5))
    reset = np.random.default_rng(0).random((4, 5)) < 0.3
    check_gradients(model, labels(4, 5), some_state(model, 4), lengths=LENGTHS, reset=reset)


def test_many_to_one_and_models_in_models():
    inner = train.Sequential(fastrnn.RNN(3, 4, bidirectional=True, **F64), train.Last(bidirectional=True))
    model = train.Sequential(train.Linear(2, 3, **F64), inner, train.Linear(8, 2, **F64))
    check_gradients(model, numbers(4, 5, 2), lengths=LENGTHS)
    output, _ = model(numbers(4, 5, 2), lengths=LENGTHS)
    alone, _ = model(numbers(4, 5, 2)[1:2, :2])
    np.testing.assert_allclose(output[1:2], alone, rtol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU])
def test_encoder_and_decoder(kind, bidirectional):
    encoder = train.Sequential(train.Embedding(7, 3, **F64), kind(3, 4, 2, bidirectional=bidirectional, **F64))
    size = 8 if bidirectional else 4
    decoder = train.Sequential(train.Embedding(6, 3, **F64), kind(3, size, 2, **F64), train.Linear(size, 5, **F64))
    model = train.EncoderDecoder(encoder, decoder)
    x = labels(4, 5), labels(4, 3, high=6)
    check_gradients(model, x)
    check_gradients(model, x, lengths=(LENGTHS, [3, 1, 2, 0]))
    check_gradients(model, x, lengths=(LENGTHS, None))


class Residual(train.Model):
    """A layer's output added to its input: a model as a user writes it."""

    def __call__(self, x, state=None, *, lengths=None, reset=None):
        y, state = self.layers["inner"](x, state, lengths=lengths, reset=reset)
        return x + y, state

    def forward(self, x, state=None, *, lengths=None, reset=None):
        y, state, tape = self.layers["inner"].forward(x, state, lengths=lengths, reset=reset)
        return x + y, state, tape

    def backward(self, tape, d_output=None, d_state=None):
        found = self.layers["inner"].backward(tape, d_output, d_state)
        params = {f"inner.{name}": array for name, array in found.params.items()}
        return train.Gradients(found.x + d_output, found.state, params)


def test_a_model_of_ones_own():
    inner = train.Sequential(fastrnn.GRU(3, 3, **F64))
    model = train.Sequential(body=Residual({"inner": inner}), output=train.Linear(3, 2, **F64))
    check_gradients(model, numbers(4, 5, 3), lengths=LENGTHS)
    trainer = train.Trainer(model, train.MeanSquaredError(), train.Adam(0.01))
    trainer.fit(numbers(20, 5, 3), numbers(20, 5, 2), epochs=2, progress=False)
    alone = train.Trainer(Residual({"inner": inner}), train.MeanSquaredError(), train.Adam(0.01))
    history = alone.fit(numbers(20, 5, 3), numbers(20, 5, 3, seed=1), epochs=5, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]


def test_decode_reads_its_own_labels():
    encoder = train.Sequential(train.Embedding(7, 3, seed=1), fastrnn.GRU(3, 8, seed=2))
    decoder = train.Sequential(train.Embedding(5, 3, seed=6), fastrnn.GRU(3, 8, seed=4), train.Linear(8, 5, seed=5))
    for part in (encoder, decoder):
        for name, array in part.parameters.items():
            array *= 1 if "bias" in name else 3  # so that rows differ: 1334311, 1313343, ...
    model = train.EncoderDecoder(encoder, decoder)
    source, lengths = labels(6, 5), [5, 4, 3, 2, 1, 5]
    went_on = 0
    for stop in range(5):
        found = model.decode(source, start=1, stop=stop, limit=7, lengths=lengths)
        for row, own_labels in enumerate(found):
            read = [1]
            for _ in range(7):
                logits, _ = model((source[row : row + 1, : lengths[row]], np.array([read])))
                read.append(int(logits[0, -1].argmax()))
            end = read.index(stop, 1) if stop in read[1:] else len(read)
            went_on += any(label != stop for label in read[end:])
            assert own_labels == read[1:end]
    assert went_on > 3  # labels that come after a stop do not count
    assert model.decode(source, start=1, stop=2, limit=0) == [[]] * 6


def test_steps_and_chunks_are_the_whole():
    model = tagger()
    x = labels(3, 6)
    whole, last = model(x)
    first, state = model(x[:, :2])
    second, state = model(x[:, 2:], state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-12)
    state = None
    for t in range(6):
        y, state = model.step(x[:, t], state)
        np.testing.assert_allclose(y, whole[:, t], rtol=1e-12)
    for one, other in zip(every_array(state), every_array(last), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_summary_counts_as_the_articles_do(capsys):
    model = train.Sequential(train.Embedding(1000, 64), fastrnn.LSTM(64, 128), train.Last(), train.Linear(128, 10))
    assert model.num_parameters == 64_000 + 99_328 + 1_290
    x = labels(3, 8, high=1000)
    before, _ = model(x)
    model.single_bias()
    after, _ = model(x)
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert model.num_parameters == 64_000 + 98_816 + 1_290 == 164_106
    model.summary()
    printed = capsys.readouterr().out
    for text in ("64,000", "98,816", "1,290", "164,106", "512"):
        assert text in printed
    trainer = train.Trainer(model, train.CrossEntropy(), train.Adam())
    trainer.fit(x, labels(3), epochs=2, progress=False)
    assert not model.parameters["1.bias_hh_l0"].any()
    with pytest.raises(ValueError, match="one bias for two needs reset_after=False"):
        train.Sequential(fastrnn.LSTM(2, 3), fastrnn.GRU(3, 4)).single_bias()
    train.Sequential(fastrnn.GRU(3, 4, reset_after=False)).single_bias()


def test_frozen_parameters_stay(tmp_path):
    model = tagger()
    model.freeze("embedding", "lstm.bias_*", "*_hh_l1")
    before = model.state_dict()
    trainer = train.Trainer(model, train.CrossEntropy(), train.AdamW(0.1))
    trainer.fit(labels(4, 5), labels(4, 5, high=6), epochs=2, progress=False)
    for name, array in model.parameters.items():
        frozen = name.startswith(("embedding", "lstm.bias")) or name.endswith("_hh_l1")
        assert np.array_equal(array, before[name]) == frozen, name
        assert (name in model.trainable) != frozen
    model.unfreeze("*")
    assert list(model.trainable) == list(model.parameters)
    inner = tagger()
    inner.freeze("gru")
    outer = train.Sequential(body=inner)
    assert "body.gru.bias_ih_l0" not in outer.trainable
    inner.freeze("embedding")  # is seen from outside, and the other way round
    assert "body.embedding.weight" not in outer.trainable
    outer.unfreeze("body.gru")
    assert "gru.bias_ih_l0" in inner.trainable
    assert outer.num_parameters == inner.num_parameters == sum(array.size for array in inner.trainable.values())


def test_files(tmp_path):
    a, b = tagger(), train.Sequential(**{**tagger().layers, "gru": fastrnn.GRU(5, 3, dtype=np.float64, seed=9)})
    a.save(tmp_path / "a.npz")
    assert b.load(tmp_path / "a.npz") == ([], [])
    np.testing.assert_array_equal(a(labels(2, 3))[0], b(labels(2, 3))[0])
    shared = train.Sequential(embedding=train.Embedding(7, 4), head=train.Linear(4, 2))
    before = shared.state_dict()
    with pytest.raises(ValueError, match=r"missing: 'head\.weight', 'head\.bias'"):
        shared.load(tmp_path / "a.npz")
    keys = shared.load(tmp_path / "a.npz", strict=False)
    assert keys.missing_keys == ["head.weight", "head.bias"]
    np.testing.assert_array_equal(shared.parameters["embedding.weight"], np.float32(a.parameters["embedding.weight"]))
    other = train.Sequential(embedding=train.Embedding(8, 4), head=train.Linear(4, 2))
    with pytest.raises(ValueError, match=r"embedding.weight has shape \(7, 4\), expected \(8, 4\)"):
        other.load(tmp_path / "a.npz", strict=False)
    np.testing.assert_array_equal(shared.parameters["head.weight"], before["head.weight"])
    a.load_state_dict(b.state_dict())
    with pytest.raises(ValueError, match="unexpected: 'no'"):
        a.load_state_dict({**b.state_dict(), "no": np.ones(1)})


def test_generate():
    model = train.Sequential(train.Embedding(9, 4, seed=0), fastrnn.LSTM(4, 8, seed=0), train.Linear(8, 9, seed=0))
    greedy = train.generate(model, [1, 2, 3], 6, temperature=0)
    read = [1, 2, 3]
    for label in greedy:
        logits, _ = model(np.array([read]))
        assert label == logits[0, -1].argmax()
        read.append(int(label))
    np.testing.assert_array_equal(train.generate(model, [1, 2, 3], 6, top_k=1, seed=3), greedy)
    a, b, c = (train.generate(model, [[1, 2], [3, 4]], 50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert a.shape == (2, 50)
    assert train.generate(model, [1], 0).shape == (0,)


def test_generate_of_equal_logits():
    model = train.Sequential(train.Embedding(9, 4, seed=0), train.Linear(4, 9, seed=0))
    model.load_state_dict({name: np.zeros_like(array) for name, array in model.parameters.items()})
    drawn = train.generate(model, np.zeros((200, 1), int), 3, top_k=2, seed=0)
    assert len(np.unique(drawn)) == 2


def test_generate_at_a_temperature_of_almost_nothing():
    model = train.Sequential(train.Embedding(9, 4, seed=0), train.Linear(4, 9, seed=0))
    greedy = train.generate(model, [1], 20, temperature=0)
    np.testing.assert_array_equal(train.generate(model, [1], 20, temperature=1e-310, seed=0), greedy)


def test_generate_draws_by_probability():
    model = train.Sequential(train.Embedding(4, 4, seed=0), train.Linear(4, 4, seed=0))
    model.parameters["1.weight"] = np.zeros((4, 4))
    model.parameters["1.bias"] = np.log([0.1, 0.2, 0.3, 0.4])
    for options, expected in (
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, np.array([1, 4, 9, 16]) / 30),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
    ):
        drawn = train.generate(model, np.zeros((2000, 1), int), 5, seed=0, **options)
        shares = np.bincount(drawn.ravel(), minlength=4) / drawn.size
        np.testing.assert_allclose(shares, expected, atol=0.02)  # four standard deviations of 10 000 draws
        assert not shares[np.array(expected) == 0].any()


def test_gradient_norms_of_a_stack_by_differences():
    layer = fastrnn.GRU(3, 4, num_layers=2, batch_first=True, **F64)
    x, d_output = numbers(2, 6, 3), numbers(2, 6, 4, seed=1)
    found = train.gradient_norms(layer, x, d_output)
    for t in (0, 3, 6):
        _, state = layer(x[:, :t])
        squares = 0.0
        for index in np.ndindex(state.shape):
            values = []
            for sign in (1, -1):
                moved = state.copy()
                moved[index] += sign * 1e-5
                output, _ = layer(x[:, t:], moved)
                own = float((moved[-1] * d_output[:, t - 1]).sum()) if t else 0.0
                values.append(float((output * d_output[:, t:]).sum()) + own)
            squares += ((values[0] - values[1]) / 2e-5) ** 2
        assert found[t] == pytest.approx(np.sqrt(squares), rel=1e-7)


# ---- bad input

X = np.zeros((2, 3, 4), np.float32)
GRU = fastrnn.GRU(4, 5)


def pair(first, second):
    return train.EncoderDecoder(train.Sequential(first), train.Sequential(second))


BAD = [
    (lambda: train.Embedding(7, 3)(np.array([[6, 7]])), ValueError, r"x\[0, 1\] is 7, expected 0 to 6"),
    (lambda: train.Embedding(7, 3)(np.array([[-1]])), ValueError, r"x\[0, 0\] is -1"),
    (lambda: train.Embedding(7, 3)(X), TypeError, "x has dtype float32, expected integers from 0 to 6"),
    (lambda: train.Embedding(7, 3, 7), ValueError, "padding_index is 7, expected less than num_labels = 7"),
    (lambda: train.Embedding(0, 3), ValueError, "num_labels is 0"),
    (lambda: train.Linear(5, 3)(X), ValueError, r"x has shape \(2, 3, 4\), expected \(B, ..., input_size\)"),
    (lambda: train.Linear(4, 3)(X.astype(float)), TypeError, "x has dtype float64, expected float32"),
    (lambda: train.Dropout(1.0), ValueError, "probability is 1.0, expected a finite number at least 0 and below 1"),
    (lambda: train.Activation("step"), ValueError, "name is 'step', expected one of 'relu'"),
    (lambda: train.Last()(X[:, 0]), ValueError, r"x has shape \(2, 4\), expected \(B, T, size\)"),
    (lambda: train.Last()(X[:, :0]), ValueError, "expected at least one step"),
    (lambda: train.Last()(X, lengths=[4, 1]), ValueError, r"lengths\[0\] is 4, expected 0 to T = 3"),
    (lambda: train.Last(bidirectional=True).step(X[:, 0]), ValueError, "needs no future input"),
    (lambda: train.Linear(4, 3)(X, X), ValueError, "state is a ndarray, expected None: Linear has no state"),
    (lambda: train.Sequential(), ValueError, "there are no layers"),
    (lambda: train.Sequential(GRU, GRU), ValueError, "a layer occurs twice"),
    (lambda: train.Sequential(np.tanh), TypeError, "layer '0' is a ufunc, expected a layer or a model"),
    (lambda: train.Sequential(body=GRU)(X[:, 0]), ValueError, r"layer 'body', GRU\(4, 5\): x has shape \(2, 4\)"),
    (lambda: train.Sequential(GRU)(X, ()), ValueError, "state has 0 entries, expected 1"),
    (lambda: train.Sequential(GRU)(X, X), TypeError, "state is a ndarray, expected a tuple"),
    (lambda: train.Sequential(GRU)(X, reset=[[True]]), ValueError, r"reset has shape \(1, 1\), expected \(B, T\)"),
    (lambda: train.Sequential(GRU).freeze("body"), ValueError, "no parameter is called 'body'; there are 0.weight"),
    (lambda: train.Sequential(GRU).backward(None), TypeError, "tape is a NoneType"),
    (lambda: train.Linear(4, 3).backward(train.Linear(4, 3).forward(X)[2], X), ValueError, "tape is of another layer"),
    (lambda: pair(train.Linear(4, 4), GRU), ValueError, "encoder and decoder have 0 and 1 recurrent layers"),
    (lambda: pair(fastrnn.GRU(4, 4), GRU), ValueError, "needs a state of"),
    (lambda: pair(fastrnn.LSTM(4, 5), GRU), ValueError, "needs a state of"),
    (lambda: pair(GRU, GRU), ValueError, "a layer occurs twice"),
    (lambda: pair(fastrnn.GRU(4, 5), GRU).decode(X, start=0, stop=5, limit=1), ValueError, "stop is 5, expected one"),
    (lambda: pair(fastrnn.GRU(4, 5), GRU).decode(X, start=0, stop=-1, limit=1), ValueError, "stop is -1, expected an"),
    (lambda: train.EncoderDecoder(GRU, GRU), TypeError, "encoder is a GRU, expected a Sequential"),
    (lambda: pair(fastrnn.GRU(4, 5), GRU)(X), TypeError, "x is a ndarray, expected a pair"),
    (lambda: pair(fastrnn.GRU(4, 5), GRU)((X, X[:1])), ValueError, "x holds batches of 2 and 1 rows"),
    (lambda: pair(fastrnn.GRU(4, 5), GRU)((X, X), lengths=[3, 3, 3]), ValueError, "lengths has 3 entries, expected 2"),
    (lambda: train.generate(train.Sequential(GRU), [], 3), ValueError, r"prompt is float64 \(0,\), expected integers"),
    (lambda: train.generate(train.Sequential(GRU), [1], 3, temperature=-1), ValueError, "temperature is -1"),
    (lambda: train.generate(train.Sequential(GRU), [1], 3, top_k=0), ValueError, "top_k is 0"),
    (lambda: train.generate(pair(fastrnn.GRU(4, 5), GRU), [1], 3), TypeError, "an EncoderDecoder has decode"),
    (lambda: train.gradient_norms(train.Linear(4, 3), X), TypeError, "layer is a Linear, expected an RNN"),
    (lambda: train.gradient_norms(fastrnn.GRU(4, 5, bidirectional=True), X), ValueError, "layer is bidirectional"),
    (lambda: train.gradient_norms(GRU, X), ValueError, "d_output and d_state are both None"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
