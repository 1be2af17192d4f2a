"""Recurrent layers as fast as the machine allows, from one ``pip install`` and no compiler.

>>> import numpy as np
>>> import fastrnn
>>> lstm = fastrnn.LSTM(8, 16, seed=0)
>>> x = np.zeros((20, 4, 8), np.float32)  # time, batch, input
>>> output, (h, c) = lstm(x)
>>> output.shape, h.shape, c.shape
((20, 4, 16), (1, 4, 16), (1, 4, 16))

Importing this module compiles nothing and imports NumPy only: the kernels are imported when they are first used.
"""

from collections.abc import Callable, Iterable

from fastrnn import functional
from fastrnn.layers import GRU, LSTM, RNN, load

__version__ = "0.1.0"
__all__ = ["GRU", "LSTM", "RNN", "functional", "get_num_threads", "load", "set_num_threads", "warmup"]


def set_num_threads(number: int) -> None:
    """Set how many threads a layer may use, in the whole process. The results have the same bits for any number.

    Every thread that takes part in a pass rounds as its caller's does, and makes zeros of denormal numbers if that one
    does (after `torch.set_flush_denormal(True)`, say). Where the system starts no more threads, fewer take part. Idle
    threads beyond a smaller number end.

    Until then it is the environment variable FASTRNN_NUM_THREADS; without it, where `fastrnn.torch` is imported, what
    ``torch.get_num_threads()`` says at each call; else the number of cores.

    Parameters
    ----------
    number : int
        From 1 to 4096.

    Raises
    ------
    TypeError
        If `number` is not an integer.
    ValueError
        If `number` is less than 1 or more than 4096.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(before)
    """
    number = functional.check_integer("number", number, 1)
    from fastrnn.kernels import threads

    if number > threads.MOST:
        raise ValueError(f"number is {number}, expected an integer from 1 to {threads.MOST}")
    threads.set_num_threads(number)


def get_num_threads() -> int:
    """Return how many threads a layer may use. See `set_num_threads`."""
    from fastrnn.kernels import threads

    return threads.get_num_threads()


def warmup(
    cells: Iterable[str] | None = None,
    dtypes: Iterable[str] = ("float32",),
    training: bool = True,
    begin: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Compile ahead, or load from the cache, what a first call would have to wait for.

    After it no call compiles, in this process or in those that find its cache, but for `recurrent_masks`. Where the
    package carries machine code for this processor, as wheels do, there is nothing to compile: the line "kernels" of
    ``python -m fastrnn info`` says so, or why not. Of processes that begin at once one compiles, and the others wait.

    Parameters
    ----------
    cells : iterable of str, optional
        Of "rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected" (with proj_size), "gru",
        "gru_reset_before"; all of them by default.
    dtypes : iterable of str
        Of "float32" and "float64".
    training : bool
        Whether to compile the backward pass too.
    begin : function of str to None, optional
        Called with the name of each, "lstm float32", before it is compiled.

    Returns
    -------
    dict
        The seconds that each one took, by name.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If there is no such cell or dtype.

    Examples
    --------
    >>> seconds = warmup(["gru"], training=False)
    """
    if cells is not None:
        cells = functional.check_names("cells", cells)
        cells = [cell if cell == "lstm_projected" else functional.check_cell(cell) for cell in cells]
    dtypes = tuple(functional.check_dtype(dtype).name for dtype in functional.check_names("dtypes", dtypes))
    training = functional.check_flag("training", training)
    if begin is not None and not callable(begin):
        raise TypeError(f"begin is {begin!r}, expected a function or None")
    from fastrnn.kernels import cpu

    return cpu.warmup(cells, dtypes, training, begin or (lambda name: None))
