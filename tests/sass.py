"""What a kernel has become on a GPU: registers, spills and instructions of its machine code, without a GPU."""

import functools
import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from fastrnn.kernels.cuda.compiled import compile_kernel


class Report(NamedTuple):
    registers: int
    spills: int  # bytes that are stored and loaded for want of registers
    local_loads: int  # instructions that load from a thread's own memory, of arrays or spills
    tensor: int  # instructions of tensor cores
    doubles: int  # instructions that compute in float64, tensor cores' too
    lines: int  # instructions in all


DOUBLES = r"D(?:ADD|MUL|FMA|SETP|MNMX)|DMMA|F2F\.F64\S*|[FI]2[FI]\S*\.F64\S*|MUFU\.(?:RCP|RSQ)64H"
TENSOR = r"(?:[HDIQ]|HG|QG|BM)M?MMA|[HQI]GMMA|UTC\w*MMA"


def report(kernel, capability=(9, 0)):
    """Compile and look; the test is skipped where numba-cuda or nvdisasm is not installed."""
    _need_compiler()
    compiled = compile_kernel(kernel, capability)
    operations = [line[1] for line in re.finditer(INSTRUCTION, disassemble(compiled.cubin), re.MULTILINE)]
    return Report(
        registers=int(re.search(r"Used (\d+) registers", compiled.log)[1]),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", compiled.log))),
        local_loads=_count(r"LDL", operations),
        tensor=_count(TENSOR, operations),
        doubles=_count(DOUBLES, operations),
        lines=len(operations),
    )


# An instruction's line: "        /*0040*/               @!P0 IMAD.WIDE R2, R3, 0x4, R4 ;"
INSTRUCTION = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)"


def disassemble(cubin):
    """The cubin's instructions as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([nvdisasm(), "-c", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def nvdisasm():
    """The disassembler, of the package or of a toolkit; the test is skipped where there is none."""
    for package in ("nvidia-cuda-nvdisasm", "nvidia-cuda-nvcc-cu12"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return str(file.locate())
    found = shutil.which("nvdisasm", path=sysconfig.get_path("scripts")) or shutil.which("nvdisasm")
    if found is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    return found


def _need_compiler():
    cuda = pytest.importorskip("numba.cuda", reason="this Numba has no CUDA target")
    if cuda.implementation == "Built-in":
        pytest.skip("numba-cuda is not installed")


def _count(pattern, operations):
    return sum(re.fullmatch(rf"(?:{pattern})(?:\..*)?", operation) is not None for operation in operations)
