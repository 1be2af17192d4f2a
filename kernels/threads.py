"""How a pass is split over threads, and whose threads.

Plain Python threads run kernels that have released the interpreter's lock. The pool is taken whole or not at all: a
caller who finds it taken runs on its own thread. Idle threads sleep. A forked child starts without a pool and makes
its own.

Where PyTorch is used the threads are PyTorch's. After work they spin for some milliseconds, and others on the same
cores would have only half of each. But an OpenMP region ends when every thread has come, even for nothing, while our
own, if other processes hold the cores, are not waited for: so they stand in for a while after one has come late.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

REST_SECONDS = (0.0005, 0.1)  # after a thread did not get a core: at first, and at most
MOST = 4096  # threads: a larger number is a mistake, and would take the system with it
POLL_SECONDS = 1e-4  # of looking whether the others are through, before going to sleep
LATE_SECONDS = 1e-3  # threads that are woken come in a fifth of it where there is a core for them

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


def _read_variable() -> int | None:
    text = os.environ.get("FASTRNN_NUM_THREADS")
    if text is None:
        return None
    digits = text.strip().lstrip("0")
    if not digits.isdecimal() or len(digits) > len(str(MOST)) or int(digits) > MOST:
        raise ValueError(f"FASTRNN_NUM_THREADS must be a whole number from 1 to {MOST}, got {text[:40]!r}")
    return int(digits)


def _find_getcpu():
    """The C library's function that tells on which processor its caller runs, where threads can be moved."""
    try:
        return ctypes.CDLL(None).sched_getcpu if hasattr(os, "sched_setaffinity") else None
    except (AttributeError, OSError, TypeError):
        return None


_getcpu = _find_getcpu()


def _find_environment():
    """The C library's functions that read and set how this thread's floating-point numbers are rounded and flushed."""
    for name in (None, "libm.so.6", "ucrtbase"):
        with contextlib.suppress(AttributeError, OSError, TypeError):
            library = ctypes.PyDLL(name)  # which keeps the interpreter's lock: they take nanoseconds
            return library.fegetenv, library.fesetenv
    return None


_environment = _find_environment()


class _Environment:
    """A thread's floating-point environment: the rounding mode, and whether denormal numbers become zero.

    Another library may have set it, for its own thread. The parts of a pass must not differ in it, or the bits would
    depend on who has done what.
    """

    def __init__(self):
        self.state = ctypes.create_string_buffer(64)  # C's fenv_t has up to 32 bytes

    def read(self):
        """Take this thread's."""
        if _environment:
            _environment[0](self.state)

    def set(self):
        """Make it this thread's."""
        if _environment:
            _environment[1](self.state)


class _Task:
    """A part of a call. Whoever first says that it is his does it: the helper that was handed it, or the caller.

    All of it can be asked again with the same answer: a caller who is interrupted at any point goes on asking.
    """

    def __init__(self, part, p, parts, environment):
        self.part, self.p, self.parts, self.environment = part, p, parts, environment
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
            if task is None:
                return
            if task.belongs_to(self):
                task.environment.set()
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


class _Own:
    """Threads of our own."""

    def __init__(self):
        self.helpers: list[_Helper] = []
        self.rest = _Rest()  # from starting more of them

    def grow(self, count):
        """Start helpers until there are so many, or as many as the system allows."""
        try:
            while len(self.helpers) < count and self.rest.is_over():
                self.helpers.append(_Helper())
        except (RuntimeError, MemoryError):  # can't start new thread
            self.rest.note(False)

    def shrink(self, count):
        """Let those beyond so many end."""
        while len(self.helpers) > count:
            self.helpers.pop().tasks.put(None)

    def begin(self, tasks):
        """Hand them out, none to a helper that was last seen on this thread's processor. The caller does those for
        which there is no helper.
        """
        self.grow(len(tasks))
        helpers = self.helpers[: len(tasks)]
        if _getcpu:
            here = _getcpu()
            for helper in helpers:
                if helper.processor == here:
                    helper.keep_off(here)
        for helper, task in zip(helpers, tasks, strict=False):
            helper.tasks.put(task)

    def end(self, tasks):
        """Wait for those that were begun."""
        # Most are through at about the same time, and being woken takes longer than looking a few times.
        polls_until = time.perf_counter() + POLL_SECONDS
        for task in tasks:
            while not task.finished and time.perf_counter() < polls_until:
                _yield()
            while not task.finished:
                with contextlib.suppress(Empty):
                    task.bell.get(timeout=1)


