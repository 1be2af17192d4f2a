"""How a pass is split over threads, and whose threads.

Plain Python threads run kernels that have released the interpreter's lock. The pool is taken whole or not at all: a
caller who finds it taken runs on its own thread. Idle threads sleep. A forked child starts without a pool and makes
its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


def _available() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _initial() -> int:
    text = os.environ.get("FASTRNN_NUM_THREADS")
    if text is None:
        return _available()
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"FASTRNN_NUM_THREADS must be a whole number of at least 1, got {text!r}")
    return int(text)


def _work(tasks):
    while True:
        part, p, parts, done = tasks.get()
        try:
            part(p, parts)
            error = None
        except BaseException as e:  # handed to the caller, who raises it
            error = e
        done.put(error)
        del part, done, error  # keep nothing of the call alive while asleep


class _Pool:
    """Threads that sleep until they are handed a part of a call."""

    def __init__(self):
        self.lock = threading.Lock()
        self.tasks: list[SimpleQueue] = []

    def _grow(self, count):
        while len(self.tasks) < count:
            tasks: SimpleQueue = SimpleQueue()
            threading.Thread(target=_work, args=(tasks,), name="fastrnn", daemon=True).start()
            self.tasks.append(tasks)

    def run(self, part, parts):
        self._grow(parts - 1)
        done: SimpleQueue = (
            SimpleQueue()
        )  # of this call alone: one that was interrupted leaves nothing behind for the next
        error: BaseException | None = None
        waiting = 0
        try:
            for p, tasks in enumerate(self.tasks[: parts - 1], 1):
                waiting += 1
                tasks.put((part, p, parts, done))
            part(0, parts)
        except BaseException as e:
            error = e
        while waiting:  # for all, whatever happens: they write into this call's arrays
            try:
                other = done.get()
                waiting -= 1
                error = error or other
            except KeyboardInterrupt as e:
                error = e
        if error is not None:
            raise error


_pool = _Pool()
_count = _initial()


def _after_fork():
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_num_threads(n: int) -> None:
    """Use at most n threads for a pass, from the next call on, in the whole process.

    Results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        At least 1. The default is FASTRNN_NUM_THREADS where that is set, else the processors this process may use.

    Examples
    --------
    >>> import fastrnn
    >>> before = fastrnn.get_num_threads()
    >>> fastrnn.set_num_threads(1)
    >>> fastrnn.get_num_threads()
    1
    >>> fastrnn.set_num_threads(before)
    """
    global _count
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n must be a whole number, got {type(n).__name__}")
    if n.__index__() < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _count = n.__index__()


def get_num_threads() -> int:
    """The most threads that a pass uses; see :func:`set_num_threads`."""
    return _count


def run(part: Callable[[int, int], None], parts: int) -> None:
    """Call part(p, parts) for every p < parts, each on a thread of its own; all on this one where the pool is taken."""
    if parts > 1 and _pool.lock.acquire(blocking=False):
        try:
            _pool.run(part, parts)
        finally:
            _pool.lock.release()
    else:
        for p in range(parts):
            part(p, parts)
