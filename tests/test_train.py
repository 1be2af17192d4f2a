"""The trainer: what it learns, going on bit for bit, early stopping, truncation, carried state, bad input."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import fastrnn
from fastrnn import train, weights


def parity(N=128, T=8, seed=0):
    x = np.random.default_rng(seed).integers(0, 2, (N, T))
    return x, x.cumsum(axis=1) % 2


def tagger(seed=0, dropout=0.2, dtype=np.float32):
    own = {"dtype": dtype, "seed": seed}
    return train.Sequential(
        embedding=train.Embedding(2, 4, **own),
        gru=fastrnn.GRU(4, 8, num_layers=2, dropout=dropout, **own),
        dropout=train.Dropout(dropout, seed=seed),
        output=train.Linear(8, 2, **own),
    )


def trainer(optimizer=None, seed=0, **options):
    model = tagger(seed, **options)
    return train.Trainer(
        model, train.CrossEntropy(), optimizer or train.Adam(0.02), clip_norm=1.0, metrics={"accuracy": train.accuracy}
    )


def assert_same(a, b):
    """The trainers are the same to the last bit, but for the seconds."""
    for name, array in a.model.parameters.items():
        np.testing.assert_array_equal(array, b.model.parameters[name], err_msg=name)
    for slot, own in a.optimizer.slots.items():
        for name, array in own.items():
            np.testing.assert_array_equal(array, b.optimizer.slots[slot][name], err_msg=f"{slot} {name}")

    def timeless(history):
        return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]

    assert timeless(a.history) == timeless(b.history)
    assert (a.epoch, a.optimizer.steps) == (b.epoch, b.optimizer.steps)
    assert a.optimizer.updates == b.optimizer.updates
    assert a.optimizer.learning_rate == b.optimizer.learning_rate


def test_learns_and_tells(capsys):
    a = trainer(dropout=0.0)
    x, y = parity()
    history = a.fit(x, y, epochs=40, validation=0.25)
    assert history is a.history
    assert a.epoch == len(history) == 40
    assert history[-1]["val_accuracy"] > 0.95
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert set(history[0]) == {"loss", "learning_rate", "gradient_norm", "seconds", "val_loss", "val_accuracy"}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 40
    assert printed[0].startswith("epoch 1/40  loss 0.")
    assert "val_accuracy" in printed[-1]
    found = a.evaluate(x[96:], y[96:])
    assert found["loss"] == pytest.approx(history[-1]["val_loss"], rel=1e-6)
    assert found["accuracy"] == history[-1]["val_accuracy"]
    np.testing.assert_array_equal(
        a.predict(x[96:]).argmax(axis=-1) == y[96:], a.predict(x[96:], batch_size=5).argmax(-1) == y[96:]
    )


def test_import_compiles_nothing_and_needs_numpy_alone():
    program = "import sys, fastrnn.train; print({'numba', 'torch', 'tqdm', 'sklearn', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_same_seed_same_training():
    x, y = parity()
    a, b, c = trainer(), trainer(), trainer()
    c.seed = 1
    for one in (a, b, c):
        one.fit(x, y, epochs=2, progress=False)
    assert_same(a, b)
    assert a.history[0]["loss"] != c.history[0]["loss"]


def test_order_is_a_new_one_in_each_epoch():
    seen = []

    class Spy(train.CrossEntropy):
        def __call__(self, output, targets, lengths=None, mask=None):
            seen.append(targets.ravel())
            return super().__call__(output, targets, lengths, mask)

    y = np.arange(10)
    a = train.Trainer(train.Sequential(train.Linear(3, 10)), Spy(), train.SGD(0.1))
    a.fit(np.ones((10, 3), np.float32), y, epochs=2, batch_size=4, progress=False)
    assert [len(part) for part in seen] == [4, 4, 2] * 2
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    for order in (first, second):
        np.testing.assert_array_equal(np.sort(order), y)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, y)
    seen.clear()
    a.fit(np.ones((10, 3), np.float32), y, epochs=3, batch_size=4, shuffle=False, progress=False)
    np.testing.assert_array_equal(np.concatenate(seen), y)


# ---- going on

OPTIMIZERS = {
    "adam": lambda: train.Adam(train.Warmup(train.Cosine(0.02, steps=30), steps=5)),
    "plateau": lambda: train.RMSprop(
        train.ReduceOnPlateau(0.01, patience=0, threshold=0.05), momentum=0.5, centered=True
    ),
    "sgd": lambda: train.SGD(0.1, momentum=0.9),
}
WAYS = {
    "batches": {"batch_size": 20},
    "windows": {"batch_size": 40, "truncate": 3},
    "stateful": {"batch_size": 16, "stateful": True, "validation": (parity(32, seed=1))},
    "streams": {"batch_size": 64, "stateful": True, "truncate": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("every", [None, 1, 7])
def test_goes_on_bit_for_bit(tmp_path, way, optimizer, every):
    x, y = parity()
    options = {**WAYS[way], "progress": False, "epochs": 4, "patience": 3}
    whole = trainer(OPTIMIZERS[optimizer]())
    whole.fit(x, y, **options)

    class Killed(BaseException):
        pass

    path = tmp_path / "run.npz"
    part, step, left = trainer(OPTIMIZERS[optimizer]()), None, 13

    def until_killed(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        step(*arguments)

    step, part.optimizer.step = part.optimizer.step, until_killed
    with pytest.raises(Killed):
        part.fit(x, y, **options, checkpoint=path, checkpoint_every=every)
    rest = trainer(OPTIMIZERS[optimizer](), seed=7)  # other parameters, other masks: the file has them all
    rest.load(path)
    assert rest.optimizer.steps == (13 if every == 1 else 7 if every == 7 and rest._position else rest.optimizer.steps)
    assert rest.optimizer.steps > 0
    rest.fit(x, y, **options)
    assert_same(whole, rest)


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    x, y = parity(16)
    a = trainer()
    a.fit(x, y, epochs=1, progress=False, checkpoint=tmp_path / "a.npz")
    a.model.save(tmp_path / "weights.npz")
    kept = copy.deepcopy(a)
    others = {
        "is of another model": train.Trainer(tagger(dropout=0.3), train.CrossEntropy(), train.Adam()),
        "is of the optimiser Adam, expected SGD": trainer(train.SGD()),
        "is of another model.*expected.*float64": trainer(dtype=np.float64),
    }
    for message, other in others.items():
        other.fit(x, y, epochs=1, progress=False)
        before, good = other._snapshot(copy=True)
        with pytest.raises(ValueError, match=rf"a.npz cannot be loaded: .*{message}"):
            other.load(tmp_path / "a.npz")
        after, now = other._snapshot()
        assert now == good
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name])
    arrays, meta = weights.read(tmp_path / "a.npz")
    name = "optimizer/mean/gru.bias_hh_l0"
    for changed, message in (
        ({**arrays, name: arrays[name][1:]}, rf"its {name} is float32 \(23,\), expected float32 \(24,\)"),
        ({**arrays, name: arrays[name].astype(float)}, rf"its {name} is float64 \(24,\), expected float32 \(24,\)"),
        ({**arrays, "optimizer/mean/no": np.ones(1)}, "its optimiser remembers 'no'"),
        ({**arrays, "optimizer/no/gru.bias_hh_l0": np.ones(1)}, "its optimiser remembers 'no'"),
        ({k: v for k, v in arrays.items() if k != "model/output.bias"}, "its parameters are"),
    ):
        weights.write(tmp_path / "c.npz", changed, meta)
        with pytest.raises(ValueError, match=rf"c.npz cannot be loaded: {message}"):
            a.load(tmp_path / "c.npz")
    # What would be seen if a part of the file were taken before the error.
    moved = {name: array + 1 for name, array in arrays.items() if name.startswith(("model", "random"))}
    for key in meta:
        without = {own: value for own, value in meta.items() if own != key}
        weights.write(tmp_path / "c.npz", {**arrays, **moved}, without)
        with pytest.raises(ValueError, match=r"c.npz cannot be loaded: it "):
            a.load(tmp_path / "c.npz")
    plateau = trainer(train.Adam(train.ReduceOnPlateau(0.1)))
    before, good = plateau._snapshot(copy=True)
    with pytest.raises(ValueError, match=r"a.npz cannot be loaded: it has no 'now'"):  # the file's rate is constant
        plateau.load(tmp_path / "a.npz")
    after, now = plateau._snapshot()
    assert now == good
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    assert_same(a, kept)
    same = {name: array for name, array in a._snapshot()[0].items() if name.startswith("random")}
    for name, array in kept._snapshot()[0].items():
        np.testing.assert_array_equal(array, same.get(name, array), err_msg=name)
    with pytest.raises(ValueError, match=r"it is no checkpoint of format 1: a model's weights are read by model.load"):
        a.load(tmp_path / "weights.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"b.npz cannot be loaded"):
        a.load(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"path is 'a.pt', expected a name that ends in .npz"):
        a.load("a.pt")
    with pytest.raises(FileNotFoundError):
        a.load(tmp_path / "no.npz")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    x, y = parity(16)
    a = trainer()
    a.fit(x, y, epochs=1, progress=False, checkpoint=tmp_path / "a.npz")
    kept = (tmp_path / "a.npz").read_bytes()

    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        a.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_a_long_history_can_be_read_again(tmp_path):
    a = trainer()
    a.fit(*parity(16), epochs=1, progress=False)
    a.history = [dict(entry) for entry in a.history * 5000]
    a.history[3]["val_loss"] = np.inf  # an entry that the others have not
    a.epoch = 5000
    a.save(tmp_path / "a.npz")
    b = trainer()
    b.load(tmp_path / "a.npz")
    assert b.history == a.history


def test_a_model_of_many_layers_can_be_saved(tmp_path):
    def deep(last=0.1):
        layers = [layer for i in range(150) for layer in (train.Linear(3, 3, seed=i), train.Dropout(0.1, seed=i))]
        model = train.Sequential(*layers, train.Dropout(last))
        return train.Trainer(model, train.MeanSquaredError(), train.Adam())

    a, b, c = deep(), deep(), deep(0.2)
    x = np.ones((4, 3), np.float32)
    a.fit(x, x, epochs=1, progress=False, checkpoint=tmp_path / "a.npz")
    b.load(tmp_path / "a.npz")
    assert_same(a, b)
    for one in (a, b):
        one.fit(x, x, epochs=2, progress=False)
    assert_same(a, b)
    with pytest.raises(ValueError, match="it is of another model"):
        c.load(tmp_path / "a.npz")


def test_copies_are_of_their_own():
    x, y = parity(32)
    a = trainer()
    a.fit(x, y, epochs=1, progress=False)
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        before = a.model.state_dict()
        b.fit(x, y, epochs=2, progress=False)
        for name, array in before.items():
            np.testing.assert_array_equal(a.model.parameters[name], array)
            assert not np.array_equal(b.model.parameters[name], array)
    a.fit(x, y, epochs=2, progress=False)
    assert_same(a, b)


def test_an_epoch_goes_on_as_it_was_begun(tmp_path):
    x, y = parity(64)
    a = trainer()

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    a.fit(x, y, epochs=1, batch_size=16, progress=False)
    steps, a.optimizer.step = a.optimizer.step, lambda *given: steps(*given) if a._position < 2 else killed()
    with pytest.raises(Killed):
        a.fit(x, y, epochs=2, batch_size=16, progress=False)
    a.save(tmp_path / "a.npz")
    b = trainer()
    b.load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"epoch 2 was begun with .*'batch_size': 16.*, and is to go on with .*8"):
        b.fit(x, y, epochs=2, batch_size=8, progress=False)
    b.fit(x, y, epochs=2, batch_size=16, progress=False)
    assert b.epoch == 2


# ---- early stopping, divergence


def test_early_stopping_restores_the_best_weights():
    x, y = parity(32)
    a = trainer(train.SGD(5.0))  # too large a rate: the loss goes up and down
    weights = []
    a.fit(
        x, y, epochs=50, patience=3, progress=False, validation=parity(32, seed=1),
        callbacks=[lambda t: weights.append(t.model.state_dict())],
    )  # fmt: skip
    losses = [entry["val_loss"] for entry in a.history]
    best = int(np.argmin(losses))
    assert a.epoch == best + 1 + 3 < 50
    assert (a.best["epoch"], a.best["value"]) == (best + 1, losses[best])
    for name, array in a.model.parameters.items():
        np.testing.assert_array_equal(array, weights[best][name])
    assert a.evaluate(*parity(32, seed=1))["loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize(("maximize", "best", "epochs"), [(True, 3, 5), (False, 2, 4)])
def test_monitor(maximize, best, epochs):
    values = iter([0.4, 0.1, 0.5, 0.3, 0.5, 0.9])
    a = trainer()
    a.metrics = {"score": lambda targets, predictions: next(values)}
    options = {"monitor": "val_score", "maximize": maximize, "patience": 2, "validation": 0.5, "progress": False}
    a.fit(*parity(32), epochs=6, **options)
    assert a.epoch == epochs
    assert a.best["epoch"] == best
    assert a.best["value"] == a.history[best - 1]["val_score"]
    a.fit(*parity(32), epochs=epochs + 1, progress=False)  # another loss is compared: none of it is known
    assert a.best["monitor"] == "loss"
    assert a.best["epoch"] == epochs + 1


def test_callbacks():
    a, seen = trainer(), []
    a.fit(
        *parity(16), epochs=9, progress=False,
        callbacks=[lambda t: t.epoch == 3, lambda t: seen.append(t.history[-1]["loss"])],
    )  # fmt: skip
    assert a.epoch == len(seen) == 3


class Poison(train.CrossEntropy):
    """A loss whose value, or gradient, is not finite at one update."""

    def __init__(self, at, value=np.nan, gradient=1.0):
        super().__init__()
        self.left, self.value, self.gradient = at, value, gradient

    def __call__(self, output, targets, lengths=None, mask=None):
        found = super().__call__(output, targets, lengths, mask)
        self.left -= 1
        if self.left:
            return found
        value = found.value if self.value is None else self.value
        return train.Loss(value, found.gradient * np.float32(self.gradient), found.terms)


@pytest.mark.parametrize(
    ("value", "gradient", "what"),
    [
        (np.nan, 1, "the loss is nan"),
        (np.inf, 1, "the loss is inf"),
        (None, np.nan, "the gradients' norm is nan"),
        (None, 1e38, "the gradients' norm is inf"),
    ],
)
@pytest.mark.parametrize("clip_value", [None, 10.0])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_divergence_keeps_the_last_good_weights(value, gradient, what, clip_value):
    x, y = parity(64)
    a = trainer()
    a.clip_value = clip_value  # never reached, and hides nothing
    a.fit(x, y, epochs=2, batch_size=16, progress=False)
    good, meta = a._snapshot(copy=True)
    a.loss = Poison(3, value, gradient)
    with pytest.raises(train.Diverged, match=rf"{what} in epoch 3, batch 3, at a learning rate of 0.02"):
        a.fit(x, y, epochs=4, batch_size=16, progress=False)
    now, then = a._snapshot()
    assert then == meta
    for name, array in good.items():
        np.testing.assert_array_equal(array, now[name], err_msg=name)
    a.loss = train.CrossEntropy()
    a.fit(x, y, epochs=4, batch_size=16, progress=False)
    b = trainer()
    b.fit(x, y, epochs=4, batch_size=16, progress=False)
    assert_same(a, b)


def test_a_metric_that_raises_changes_nothing():
    def metric(targets, predictions):
        raise ZeroDivisionError("of the metric")

    x, y = parity(64)
    a = trainer()
    good, meta = a._snapshot(copy=True)
    a.metrics = {"metric": metric}
    with pytest.raises(ZeroDivisionError, match="of the metric"):
        a.fit(x, y, epochs=1, validation=0.25, progress=False)
    now, then = a._snapshot()
    assert then == meta
    for name, array in good.items():
        np.testing.assert_array_equal(array, now[name], err_msg=name)


def test_the_norm_in_the_history_is_that_before_clipping():
    x = np.ones((4, 2), np.float32)
    norms = []
    for options in ({}, {"clip_value": 1e-3}, {"clip_norm": 1e-3}, {"clip_value": 1e-3, "clip_norm": 1e-4}):
        model = train.Sequential(train.Linear(2, 2, seed=0))
        a = train.Trainer(model, train.MeanSquaredError(), train.SGD(0.1), **options)
        norms.append(a.fit(x, -x, epochs=1, progress=False)[0]["gradient_norm"])
    assert norms == [norms[0]] * 4
    assert norms[0] > 0.1


def test_a_rate_that_is_too_large_diverges():
    model = train.Sequential(train.Linear(3, 1, seed=0))
    a = train.Trainer(model, train.MeanSquaredError(), train.SGD(1e6))
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    with pytest.warns(RuntimeWarning), pytest.raises(train.Diverged):
        a.fit(x, x[:, :1], epochs=50, progress=False)
    assert all(np.isfinite(array).all() for array in model.parameters.values())


# ---- lengths, windows, carried state


def test_results_do_not_depend_on_batches_or_windows():
    a = trainer(dtype=np.float64)
    x, y = parity(50, 11)
    lengths = np.random.default_rng(0).integers(0, 12, 50)
    whole = a.evaluate(x, y, lengths=lengths)
    for options in ({"batch_size": 7}, {"truncate": 4}, {"truncate": 1, "batch_size": 3}, {"truncate": 40}):
        found = a.evaluate(x, y, lengths=lengths, **options)
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-12)
        assert found["accuracy"] == whole["accuracy"]
    kept = np.arange(11) < lengths[:, None]
    logs = train.log_softmax(a.predict(x, lengths=lengths))
    assert whole["loss"] == pytest.approx(-np.take_along_axis(logs, y[..., None], -1)[..., 0][kept].mean(), rel=1e-12)


@pytest.mark.parametrize("way", ["windows", "stateful"])
def test_carried_state_by_hand(way):
    """Truncated backpropagation as one writes it down: gradients go back through a window, the state goes on."""
    x, y = parity(6, 9)
    a, b = (train.Trainer(tagger(dropout=0.0, dtype=np.float64), train.CrossEntropy(), train.SGD(0.5)) for _ in "ab")
    if way == "windows":
        a.fit(x, y, epochs=2, batch_size=6, truncate=3, shuffle=False, progress=False)
    else:
        cut = [part.reshape(6, 3, 3).swapaxes(0, 1).reshape(18, 3) for part in (x, y)]
        a.fit(*cut, epochs=2, batch_size=6, stateful=True, progress=False)
    for _ in range(2):
        state = None
        for t in range(0, 9, 3):
            output, state, tape = b.model.forward(x[:, t : t + 3], state)
            loss = b.loss(output, y[:, t : t + 3])
            b.optimizer.step(b.model.parameters, b.model.backward(tape, loss.gradient).params)
    for name, array in a.model.parameters.items():
        np.testing.assert_allclose(array, b.model.parameters[name], rtol=1e-12)


def test_streams():
    labels = np.arange(50)
    x, y = train.streams(labels, batch_size=4, steps=5)
    assert x.shape == y.shape == (8, 5)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x[4:, 0], x[:4, -1] + 1)
    with pytest.raises(ValueError, match=r"there are 20 labels, expected at least batch_size \* steps \+ 1 = 21"):
        train.streams(labels[:20], batch_size=4, steps=5)


def test_padding_teaches_nothing():
    x, y = parity(24, 6)
    lengths = np.random.default_rng(1).integers(1, 7, 24)
    beyond = np.arange(6) >= lengths[:, None]
    a, b = trainer(dropout=0.0), trainer(dropout=0.0)
    a.fit(x, y, lengths=lengths, epochs=2, progress=False, validation=(x, y, lengths))
    b.fit(
        np.where(beyond, 1 - x, x),
        np.where(beyond, 0, y),
        lengths=lengths,
        epochs=2,
        progress=False,
        validation=(x, y, lengths),
    )
    assert_same(a, b)


def test_several_arrays():
    random = np.random.default_rng(0)
    source, target = random.integers(0, 6, (40, 5)), random.integers(0, 6, (40, 4))
    own = {"seed": 0}
    encoder = train.Sequential(train.Embedding(6, 4, **own), fastrnn.GRU(4, 8, **own))
    decoder = train.Sequential(train.Embedding(6, 4, **own), fastrnn.GRU(4, 8, **own), train.Linear(8, 6, **own))
    model = train.EncoderDecoder(encoder, decoder)
    a = train.Trainer(model, train.CrossEntropy(), train.Adam(0.01), metrics={"accuracy": train.accuracy})
    lengths = random.integers(1, 6, 40), random.integers(1, 5, 40)
    a.fit((source, target), target, lengths=lengths, epochs=15, validation=0.2, progress=False)
    assert a.history[-1]["loss"] < 0.8 * a.history[0]["loss"]
    assert a.predict((source, target), lengths=lengths, batch_size=7).shape == (40, 4, 6)
    kept = np.arange(4) < lengths[1][:, None]
    guess = a.predict((source, target), lengths=lengths).argmax(-1)
    assert a.evaluate((source, target), target, lengths=lengths)["accuracy"] == pytest.approx(
        (guess == target)[kept].mean()
    )


def test_ctc_and_its_metric():
    random = np.random.default_rng(0)
    y = random.integers(1, 4, (32, 3))
    x = np.eye(4, dtype=np.float32)[np.repeat(np.insert(y, [1, 2], 0, axis=1), 2, axis=1)]  # a blank between each
    own = {"seed": 0}
    model = train.Sequential(fastrnn.GRU(4, 16, **own), train.Linear(16, 4, **own))
    a = train.Trainer(model, train.CTC(), train.Adam(0.02), metrics={"error": train.error_rate})
    a.fit(x, y, epochs=40, validation=(x, y), lengths=np.full(32, 10), progress=False)
    assert a.history[-1]["val_error"] < 0.05 < a.history[0]["val_error"]


# ---- what it shows


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr(sys, "stderr", Terminal())
    trainer().fit(*parity(64), epochs=2, batch_size=16)
    assert "epoch 1/2" in sys.stderr.getvalue()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_bar_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    trainer().fit(*parity(64), epochs=2)
    assert not sys.stderr.getvalue()
    assert len(capsys.readouterr().out.splitlines()) == 2


# ---- bad input

X, Y = parity(10, 6)
S = np.zeros((10, 6, 3), np.float32)


def regression():
    model = train.Sequential(fastrnn.GRU(3, 4), train.Last(), train.Linear(4, 2))
    return train.Trainer(model, train.MeanSquaredError(), train.Adam())


def both_ways():
    model = train.Sequential(train.Embedding(2, 4), fastrnn.GRU(4, 3, bidirectional=True), train.Linear(6, 2))
    return train.Trainer(model, train.CrossEntropy(), train.Adam())


def translator():
    encoder, decoder = ((train.Embedding(2, 4), fastrnn.GRU(4, 3)) for _ in range(2))
    model = train.EncoderDecoder(train.Sequential(*encoder), train.Sequential(*decoder, train.Linear(3, 2)))
    return train.Trainer(model, train.CrossEntropy(), train.Adam())


def frozen():
    a = trainer()
    a.model.freeze("*")
    return a


BAD = [
    (trainer, (X[:0], Y[:0]), {}, ValueError, r"x has shape \(0, 6\), expected at least one example"),
    (trainer, (X, Y[:9]), {}, ValueError, "different numbers of examples: 10 in x, 9 in y"),
    (trainer, (X, Y + 1), {}, ValueError, r"targets\[.*\] is 2, expected 0 to 1"),
    (trainer, (X + 1, Y), {}, ValueError, r"layer 'embedding', Embedding\(2, 4\): x\[.*\] is 2, expected 0 to 1"),
    (trainer, (X, Y.astype(float)), {}, TypeError, "targets has dtype float64, expected integers"),
    (trainer, (X, Y[:, :5]), {}, ValueError, r"targets have shape \(10, 5\), expected \(10, 6\)"),
    (trainer, (X, Y[:, 0]), {}, ValueError, r"targets have shape \(10,\), expected \(10, 6\)"),
    (trainer, (X, Y), {"lengths": [6] * 9}, ValueError, r"lengths has shape \(9,\), expected \(10,\)"),
    (trainer, (X, Y), {"lengths": [7] * 10}, ValueError, r"lengths\[0\] is 7, expected 0 to T = 6"),
    (trainer, (X, Y), {"lengths": [6.0] * 10}, TypeError, "lengths has dtype float64"),
    (trainer, (X, Y), {"lengths": [0] * 10}, ValueError, "no target of the epoch counts"),
    (trainer, (X, Y), {"batch_size": 0}, ValueError, "batch_size is 0"),
    (trainer, (X, Y), {"epochs": -1}, ValueError, "epochs is -1"),
    (trainer, (X, Y), {"validation": 1.0}, ValueError, "validation is 1.0, expected a finite number above 0 and below"),
    (trainer, (X, Y), {"validation": 0.01}, ValueError, "validation is 0.01 of 10 examples, expected a part"),
    (trainer, (X, Y), {"validation": (X,)}, ValueError, r"validation has 1 entries, expected \(x, y\)"),
    (trainer, (X, Y), {"validation": (X, Y + 1)}, ValueError, "is 2, expected 0 to 1"),
    (trainer, (X, Y), {"validation": (X, Y, [1])}, ValueError, r"validation lengths has shape \(1,\)"),
    (trainer, (X, Y), {"validation": (X[:0], Y[:0])}, ValueError, r"validation x has shape \(0, 6\)"),
    (trainer, (X, Y), {"truncate": 0}, ValueError, "truncate is 0"),
    (trainer, (X, Y), {"stateful": True, "batch_size": 3}, ValueError, "10 examples and batch_size 3, expected whole"),
    (
        trainer,
        (X, Y),
        {"stateful": True, "shuffle": True, "batch_size": 5},
        ValueError,
        "shuffle is True with stateful",
    ),
    (trainer, (X, Y), {"stateful": 1}, TypeError, "stateful is 1, expected True or False"),
    (trainer, (X, Y), {"patience": 0}, ValueError, "patience is 0"),
    (trainer, (X, Y), {"monitor": "val_loss"}, ValueError, "monitor is 'val_loss', expected one of 'loss'"),
    (trainer, (X, Y), {"checkpoint": "run.pt"}, ValueError, r"path is 'run.pt', expected a name that ends in .npz"),
    (trainer, (X, Y), {"checkpoint": "no/run.npz"}, FileNotFoundError, "there is no folder 'no'"),
    (trainer, (X, Y), {"checkpoint_every": 3}, ValueError, "checkpoint_every is 3 without checkpoint"),
    (trainer, ((X, X), Y), {}, TypeError, "x is a tuple, expected one array"),
    (frozen, (X, Y), {}, ValueError, "all parameters are frozen"),
    (both_ways, (X, Y), {"truncate": 3}, ValueError, "layer '1' is GRU.*, whose reverse direction begins at the end"),
    (both_ways, (X, Y), {"stateful": True, "batch_size": 5}, ValueError, "layer '1' is GRU.*, whose reverse direction"),
    (translator, ((X, X), Y), {"stateful": True, "batch_size": 5}, ValueError, "the model is an EncoderDecoder, whose"),
    (regression, (S, np.zeros((10, 3))), {}, ValueError, r"targets have shape \(10, 3\), expected 2 in the last axis"),
    (regression, (S, np.zeros((10, 6, 2))), {}, ValueError, r"targets have shape \(10, 6, 2\), expected \(10, 2\)"),
    (regression, (S, np.zeros((10, 2))), {"truncate": 2}, ValueError, "expected a target for each step"),
    (regression, (S.astype(float), np.zeros((10, 2))), {}, TypeError, "x has dtype float64, expected float32"),
    (
        regression,
        (S[..., :2], np.zeros((10, 2))),
        {},
        ValueError,
        r"x has shape \(10, 6, 2\), expected \(B, T, input_size\)",
    ),
]


@pytest.mark.parametrize(("make", "data", "options", "kind", "message"), BAD)
def test_bad_input_to_fit(make, data, options, kind, message):
    a = make()
    before, meta = a._snapshot(copy=True)
    with pytest.raises(kind, match=message):
        a.fit(*data, **{"epochs": 1, "progress": False, **options})
    after, now = a._snapshot()
    assert now == meta
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def test_bad_input_to_trainer():
    model = tagger()
    for arguments, options, message in (
        ((fastrnn.GRU(3, 4), train.CrossEntropy(), train.Adam()), {}, "model is a GRU, expected a Model"),
        ((model, train.CrossEntropy, train.Adam()), {}, "loss is <class .*CrossEntropy'>, expected a loss"),
        ((model, train.CrossEntropy(), 0.1), {}, "optimizer is a float, expected an Optimizer"),
        ((model, train.CrossEntropy(), train.Adam()), {"clip_norm": "1"}, "clip_norm is a str, expected a number"),
    ):
        with pytest.raises(TypeError, match=message):
            train.Trainer(*arguments, **options)
    with pytest.raises(ValueError, match="metrics has a 'loss'"):
        train.Trainer(model, train.CrossEntropy(), train.Adam(), metrics={"loss": train.accuracy})
    with pytest.raises(ValueError, match="lengths has shape"):
        trainer().predict(X, lengths=[6])
    with pytest.raises(ValueError, match=r"x has shape \(0, 6\), expected at least one example"):
        trainer().predict(X[:0])
    with pytest.raises(ValueError, match=r"lengths has shape \(12,\), expected \(10,\)"):
        trainer().predict(X, lengths=[6] * 12, batch_size=5)  # the first ten would fit
    with pytest.raises(ValueError, match=r"different numbers of examples: 5 in x\[0\], 10 in x\[1\]"):
        translator().predict((X[:5], X), batch_size=5)
