"""How work is cut for registers and caches: plain numbers, which compiled code and its callers share."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from fastrnn.kernels import shipped
from fastrnn.kernels.cells import CELLS, Stage

VECTORS = 4  # vectors of columns in a panel of a plain product
BLOCK = 128  # steps of k that are summed at a time: a panel's share of them stays in the first-level cache
OUTER_BLOCK = (
    512  # the same in the weight gradients, whose sums are over rows: fewer visits of the gradient, which is large
)
OUTER_TILES = 32  # tiles of gate gradients that are packed at a time: they stay in the second-level cache
TALL = 4  # rows of a tile that computes long enough to have something fetched meanwhile
IN_FLIGHT = 8  # sums under way that hide the latency of a fused multiply-add
ROWS = 48  # rows whose gate sums are under way at a time: they stay in the first-level cache


def _asked_of_numba() -> tuple[str | None, str | None]:
    """Name and features of the processor that Numba is told to compile for, where it is."""
    if "numba" in sys.modules or Path(".numba_config.yaml").exists():
        from numba.core import config

        return config.CPU_NAME, config.CPU_FEATURES
    return os.environ.get("NUMBA_CPU_NAME") or None, os.environ.get("NUMBA_CPU_FEATURES")


def _assembly(code: str) -> str:
    """What LLVM makes of `code` for the CPU that Numba compiles for."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    asked, features = _asked_of_numba()
    name = "" if asked == "generic" else asked or binding.get_host_cpu_name()
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features, opt=2)
    return machine.emit_assembly(binding.parse_assembly(code))


@functools.cache
def machine() -> dict:
    """Width in bits and number of the vector registers, and whether there is a fused multiply-add.

    As the shipped machine code was made for; else asked of the compiler itself rather than of a list of CPU names:
    sixteen floats are added, and the registers that the compiler uses for it are looked at.
    """
    library, _ = shipped.find()
    if library is not None:
        target = library.target
        return {"vector_bits": target.vector_bits, "registers": target.registers, "fused_multiply_add": True}
    from llvmlite import binding

    text = _assembly(
        "declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)\n"
        "define <16 x float> @f(<16 x float> %a) {\n"
        "  %b = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %a)\n"
        "  ret <16 x float> %b\n}\n"
    )
    bits = 512 if "zmm" in text else 256 if "ymm" in text else 128
    fused = "vfmadd" in text or "fmla" in text or "fmadd" in text
    arm = binding.get_process_triple().startswith(("aarch64", "arm64"))
    return {"vector_bits": bits, "registers": 32 if bits == 512 or arm else 16, "fused_multiply_add": fused}


VECTOR_BITS = machine()["vector_bits"]
REGISTERS = machine()["registers"]


def rows_in_tile(vectors: int) -> int:
    """Most rows that a tile can have: its sums, one row of weights and one element of A fill the registers."""
    return (REGISTERS * 3 // 4) // vectors


def outer_work(vectors: int, width: int) -> int:
    """Numbers of scratch that the product of the weight gradients needs, for vectors of `width` numbers."""
    height = rows_in_tile(vectors)
    return (OUTER_TILES * height + vectors * width) * OUTER_BLOCK + width + height * vectors * width


def _units(stage: Stage) -> int:
    """Vectors of hidden units in a panel: few gates leave room for several."""
    return max(1, VECTORS // len(stage.h_blocks))


STAGES = {stage.name: stage for cell in CELLS.values() for stage in cell.stages}
UNITS = {name: _units(stage) for name, stage in STAGES.items()}
TILE_ROWS = rows_in_tile(VECTORS)
