"""From a kernel's text to a cubin, the machine code of a GPU: by Numba to PTX, by nvJitLink to code, without a GPU.

Neither step needs a driver, so that kernels are compiled and looked at on any machine with numba-cuda. Cubins are kept
on disk where Numba keeps the kernels of the CPU: beside this file, in NUMBA_CACHE_DIR, or in the user's cache folder.
Importing this module imports nothing of CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
import threading
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numba

from fastrnn.kernels.cached import write_whole
from fastrnn.kernels.cuda.text import Kernel
from fastrnn.kernels.loading import uninterrupted

HINT = "pip install 'fastrnn[cuda13]' (for drivers from 580 on), or 'fastrnn[cuda12]'"

SUFFIX = ".fastrnn.cubin"
PACKAGES = ("numba", "llvmlite", "numba-cuda", "cuda-core", "cuda-bindings", "cuda-toolkit", "nvidia-nvjitlink")
PACKAGES += ("nvidia-nvvm", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc-cu12")

_lock = threading.Lock()


class Compiled(NamedTuple):
    """A kernel's machine code."""

    cubin: bytes
    entry: str  # its name in the cubin
    log: str  # what the assembler says of registers and spills


def compile_kernel(kernel: Kernel, capability: tuple[int, int]) -> Compiled:
    """The kernel's machine code for GPUs of this compute capability, from disk where it was compiled before."""
    if "<locals>" in kernel.make.__qualname__:  # may hang on more than its constants
        return _compile(kernel, capability)
    name = f"{kernel.make.__name__}-{_key(kernel, capability)}{SUFFIX}"
    compiled = _read(name)
    if compiled is None:
        compiled = _compile(kernel, capability)
        _write(name, compiled)
    return compiled


# ---- compilation


def _compile(kernel: Kernel, capability: tuple[int, int]) -> Compiled:
    with uninterrupted():
        from numba import cuda
        from numba.cuda.cudadrv.error import NvvmSupportError

        from fastrnn.kernels import ptx

    function, signature = kernel.make(ptx, *kernel.constants), numba.void(*map(_type, kernel.arguments))
    options = {"debug": False, "opt": True, "fastmath": False, "device": False}
    try:
        with _lock, _device_of(capability):
            text, _ = cuda.compile_ptx(function, signature, cc=capability, launch_bounds=(kernel.threads, 1), **options)
    except NvvmSupportError as error:
        raise ImportError(f"numba-cuda is installed without its compiler, NVVM: {HINT}") from error
    return _assemble(_named(text, kernel.make.__name__), kernel.make.__name__, capability)


def _type(argument: str):
    """Numba's type for "int32", or for "float32*", a bare pointer."""
    number = getattr(numba.types, argument.rstrip("*"))
    return numba.types.CPointer(number) if argument.endswith("*") else number


def _named(text: str, name: str) -> str:
    """PTX with `name` for its entry, and without Numba's own names: they count what the process has compiled before."""
    text = re.sub(
        r"^\.common \.global \S+ \S+ \S+ _ZN08NumbaEnv\w+;\n", "", text, flags=re.MULTILINE
    )  # unused on a GPU
    (entry,) = re.findall(r"^\s*\.visible \.entry ([\w$]+)\(", text, re.MULTILINE)
    names = dict.fromkeys(re.findall(r"\b_ZN[\w$]+", text))
    names = {entry: name, **{other: f"{name}_{i}" for i, other in enumerate(names) if not other.startswith(entry)}}
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(pattern, lambda found: names[found.group()], text)


def _assemble(text: str, entry: str, capability: tuple[int, int]) -> Compiled:
    with uninterrupted():
        from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_{}{}".format(*capability), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    cubin = bytes(linker.link("cubin").code)
    log = [line.rstrip() for line in linker.get_info_log().strip("\0\n ").splitlines() if "Compile time" not in line]
    return Compiled(cubin, entry, "\n".join(log))


@contextlib.contextmanager
def _device_of(capability: tuple[int, int]):
    """Within, this thread's calls to device functions compile for `capability`, whatever GPU there is or is not.

    Numba asks the current device as soon as a kernel calls a device function, though all code is for the `cc` that it
    was given. Other threads get what they got before.
    """
    from numba.cuda import dispatcher

    asked, thread, device = dispatcher.get_current_device, threading.get_ident(), SimpleNamespace()
    device.compute_capability = capability

    def get_current_device():
        return device if threading.get_ident() == thread else asked()

    dispatcher.get_current_device = get_current_device
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


# ---- the cache on disk


def folders() -> list[Path]:
    """Where cubins are looked for. They are written to the first of them that can be written to."""
    from numba.core import config
    from numba.misc.appdirs import AppDirs

    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR) / "fastrnn-cuda"]
    everybody = Path(AppDirs(appname="numba", appauthor=False).user_cache_dir) / "fastrnn-cuda"
    return [Path(__file__).parent / "__pycache__", everybody]


def cache_files() -> list[Path]:
    """The cubins that are kept."""
    return sorted(path for folder in folders() for path in folder.glob(f"*{SUFFIX}*"))  # and half ones


def _key(kernel: Kernel, capability: tuple[int, int]) -> str:
    """A checksum of all that a cubin depends on."""
    make = kernel.make
    what = (make.__module__, make.__qualname__, kernel.constants, kernel.arguments, kernel.threads, tuple(capability))
    source = _checksum(make.__code__.co_filename)
    return hashlib.sha256(repr((what, source, _sources(), _versions())).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Of the modules that kernels are made of."""
    here = Path(__file__).parent
    return _checksum(here.parent / "cells.py", here.parent / "ptx.py", *sorted(here.glob("*.py")))


@functools.cache
def _checksum(*paths) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(Path(path).read_bytes()).digest() for path in paths)).hexdigest()


@functools.cache
def _versions() -> tuple:
    """Of Python and of the packages that compile, by their names: loading the libraries would take longer."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append((name, metadata.version(name)))
    return sys.version_info[:2], tuple(found)


def _seal(name: str, compiled: Compiled) -> str:
    """A checksum of a kernel and of the name under which it is kept: another's file shall not be taken for it."""
    return hashlib.sha256(repr((name, compiled.entry, compiled.log)).encode() + compiled.cubin).hexdigest()


def _read(name: str) -> Compiled | None:
    """What was kept under this name; None where nothing was, or it can't be read, or isn't whole."""
    for folder in folders():
        try:
            head, _, cubin = (folder / name).read_bytes().partition(b"\n")
            said = json.loads(head)
            compiled = Compiled(cubin, said["entry"], said["log"])
            if said["sha256"] == _seal(name, compiled):
                return compiled
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return None


def _write(name: str, compiled: Compiled) -> None:
    """Keep it, at once and whole, in the first folder that takes it, if any does."""
    said = {"sha256": _seal(name, compiled), "entry": compiled.entry, "log": compiled.log}
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, json.dumps(said).encode() + b"\n" + compiled.cubin)
        except OSError:
            continue
        return
