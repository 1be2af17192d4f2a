"""What this machine and this installation offer, and where the compiled kernels are."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

#: Features that decide how fast a kernel is, of the hundred that a processor names.
FEATURES = ("avx512f", "avx2", "fma", "avx", "sse4.2", "sse2", "sve", "neon")


def describe() -> dict[str, str]:
    """Versions, processor, kernels, threads, cache and GPU, each as a line of text.

    Examples
    --------
    >>> "numba" in describe()
    True
    """
    return {**versions(), **processor(), "kernels": kernels(), "threads": threads(), "cache": cache(), "GPU": gpu()}


def versions() -> dict[str, str]:
    """Versions of fastrnn, of Python and of what it stands on."""
    import fastrnn

    packages = {name: metadata.version(name) for name in ("numpy", "numba", "llvmlite")}
    python = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    return {"fastrnn": fastrnn.__version__, "python": python, **packages}


def processor() -> dict[str, str]:
    """The processor, those of its features that matter, and the vectors that kernels work with."""
    from llvmlite import binding

    from fastrnn.kernels import cpu

    here = cpu.describe()
    offered = binding.get_host_cpu_features()
    fused = "with" if here["fused_multiply_add"] else "without"
    return {
        "processor": f"{_processor_name()} ({binding.get_host_cpu_name()})",
        "features": " ".join(name for name in FEATURES if offered.get(name)),
        "vectors": f"{here['vector_bits']} bits, {here['registers']} registers, {fused} fused multiply-add",
    }


def kernels() -> str:
    """Whether kernels are machine code of this package or compiled here, and why."""
    from fastrnn.kernels import shipped

    said = shipped.describe()
    return said if shipped.load() is None else f"machine code of this package, {said}: nothing is compiled"


def _processor_name() -> str:
    """The name that the maker gave it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def threads() -> str:
    """Threads in use, and why so many."""
    import fastrnn

    set_by = os.environ.get("FASTRNN_NUM_THREADS")
    why = f"FASTRNN_NUM_THREADS={set_by}" if set_by else "FASTRNN_NUM_THREADS is not set"
    return f"{fastrnn.get_num_threads()} of {os.cpu_count()} processors ({why})"


def cache_folder() -> Path | None:
    """Where the compiled kernels are kept; None where no folder can be written to."""
    from fastrnn.kernels import compiled

    folder = compiled.cache_folder()
    return None if folder is None else Path(folder)


def cache_files() -> list[Path]:
    """The files of compiled kernels, and nothing else that Numba may have put beside them."""
    from fastrnn import kernels as package

    folder = cache_folder()
    if folder is None:
        return []
    modules = [path.stem for place in package.__path__ for path in Path(place).glob("*.py")]
    # Compiled code, what Numba itself kept before, and what a process was writing, or held locked, when it was killed.
    found = (folder.glob(f"{module}.*.nb[ic]{end}") for module in modules for end in ("", ".tmp.*", ".lock"))
    return sorted(path for files in found for path in files)


def cache() -> str:
    """Folder, number and size of the compiled kernels."""
    if cache_folder() is None:
        return "none: no folder can be written to (NUMBA_CACHE_DIR may name one)"
    sizes = [path.stat().st_size for path in cache_files()]
    return f"{cache_folder()}, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def gpu() -> str:
    """The GPU that `backend="cuda"` would use, or why there is none."""
    from fastrnn.kernels.cuda import device as gpus

    try:
        device = gpus.get_device()
    except (ImportError, RuntimeError) as error:
        return f"none ({str(error).rstrip('.')})"
    return "{} (compute capability {}.{})".format(device.name, *device.capability)
