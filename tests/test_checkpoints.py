"""Checkpoints that are not what they should be: each is refused before it is read, and the trainer stays as it was."""

import copy
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from fastrnn import LSTM, RNN, train, weights

N, T = 8, 6
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.standard_normal((N, T, 3)).astype(np.float32), RANDOM.standard_normal((N, T, 2)).astype(np.float32)
OPTIONS = {"batch_size": 4, "truncate": 2, "validation": (X, Y), "progress": False}


def make(seed=0):
    reference = {"backend": "reference"}
    inner = train.Sequential(train.Dropout(0.1, seed=seed), RNN(4, 4, batch_first=True, seed=seed, **reference))
    lstm = LSTM(3, 4, 2, dropout=0.1, batch_first=True, seed=seed, **reference)
    model = train.Sequential(lstm=lstm, inner=inner, output=train.Linear(4, 2, seed=seed))
    return train.Trainer(model, train.MeanSquaredError(), train.Adam(train.ReduceOnPlateau(0.01)), seed=seed)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole():
    """A trainer in the midst of an epoch: there is everything that a checkpoint can have."""
    trainer = make()
    trainer.fit(X, Y, epochs=2, patience=5, **OPTIONS)
    step = trainer.optimizer.step

    def until_killed(*arguments):
        if trainer._position == 4:
            raise Killed
        step(*arguments)

    trainer.optimizer.step = until_killed
    with pytest.raises(Killed):
        trainer.fit(X, Y, epochs=3, patience=5, **OPTIONS)
    del trainer.optimizer.step
    arrays, meta = trainer._snapshot(copy=True)
    assert meta["best"]
    assert meta["plan"]
    assert meta["position"] == 4
    assert meta["state"] == [["state/0", "state/1"], [None, "state/2"], None]
    return arrays, meta


def assert_same(one, other):
    (arrays, meta), (others, expected) = one, other
    assert meta == expected
    assert list(arrays) == list(others)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def refuse(path, message):
    """A new trainer refuses the file, and goes on as if it had not seen it."""
    trainer = make(seed=3)
    trainer.fit(X, Y, epochs=1, **OPTIONS)
    before = trainer._snapshot(copy=True)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        trainer.load(path)
    assert f"{path} cannot be loaded: " in str(caught.value)
    assert len(str(caught.value)) < 10_000
    assert_same(trainer._snapshot(), before)


def test_what_is_whole_is_taken(whole, tmp_path):
    weights.write(tmp_path / "a.npz", *whole)
    trainer = make(seed=3)
    trainer.load(tmp_path / "a.npz")
    assert_same(trainer._snapshot(), whole)
    assert len(trainer.fit(X, Y, epochs=4, patience=5, **OPTIONS)) == 4


def changed(meta, key, value):
    """Return a copy with another value at a place such as "plan.shuffle" or "sums.0"."""
    meta = copy.deepcopy(meta)
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    place = meta
    for part in path:
        place = place[part]
    place[last] = value
    return meta


NAN, HUGE = float("nan"), 10**400
COUNT = [True, None, 1.0, "1", [1], {}, -1, 2**53 + 1, HUGE, NAN]
NUMBER = [True, None, "1", [1.0], {}, NAN, HUGE, -HUGE]
FLAG = [0, 1, 0.0, "true", [], {}]
WRONG = {
    "checkpoint": [True, 1.0, "1", 2, None, [1]],
    "model": [True, None, "LSTM", ["LSTM"], "x" * 30000],
    "optimizer": [True, None, "SGD", ["Adam"], "x" * 30000],
    "steps": COUNT,
    "schedule": [True, None, 1, "now", [1.0], {}, {"now": 0.1}],
    "schedule.now": [*NUMBER, -0.1, float("inf")],
    "schedule.best": NUMBER,
    "schedule.waited": [True, None, 1.0, "1", [1], {}, -1, NAN],
    "seed": [True, None, 1.0, "1", [1], {}, -1, NAN],
    "epoch": [*COUNT, 0, 1, 3, 10**9, 2**53],
    "position": COUNT,
    "sums": [True, None, 1.0, "1.0", [], {}, [1.0, 1.0], [1.0] * 4, {"0": 1.0, "1": 1.0, "2": 1.0}],
    "sums.0": [*NUMBER, float("inf")],
    "sums.1": [*NUMBER, -float("inf")],
    "sums.2": NUMBER,
    "plan": [True, None, 1, "plan", [], {"examples": 8}],
    "plan.other": [1],
    "plan.examples": [*COUNT, 0],
    "plan.batch_size": [*COUNT, 0],
    "plan.shuffle": [*FLAG, None],
    "plan.truncate": [value for value in COUNT if value is not None] + [0],
    "plan.stateful": [*FLAG, None],
    "state": [True, 1, "state/0", {}, [], [None], [None] * 4, "state/9", None, [None] * 3],
    "state.0": [True, 1, "state/0", {}, [], ["state/0"], ["state/0"] * 3, ["state/1", "state/0"], ["a", "b"], None],
    "state.0.1": [True, 1, None, [], "state/0", "state/9", "updates", "lstm", ["state/1"]],
    "state.1": [True, 1, "state/2", [], ["state/2", None], [["state/2"], "state/2"], [None, ["state/2"]]],
    "state.2": [True, 1, [], {}, "state/2"],
    "best": [True, None, 1, "best", [], {}, {"epoch": 1}],
    "best.weights": [1],
    "best.epoch": [*COUNT, 0, 3],
    "best.monitor": [True, None, 1, ["loss"], {}],
    "best.value": NUMBER,
    "other": [1],
}


