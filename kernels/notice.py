"""One line for who waits: that kernels are being compiled, where this takes more than a second in a process.

It is for people: written to standard error where that is a terminal, once, and not where FASTRNN_QUIET is set.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

PATIENCE = 1.0  # seconds of compiling, in all, before anything is said

_left = PATIENCE
_silent = False  # whether the line is there already, or whoever called has one of his own


@contextlib.contextmanager
def while_compiling(what: str):
    """Within, `what` is being compiled: say so when it takes long."""
    global _left
    timer, begin = _started(what), time.monotonic()
    try:
        yield
    finally:
        _left -= time.monotonic() - begin
        if timer is not None:
            timer.cancel()


@contextlib.contextmanager
def silence():
    """Within, nothing is said: for who says it in his own words."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def _started(what: str) -> threading.Timer | None:
    """What will say it when it is time; None where nothing is to be said."""
    if _silent or os.environ.get("FASTRNN_QUIET", "0") not in ("", "0") or not _is_watched():
        return None
    timer = threading.Timer(max(_left, 0.0), _say, (what,))
    timer.daemon = True  # the process may end meanwhile
    try:
        timer.start()
    except RuntimeError:  # the system starts no more threads
        return None
    return timer


def _is_watched() -> bool:
    """Whether standard error is a terminal; it may be closed, None, or anything else with a method for writing."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _say(what: str) -> None:
    global _silent
    if not _silent:
        _silent = True
        text = f"fastrnn: compiling for this processor ({what}), some seconds, kept on disk for later processes"
        advice = "FASTRNN_QUIET=1 silences this, python -m fastrnn warmup compiles ahead"
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed since
            sys.stderr.write(f"{text}; {advice}\n")
            sys.stderr.flush()
