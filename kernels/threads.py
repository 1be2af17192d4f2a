"""How a pass is split over threads, and whose threads.

Plain Python threads run kernels that have released the interpreter's lock. The pool is taken whole or not at all: a
caller who finds it taken runs on its own thread. Idle threads sleep. A forked child starts without a pool and makes
its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

REST_SECONDS = (0.0005, 0.1)  # without sharing, after a thread did not get a core: at first, and at most
POLL_SECONDS = 1e-4  # of looking whether the others are through, before going to sleep

_yield = getattr(os, "sched_yield", functools.partial(time.sleep, 0))


def cores() -> int:
    """Processors that this process may use at a time."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, _quota())))


@functools.cache
def _quota(folder: str = "/sys/fs/cgroup") -> float:
    """Processors' worth of time that the container grants."""
    try:
        granted, period = Path(folder, "cpu.max").read_text().split()  # cgroup 2
    except (OSError, ValueError):
        try:
            granted = Path(folder, "cpu/cpu.cfs_quota_us").read_text()  # cgroup 1
            period = Path(folder, "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    try:
        return int(granted) / int(period) if int(granted) > 0 else math.inf
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return math.inf


def _initial() -> int:
    text = os.environ.get("FASTRNN_NUM_THREADS")
    if text is None:
        return cores()
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"FASTRNN_NUM_THREADS must be a whole number of at least 1, got {text!r}")
    return int(text)


def _find_getcpu():
    """The C library's function that tells on which processor its caller runs, where threads can be moved."""
    try:
        return ctypes.CDLL(None).sched_getcpu if hasattr(os, "sched_setaffinity") else None
    except (AttributeError, OSError, TypeError):
        return None


_getcpu = _find_getcpu()


class _Task:
    """A part of a call. Whoever first says that it is his does it: the helper that was handed it, or the caller.

    All of it can be asked again with the same answer: a caller who is interrupted at any point goes on asking.
    """

    def __init__(self, part, p, parts):
        self.part, self.p, self.parts = part, p, parts
        self.owner: dict = {}
        self.finished = False
        self.bell: SimpleQueue = SimpleQueue()  # threading's Event may stay locked after an interrupt
        self.error: BaseException | None = None

    def belongs_to(self, who) -> bool:
        return self.owner.setdefault("it is", who) is who  # in one step: no two get True

    def run(self):
        try:
            self.part(self.p, self.parts)
        except BaseException as e:  # handed to the caller, who raises it
            self.error = e


class _Helper:
    """A thread that sleeps until it is handed a part of a call."""

    def __init__(self):
        self.tasks: SimpleQueue = SimpleQueue()
        self.number = 0  # the system's, of the thread
        self.processor = -1  # where it ran last
        threading.Thread(target=self._work, name="fastrnn", daemon=True).start()

    def _work(self):
        self.number = threading.get_native_id()
        while True:
            task = self.tasks.get()
            if task.belongs_to(self):
                task.run()
                if _getcpu:
                    self.processor = _getcpu()
                task.finished = True
                task.bell.put(None)
            del task  # keep nothing of the call alive while asleep

    def keep_off(self, processor):
        """Run elsewhere. A thread is woken where it ran last if no other processor seems idle, and in a virtual machine
        those that sleep do not: it would take turns with the thread that it is to help.
        """
        others = os.sched_getaffinity(0) - {processor}
        if self.number and others:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self.number, others)
            self.processor = -1


class _Pool:
    """Helpers, taken whole by one caller at a time."""

    def __init__(self):
        self.taken_by: dict = {}
        self.helpers: list[_Helper] = []
        self.rests_until = -math.inf
        self.rest = REST_SECONDS[0]

    @contextlib.contextmanager
    def taken(self):
        """Whether this thread has the pool now. If it was interrupted just when it took it, it has it still, and gives
        it back at the end of its next call: a lock would be lost.
        """
        me = threading.get_ident()
        if self.taken_by.setdefault("thread", me) != me:
            yield False
            return
        try:
            yield True
        finally:
            self.taken_by.pop("thread", None)

    def _call(self, count) -> list[_Helper]:
        """So many helpers, none of which was last seen on this thread's processor."""
        while len(self.helpers) < count:
            self.helpers.append(_Helper())
        helpers = self.helpers[:count]
        if _getcpu:
            here = _getcpu()
            for helper in helpers:
                if helper.processor == here:
                    helper.keep_off(here)
        return helpers

    def run(self, part, parts, needed=True) -> bool:
        """Call part(p, parts) for every p: 0 on this thread. Those that no thread has begun by the time this one is
        through with its own are done here as well, or not at all if they are not `needed`.

        Returns whether all were through at about the same time.
        """
        tasks = [_Task(part, p, parts) for p in range(1, parts)]
        errors: list[BaseException] = []
        try:
            for helper, task in zip(self._call(parts - 1), tasks, strict=True):
                helper.tasks.put(task)
            part(0, parts)
        except BaseException as e:
            errors.append(e)
        while True:  # whatever happens: the others write into this call's arrays
            try:
                in_time = self._finish(tasks, needed, errors)
                break
            except BaseException as e:
                errors.append(e)
        errors += [task.error for task in tasks if task.error]
        if errors:
            raise errors[0]
        return in_time

    def _finish(self, tasks, needed, errors) -> bool:
        """Do or call off what nobody has begun, and wait for the rest; whether that took no time."""
        for task in tasks:
            if task.belongs_to(self) and needed and not errors and not task.finished:
                task.finished = True
                task.run()
        polls_until, in_time = time.perf_counter() + POLL_SECONDS, True
        for task in tasks:
            if not task.belongs_to(self):
                # Most are through at about the same time, and being woken takes longer than looking a few times.
                while not task.finished and time.perf_counter() < polls_until:
                    _yield()
                in_time = in_time and task.finished
                while not task.finished:
                    with contextlib.suppress(Empty):
                        task.bell.get(timeout=1)
        return in_time


_pool = _Pool()
limit = _initial()  # of threads in a pass; see set_num_threads


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
    global limit
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n must be a whole number, got {type(n).__name__}")
    if n.__index__() < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    limit = n.__index__()


def get_num_threads() -> int:
    """The most threads that a pass uses; see :func:`set_num_threads`."""
    return limit


def run(part: Callable[[int, int], None], parts: int) -> None:
    """Call part(p, parts) for every p < parts, each on a thread of its own; all on this one where the pool is taken."""
    if parts > 1:
        with _pool.taken() as mine:
            if mine:
                _pool.run(part, parts)
                return
    for p in range(parts):
        part(p, parts)


def share(part: Callable[[int, int], None], parts: int) -> bool:
    """Call part(0, parts) here, which can do everything, and the other parts, which help it, on as many threads as come
    in time; part(0, 1) where the pool is taken or resting.

    Returns whether nobody had to be waited for at the end.
    """
    if time.monotonic() >= _pool.rests_until:
        with _pool.taken() as mine:
            if mine:
                return _pool.run(part, parts, needed=False)
    part(0, 1)
    return True


def shared(successfully: bool) -> None:
    """Whether the last sharing was one. If a thread did not get a core, share nothing for a while; the more often that
    happens, the longer.
    """
    shortest, longest = REST_SECONDS
    if successfully:
        _pool.rest = max(_pool.rest / 2, shortest)
    else:
        _pool.rests_until = time.monotonic() + _pool.rest
        _pool.rest = min(4 * _pool.rest, longest)