@pytest.mark.parametrize("key", WRONG)
def test_meta_that_is_wrong(whole, tmp_path, monkeypatch, key):
    arrays, meta = whole
    if not key.startswith("schedule"):  # which the schedule looks at, the only one who knows
        monkeypatch.setattr(weights._Npz, "read", lambda *arguments: pytest.fail("it was read"))
    for value in WRONG[key]:
        if key == "epoch" and value in (0, 1, 3, 10**9, 2**53):
            monkeypatch.undo()
        weights.write(tmp_path / "a.npz", arrays, changed(meta, key, value))
        refuse(tmp_path / "a.npz", "it is no checkpoint" if key == "checkpoint" else "it")


def test_a_deep_state(whole, tmp_path):
    arrays, meta = whole

    deep = "[" * 8000 + "]" * 8000
    for place in ("state", "state.1"):
        text = json.dumps(changed(meta, place, "here")).replace('"here"', deep)
        np.savez(tmp_path / "a.npz", __fastrnn__=np.array(text), **arrays)
        refuse(tmp_path / "a.npz", "it")


ROW = np.ones((1, 2))
ARRAYS = {
    "updates": [
        lambda a: None,
        lambda a: a[1:],
        lambda a: a[None],
        lambda a: a.astype(np.float32),
        *(lambda a, v=v: np.where(np.arange(len(a)) == 1, v, a) for v in (-1.0, 0.5, np.nan, np.inf, 2.0**54)),
    ],
    "history/loss": [
        lambda a: a[:0],
        lambda a: a[0],
        lambda a: a[:, :1],
        lambda a: a[::-1],
        lambda a: np.concatenate([a, a[-1:]]),
        lambda a: a + 1,
        lambda a: a.astype(np.float32),
        *(lambda a, v=v: np.where(np.arange(2) == 0, v, a) for v in (-1.0, 0.5, np.nan, np.inf, 1e300)),
    ],
    "history/": [lambda a: ROW * np.nan],
    "random/lstm": [
        lambda a: None,
        lambda a: a[1:],
        lambda a: a.astype(np.float32),
        *(
            lambda a, i=i, v=v: np.where(np.arange(10) == i, v, a)
            for i in range(10)
            for v in (-1.0, 0.5, np.nan, 2.0**32)
        ),
        lambda a: np.where(np.arange(10) == 4, 2, a),
        lambda a: np.where(np.arange(10) == 8, 2, a),
    ],
    "random/other": [lambda a: np.zeros(10)],
    "model/output.bias": [lambda a: None, lambda a: a[1:], lambda a: a.astype(float), lambda a: a.astype(np.float16)],
    "model/other": [lambda a: np.zeros(2, np.float32)],
    "best/output.bias": [lambda a: None, lambda a: a[1:], lambda a: a.astype(float)],
    "best/other": [lambda a: np.zeros(2, np.float32)],
    "optimizer/mean/output.bias": [lambda a: a[1:], lambda a: a.astype(float)],
    "optimizer/mean/other": [lambda a: np.zeros(2, np.float32)],
    "optimizer/velocity/output.bias": [lambda a: np.zeros(2, np.float32)],
    "optimizer": [lambda a: np.zeros(2, np.float32)],
    "state/0": [
        lambda a: None,
        lambda a: a[1:],
        lambda a: a[..., 1:],
        lambda a: a[0],
        lambda a: a[:, :0],
        lambda a: np.concatenate([a, a], axis=1),  # more rows than the plan has in a batch
        lambda a: a.astype(float),
    ],
    "state/3": [lambda a: np.zeros((1, 4, 4), np.float32)],
    "other": [lambda a: np.zeros(2, np.float32)],
    "": [lambda a: np.zeros(2, np.float32)],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_wrong(whole, tmp_path, name):
    arrays, meta = whole
    for change in ARRAYS[name]:
        array = change(arrays.get(name))
        new = {own: kept for own, kept in arrays.items() if own != name} | ({} if array is None else {name: array})
        weights.write(tmp_path / "a.npz", new, meta)
        refuse(tmp_path / "a.npz", "it")


def test_a_position_beyond_the_epoch(whole, tmp_path):
    arrays, meta = whole
    weights.write(tmp_path / "a.npz", arrays, changed(meta, "position", 7))
    trainer = make()
    trainer.load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="epoch 3 has 6 updates, and is to go on after 7"):
        trainer.fit(X, Y, epochs=4, **OPTIONS)


