"""A GPU in Python, for tests: it runs the texts of the kernels, all blocks of a grid at once, deterministically.

Every thread is a greenlet that runs until it has to wait: at a barrier of its block, in an instruction of its warp, or
for memory that another block has still to write. The order in which those that may go on do so is shuffled by a seed.
Found on the way are what a GPU would not tell of: an index beyond an array, a race in shared memory (two threads at
one element, one of them writing, and no barrier between), threads that wait for each other for ever, and a block whose
threads meet at different barriers.

It can't see what depends on the order of memory between blocks, on the compiler's types or on time.
"""

import contextlib
import functools
import math
import random
import sys
import types

import greenlet
import numpy as np

from fastrnn.kernels import cells

WARP = 32
PATIENCE = 2000  # rounds in which nobody does more than wait


class Fault(AssertionError):
    """What the simulator has found wrong with a kernel."""


class Thread:
    __slots__ = ("arrays", "barriers", "block", "done", "greenlet", "index", "result", "value", "waits", "warps")

    def __init__(self, block, index):
        self.block, self.index = block, index
        self.waits = self.value = self.result = None
        self.arrays = 0  # shared arrays that it has asked for
        self.barriers = self.warps = 0  # that it has passed, of its block and of its warp
        self.done = False


class Pointer:
    """A bare pointer: an array's elements from one on, and an error for any other."""

    __slots__ = ("array", "start")

    def __init__(self, array, start=0):
        self.array, self.start = array.reshape(-1) if isinstance(array, np.ndarray) else array, start

    def place(self, i):
        place = self.start + int(i)
        if not 0 <= place < len(self.array):
            raise Fault(f"element {place} of an array of {len(self.array)}")
        return place

    def __getitem__(self, i):
        return self.array[self.place(i)]

    def __setitem__(self, i, value):
        self.array[self.place(i)] = value


class Shared:
    """An array in shared memory, which notices races."""

    def __init__(self, grid, size, dtype):
        self.grid, self.array = grid, np.zeros(size, dtype)
        self.array.view(np.uint8)[:] = 0xAB
        if self.array.dtype.kind == "f":
            self.array[:] = np.nan  # the bytes above are too small a number to be noticed in a sum
        self.writer, self.readers = [None] * size, [{} for _ in range(size)]

    def __len__(self):
        return len(self.array)

    def _check(self, i, other, what):
        now = self.grid.now
        index, barriers, warps = other
        apart = index // WARP != now.index // WARP or warps == now.warps
        if index != now.index and barriers == now.barriers and apart:
            raise Fault(f"a race: threads {index} and {now.index} at element {i} of shared memory, {what}")

    def __getitem__(self, i):
        if not 0 <= i < len(self.array):
            raise Fault(f"element {i} of {len(self.array)} in shared memory")
        now = self.grid.now
        if self.writer[i]:
            self._check(i, self.writer[i], "written and read")
        self.readers[i][now.index] = (now.index, now.barriers, now.warps)
        return self.array[i]

    def __setitem__(self, i, value):
        if not 0 <= i < len(self.array):
            raise Fault(f"element {i} of {len(self.array)} in shared memory")
        now = self.grid.now
        if self.writer[i]:
            self._check(i, self.writer[i], "written twice")
        for reader in self.readers[i].values():
            self._check(i, reader, "read and written")
        self.readers[i] = {}
        self.writer[i] = (now.index, now.barriers, now.warps)
        self.array[i] = value


