"""Imports and compilations in the middle of a call, which no signal may break.

The kernels, and Numba with them, are imported when they are first used. If a handler raises meanwhile, as Ctrl-C's
does, Python keeps those of Numba's modules that were made already and makes the others anew, and the two do not fit:
every later call of the process would fail. So would it after a compilation that is broken off at the wrong place.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from types import ModuleType

_held = False  # whether the main thread's signals wait already; looked at elsewhere, it makes no difference


def load(name: str) -> ModuleType:
    """The module of this full name, imported whole."""
    with uninterrupted():
        return importlib.import_module(name)


def attribute(package: str, name: str) -> ModuleType:
    """For a package's ``__getattr__``, where ``from package import name`` comes first: the module of that name."""
    full = f"{package}.{name}"
    if not name.startswith("_"):
        try:
            return load(full)
        except ModuleNotFoundError as error:
            if error.name != full:
                raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


@contextlib.contextmanager
def uninterrupted():
    """Within, signals wait that have handlers in Python: these run in the main thread, and may raise there."""
    global _held
    if _held or threading.current_thread() is not threading.main_thread():
        yield
        return
    missed: dict = {}
    with contextlib.ExitStack() as stack:
        stack.callback(_deliver, missed)
        _hold(stack, missed)
        try:
            _held = True
            yield
        finally:
            _held = False


def _hold(stack, missed):
    """Until `stack` ends, only note which signals come: in `missed`, by number, whose handler is given what."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for number, handler in handlers.items():
        if callable(handler):

            def note(number, frame, handler=handler):
                missed[number] = handler, frame

            stack.callback(signal.signal, number, handler)
            signal.signal(number, note)


def _deliver(missed):
    with contextlib.ExitStack() as stack:  # each is run, even if another raises
        for number, (handler, frame) in missed.items():
            stack.callback(handler, number, frame)
