"""Processes that want the same file: one makes it, the others wait for it. A convenience, never a condition.

The one that makes it holds a lock on a file beside it, which the system takes away when that process ends, however it
ends. Where there are no such locks, or the folder cannot be written to, nobody waits.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST, LOOK = 60.0, 0.03  # seconds: how long to wait for another process, and between looks

Found = TypeVar("Found")


def await_or_lock(look: Callable[[], Found | None], file: Path, making: contextlib.ExitStack) -> Found | None:
    """What `look` finds, perhaps when another process has made it; None: make it, here and now.

    The others wait for that until `making` ends.
    """
    end, waited = time.monotonic() + LONGEST, False
    while time.monotonic() < end:
        mine, lock = _lock(file)
        with contextlib.ExitStack() as ends:
            ends.callback(_release, file, lock)
            found = look()  # with the lock: it may have been made just before
            if found is not None or mine:
                if found is None and not waited:
                    making.push(ends.pop_all())
                return found  # after a wait, None: the other could not make or keep it, and a queue would not help
        waited = True
        time.sleep(LOOK)
    return None


def _lock(file: Path) -> tuple[bool, int | None]:
    """Whether no other process has the lock; and its number, None where it is not had."""
    if fcntl is None:
        return True, None
    number: int | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        return False, None
    except OSError:  # a folder that cannot be written to, a file system without locks
        _release(file, number)
        return True, None
    return True, number


def _release(file: Path, number: int | None) -> None:
    if number is not None:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is locked: who has it open finds what was made, and needs no lock any more
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)  # closing is not enough: a fork in the meantime has it open, too
        os.close(number)
