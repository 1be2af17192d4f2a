"""Make the machine code that a wheel carries: ``python -m fastrnn.kernels.shipped.build``, as ``make wheel`` does.

For each target every kernel is compiled as it would be on the spot, and written as an object file with a C interface;
a linker makes one library of them. Kernels for other processors and systems than this one are compiled as well as any:
nothing is run. It needs the package ziglang, which brings linkers for all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.shipped import CHECKSUM, FOLDER, MANIFEST, TARGETS

DTYPES = ("float32", "float64")
WORKERS = 2  # processes that compile
ZIG = {  # a linker's name for the target's system
    "x86_64-unknown-linux-gnu": "x86_64-linux-gnu",
    "aarch64-unknown-linux-gnu": "aarch64-linux-gnu",
    "arm64-apple-macosx11.0.0": "aarch64-macos.11.0",
}
# An error in a kernel would be written to Python's standard error; none has any, and the linker makes sure of it.
ALLOWED = {"memcpy", "memset", "memmove", "fma", "fmaf"}


def write_objects(target_name, cells, folder, part):
    """Compile a part of a target's kernels, in a process of its own (see `_environment`)."""
    from fastrnn.kernels.shipped import cross

    cross.compile_for(TARGETS[target_name])
    import numpy as np
    from llvmlite import binding

    from fastrnn.kernels import compiled, native

    of_cells = ("forward", "backward")
    wanted = [(name, dtype, cell) for cell in cells for dtype in DTYPES for name in of_cells]
    wanted += [(name, dtype, None) for name in compiled.KERNELS for dtype in DTYPES if name not in of_cells]
    for name, dtype, cell in wanted[part::WORKERS]:
        symbol = native.symbol(name, np.dtype(dtype), cell)
        module = _with_c_interface(*_compiled(name, np.dtype(dtype), cell), symbol, binding)
        machine = cross.target_machine(TARGETS[target_name])
        tuning = binding.create_pipeline_tuning_options(speed_level=1)
        passes = binding.create_pass_builder(machine, tuning).getModulePassManager()
        passes.run(module, binding.create_pass_builder(machine, tuning))  # drops what nobody calls
        undefined = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
        if not undefined <= ALLOWED:
            raise RuntimeError(f"{symbol} calls {sorted(undefined - ALLOWED)}, which no library has here")
        (folder / f"{symbol}.o").write_bytes(machine.emit_object(module))
        print(f"{target_name}: {symbol}", flush=True)


def _compiled(name, dtype, cell):
    """A kernel's LLVM module, and the name of the function in it that C could call."""
    from numba import njit

    from fastrnn.kernels import compiled, lean

    options = lean.KERNEL | {"no_cfunc_wrapper": False, "no_cpython_wrapper": True}
    kernel = njit(nogil=True, error_model="numpy", _nrt=False, **options)(compiled.KERNELS[name].py_func)
    arguments = compiled.signature(dtype, cell)
    kernel.compile(arguments)
    result = kernel.overloads[arguments]
    return result.library._final_module, result.fndesc.llvm_cfunc_wrapper_name, len(arguments)


def _with_c_interface(module, wrapper, count, symbol, binding):
    """The module with one function that can be seen, of the record's address alone."""
    module = binding.parse_bitcode(module.as_bitcode())
    for named in (*module.functions, *module.global_variables):
        if not named.is_declaration:
            named.linkage = "internal"
    nothing = ", ".join(["ptr null"] * (count - 1))
    text = f'define i64 @{symbol}(i64 %record) {{\n  %result = call i64 @"{wrapper}"({nothing}, i64 %record)\n'
    return binding.parse_assembly(f"{module}\n{text}  ret i64 %result\n}}\n")


def _environment(target) -> dict[str, str]:
    """In which a process compiles for a target."""
    chosen = {"NUMBA_CPU_NAME": target.cpu, "NUMBA_CPU_FEATURES": target.cpu_features, "FASTRNN_SHIPPED": "0"}
    return {**os.environ, **chosen}


def link(target_name, objects) -> Path:
    """One library of the object files."""
    target = TARGETS[target_name]
    path = FOLDER / (target_name + target.suffix)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", ZIG[target.triple], "-shared", "-nostdlib", "-s"]
    if target.system == "Darwin":
        command += ["-Wl,-undefined,dynamic_lookup", f"-Wl,-install_name,{path.name}"]
    subprocess.run([*command, "-o", str(path), *map(str, objects)], check=True)
    return path


def build(targets, cells) -> dict:
    """Make the libraries and the manifest, which is returned. Others of the same sources stay."""
    libraries = _libraries_that_stay()
    for name in targets:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fastrnn.kernels.shipped.build", "--objects", folder, "--target", name]
            workers = [
                subprocess.Popen([*command, "--part", str(part), "--cells", *cells], env=_environment(TARGETS[name]))
                for part in range(WORKERS)
            ]
            ends = [worker.wait() for worker in workers]
            if any(ends):
                raise SystemExit(f"{name} could not be compiled")
            path = link(name, sorted(Path(folder).glob("*.o")))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        libraries[name] = {"sha256": digest, "bytes": path.stat().st_size, "cells": list(cells)}
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    manifest = {"sources": CHECKSUM, "libraries": libraries}
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _libraries_that_stay() -> dict:
    try:
        manifest = json.loads(MANIFEST.read_text())
        return manifest["libraries"] if manifest["sources"] == CHECKSUM else {}
    except (OSError, ValueError, KeyError):
        return {}


def main(arguments=None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=list(CELLS), metavar="NAME")
    parser.add_argument("--objects", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.objects:
        write_objects(options.target[0], options.cells, options.objects, options.part)
    else:
        build(options.target, options.cells)


if __name__ == "__main__":
    main()