class _Borrowed:
    """The threads of GNU's OpenMP, which another library uses.

    They are begun and ended by the two functions that compilers once made of `#pragma omp parallel`, with the caller's
    own part between them: so that one stays an ordinary call, in which Python may raise what it wants. All threads of
    the other library take part, as in its own work: any other number would end some, and make them again later.
    """

    def __init__(self, library: str, count: Callable[[], int]):
        """`library` is the path of the one that uses them, `count` tells how many it has now."""
        locked, free = ctypes.PyDLL(library), ctypes.CDLL(library)  # whether they keep the interpreter's lock
        if hasattr(free, "__kmpc_fork_call"):
            raise OSError(f"{library} uses another OpenMP than GNU's")
        self.count = count
        self.level, self.thread_number = locked.omp_get_level, locked.omp_get_thread_num
        self.start, self.finish = locked.GOMP_parallel_start, free.GOMP_parallel_end
        self.number_without_lock = free.omp_get_thread_num
        region = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)
        self.start.argtypes, self.start.restype = [region, ctypes.c_ssize_t, ctypes.c_uint], None
        self.finish.argtypes, self.finish.restype = [], None
        self.region = region(self._work)
        self.rest = _Rest()
        self.had = threading.local()  # GNU's OpenMP has other threads for each that calls it
        self.tasks: list[_Task] = []
        self.last_end = 0.0

    def can_run(self, parts) -> bool:
        """Whether they are so many, came in time the last time, and do not wait for the end of a region already."""
        return parts <= self.count() and self.rest.is_over() and not self.level() and self._can_be_had()

    def _can_be_had(self) -> bool:
        """Whether they are there, or can be started: GNU's OpenMP ends the process where it cannot start one."""
        count, had = self.count(), getattr(self.had, "count", 1)
        if count > had and not _can_start(count - had):
            self.rest.note(False)
            return False
        self.had.count = count
        return True

    def begin(self, tasks):
        self.tasks, parts, count = tasks, len(tasks) + 1, self.count()
        self.start(self.region if parts == count else self.first_of_them, parts, count)

    def _work(self, parts):
        """What each of the others does. Nothing is raised here: signals are the main thread's."""
        task = self.tasks[self.thread_number() - 1]
        if task.belongs_to(self):
            before = _Environment()
            before.read()
            task.environment.set()
            task.run()
            before.set()  # the thread is another library's
            task.finished = True
            self.last_end = time.perf_counter()

    @functools.cached_property
    def first_of_them(self):
        """`region`, where there are more threads than parts: the others shall not wait for the interpreter's lock."""
        from numba import cfunc

        region, thread_number = self.region, self.number_without_lock
        thread_number.argtypes = []

        @cfunc("void(intp)")
        def first_of_them(parts):
            if thread_number() < parts:
                region(parts)

        self.machine_code = first_of_them  # lives as long as this
        return type(region)(first_of_them.address)

    def end(self, tasks):
        """Wait for all of them, and note whether one came long after the work was done."""
        begin = time.perf_counter()
        while self.level():
            self.finish()
        self.rest.note(time.perf_counter() < max(begin, self.last_end) + LATE_SECONDS)


def _can_start(count: int) -> bool:
    """Whether so many more threads can be started, by doing so. They have ended when this does."""
    gate, started = SimpleQueue(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=gate.get, name="fastrnn-trial", daemon=True)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        return False
    finally:
        for _ in started:
            gate.put(None)
        until = time.monotonic() + 0.1
        for thread in started:
            thread.join()
            while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < until:
                _yield()  # the system counts it a little longer than Python
    return True


class _Rest:
    """From what has failed for want of a core: the more often that happens, the longer."""

    def __init__(self):
        self.until, self.seconds = -math.inf, REST_SECONDS[0]

    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def note(self, successful: bool):
        shortest, longest = REST_SECONDS
        if successful:
            self.seconds = max(self.seconds / 2, shortest)
        else:
            self.until = time.monotonic() + self.seconds
            self.seconds = min(4 * self.seconds, longest)


