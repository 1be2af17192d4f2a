"""What the persistent kernels have become in machine code: nothing in memory that should be in a register, tensor cores
at work, one barrier a step, wide loads.

A choice of shapes in which every cell, mode, architecture and size appears; FASTRNN_ALL_KERNELS=1 takes all of them,
some minutes. The table of what was compiled is printed (``pytest -s``), and written to the file that
FASTRNN_KERNEL_TABLE names.
"""

import collections
import itertools
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import sass
from fastrnn.kernels.cuda import persistent, plan
from fastrnn.kernels.cuda.compiled import compile_kernel
from fastrnn.kernels.cuda.layer import Layer
from fastrnn.kernels.cuda.simple import Size

MMA = {
    "float32": "HMMA.1688.F32.TF32",
    "tf32": "HMMA.1688.F32.TF32",
    "bfloat16": "HMMA.16816.F32.BF16",
    "float16": "HMMA.16816.F32",
}
CELLS, WALKS = ("lstm", "gru", "rnn_tanh"), ("forward", "training", "backward")
HIDDEN, BATCHES, CAPABILITIES = (64, 200, 512, 1024), (1, 8, 64), ((8, 0), (9, 0), (10, 0))
HEAD = "walk cell mode H B units tile items groups tiles kept".split()
HEAD += "arch registers spills local in-steps tensor steps all".split()


class Case(NamedTuple):
    walk: str  # "training" is forward with a tape
    cell: str
    mode: str
    H: int
    B: int
    capability: tuple

    def __str__(self):
        return f"{self.walk}-{self.cell}-{self.mode}-H{self.H}-B{self.B}-sm_{self.capability[0]}{self.capability[1]}"


def cases():
    """All, or those that go through all lists at different paces; and the other activations at one size."""
    kinds = list(itertools.product(CELLS, MMA, WALKS))
    if os.environ.get("FASTRNN_ALL_KERNELS"):
        for one in itertools.product(kinds, HIDDEN, BATCHES, CAPABILITIES):
            yield Case(one[0][2], *one[0][:2], *one[1:])
    else:
        for n, (cell, mode, walk) in enumerate(kinds):
            case = Case(
                walk, cell, mode, HIDDEN[(n + n // 12) % 4], BATCHES[n // 3 % 3], CAPABILITIES[(n + n // 3) % 3]
            )
            yield case if layout(case) else case._replace(capability=(9, 0))  # which has room for more
    for cell, walk in itertools.product(("rnn_relu", "rnn_sigmoid"), WALKS[1:]):
        yield Case(walk, cell, "float32", 128, 8, (9, 0))


def layout(case):
    """The plan's for an H200; None where it is not persistent."""
    device = SimpleNamespace(
        multiprocessors=132,
        shared_memory=227 << 10,
        capability=case.capability,
        has_library=True,
    )
    layer, size = Layer(None, case.cell, (), case.mode, "persistent"), Size(1, case.B, case.H, case.H, 1)
    try:
        chosen = plan.choose(device, layer, size, "float32")
    except ValueError:
        return None
    return chosen.backward if case.walk == "backward" else chosen.forward


def kernel(case, shape):
    if case.walk == "backward":
        return persistent.backward_kernel(shape)
    return persistent.forward_kernel(shape._replace(tape=0) if case.walk == "forward" else shape)


class Code(NamedTuple):
    """A kernel's machine code in numbers."""

    registers: int
    spills: int  # bytes
    operations: collections.Counter  # how often each instruction stands there
    steps: collections.Counter  # and within the loop over steps


def count(operations, pattern):
    return sum(n for name, n in operations.items() if re.fullmatch(rf"(?:{pattern})(?:\..*)?", name))


def code_of(made, capability):
    compiled = compile_kernel(made, capability)
    operations, after = flow(sass.disassemble(compiled.cubin))
    (barrier,) = (n for n, name in enumerate(operations) if name.startswith("BAR"))  # one: that of a step
    before = collections.defaultdict(list)
    for n, others in after.items():
        for other in others:
            before[other].append(n)
    steps = reached(after, barrier) & reached(before, barrier)
    return Code(
        int(re.search(r"Used (\d+) registers", compiled.log)[1]),
        sum(map(int, re.findall(r"(\d+) bytes spill", compiled.log))),
        collections.Counter(operations),
        collections.Counter(operations[n] for n in steps),
    )


def flow(text):
    """The instructions in order, and for each the numbers of those that may be next."""
    operations, labels, jumps = [], {}, {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(sass.INSTRUCTION, line):
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if found[1].startswith(("BRA", "CALL", "EXIT", "RET")):
                always = re.search(r"\*/\s+@", line) is None and not found[1].startswith(("BRA.", "CALL"))
                jumps[len(operations)] = target and target[1], always
            operations.append(found[1])
    after = {}
    for n in range(len(operations)):
        label, always = jumps.get(n, (None, False))
        after[n] = [n + 1] * (not always) + ([labels[label]] if label else [])
    return operations, after


def reached(after, start):
    seen, todo = set(), [start]
    while todo:
        for n in after.get(todo.pop(), ()):
            if n not in seen:
                seen.add(n)
                todo.append(n)
    return seen


@pytest.fixture(scope="module")
def table():
    """Rows as of HEAD; what was compiled is told at the end."""
    rows = []
    yield rows
    width = [max(len(str(row[i])) for row in [HEAD, *rows]) for i in range(len(HEAD))]
    text = "\n".join("  ".join(str(x).rjust(n) for x, n in zip(row, width, strict=True)) for row in [HEAD, *rows])
    print(f"\n{text}")
    if path := os.environ.get("FASTRNN_KERNEL_TABLE"):
        Path(path).write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize("case", list(dict.fromkeys(cases())), ids=str)
def test_machine_code(case, table):
    found = layout(case)
    if found is None:
        pytest.skip("does not fit into the registers of 132 multiprocessors")
    shape, back = found.shape, case.walk == "backward"
    made = kernel(case, shape)
    code = code_of(made, case.capability)
    local, tensor = count(code.operations, "LDL|STL"), count(code.operations, sass.TENSOR)
    local_of_steps, strong = count(code.steps, "LDL|STL"), count(code.operations, r"LDG\..*STRONG")
    kept = (persistent.backward_kept if back else persistent.forward_kept)(shape)
    row = [shape.units, shape.tile, shape.items, found.groups, found.tiles, kept]
    row += ["sm_{}{}".format(*case.capability), code.registers, code.spills, local, local_of_steps, tensor]
    table.append([*case[:5], *row, code.steps.total(), code.operations.total()])
    assert code.registers <= min(255, 65536 // made.threads)
    assert tensor == code.operations[MMA[case.mode]] == code.steps[MMA[case.mode]] > 0
    assert count(code.operations, sass.DOUBLES) == 0
    assert count(code.operations, "MEMBAR|FENCE|ERRBAR") == 0, "no fence: a word is its own flag"
    assert strong == code.operations["LDG.E.128.STRONG.GPU"] > 0, "the exchange is read four words at a time"
    assert code.spills == local == 0, f"{local_of_steps} of {local} are in the loop over steps; {found}"


def test_everything_appears():
    fits = [case for case in cases() if layout(case)]
    for field, values in zip(Case._fields, (WALKS, CELLS, MMA, HIDDEN, BATCHES, CAPABILITIES), strict=True):
        assert {getattr(case, field) for case in fits} >= set(values), field
    for pair in itertools.product(CELLS, MMA):
        assert {case.walk for case in fits if case[1:3] == pair} == set(WALKS), pair