class Grid:
    """One launch of a kernel."""

    def __init__(self, grid, threads, seed=None, shared=0):
        self.size = types.SimpleNamespace(**dict(zip("xyz", grid, strict=True)))
        self.threads, self.shared_bytes, self.memory = threads, shared, {}
        self.random = None if seed is None else random.Random(seed)
        self.all = [
            Thread((x, y, z), i) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])
            for i in range(threads)
        ]  # fmt: skip

    def run(self, function, arguments):
        self.main = greenlet.getcurrent()
        for thread in self.all:
            thread.greenlet = greenlet.greenlet(lambda thread=thread: self._body(thread, function, arguments))
        ready, idle = self.all, 0
        with np.errstate(all="ignore"):
            while ready:
                if self.random:
                    self.random.shuffle(ready)
                for thread in ready:
                    self.now = thread
                    thread.greenlet.switch()
                live = [thread for thread in self.all if not thread.done]
                ready = self._may_go_on(live)
                idle = idle + 1 if ready and all(thread.waits == ("memory",) for thread in ready) else 0
                if (live and not ready) or idle > PATIENCE:
                    raise Fault(f"threads wait for ever: {sorted({str(thread.waits) for thread in live})[:5]}")

    def _body(self, thread, function, arguments):
        function(*arguments)
        thread.done = True

    def _may_go_on(self, live):
        groups = {}
        for thread in live:
            key = thread.waits if thread.waits != ("memory",) else ("memory", thread.block, thread.index)
            groups.setdefault(key, []).append(thread)
        ready = []
        for (kind, *where), group in groups.items():
            need = {"block": self.threads, "warp": WARP, "memory": 1}[kind]
            if kind == "warp":
                need = min(need, self.threads - where[1] * WARP)
            if len(group) < need:
                continue
            if kind == "warp":
                group.sort(key=lambda thread: thread.index)
                collective = group[0].value[0]
                results = collective([thread.value[1] for thread in group]) if collective else [None] * need
                for thread, result in zip(group, results, strict=True):
                    thread.result = result
                    thread.warps += 1
            if kind == "block":
                lines = sorted({thread.value for thread in group})
                if len(lines) > 1:
                    raise Fault(f"threads of block {where[0]} meet at different barriers, lines {lines}")
                for thread in group:
                    thread.barriers += 1
            ready += group
        return ready

    def wait(self, *key, value=None):
        thread = self.now
        thread.waits, thread.value = key, value
        self.main.switch()
        return thread.result

    # ---- what `numba.cuda` has in a kernel

    def syncthreads(self):
        caller = sys._getframe(1)
        self.wait("block", self.now.block, value=(caller.f_code.co_filename, caller.f_lineno))

    def in_warp(self, value=None, collective=None):
        """What an instruction of the whole warp gives this thread: `collective` takes a list of 32 values to 32."""
        return self.wait("warp", self.now.block, self.now.index // WARP, value=(collective, value))

    def shared_array(self, size, dtype, alignment=None):
        thread = self.now
        key = thread.block, thread.arrays if size else "dynamic"
        thread.arrays += 1
        if key not in self.memory:
            dtype = np.dtype(dtype)
            self.memory[key] = Shared(self, size or self.shared_bytes // dtype.itemsize, dtype)
        return self.memory[key]

    @property
    def threadIdx(self):
        return types.SimpleNamespace(x=self.now.index, y=0, z=0)

    @property
    def blockIdx(self):
        return types.SimpleNamespace(**dict(zip("xyz", self.now.block, strict=True)))

    @property
    def blockDim(self):
        return types.SimpleNamespace(x=self.threads, y=1, z=1)

    @property
    def gridDim(self):
        return self.size


class Ops:
    """The instructions of :mod:`fastrnn.kernels.ptx`, as plain Python on a Grid."""

    float32, float64, int32, int64, uint32 = np.float32, np.float64, int, int, int

    def __init__(self, grid):
        self.grid = grid
        self.cuda = grid
        grid.shared = types.SimpleNamespace(array=grid.shared_array)
        grid.local = types.SimpleNamespace(
            array=lambda size, dtype: np.frombuffer(b"\xab" * size * np.dtype(dtype).itemsize, dtype).copy()
        )

    @staticmethod
    def device(function):
        return function

    @staticmethod
    def activations(dtype):
        number = np.dtype(dtype).type
        zero, one = number(0), number(1)
        return {
            "sigmoid": lambda x: number(cells.sigmoid(float(x))),
            "tanh": lambda x: number(math.tanh(x)),
            "relu": lambda x: zero if x < 0 else x,
            "d_relu": lambda y, dy: dy if y > 0 else zero,
            "ONE": one,
        }

    @staticmethod
    def at(pointer, n):
        return Pointer(pointer.array, pointer.start + int(n))

    # ---- words

    @staticmethod
    def word_of(x):
        return int(np.float32(x).view(np.uint32))

    @staticmethod
    def number_of(word):
        return np.uint32(word).view(np.float32)

    @staticmethod
    def upper(word):
        return word & 0xFFFFE000

    upper_again = upper

    # ---- memory that other blocks write meanwhile

    @staticmethod
    def load_words(pointer, i):
        if (pointer.start + i) % 4:
            raise Fault(f"a load of four words at {pointer.start + i}")
        return tuple(int(pointer[i + k]) for k in range(4))

    @staticmethod
    def store_word(pointer, i, word):
        pointer[i] = word

    @staticmethod
    def store_half(pointer, i, half):
        pointer.array.view(np.uint16)[2 * pointer.start + i] = half & 0xFFFF

    def pause(self):
        self.grid.wait("memory")

    def sync_warp(self):
        self.grid.in_warp()

    # ---- tensor cores

    @property
    def FORMATS(self):
        def tf32(x):
            """Rounded to nearest, ties away from zero, as cvt.rna."""
            return (Ops.word_of(x) + 0x1000) & 0xFFFFE000 if math.isfinite(x) else Ops.word_of(x)

        def two(half):
            return lambda first, second: half(first) | half(second) << 16

        def float16(x):
            return int(np.float16(x).view(np.uint16)) if x == x else 0x7FFF

        def bfloat16(x):
            word = Ops.word_of(x)
            return (word + 0x7FFF + (word >> 16 & 1)) >> 16 if x == x else 0x7FFF

        def mma(unpack):
            def multiply(*words_and_numbers):
                return self.grid.in_warp(words_and_numbers, functools.partial(_mma, unpack))

            return multiply

        def format_of(pack, unpack):
            return types.SimpleNamespace(pack=pack, mma=mma(unpack))

        return {
            "float32": format_of(lambda first, second: Ops.word_of(first), _one),
            "tf32": format_of(lambda first, second: tf32(first), _one),
            "bfloat16": format_of(two(bfloat16), _two_bfloat16),
            "float16": format_of(two(float16), _two_float16),
        }


def _one(word):
    """What tensor cores read of a word."""
    return (float(Ops.number_of(word & 0xFFFFE000)),)


def _two_bfloat16(word):
    return float(Ops.number_of((word & 0xFFFF) << 16)), float(Ops.number_of(word & 0xFFFF0000))


def _two_float16(word):
    return tuple(float(x) for x in np.array([word], np.uint32).view(np.float16))


def _mma(unpack, lanes):
    """D = A B + C for the words of 32 lanes: PTX ISA, matrix fragments for mma.m16n8k8 and .m16n8k16."""
    each = len(unpack(0))  # numbers in a word: k = lane % 4, and the same 4 words further on
    a, b = np.zeros((16, 8 * each)), np.zeros((8 * each, 8))
    for lane, words in enumerate(lanes):
        row, k = lane // 4, lane % 4 * each
        for i in range(4):
            first = k + i // 2 * 4 * each
            a[row + i % 2 * 8, first : first + each] = unpack(words[i])
        for i in range(2):
            first = k + i * 4 * each
            b[first : first + each, row] = unpack(words[4 + i])
    d = a @ b
    results = []
    for lane, words in enumerate(lanes):
        row, column = lane // 4, lane % 4 * 2
        places = ((row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1))
        results.append(tuple(np.float32(d[place] + c) for place, c in zip(places, words[6:], strict=True)))
    return results


def launch(kernel, grid, arguments, *, shared=0, seed=None):
    """Run a Kernel; arrays stand for pointers (and are modified), numbers for themselves."""
    arguments = [Pointer(a) if isinstance(a, np.ndarray) else a for a in arguments]
    assert len(arguments) == len(kernel.arguments)
    for argument, kind in zip(arguments, kernel.arguments, strict=True):
        assert isinstance(argument, Pointer) == kind.endswith("*"), kind
        if isinstance(argument, Pointer):
            assert argument.array.dtype == kind[:-1], (argument.array.dtype, kind)
    run = Grid(grid, kernel.threads, seed, shared)
    function = kernel.make(Ops(run), *kernel.constants)
    with contextlib.suppress(greenlet.GreenletExit):
        run.run(function, arguments)
