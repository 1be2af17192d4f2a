"""Files that chance has damaged: nothing comes out but the errors that are documented, or what can be used.

FASTRNN_FUZZ_SECONDS tells how long it may take in all: some seconds by default. Each round has a seed of its own, which
a failure tells.
"""

import io
import json
import os
import time
import zipfile

import numpy as np
import pytest

import fastrnn
from fastrnn import GRU, LSTM, RNN, train

pytestmark = pytest.mark.filterwarnings("ignore")  # of zipfile about names, of NumPy about numbers
KINDS = ["layer.npz", "layer.safetensors", "checkpoint.npz", "layer.onnx", "folded.onnx"]
SECONDS = float(os.environ.get("FASTRNN_FUZZ_SECONDS", "5")) / 2 / len(KINDS)
LEAST = 20  # rounds, however slow the machine is
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.standard_normal((8, 4, 3)).astype(np.float32), RANDOM.standard_normal((8, 4, 2)).astype(np.float32)
OPTIONS = {"batch_size": 4, "truncate": 2, "validation": (X, Y), "progress": False}
JSON = [True, False, None, 0, 1, -1, 1.0, 0.5, float("nan"), float("inf"), 10**9, 10**30, 10**400, "", "a", "float32"]
JSON += [[], {}, [1], ["state/0"], {"a": 1}, [[[]]]]


def trainer():
    layers = train.Sequential(
        LSTM(3, 4, batch_first=True, dropout=0.0, backend="reference", seed=0), train.Dropout(0.1)
    )
    model = train.Sequential(body=layers, head=train.Linear(4, 2, seed=0))
    return train.Trainer(model, train.MeanSquaredError(), train.Adam(train.ReduceOnPlateau(0.01)))


class Killed(BaseException):
    pass


def stop(*arguments):
    raise Killed


def write_checkpoint(path):
    one = trainer()
    one.fit(X, Y, epochs=1, **OPTIONS)
    step = one.optimizer.step
    one.optimizer.step = lambda *given: step(*given) if one._position < 3 else stop()
    with pytest.raises(Killed):
        one.fit(X, Y, epochs=2, **OPTIONS)
    one.save(path)


def write_folded(path):
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2, B, 3] x) => (float[2, 1, B, 4] y)
        <float[1, 4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2] f = {1, 2}> {
            s = Constant <value_ints = [1, 4, 4]> ()
            z = ConstantOfShape <value = float[1] {0.5}> (s)
            n = Constant <value_int = 3> ()
            t = Constant <value = bool {1}> ()
            r = Loop (n, t, z) <body = b (int64 i, bool go, float[1, 4, 4] a) => (bool on, float[1, 4, 4] b) {
                on = Identity (go) b = Add (a, z) }>
            v = If (t) <then_branch = p () => (float c) { c = Concat <axis = 0> (w) },
                else_branch = q () => (float d) { d = Neg (w) }>
            q = Transpose <perm = [0, 2, 1]> (v)
            u = Transpose <perm = [0, 2, 1]> (q)
            y = RNN <hidden_size = 4, activations = ["Affine"], activation_alpha = [0.5], activation_beta = [0.1],
                clip = 3.0, direction = "forward", layout = 0> (x, u, r)
        }"""
    )
    onnx.save(model, path)


def write_onnx(path):
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    import fastrnn.onnx

    fastrnn.onnx.export(GRU(2, 2, bidirectional=True, seed=0), path, state=True)


def write_safetensors(path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    RNN(1, 2, bias=False, seed=0).save(path)


WRITE = {
    "layer.npz": lambda path: RNN(1, 2, bias=False, seed=0).save(path),
    "layer.safetensors": write_safetensors,
    "checkpoint.npz": write_checkpoint,
    "layer.onnx": write_onnx,
    "folded.onnx": write_folded,
}


# ---- damages


def flip(random, content):
    """Return some bytes with other bits, or others in their place."""
    damaged = bytearray(content)
    for place in random.integers(0, len(content), random.integers(1, 5)):
        damaged[place] = damaged[place] ^ 1 << random.integers(8) if random.random() < 0.5 else random.integers(256)
    return bytes(damaged)


def cut(random, content):
    """Return some bytes without a part, or with a part of them once more."""
    begin, end = sorted(random.integers(0, len(content) + 1, 2))
    way = random.integers(3)
    return (
        content[:begin]
        if way == 0
        else content[:begin] + content[end:]
        if way == 1
        else content[:end] + content[begin:]
    )


def swap_json(random, value):
    """Return what JSON holds with another value in one place."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.1:
        return JSON[random.integers(len(JSON))]
    if isinstance(value, list):
        at = random.integers(len(value))
        return [swap_json(random, part) if i == at else part for i, part in enumerate(value)]
    key = list(value)[random.integers(len(value))]
    if random.random() < 0.1:
        return {other: part for other, part in value.items() if other != key}
    return {**value, key: swap_json(random, value[key])}


