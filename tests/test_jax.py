"""fastrnn.jax: its checks, in a process of their own, and the function that XLA calls, with frames made by hand."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")


# Nearly all the time is XLA's, compiling what runs once.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": QUICK}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=900, env=environment, check=False
    )


@needs_jax
def test_jax():
    checks = Path(__file__).with_name("jax_checks.py")
    result = run("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "error", str(checks))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


LATE = """
import jax, jax.numpy as jnp
from fastrnn.jax import init, lstm
params, x = init("lstm", jax.random.key(0), 64, 128), jnp.ones((400, 32, 64))
run = jax.jit(lambda x: lstm(x, None, params)[0].sum())
run(x).block_until_ready()
waiting = [run(x + i) for i in range(6)]
print("end")
"""


@needs_jax
@pytest.mark.parametrize("more", ["", "del waiting"])
def test_python_ends_while_passes_are_waiting(more):
    result = run("-c", LATE + more)
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr


# ---- the function that XLA calls

WORD, CREATE = ctypes.c_int64, ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)


@pytest.fixture(scope="module")
def handler():
    """The handler, what it will be answered, what it was given, and the errors it has made."""
    from fastrnn.kernels import xla

    answer, given, errors = [xla.DONE], [], []

    def serve(address, count, to):
        given.append(list((WORD * count).from_address(address)))
        if isinstance(answer[0], Exception):
            raise answer[0]
        xla.answer(to, answer[0], "" if answer[0] == xla.DONE else "as I said")

    call = ctypes.CFUNCTYPE(WORD, WORD)(xla.make_handler(serve).value)
    return call, answer, given, errors


class Frame:
    """A call frame as c_api.h has it, of two arrays in, one out and one string."""

    def __init__(self, errors, **changes):
        self.kept, self.changes = [], changes
        one, two = np.zeros((2, 3), np.float32), np.zeros(4)
        buffers = [self.buffer(one, 11), self.buffer(two, 12)]
        results = [self.buffer(one, 11)]
        span = self.words(self.address(np.frombuffer(b"hello", np.uint8)), 5)
        attributes = self.words(
            48, 0, changes.get("attributes", 1), self.ints(changes.get("attribute", 4)), 0, self.words(span)
        )

        def create(arguments):
            size, _, text, code = (WORD * 4).from_address(arguments)
            errors.append((size, ctypes.string_at(text).decode(), code & 0xFFFFFFFF))
            return 77

        self.create = CREATE(create)
        version = changes.get("major", 0) | 3 << 32
        api = self.words(
            changes.get("api_bytes", 200), 0, 24, 0, version, 0, ctypes.cast(self.create, ctypes.c_void_p).value
        )
        self.metadata = np.array([48, 24, 0, -7, 0, 0], np.int64)
        extension = self.words(32, 1, 0, self.address(self.metadata)) if changes.get("asks") else 0
        args = self.list(buffers, changes.get("kind", 1))
        self.place = self.words(
            changes.get("bytes", 168), extension, api, 0, changes.get("stage", 3), *args, *self.list(results, 1),
            *np.ctypeslib.as_array((WORD * 6).from_address(attributes)).tolist(),
        )  # fmt: skip
        self.expected = [span, *self.rows(one, 11), *self.rows(two, 12), *self.rows(one, 11)]

    def address(self, array):
        self.kept.append(array)
        return array.ctypes.data

    def words(self, *values):
        return self.address(np.array(values, np.int64))

    def ints(self, *values):
        return self.address(np.array([*values, 0], np.int32))

    def buffer(self, array, dtype):
        dims = self.words(*array.shape)
        return self.words(self.changes.get("buffer_bytes", 48), 0, dtype, self.address(array), array.ndim, dims)

    def list(self, buffers, kind):
        return [
            self.changes.get("list_bytes", 40),
            0,
            len(buffers),
            self.ints(*[kind] * len(buffers)),
            self.words(*buffers),
        ]

    def rows(self, array, dtype):
        return [dtype, array.ctypes.data, array.ndim, *array.shape]


def test_a_frame_becomes_a_table(handler):
    call, answer, given, errors = handler
    answer[0] = -1
    given.clear()
    frame = Frame(errors)
    assert call(frame.place) == 0
    (table,) = given
    assert ctypes.string_at(table[0], table[1]) == b"hello"
    assert table[2:] == [2, *frame.expected[1:]]


def test_answers_become_errors(handler):
    call, answer, _, errors = handler
    for code in (3, 13):
        errors.clear()
        answer[0] = code
        assert call(Frame(errors).place) == 77
        assert errors == [(28, "as I said", code)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_that_escapes_is_no_success(handler):
    call, answer, _, errors = handler
    errors.clear()
    answer[0] = ValueError("escaped")
    assert call(Frame(errors).place) == 77
    assert "without telling how" in errors[0][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": 160}, {"api_bytes": 48}, {"major": 1}, {"list_bytes": 32}, {"buffer_bytes": 40}, {"kind": 2},
        {"attribute": 3}, {"attributes": 2}, {"attributes": 0},
    ],
    ids=str,
)  # fmt: skip
def test_frames_that_do_not_fit(handler, changes):
    call, answer, given, errors = handler
    answer[0] = -1
    given.clear()
    errors.clear()
    assert call(Frame(errors, **changes).place) == 77
    assert "is not that of interface 0.x" in errors[0][1]
    assert not given


def test_other_stages_do_nothing(handler):
    call, _, given, errors = handler
    given.clear()
    for stage in (0, 1, 2):
        assert call(Frame(errors, stage=stage).place) == 0
    assert not given


def test_which_interface_it_is_made_for(handler):
    call, _, given, errors = handler
    given.clear()
    for changes, version in (({}, 3 << 32), ({"major": 1}, -1), ({"bytes": 160}, -1)):
        frame = Frame(errors, asks=True, **changes)
        assert call(frame.place) == 0
        assert frame.metadata[3] == version
    assert not given
