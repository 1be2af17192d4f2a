"""The machine code that a wheel carries: found, checked and loaded here, without Numba.

A wheel holds one library for each kind of processor, made by :mod:`fastrnn.kernels.shipped.build` of the very kernels
that would be compiled on the spot. They are C functions of one integer, the address of a record
(:mod:`fastrnn.kernels.records`), so that nothing in them depends on a version of Python, NumPy or Numba.

A library is mapped only where it was made of these sources, its checksum is right, and this processor has every
instruction that it may use. Everywhere else kernels are compiled as they are needed, and :func:`reason` says why.
FASTRNN_SHIPPED chooses a library by the name of its target, or, as 0, none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"
SOURCES = (
    "barrier", "cells", "lean", "meeting", "packing", "product", "records", "simd", "stage", "tiles", "walk",
)  # fmt: skip


class Target(NamedTuple):
    """A kind of processor and system, and how kernels are laid out for it."""

    system: str  # as platform.system() calls it
    machines: tuple[str, ...]  # as platform.machine() does
    features: tuple[str, ...]  # instructions that a processor must have, by LLVM's names
    vector_bits: int
    registers: int
    cpu: str  # LLVM's name, and what is added to or taken from it
    cpu_features: str
    triple: str
    suffix: str


_V3 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "sse4.2", "popcnt", "cx16", "sahf")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")

# In the order of preference. LLVM tunes x86-64-v4 for vectors of 256 bits, and ours have 512.
TARGETS = {
    "linux-x86-64-v4": Target(
        "Linux", _X86, _V4, 512, 32, "x86-64-v4", "-prefer-256-bit", "x86_64-unknown-linux-gnu", ".so"
    ),
    "linux-x86-64-v3": Target("Linux", _X86, _V3, 256, 16, "x86-64-v3", "", "x86_64-unknown-linux-gnu", ".so"),
    "linux-aarch64": Target("Linux", _ARM, (), 128, 32, "generic", "+neon", "aarch64-unknown-linux-gnu", ".so"),
    "macos-arm64": Target("Darwin", _ARM, (), 128, 32, "apple-m1", "", "arm64-apple-macosx11.0.0", ".dylib"),
}


def checksum_of_sources() -> str:
    """Of the sources that kernels are made of."""
    folder = FOLDER.parent
    return f"{zlib.crc32(b''.join((folder / f'{name}.py').read_bytes() for name in SOURCES)):08x}"


CHECKSUM = checksum_of_sources()


class Library(NamedTuple):
    """One that may be mapped."""

    name: str
    target: Target
    path: Path


def _features() -> dict:
    from llvmlite import binding

    return binding.get_host_cpu_features()


def _unfit(name: str, target: Target, entry: dict) -> str:
    """Why a library may not be mapped here; empty if it may."""
    if platform.system() != target.system or platform.machine() not in target.machines:
        return "it is for another system"
    if target.features:
        have = _features()
        missing = [feature for feature in target.features if not have.get(feature)]
        if missing:
            return f"this processor lacks {', '.join(missing)}"
    try:
        data = (FOLDER / (name + target.suffix)).read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        return "it is damaged: its checksum is another"
    return ""


def _manifest() -> dict | str:
    """What stands in the manifest; or why nothing of it can be used."""
    asked = os.environ.get("FASTRNN_SHIPPED", "")
    if asked == "0":
        return "FASTRNN_SHIPPED is 0"
    if not asked and any(os.environ.get(f"NUMBA_CPU_{name}") is not None for name in ("NAME", "FEATURES")):
        return "NUMBA_CPU_NAME or NUMBA_CPU_FEATURES asks for a certain processor"
    if object.__basicsize__ != 16 or sys.byteorder != "little":
        return "this Python keeps arrays in another way"
    try:
        manifest = json.loads(MANIFEST.read_text())
        libraries = {name: dict(entry) for name, entry in manifest["libraries"].items()}
        sources = manifest["sources"]
    except FileNotFoundError:
        return "this installation carries none"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    if sources != CHECKSUM:
        return "it was made of other sources"
    if asked and asked not in libraries:
        return f"FASTRNN_SHIPPED is {asked!r}, and there is {', '.join(libraries)}"
    return {name: entry for name, entry in libraries.items() if asked in ("", name)}


@functools.cache
def find() -> tuple[Library | None, str]:
    """The library for this processor, or None and the reason."""
    libraries = _manifest()
    if isinstance(libraries, str):
        return None, libraries
    reasons = []
    for name, target in TARGETS.items():
        if name in libraries:
            reason = _unfit(name, target, libraries[name])
            if not reason:
                return Library(name, target, FOLDER / (name + target.suffix)), ""
            reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons) or "there is none for this system"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, mapped."""
    library, _ = find()
    if library is None:
        return None
    try:
        return ctypes.CDLL(str(library.path))
    except OSError:  # another C library, a file system that forbids it: compile
        return None


@functools.cache
def function(name: str):
    """A kernel of the library, a function of an address; None if it has none of that name."""
    found = getattr(load(), name, None)
    if found is not None:
        found.argtypes, found.restype = [ctypes.c_int64], ctypes.c_int64
    return found


def describe() -> str:
    """Which library is used, or why none."""
    library, reason = find()
    if library is None:
        return f"compiled when needed: {reason}"
    return library.name if load() is not None else f"compiled when needed: {library.path} cannot be mapped"