def swap_entry(random, content):
    """Return an .npz with one entry damaged, and the zip around it as it must be."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = "__fastrnn__.npy" if random.random() < 0.5 else list(entries)[random.integers(len(entries))]
    if name == "__fastrnn__.npy":
        stream = io.BytesIO()
        np.save(stream, np.array(json.dumps(swap_json(random, json.loads(str(np.load(io.BytesIO(entries[name]))))))))
        entries[name] = stream.getvalue()
    else:
        way = random.integers(4)
        entry = entries.pop(name)
        if way:
            head = entry[:128] if way == 1 else entry
            entries["a.npy" if random.random() < 0.1 else name] = flip(random, head) + entry[len(head) :]
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][random.integers(2)]) as archive:
        for own, entry in entries.items():
            archive.writestr(own, entry)
    return written.getvalue()


def swap_field(random, content):
    """Return an ONNX model with one field of one message changed, taken away or given once more."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    message = model.graph
    while True:  # down to some field
        fields = message.ListFields()
        if not fields:
            break
        field, value = fields[random.integers(len(fields))]
        many = getattr(field, "is_repeated", None)
        many = field.label == field.LABEL_REPEATED if many is None else many
        inner = value[random.integers(len(value))] if many else value
        if field.message_type is not None and random.random() < 0.9:
            message = inner
            continue
        if random.random() < 0.2:
            message.ClearField(field.name)
        elif field.message_type is not None:
            value.add().CopyFrom(inner) if many else None
        else:
            numbers = [-1, 0, 1, 2, 3, 7, 16, 100, 2**31 - 1, -(2**31)]
            if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
                numbers += [2**62, 2**40]
            texts = {
                str: ["", "x", "u", "y", "Concat", "Loop", "RNN", "perm"],
                bytes: [b"", b"\xff", b"Relu", bytes(9)],
            }
            new = texts.get(type(inner), [float("nan"), 0.0, -1.0, 1e30] if isinstance(inner, float) else numbers)
            new = new[random.integers(len(new))]
            try:
                if many:
                    value[random.integers(len(value))] = new
                else:
                    setattr(message, field.name, new)
            except ValueError:  # no such number there
                continue
        break
    return model.SerializeToString()


# ---- what is made of them


def load_layer(path):
    layer = RNN(1, 2, bias=False)
    for load in (layer.load, lambda path: layer.load(path, strict=False), fastrnn.load):
        documented(path, load)


def documented(path, load):
    """Return what is loaded, or None after an error that tells which file it is of."""
    result, message = attempted(load, path)
    assert message is None or str(path) in message
    assert len(message or "") < 10_000
    return result


def attempted(call, *arguments, kinds=(ValueError,), **options):
    """Return what a call returns, or what an error of exactly such a kind says."""
    try:
        return call(*arguments, **options), None
    except kinds as error:
        if type(error) not in kinds:
            raise
        return None, str(error)


def load_checkpoint(path):
    one = trainer()
    before = one._snapshot(copy=True)
    documented(path, one.load)
    if one.epoch == 0:
        arrays, meta = one._snapshot()
        assert meta == before[1]
        assert all(np.array_equal(array, before[0][name], equal_nan=True) for name, array in arrays.items())
        return
    # The shapes and the counts are those of a trainer, whatever the numbers are.
    options = {**OPTIONS, "epochs": one.epoch + 1, "patience": 3}
    _, message = attempted(one.fit, X, Y, **options, kinds=(ValueError, train.Diverged))
    assert message is None or any(text in message for text in ("was begun with", "is to go on after", "The weights"))
    one.save(path)


def load_onnx(path):
    import fastrnn.onnx

    operators, message = attempted(fastrnn.onnx.load, path)
    begins = ("RNN ", "GRU ", "LSTM ", "the model's functions")
    assert message is None or str(path) in message or message.startswith(begins)
    assert len(message or "") < 10_000
    for operator in (operators or {}).values():
        x = np.zeros((2, 1, operator.input_size), operator.dtype)
        _, message = attempted(operator, x.swapaxes(0, 1) if operator.layout else x, kinds=(TypeError, ValueError))
        states = ("sequence_lens", "initial_h", "initial_c")  # which the file may have, for another number of rows
        assert message is None or any(name in message for name in states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["bytes", "fields"])
def test_damaged_files(tmp_path, kind, way):
    name, ending = kind.split(".")
    if ending == "safetensors" and way == "fields":
        pytest.skip("its meta is the layer's, and its list of arrays the package's")
    path = tmp_path / kind
    WRITE[kind](path)
    content = path.read_bytes()
    load = load_onnx if ending == "onnx" else load_checkpoint if name == "checkpoint" else load_layer
    load(path)
    damages = [flip, cut] if way == "bytes" else [swap_entry if ending == "npz" else swap_field]
    begin, seed = time.monotonic(), 0
    while seed < LEAST or time.monotonic() - begin < SECONDS:
        random = np.random.default_rng((seed, KINDS.index(kind), way == "bytes"))
        path.write_bytes(damages[seed % len(damages)](random, content))
        start = time.process_time()
        try:
            load(path)
        except BaseException as error:
            raise AssertionError(f"{kind}, {way}: round {seed} gives {type(error).__name__}: {error}") from error
        assert time.process_time() - start < 60, f"{kind}, {way}: round {seed}"
        seed += 1
    assert os.listdir(tmp_path) == [kind]
