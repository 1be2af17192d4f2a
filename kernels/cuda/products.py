"""Matrix products on a GPU, and what else becomes of whole sequences before and after the walk through time.

A product is a library's where the device has one (cuBLAS, by way of PyTorch or CuPy), and else that of the kernel here,
which needs nothing. Sums are made in a fixed order, without atomic additions: the same bits every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastrnn.kernels.cuda.text import Kernel, load_each

TILE = 64  # rows and columns of C that a block of threads makes,
DEPTH = 16  # with as many terms of its sums at a time in shared memory,
EACH = 4  # and EACH x EACH of its numbers in each thread's registers
ACROSS = TILE // EACH  # threads in a row, and rows of threads
SQUARE = 32  # rows and columns that are transposed together
LANES = 8  # threads that share a column's sum
PARTS, PART_ROWS = 64, 256  # of a sum over rows: at most so many parts, and none shorter
COPY_THREADS = 256
# Of arrays in shared memory; with one number more in a row than is used, so that a column lies in different banks.
TILES, SQUARES, SUMS = (TILE + 1) * DEPTH, SQUARE * (SQUARE + 1), SQUARE * LANES


class Matrix(NamedTuple):
    """A matrix in a buffer: number (i, j) is element start + i * row + j * column, where row or column is 1."""

    buffer: Any
    start: int
    rows: int
    columns: int
    row: int
    column: int = 1

    @property
    def T(self):
        """The same numbers, transposed."""
        return Matrix(self.buffer, self.start, self.columns, self.rows, self.column, self.row)


# ---- products


def multiply(device, a, b, c, *, add=False, mode="float32"):
    """C = A B, or C += A B: matrices (M, K), (K, N) and (M, N), A and B perhaps transposed. c's buffer is modified.

    `mode` is what a library may round numbers of float32 to before it multiplies them: see exchange.MODES.
    """
    assert (c.rows, c.columns, a.columns) == (a.rows, b.columns, b.rows), "shapes do not fit"
    if not c.rows or not c.columns:
        return
    if device.library_product is not None and device.library_product(a, b, c, add, mode):
        return
    dtype = c.buffer.dtype.name
    numbers = (c.rows, c.columns, a.columns, a.start, a.row, a.column, b.start, b.row, b.column, c.start, c.row)
    types = (*[f"{dtype}*"] * 3, *["int64"] * len(numbers))
    # Neighbouring threads load neighbouring numbers: along the side where they stand together.
    kernel = Kernel(make_product, (dtype, a.column == 1, b.column == 1, add), types, ACROSS**2)
    grid = (-(-c.rows // TILE), -(-c.columns // TILE), 1)
    device.launch(kernel, grid, [a.buffer, b.buffer, c.buffer, *numbers])


def make_product(ops, dtype, a_rows, b_rows, add):
    """Make the kernel of a grid (rows / TILE, columns / TILE, 1). a_rows, b_rows: whether A's, B's rows stand together.

    A thread makes numbers that stand ACROSS apart in C, so that neighbours read and write neighbouring numbers.
    """
    cuda, number, zero = ops.cuda, getattr(ops, dtype), np.dtype(dtype).type(0)
    # From thread n's number i to its place (along the tile's side, along the sum).
    place_a = ops.device((lambda n: (n // DEPTH, n % DEPTH)) if a_rows else (lambda n: (n % TILE, n // TILE)))
    place_b = ops.device((lambda n: (n % TILE, n // TILE)) if b_rows else (lambda n: (n // DEPTH, n % DEPTH)))
    every = load_each(ops, tuple(range(EACH)))
    outer, zeros = add_outer(ops, EACH), ((zero,) * EACH,) * EACH
    store = store_tile(ops, EACH, add)

    def kernel(a, b, c, M, N, K, a_start, a_row, a_column, b_start, b_row, b_column, c_start, c_row):
        tile_a = cuda.shared.array(TILES, number)
        tile_b = cuda.shared.array(TILES, number)
        thread = cuda.threadIdx.x
        x, y = thread % ACROSS, thread // ACROSS
        m0, n0 = cuda.blockIdx.x * TILE, cuda.blockIdx.y * TILE
        sums = zeros
        for k0 in range(0, K, DEPTH):
            for i in range(thread, TILE * DEPTH, ACROSS**2):
                m, k = place_a(i)
                inside = m0 + m < M and k0 + k < K
                tile_a[k * (TILE + 1) + m] = a[a_start + (m0 + m) * a_row + (k0 + k) * a_column] if inside else zero
                n, k = place_b(i)
                inside = n0 + n < N and k0 + k < K
                tile_b[k * (TILE + 1) + n] = b[b_start + (k0 + k) * b_row + (n0 + n) * b_column] if inside else zero
            cuda.syncthreads()
            for k in range(DEPTH):
                at = k * (TILE + 1)
                sums = outer(sums, every(tile_a, at + y, ACROSS), every(tile_b, at + x, ACROSS))
            cuda.syncthreads()
        store(c, c_start + (m0 + y) * c_row + n0 + x, c_row, M - m0 - y, N - n0 - x, sums)

    return kernel


def add_outer(ops, rows):
    """A function (sums, a, b) -> sums + a b^T, tuples of rows."""
    if not rows:
        return ops.device(lambda sums, a, b: ())
    others, add = add_outer(ops, rows - 1), add_scaled(ops, EACH)
    return ops.device(lambda sums, a, b: (add(sums[0], a[0], b),) + others(sums[1:], a[1:], b))  # noqa: RUF005


def add_scaled(ops, count):
    """A function (sums, a, b) -> sums + a * b, of tuples sums and b."""
    if not count:
        return ops.device(lambda sums, a, b: ())
    others = add_scaled(ops, count - 1)
    return ops.device(lambda sums, a, b: (sums[0] + a * b[0],) + others(sums[1:], a, b[1:]))  # noqa: RUF005


def store_tile(ops, rows, add):
    """A function (c, at, c_row, M, N, sums): numbers that stand ACROSS apart, where they are within (M, N)."""
    if not rows:
        return ops.device(lambda c, at, c_row, M, N, sums: None)
    others, store_row = store_tile(ops, rows - 1, add), store_line(ops, EACH, add)

    def store(c, at, c_row, M, N, sums):
        if M > 0:
            store_row(c, at, N, sums[0])
        others(c, at + ACROSS * c_row, c_row, M - ACROSS, N, sums[1:])

    return ops.device(store)


def store_line(ops, count, add):
    """A function (c, at, N, sums): the same of one row."""
    if not count:
        return ops.device(lambda c, at, N, sums: None)
    others = store_line(ops, count - 1, add)

    def store(c, at, N, sums):
        if N > 0:
            c[at] = c[at] + sums[0] if add else sums[0]
        others(c, at + ACROSS, N - ACROSS, sums[1:])

    return ops.device(store)


# ---- transposing


def transpose(device, source, count, rows, columns):
    """Return `count` matrices (rows, columns), one behind the other, transposed each."""
    target = device.empty((count, columns, rows), source.dtype)
    dtype = source.dtype.name
    kernel = Kernel(make_transpose, (dtype,), (f"{dtype}*", f"{dtype}*", "int64", "int64"), SQUARE * LANES)
    device.launch(kernel, (-(-rows // SQUARE), -(-columns // SQUARE), count), [source, target, rows, columns])
    return target


def make_transpose(ops, dtype):
    """Make the kernel of a grid (rows / SQUARE, columns / SQUARE, count)."""
    cuda, number = ops.cuda, getattr(ops, dtype)

    def kernel(source, target, rows, columns):
        square = cuda.shared.array(SQUARES, number)
        x, y = cuda.threadIdx.x % SQUARE, cuda.threadIdx.x // SQUARE
        row0, column0 = cuda.blockIdx.x * SQUARE, cuda.blockIdx.y * SQUARE
        start = cuda.blockIdx.z * rows * columns
        for i in range(y, SQUARE, LANES):
            if row0 + i < rows and column0 + x < columns:
                square[i * (SQUARE + 1) + x] = source[start + (row0 + i) * columns + column0 + x]
        cuda.syncthreads()
        for i in range(y, SQUARE, LANES):
            if column0 + i < columns and row0 + x < rows:
                target[start + (column0 + i) * rows + row0 + x] = square[x * (SQUARE + 1) + i]

    return kernel


# ---- sums of columns, for gradients of biases


def column_sums(device, a, target, start=0, *, add=False):
    """target[start + j] = (or +=) the sum of a's column j (target is modified). a's rows stand together.

    Rows are summed in parts and then the parts, whose number is that of the rows' alone.
    """
    parts = max(1, min(PARTS, a.rows // PART_ROWS))
    if not a.columns:
        return
    if parts > 1:
        partial = Matrix(device.empty((parts, a.columns), a.buffer.dtype), 0, parts, a.columns, a.columns)
        launch_sums(device, a, partial.buffer, 0, parts, False)
        a = partial
    launch_sums(device, a, target, start, 1, add)


def launch_sums(device, a, target, start, parts, add):
    """Part p of the rows is summed to target[start + p * columns ...]."""
    dtype = a.buffer.dtype.name
    types = (f"{dtype}*", f"{dtype}*", *["int64"] * 6)
    kernel = Kernel(make_column_sums, (dtype, add), types, SQUARE * LANES)
    each = -(-a.rows // parts)
    grid = (-(-a.columns // SQUARE), parts, 1)
    device.launch(kernel, grid, [a.buffer, target, a.start, a.row, a.rows, a.columns, each, start])


def make_column_sums(ops, dtype, add):
    """Make the kernel of a grid (columns / SQUARE, parts, 1)."""
    cuda, number, zero = ops.cuda, getattr(ops, dtype), np.dtype(dtype).type(0)

    def kernel(a, target, a_start, a_row, rows, columns, each, start):
        sums = cuda.shared.array(SUMS, number)
        x, lane = cuda.threadIdx.x % SQUARE, cuda.threadIdx.x // SQUARE
        column, part = cuda.blockIdx.x * SQUARE + x, cuda.blockIdx.y
        total = zero
        if column < columns:
            for i in range(part * each + lane, min(rows, (part + 1) * each), LANES):
                total = total + a[a_start + i * a_row + column]
        sums[lane * SQUARE + x] = total
        cuda.syncthreads()
        if lane == 0 and column < columns:
            for i in range(1, LANES):
                total = total + sums[i * SQUARE + x]
            at = start + part * columns + column
            target[at] = target[at] + total if add else total

    return kernel


# ---- the states before each step, for gradients of recurrent weights


def before(device, size, states, reset, reverse):
    """The h before each step, one Matrix (T*B, W) for each direction; where a row was reset, 0.

    states is [D, T+1, B, W]; without reset, the matrices are where they stand.
    """
    T, B, W, D = size.T, size.B, size.W, size.D
    if reset is None:
        starts = [((d * (T + 1)) + (reverse >> d & 1)) * B * W for d in range(D)]
        return [Matrix(states, start, T * B, W, W) for start in starts]
    target = device.empty((D, T, B, W), states.dtype)
    dtype = states.dtype.name
    types = (f"{dtype}*", "uint8*", f"{dtype}*", *["int64"] * 4)
    kernel = Kernel(make_before, (dtype,), types, COPY_THREADS)
    device.launch(kernel, (_blocks(device, T * B * W), 1, D), [states, reset, target, T, B, W, reverse])
    return [Matrix(target, d * T * B * W, T * B, W, W) for d in range(D)]


def make_before(ops, dtype):
    """Make the kernel of a grid (any, 1, D)."""
    cuda, zero = ops.cuda, np.dtype(dtype).type(0)

    def kernel(states, reset, target, T, B, W, reverse):
        direction = cuda.blockIdx.z
        count = T * B * W
        source = direction * (count + B * W) + ((reverse >> direction) & 1) * B * W
        for i in range(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, count, cuda.gridDim.x * cuda.blockDim.x):
            target[direction * count + i] = zero if reset[i // W] else states[source + i]

    return kernel


# ---- element by element


def scaled(device, a, b):
    """A new buffer with a * b, of buffers of one shape."""
    target = device.empty(a.shape, a.dtype)
    if a.size:
        kernel = Kernel(make_scaled, (a.dtype.name,), (f"{a.dtype.name}*",) * 3 + ("int64",), COPY_THREADS)
        device.launch(kernel, (_blocks(device, a.size), 1, 1), [a, b, target, a.size])
    return target


def make_scaled(ops, dtype):
    """Make the kernel of a grid (any, 1, 1)."""
    cuda = ops.cuda

    def kernel(a, b, target, count):
        for i in range(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, count, cuda.gridDim.x * cuda.blockDim.x):
            target[i] = a[i] * b[i]

    return kernel


def swapped(device, a):
    """A new buffer with a's first two axes swapped, of three."""
    n, m, each = a.shape
    target = device.empty((m, n, each), a.dtype)
    if a.size:
        kernel = Kernel(make_swapped, (a.dtype.name,), (f"{a.dtype.name}*",) * 2 + ("int64",) * 3, COPY_THREADS)
        device.launch(kernel, (_blocks(device, a.size), 1, 1), [a, target, n, m, each])
    return target


def make_swapped(ops, dtype):
    """Make the kernel of a grid (any, 1, 1)."""
    cuda = ops.cuda

    def kernel(a, target, n, m, each):
        count = n * m * each
        for i in range(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, count, cuda.gridDim.x * cuda.blockDim.x):
            row, k = i // each, i % each
            target[i] = a[(row % n * m + row // n) * each + k]

    return kernel


def _blocks(device, count):
    return min(-(-count // COPY_THREADS), 32 * device.multiprocessors)
