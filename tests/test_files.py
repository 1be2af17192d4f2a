"""Files: what is written is read back bit for bit, and no file, however corrupt or hostile, does more than raise."""

import copy
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import fastrnn
from fastrnn import GRU, LSTM, RNN, functional, weights

I, H = 3, 5
ENDINGS = [".npz", ".safetensors"]


@pytest.fixture(params=ENDINGS)
def ending(request):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    return request.param


def small():
    return GRU(I, H, seed=0)


def assert_same(layer, other):
    assert repr(layer) == repr(other)
    for name, array in layer.parameters.items():
        assert other.parameters[name].dtype == array.dtype
        assert other.parameters[name].tobytes() == array.tobytes()


def refuse(path, message, layer=None):
    """Both ways to load refuse the file, name it, and leave the layer as it was."""
    layer = layer or small()
    before = layer.state_dict()
    for load in (layer.load, fastrnn.load):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load(path)
        assert str(path) in str(caught.value)
    assert all(np.array_equal(before[name], array) for name, array in layer.parameters.items())


LAYERS = [
    RNN(I, H, 2, "relu", bias=False, seed=0),
    LSTM(I, H, 2, bidirectional=True, proj_size=2, dropout=0.5, dtype="float64", seed=0),
    GRU(I, H, reset_after=False, batch_first=True, seed=0),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_save_and_load(layer, tmp_path, ending):
    path = tmp_path / f"layer{ending}"
    layer.save(path)
    assert os.listdir(tmp_path) == [path.name]
    other = fastrnn.load(path, seed=1)
    assert_same(layer, other)
    assert type(other) is type(layer)
    assert all(array.flags.carray for array in other.parameters.values())
    for array in other.parameters.values():
        array[...] = 0
    assert other.load(str(path)) == ([], [])
    assert_same(layer, other)


def test_special_numbers_are_kept(tmp_path, ending):
    layer = small()
    bias = layer.parameters["bias_ih_l0"]
    bias[:6] = np.nan, np.inf, -np.inf, -0.0, 1e-45, np.finfo(np.float32).max
    layer.save(tmp_path / f"a{ending}")
    assert_same(layer, fastrnn.load(tmp_path / f"a{ending}"))


def test_other_kinds_of_paths(tmp_path):
    layer = small()
    for path in (f"{tmp_path}/a.npz", tmp_path / "b.NPZ", os.fsencode(tmp_path / "ü.npz")):
        layer.save(path)
        assert_same(layer, fastrnn.load(path))


def test_numpy_reads_what_is_written(tmp_path):
    layer = small()
    layer.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        for name, array in layer.parameters.items():
            np.testing.assert_array_equal(archive[name], array)
        assert json.loads(str(archive["__fastrnn__"]))["hidden_size"] == H


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(save, tmp_path):
    layer, other = small(), GRU(I, H, seed=9)
    arrays = layer.state_dict()
    arrays["weight_hh_l0"] = np.asfortranarray(arrays["weight_hh_l0"])
    arrays["weight_ih_l0"] = arrays["weight_ih_l0"].astype(">f8")
    save(tmp_path / "a.npz", **arrays)
    other.load(tmp_path / "a.npz")
    assert_same(layer, other)
    with pytest.raises(ValueError, match=r"a\.npz tells no architecture: make the layer, and call its load\(\)"):
        fastrnn.load(tmp_path / "a.npz")


def test_what_torch_users_write_is_read(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from safetensors.torch import save_file

    theirs, layer = torch.nn.LSTM(I, H, 2, bidirectional=True), LSTM(I, H, 2, bidirectional=True)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    layer.load(tmp_path / "a.safetensors")
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(layer.parameters[name], tensor.numpy())
    save_file(theirs.bfloat16().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"has dtype BF16, expected one of 'F16', 'F32', 'F64'"):
        layer.load(tmp_path / "a.safetensors")


def test_names_that_do_not_fit(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    LSTM(I, H, 2).save(path)
    layer = LSTM(I, H, bidirectional=True, seed=0)
    before = layer.state_dict()
    with pytest.raises(
        ValueError, match=r"missing: 'weight_ih_l0_reverse', .*; unexpected: .*'weight_ih_l1'"
    ) as caught:
        layer.load(path)
    assert str(path) in str(caught.value)
    keys = layer.load(path, strict=False)
    assert keys.missing_keys == [f"{n}_l0_reverse" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert sorted(keys.unexpected_keys) == sorted(f"{n}_l1" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    np.testing.assert_array_equal(layer.parameters["bias_ih_l0_reverse"], before["bias_ih_l0_reverse"])
    np.testing.assert_array_equal(layer.parameters["bias_ih_l0"], fastrnn.load(path).parameters["bias_ih_l0"])
    with pytest.raises(TypeError, match="strict is 1, expected True or False"):
        layer.load(path, 1)


def test_shapes_that_do_not_fit(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    GRU(I + 1, H).save(path)
    for strict in (True, False):
        with pytest.raises(ValueError, match=re.escape("weight_ih_l0 has shape (15, 4), expected (15, 3)")) as caught:
            small().load(path, strict)
        assert str(path) in str(caught.value)


def test_paths_that_are_none(tmp_path):
    for call in (small().save, small().load, fastrnn.load):
        with pytest.raises(TypeError, match="path is a int, expected a str or a path"):
            call(3)
        with pytest.raises(
            ValueError, match=r"path is '.*a\.bin', expected a name that ends in \.npz or \.safetensors"
        ):
            call(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError):
        fastrnn.load(tmp_path / "missing.npz")
    with pytest.raises(FileNotFoundError):
        small().save(tmp_path / "missing" / "a.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(IsADirectoryError):
        small().load(tmp_path / "folder.npz")


def test_safetensors_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "a.safetensors"
    message = "the package safetensors is needed for .safetensors files, not for .npz: pip install safetensors"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        small().save(path)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        small().load(path)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, ending):
    path = tmp_path / f"a{ending}"
    layer = small()
    layer.save(path)

    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        GRU(I, H, seed=5).save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(layer, fastrnn.load(path))


# Files that are not what they should be.


def npz(path, **entries):
    """Write a zip of the given bytes, or of arrays as .npy."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, entry in entries.items():
            if isinstance(entry, np.ndarray):
                stream = io.BytesIO()
                np.save(stream, entry, allow_pickle=True)
                name, entry = name + ".npy", stream.getvalue()
            archive.writestr(name, entry)
    return path


def header(shape, descr="<f4", order="False"):
    """A .npy file that promises this shape, and holds 16 numbers."""
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


class Bomb:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return print, ("the pickle was executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not a whole .npz file"),
        (b"nothing of the kind", "it is not a whole .npz file"),
        (pickle.dumps(Bomb()), "it is not a whole .npz file"),
        (header((16,)), "it is not a whole .npz file"),
        (b"PK\x05\x06" + bytes(18), "tells no architecture"),
    ],
)
def test_other_files(content, message, tmp_path, capsys):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    if message != "tells no architecture":
        refuse(path, message)
    with pytest.raises(ValueError, match=re.escape(message)):
        fastrnn.load(path)
    assert capsys.readouterr().out == ""


ENTRIES = [
    ({"weights.txt": b"text"}, "its entry 'weights.txt' is not an array"),
    ({"a": np.array([Bomb()], object)}, "its entry 'a' holds pickled objects, which are never loaded"),
    ({"a": np.arange(3)}, "its entry 'a' has dtype int64, expected floats of 16, 32 or 64 bits"),
    ({"a": np.zeros(3, complex)}, "its entry 'a' has dtype complex128"),
    ({"a": np.zeros(3, np.longdouble)}, f"its entry 'a' has dtype {np.dtype(np.longdouble)}"),
    ({"a": np.zeros(3, "f4,i8")}, "its entry 'a' has dtype"),
    ({"a.npy": b"\x93NUMPY\x09\x00" + bytes(64)}, "its entry 'a' has the unknown .npy version (9, 0)"),
    ({"a.npy": b"text"}, "it is not a whole .npz file"),
    ({"a.npy": header((10**12,))}, "the header of its entry 'a' does not agree with the entry's size"),
    ({"a.npy": header((2**62, 2**62))}, "the header of its entry 'a' does not agree with the entry's size"),
    ({"a.npy": header((-4, -4))}, "the header of its entry 'a' does not agree with the entry's size"),
    ({"a.npy": header((17,))}, "the header of its entry 'a' does not agree with the entry's size"),
    ({"a.npy": header((15,))}, "the header of its entry 'a' does not agree with the entry's size"),
    ({"a.npy": header("__import__('os').abort()")}, "it is not a whole .npz file"),
    ({"a.npy": header((True, 16))}, "the header of its entry 'a' has the shape (True, 16), expected integers"),
    ({"a.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 10_001)}, "'a' has 10001 bytes, expected at most 10000"),
    ({"x" * 501: np.zeros(3)}, "has a name of 501 characters, expected 500 bytes"),
    ({"ü" * 251: np.zeros(3)}, "has a name of 251 characters, expected 500 bytes"),
    ({"a.npy": header("'ab'")}, "it is not a whole .npz file"),
    ({"a.npy": header((16,), descr="O")}, "its entry 'a' holds pickled objects"),
    ({"__fastrnn__": np.array("{")}, "its entry '__fastrnn__' is not JSON"),
    ({"__fastrnn__": np.array("[" * 9999)}, "its entry '__fastrnn__' is not JSON"),
    ({"__fastrnn__": np.array('{"a": 1' + "0" * 1000 + "}")}, "is not JSON (a number has 1001 digits)"),
    ({"__fastrnn__": np.array("[1]")}, "its entry '__fastrnn__' is not a JSON object"),
    ({"__fastrnn__": np.array(["{}"])}, "its entry '__fastrnn__' is not a short text"),
    ({"__fastrnn__": np.zeros(3)}, "its entry '__fastrnn__' is not a short text"),
    ({"__fastrnn__": np.array("{}" + " " * 99999)}, "its entry '__fastrnn__' is not a short text"),
]


@pytest.mark.parametrize(("entries", "message"), ENTRIES, ids=[message for _, message in ENTRIES])
def test_hostile_entries(entries, message, tmp_path, capsys):
    refuse(npz(tmp_path / "a.npz", **entries), message)
    assert capsys.readouterr().out == ""


def test_two_entries_of_one_name(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header((16,)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", header((16,)))
    refuse(path, "it has two entries 'a'")


def test_zip_that_grows_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A megabyte of zip that holds a gigabyte of zeros: the shape tells, and nothing of it is unpacked."""
    size = 1 << 28
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("weight_ih_l0.npy", "w") as stream:
        stream.write(header((size,))[:128])
        for _ in range(size * 4 >> 24):
            stream.write(bytes(1 << 24))
    assert path.stat().st_size < 2 << 20
    monkeypatch.setattr(weights._Npz, "read", lambda *arguments: pytest.fail("it was unpacked"))
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"missing|has shape \(268435456,\), expected \(15, 3\)"):
            small().load(path, strict)


def test_a_million_names_make_a_short_message(tmp_path):
    arrays = {f"{'x' * 200}{i}": np.zeros(1, np.float32) for i in range(300)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="and 288 more") as caught:
        small().load(tmp_path / "a.npz")
    assert len(str(caught.value)) < 2000


def deflated(path, *pieces, **sizes):
    """Write a deflated zip, each entry of a beginning and so many zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for (name, zeros), begin in zip(sizes.items(), pieces, strict=True):
            with archive.open(f"{name}.npy", "w") as stream:
                stream.write(begin)
                for at in range(0, zeros, 1 << 24):
                    stream.write(bytes(min(1 << 24, zeros - at)))
    return path


MEASURED = """
import resource, sys, time
import fastrnn
layer = fastrnn.GRU(3, 5)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    {load}
except ValueError as error:
    print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown * (1 if sys.platform == "darwin" else 1024), time.process_time() - start)
"""


def measured(load, *arguments):
    """Return what loading in a process of its own says, by how much its memory grows and how long it computes."""
    command = [sys.executable, "-c", MEASURED.format(load=load), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *said, numbers = done.stdout.splitlines()
    return "\n".join(said), *map(float, numbers.split())


def test_a_header_is_not_read_because_it_says_that_it_is_long(tmp_path):
    size = 1 << 29
    path = deflated(tmp_path / "a.npz", b"\x93NUMPY\x02\x00" + struct.pack("<I", size), weight_ih_l0=size)
    assert path.stat().st_size < 1 << 20
    for load in ("layer.load(sys.argv[1])", "layer.load(sys.argv[1], strict=False)", "fastrnn.load(sys.argv[1])"):
        said, grown, _ = measured(load, path)
        assert "the header of its entry 'weight_ih_l0' has 536870912 bytes, expected at most 10000" in said
        assert grown < 20 << 20


def test_no_more_is_unpacked_than_the_size_that_was_agreed_on(tmp_path):
    """An entry that says 8320 bytes, more than `zipfile` unpacks for a header, and unpacks to half a gigabyte."""
    size = 1 << 29
    path = deflated(tmp_path / "a.npz", header((2048,))[:128], bias_ih_l0=size)
    content, true = path.read_bytes(), struct.pack("<I", 128 + size)
    assert content.count(true) == 2  # in the list of entries, and behind the entry
    path.write_bytes(content.replace(true, struct.pack("<I", 128 + 8192)))
    for load in ("fastrnn.weights.read(sys.argv[1])", "layer.load(sys.argv[1], strict=False)"):
        said, grown, _ = measured(load, path)
        assert "a.npz" in said
        assert grown < 20 << 20


@pytest.mark.parametrize("entries", [10_001, 200_000])
def test_too_many_entries(tmp_path, entries):
    path = tmp_path / "a.npz"
    record = header((16,))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.npy", record)
        first = archive.filelist[0]
        for i in range(1, entries):  # all are the first one's bytes
            archive.filelist.append(copy.copy(first))
            archive.filelist[-1].filename = f"{i}.npy"
        archive._didModify = True
    for load in ("layer.load(sys.argv[1], strict=False)", "fastrnn.load(sys.argv[1])"):
        said, _, seconds = measured(load, path)
        assert re.search(f"it has {entries} entries, expected at most 10000|its list of entries has \\d+ bytes", said)
        assert seconds < 1


def test_as_many_entries_as_there_may_be(tmp_path):
    arrays = {f"{'x' * 490}{i}": np.zeros(1, np.float32) for i in range(9_999)}
    for ending in ENDINGS:
        if ending == ".safetensors":
            pytest.importorskip("safetensors", reason="safetensors is not installed")
        weights.write(tmp_path / f"a{ending}", arrays)
        assert len(small().load(tmp_path / f"a{ending}", strict=False).unexpected_keys) == 9_999


def test_a_long_header_of_safetensors(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "a.safetensors"
    entry = '"{}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    text = "{" + ", ".join(entry.format(i) for i in range(120_000)) + "}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    refuse(path, f"its list of entries has {len(text)} bytes, expected at most 6291456")
    text = "{" + ", ".join(entry.format(i) for i in range(10_001)) + "}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    refuse(path, "it has 10001 entries, expected at most 10000")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_to_compress(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("a.npy", header((16,)))
    refuse(tmp_path / "a.npz", "its entry 'a' is compressed in a way that np.savez_compressed does not have")


def test_nothing_is_written_that_could_not_be_read(tmp_path, ending):
    path, one = tmp_path / f"a{ending}", np.zeros(1, np.float32)
    for arrays, meta, message in (
        ({str(i): one for i in range(10_000)}, {}, "it has 10001 entries, expected at most 10000"),
        ({"x" * 501: one}, {}, "has a name of 501 characters, expected 500 bytes"),
        ({"a": one}, {"text": "x" * (1 << 16)}, "its entry '__fastrnn__' is not a short text"),
    ):
        with pytest.raises(ValueError, match=f"cannot be written, as it could not be loaded: .*{message}"):
            weights.write(path, arrays, meta)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is 2, expected 1"),
        ({"format": None}, "its format is None, expected 1"),
        ({"format": True}, "its format is True, expected 1"),
        ({"format": 1.0}, "its format is 1.0, expected 1"),
        ({"cell": "transformer"}, "its cell is 'transformer', expected one of rnn_tanh"),
        ({"cell": ["gru"]}, "its cell is ['gru'], expected one of rnn_tanh"),
        ({"cell": "lstm"}, "weight_ih_l0 has shape (15, 3), expected (20, 3)"),
        ({"hidden_size": "5"}, "the architecture that it tells is wrong: hidden_size is '5'"),
        ({"hidden_size": 5.0}, "the architecture that it tells is wrong: hidden_size is 5.0"),
        ({"num_layers": True}, "the architecture that it tells is wrong: num_layers is True"),
        ({"proj_size": False}, "the architecture that it tells is wrong: proj_size is False"),
        ({"bias": 1}, "the architecture that it tells is wrong: bias is 1"),
        ({"bidirectional": 0.0}, "the architecture that it tells is wrong: bidirectional is 0.0"),
        ({"batch_first": 0}, "the architecture that it tells is wrong: batch_first is 0"),
        ({"dropout": False}, "the architecture that it tells is wrong: dropout is a bool"),
        ({"dtype": True}, "the architecture that it tells is wrong: dtype is True"),
        ({"hidden_size": -5}, "the architecture that it tells is wrong: hidden_size is -5"),
        ({"hidden_size": 10**30}, "weight_ih_l0 has shape (15, 3), expected (3"),
        ({"num_layers": 10**9}, "it has 4 arrays, and the layer that it tells of has 4000000000"),
        ({"num_layers": 10**30}, "it has 4 arrays, and the layer that it tells of has 4" + "0" * 30),
        ({"num_layers": 2, "bias": False}, "missing: 'weight_ih_l1', 'weight_hh_l1'; unexpected: 'bias_"),
        ({"proj_size": 2}, "the architecture that it tells is wrong: proj_size is 2, expected 0 for gru"),
        ({"dropout": 7}, "the architecture that it tells is wrong: dropout is 7.0"),
        ({"dropout": float("nan")}, "the architecture that it tells is wrong: dropout is nan"),
        ({"dropout": 10**400}, "the architecture that it tells is wrong: dropout is"),
        ({"dtype": "object"}, "the architecture that it tells is wrong: dtype is 'object'"),
        ({"dtype": [["a", "f4"]]}, "the architecture that it tells is wrong: dtype is"),
        ({"nonsense": 1}, "the architecture that it tells is wrong"),
        ({"self": 1}, "the architecture that it tells is wrong"),
        ({"backend": "reference"}, "the architecture that it tells is wrong"),
    ],
)
def test_hostile_architecture(change, message, tmp_path, ending):
    path, layer = tmp_path / f"a{ending}", small()
    meta = {"format": 1, **layer._spec.__dict__, "batch_first": False, "dropout": 0.0, "dtype": "float32"}
    weights.write(path, layer.parameters, meta)
    assert_same(layer, fastrnn.load(path))
    weights.write(path, layer.parameters, meta | change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fastrnn.load(path)
    assert str(path) in str(caught.value)
    layer.load(path)  # which knows its own


def test_long_architecture(tmp_path, ending, monkeypatch):
    path, layer = tmp_path / f"a{ending}", small()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_META_BYTES", 1 << 20)
        weights.write(path, layer.parameters, {"text": "x" * (1 << 16)})
    refuse(path, "its entry '__fastrnn__' is not a short text", layer)


def test_architecture_without_a_part(tmp_path):
    path, layer = tmp_path / "a.npz", small()
    weights.write(path, layer.parameters, {"format": 1, "cell": "gru", "input_size": I})
    with pytest.raises(ValueError, match=r"the architecture that it tells is wrong: .*hidden_size"):
        fastrnn.load(path)


def test_arguments_of_load(tmp_path):
    path = tmp_path / "a.npz"
    small().save(path)
    assert fastrnn.load(path, backend="reference").backend == "reference"
    for error, message, options in (
        (ValueError, "seed is -1, expected an integer of 0 or more", {"seed": -1}),
        (ValueError, "backend is 'gpu', expected one of 'cpu'", {"backend": "gpu"}),
    ):
        with pytest.raises(error, match=re.escape(message)):
            fastrnn.load(path, **options)


def test_every_truncation_is_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    RNN(1, 2, bias=False, seed=0).save(path)
    content = path.read_bytes()
    layer = RNN(1, 2, bias=False)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refuse(path, "cannot be loaded: it is not a whole", layer)


def test_damaged_bytes_are_refused_or_harmless(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    original = RNN(1, 2, bias=False, seed=0)
    original.save(path)
    content, random = path.read_bytes(), np.random.default_rng(0)
    layer, refused = RNN(1, 2, bias=False), 0
    for _ in range(1500):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), random.integers(1, 4)):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        for load in (layer.load, fastrnn.load):
            try:
                load(path)
            except ValueError as error:
                refused += str(path) in str(error)
            else:
                assert layer.num_parameters == original.num_parameters
    assert refused > 500


def test_loading_into_a_layer_allocates_no_more_than_the_layer(tmp_path, monkeypatch):
    """The machine's memory is never asked for by a file's word alone."""
    path = tmp_path / "a.npz"
    small().save(path)
    monkeypatch.setattr(functional, "_memory", lambda: 1)
    small_layer = GRU.__new__(GRU)
    with pytest.raises(MemoryError):
        small_layer.__init__(I, H)
    fastrnn.load(path)  # as large as the file, not as large as it says
