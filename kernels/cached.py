"""Compiled kernels, kept on disk between processes: a convenience, never a condition.

`kernel` and `callback` stand where Numba's ``njit(cache=True)`` and ``cfunc(cache=True)`` would. What these keep is
trusted as it is found: a file that is cut short, empty or another kernel's ends every later process, and so does a
folder that cannot be written to. Here each compiled kernel is a file of its own, which begins with a checksum of
everything that it stands for: the kernel, the types of its arguments, its source, Numba's version, the processor, and
the machine code. Whatever does not fit is compiled anew and written over. What cannot be written is not kept, and a
warning says so once. The checksum is against accidents: whoever can write into the folder can run what he wants.

Of processes that want the same kernel at once, one compiles it (:mod:`fastrnn.kernels.turns`). Who waits at a terminal
is told so (:mod:`fastrnn.kernels.notice`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import numba
from numba import njit
from numba.core import caching, compiler, config, sigutils
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps

from fastrnn.kernels import notice, turns
from fastrnn.kernels.loading import uninterrupted

SUFFIX = ".nbc"
SEAL_BYTES = hashlib.sha256().digest_size


def kernel(function, **options):
    """Numba's dispatcher of a function of this package, compiled when it is called, without the interpreter's lock.

    Signals wait meanwhile. Numba goes on with generators where it was at the last compilation, and one that ends by an
    exception, as Ctrl-C's, makes all later ones fail; and what a handler raises when LLVM calls Python is lost.
    """
    # Never fastmath: NaN and infinity are what they are. Python's own division looks for zeros, at ten times the cost.
    dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
    dispatcher._cache = KernelCache(function)
    dispatcher.compile = dispatcher._cache.around(dispatcher.compile)
    return dispatcher


def callback(signature):
    """A decorator: the function, compiled for C to call."""

    def compiled(function):
        made = CFunc(function, sigutils.normalize_signature(signature), locals={}, options={})
        made._cache = KernelCache(function)
        made._cache.around(made.compile)()
        return made

    return compiled


class Place:
    """A folder with compiled versions of one function, each for other types of arguments or another processor."""

    def __init__(self, function, folder):
        file = Path(function.__code__.co_filename)
        abi = "{}{}{}".format(*sys.version_info[:2], getattr(sys, "abiflags", ""))
        self.folder = Path(folder)
        self.base = f"{file.stem}.{function.__qualname__}.py{abi}"
        self.of = (self.base, _checksum(file), hashlib.sha256(function.__code__.co_code).hexdigest(), numba.__version__)

    def load(self, key):
        """What was saved by this key; None where nothing was, or it is not whole, or of other versions."""
        content = memoryview(self._file(key).read_bytes())
        seal, data = content[:SEAL_BYTES], content[SEAL_BYTES:]
        return pickle.loads(data) if seal == self._seal(key, data) else None

    def save(self, key, payload):
        """Keep it, at once and whole: others may read and write at the same time."""
        data = dumps(payload)
        write_whole(self._file(key), self._seal(key, data) + data)

    def lock(self, key):
        """The file that who makes this one holds locked."""
        file = self._file(key)
        return file.with_name(f"{file.name}.lock")

    def files(self):
        return list(self.folder.glob(f"{self.base}.*{SUFFIX}"))

    def _file(self, key):
        return self.folder / f"{self.base}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}{SUFFIX}"

    def _seal(self, key, data):
        seal = hashlib.sha256(repr((self.of, key)).encode())
        seal.update(data)
        return seal.digest()


class KernelCache(caching._Cache):
    """What Numba asks before it compiles a function, and tells what it has compiled."""

    def __init__(self, function):
        self.name = function.__qualname__
        self.compiling = contextlib.ExitStack()  # what ends with a compilation
        self.own: Place | None = None  # where there is none, what was found in looking for one
        self.reason: Exception | None = None
        try:
            self.own = Place(function, caching.CompileResultCacheImpl(function).locator.get_cache_path())
        except Exception as error:  # Numba's RuntimeError, and whatever a strange system may raise
            self.reason = error
        self.places = [self.own] if self.own else []  # where to look, in this order; only its own is written to
        for find in READ_ONLY:
            with contextlib.suppress(Exception):
                self.places += [place for place in find(function) if not self.own or place.folder != self.own.folder]
        self.enable()

    @property
    def cache_path(self):
        return self.own and str(self.own.folder)

    def enable(self):
        self.enabled = True

    def disable(self):
        self.enabled = False

    def flush(self):
        for file in self.own.files() if self.own else ():
            file.unlink(missing_ok=True)

    def around(self, compile):
        """`compile`, which no signal breaks, and what is to be ended after it."""

        @functools.wraps(compile)
        def compiled(*arguments):
            # Numba's own lock, which it takes again: another thread would find this one's stack.
            with uninterrupted(), global_compiler_lock, self.compiling:
                return compile(*arguments)

        return compiled

    def load_overload(self, sig, target_context):
        if not self.enabled:
            return None
        target_context.refresh()
        key = self._key(sig, target_context.codegen())
        look = functools.partial(self._look, key, target_context)
        found = look()
        if found is None:
            self.compiling.enter_context(notice.while_compiling(self._described(sig)))
            if self.own is not None:
                found = turns.await_or_lock(look, self.own.lock(key), self.compiling)
        return found

    def _look(self, key, target_context):
        for place in self.places:
            # Whatever goes wrong with a file, from one that is not there to Numba's own check of what is in it: it is
            # compiled.
            with contextlib.suppress(Exception):
                payload = place.load(key)
                if payload is not None:
                    return compiler.CompileResult._rebuild(target_context, *payload)
        return None

    def _described(self, sig):
        """A kernel in a reader's words: types may say what it is for."""
        described = [argument.described for argument in getattr(sig, "args", sig) if hasattr(argument, "described")]
        return " of ".join([self.name, *described[:1]])

    def save_overload(self, sig, data):
        if not self.enabled or data.library.has_dynamic_globals:  # addresses of this process
            return
        if self.own is None:
            _warn(self.reason)
            return
        try:
            self.own.folder.mkdir(parents=True, exist_ok=True)
            self.own.save(self._key(sig, data.codegen), data._reduce())
        except OSError as error:
            # Windows does not let a file be replaced while somebody reads it, who then has one just as good.
            if os.name != "nt" or not isinstance(error, PermissionError):
                _warn(error)
        except Exception:  # Numba may not have the machine code any more, and nobody could do anything
            pass

    @staticmethod
    def _key(sig, codegen):
        return sig, codegen.magic_tuple()


def _first_choice(function) -> list[Place]:
    """The folder that Numba would take if it could be written to: an image may have been filled, and then closed."""
    file = Path(function.__code__.co_filename)
    if config.CACHE_DIR:
        return [Place(function, Path(config.CACHE_DIR, caching._CacheLocator.get_suitable_cache_subpath(str(file))))]
    return [Place(function, file.parent / "__pycache__")]


# Each gives the places, for one function, that are read after its own and never written to.
READ_ONLY: list[Callable[..., list[Place]]] = [_first_choice]


@functools.cache
def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all; nothing is left where that fails."""
    temporary = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex[:16]}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


_warned = False


def _warn(reason) -> None:
    """Say once in a process that kernels are not kept, and what can be done."""
    global _warned
    if not _warned:
        _warned = True
        text = "fastrnn cannot keep its compiled kernels, so that each process compiles them anew"
        advice = "set the environment variable NUMBA_CACHE_DIR to a folder that can be written to and has room"
        warnings.warn(f"{text}: {advice} ({reason})", RuntimeWarning, stacklevel=3)