class _Pool:
    """Threads, taken whole by one caller at a time."""

    def __init__(self):
        self.taken_by: dict = {}
        self.own = _Own()
        self.rest = _Rest()  # from sharing
        self.environment = _Environment()  # of who has taken it

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
            self.own.shrink(get_num_threads() - 1)
            self.taken_by.pop("thread", None)

    def run(self, part, parts, needed=True) -> bool:
        """Call part(p, parts) for every p: 0 on this thread. Those that no thread has begun by the time this one is
        through with its own are done here as well, or not at all if they are not `needed`.

        Returns whether all were through at about the same time.
        """
        self.environment.read()
        tasks = [_Task(part, p, parts, self.environment) for p in range(1, parts)]
        team = _borrowed if _borrowed and _borrowed.can_run(parts) else self.own
        errors: list[BaseException] = []
        try:
            team.begin(tasks)
            part(0, parts)
        except BaseException as e:
            errors.append(e)
        while True:  # whatever happens: the others write into this call's arrays
            try:
                in_time = self._finish(team, tasks, needed, errors)
                break
            except BaseException as e:
                errors.append(e)
        errors += [task.error for task in tasks if task.error]
        if errors:
            raise errors[0]
        return in_time

    def _finish(self, team, tasks, needed, errors) -> bool:
        """Do or call off what nobody has begun, and wait for the rest; whether that took no time."""
        for task in tasks:
            if task.belongs_to(self) and needed and not errors and not task.finished:
                task.finished = True
                task.run()
        begin = time.perf_counter()
        team.end([task for task in tasks if not task.belongs_to(self)])
        return time.perf_counter() < begin + POLL_SECONDS


_pool = _Pool()
_borrowed: _Borrowed | None = None
_chosen = _read_variable()
_following: Callable[[], int] = functools.cache(cores)  # says how many threads where no number is chosen


def _after_fork():
    """A child has no threads, and GNU's OpenMP would wait for its own for ever."""
    global _pool, _borrowed
    _pool, _borrowed = _Pool(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _is_forked() -> bool:
    """Whether this process is a copy of another one, as Linux knows it: forked, and no program begun since."""
    try:
        flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
    except (OSError, IndexError):
        return False
    return bool(int(flags) & 0x40)  # PF_FORKNOEXEC


def follow(count: Callable[[], int], library: str) -> None:
    """Use as many threads as count() says, where no other number is chosen, and those of `library`'s OpenMP.

    The threads stay our own where those cannot be had: on other systems than Linux, with another OpenMP than GNU's, in
    a forked child, whose parent may have begun them before this module was there, or for more parts than count() says.

    Parameters
    ----------
    count : function of nothing to int
        Called for every pass.
    library : str
        The path of a library that is loaded already.
    """
    global _following, _borrowed
    _following = count
    if sys.platform == "linux" and not _is_forked():
        with contextlib.suppress(OSError, AttributeError):
            _borrowed = _Borrowed(library, count)


def set_num_threads(n: int) -> None:
    """Use at most n threads for a pass, from the next call on, in the whole process.

    Results do not depend on it, to the last bit: every thread of a pass rounds, and flushes denormal numbers to zero,
    as its caller does, who may have been told so by fesetround or torch.set_flush_denormal. Where the system starts no
    more threads, a pass runs on those that there are. Threads of our own that are too many end.

    Parameters
    ----------
    n : int
        1 to 4096. Until it is called: FASTRNN_NUM_THREADS where that is set, else what torch.get_num_threads() says at
        each pass once fastrnn.torch has been imported, else the processors that this process may use.

    Examples
    --------
    >>> import fastrnn
    >>> before = fastrnn.get_num_threads()
    >>> fastrnn.set_num_threads(1)
    >>> fastrnn.get_num_threads()
    1
    >>> fastrnn.set_num_threads(before)
    """
    global _chosen
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n must be a whole number, got {type(n).__name__}")
    if not 1 <= n.__index__() <= MOST:
        raise ValueError(f"n must be a whole number from 1 to {MOST}, got {n}")
    _chosen = n.__index__()
    if not _pool.taken_by:  # else whoever has it lets too many threads end when he gives it back
        with _pool.taken():
            pass


def get_num_threads() -> int:
    """The most threads that a pass uses; see :func:`set_num_threads`."""
    return min(_following(), MOST) if _chosen is None else _chosen


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
    if _pool.rest.is_over():
        with _pool.taken() as mine:
            if mine:
                return _pool.run(part, parts, needed=False)
    part(0, 1)
    return True


def shared(successfully: bool) -> None:
    """Whether the last sharing was one. If a thread did not get a core, share nothing for a while; the more often that
    happens, the longer.
    """
    _pool.rest.note(successfully)