MEASURED = """
import resource, sys, time
import fastrnn
from fastrnn.train import Adam, Linear, MeanSquaredError, Sequential, Trainer
trainer = Trainer(Sequential(Linear(3, 2, seed=0)), MeanSquaredError(), Adam())
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    trainer.load(sys.argv[1])
except ValueError as error:
    print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown * (1 if sys.platform == "darwin" else 1024), time.process_time() - start)
"""


def small():
    return train.Trainer(train.Sequential(train.Linear(3, 2, seed=0)), train.MeanSquaredError(), train.Adam())


def add_zeros(path, name, shape):
    """Add an array of zeros to a file, deflated."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        for _ in range(0, int(np.prod(shape)) * 8, 1 << 24):
            stream.write(bytes(1 << 24))


@pytest.mark.parametrize(
    ("meta", "extra", "message"),
    [
        ({"epoch": 10**9}, None, "its epoch is 1000000000, and its history has 0"),
        ({}, ("extra", (1 << 26,)), "it has an array 'extra', which no checkpoint of such a trainer has"),
        ({}, ("state/0", (1 << 26,)), "it has an array 'state/0'"),
        ({"epoch": 1 << 25}, ("history/loss", (1 << 25, 2)), "its arrays are larger than the file"),
    ],
)
def test_what_is_refused_costs_nothing(tmp_path, meta, extra, message):
    path = tmp_path / "a.npz"
    arrays, known = small()._snapshot()
    weights.write(path, arrays, known | meta)
    if extra:
        add_zeros(path, *extra)
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said, numbers = done.stdout.splitlines()
    grown, seconds = map(float, numbers.split())
    assert message in said
    assert grown < 20 << 20
    assert seconds < 1


def test_a_schedule_that_refuses_in_the_middle(tmp_path):
    """One of the user's own, which takes a part before it raises."""

    class Own(train.Schedule):
        a = b = 1

        def __call__(self, step):
            return 0.1

        def state(self):
            return {"a": self.a, "b": self.b}

        def restore(self, state):
            self.a = state["a"]
            self.b = [0, 1][state["b"]]

    one = train.Trainer(train.Sequential(train.Linear(3, 2)), train.MeanSquaredError(), train.Adam(Own()))
    arrays, meta = one._snapshot(copy=True)
    weights.write(tmp_path / "a.npz", arrays, meta | {"schedule": {"a": 5, "b": 7}})
    with pytest.raises(ValueError, match="its schedule cannot be taken: list index out of range"):
        one.load(tmp_path / "a.npz")
    assert_same(one._snapshot(), (arrays, meta))


def test_a_model_of_ones_own_carries_what_it_likes(tmp_path):
    class Own(train.Model):
        def __init__(self):
            super().__init__({"rnn": RNN(3, 4, batch_first=True, backend="reference")})

    one = train.Trainer(Own(), train.MeanSquaredError(), train.Adam())
    one._state = (np.ones((2, 3), np.float32), None, (np.ones(4), (np.ones((1, 1, 1)),)))
    one.save(tmp_path / "a.npz")
    other = train.Trainer(Own(), train.MeanSquaredError(), train.Adam())
    other.load(tmp_path / "a.npz")
    assert_same(other._snapshot(), one._snapshot())
    arrays, meta = one._snapshot(copy=True)
    for state in ("[" * 60 + "]" * 60, '["state/0", 1]', '["state/0", "state/1"]', '["state/2", "state/1", "state/0"]'):
        weights.write(tmp_path / "a.npz", arrays, meta | {"state": json.loads(state)})
        with pytest.raises(ValueError, match=r"its state|an array 'state/2'"):
            other.load(tmp_path / "a.npz")


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path):
    trainer = make()
    trainer.fit(X, Y, epochs=2, **OPTIONS)
    trainer.history[1]["steps"] = 12  # an integer, of a callback
    trainer.save(tmp_path / "a.npz")
    other = make()
    other.load(tmp_path / "a.npz")
    assert other.history == trainer.history
    content = (tmp_path / "a.npz").read_bytes()
    del trainer.history[0]
    with pytest.raises(ValueError, match=r"a.npz cannot be written, .*: its epoch is 2, and its history has 1"):
        trainer.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == content
