"""Compile kernels for a 64-bit ARM processor on another one, into Numba's cache: none of them is run here.

Compiling a cell under emulation takes minutes. LLVM compiles for any processor anywhere, and Numba's cache keeps what
it made by the processor's name: an emulated process with the same sources and versions takes it from there.

    NUMBA_CACHE_DIR=folder python tests/arm_kernels.py TRIPLE CPU FEATURES DTYPES CELL...
"""

import sys
import time

from llvmlite import binding
from llvmlite.binding import targets
from numba.core import codegen, config


class Features(dict):
    def flatten(self, sort=True):
        return FEATURES


class Engine:
    """In place of LLVM's execution engine: knows which symbols there would be, and runs nothing."""

    def __init__(self):
        self.names = set()

    def is_symbol_defined(self, name):
        return name in self.names

    def _load_defined_symbols(self, module):
        for values in (module.functions, module.global_variables):
            self.names |= {value.name for value in values if not value.is_declaration}

    def add_module(self, module):
        self._load_defined_symbols(module)

    def add_global_mapping(self, variable, address):
        self.names.add(variable.name)

    def set_object_cache(self, *functions):
        pass

    def finalize_object(self):
        pass

    def get_function_address(self, name):
        return 0x1000  # never called

    def get_global_value_address(self, name):
        return 0


def init(self, module):
    """What numba.core.codegen.CPUCodegen._init does, for a target that is not this machine."""
    options = {"opt": config.OPT}
    self._tm_features = self._customize_tm_features()
    self._customize_tm_options(options)
    self._tm = binding.Target.from_triple(TRIPLE).create_target_machine(**options)
    self._engine = Engine()
    self._target_data = self._tm.target_data
    self._data_layout = str(self._target_data)
    self._loopvect, self._opt_level = (True, 3) if config.OPT.is_opt_max else (False, 0)


def compile_only(kernel, key, *args):
    """In place of fastrnn.kernels.stage.call."""
    types = tuple(stage._of_any_flags(stage.typeof(argument)) for argument in args)
    kernel.compile(types)
    stage._entries[kernel, key] = kernel.overloads[types].entry_point
    return 1  # walk.DONE


TRIPLE, CPU, FEATURES, DTYPES, *CELLS = sys.argv[1:]
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
for module in (binding, targets):
    module.get_process_triple = module.get_default_triple = lambda: TRIPLE
    module.get_host_cpu_name = lambda: CPU
    module.get_host_cpu_features = Features
codegen.CPUCodegen._init = init
codegen.JITCPUCodegen.set_env = lambda self, name, environment: None
codegen.CodeLibrary._get_compiled_object = lambda self: self._codegen._tm.emit_object(self._final_module)

# Not before: the kernels' modules ask for the processor when they are imported, and take `call` from this one.
from fastrnn.kernels import stage  # noqa: E402

stage.call = compile_only

from fastrnn import testing  # noqa: E402
from fastrnn.kernels import cpu, simd  # noqa: E402

if __name__ == "__main__":
    assert simd.machine() == {"vector_bits": 128, "registers": 32, "fused_multiply_add": True}, simd.machine()
    for cell in CELLS:
        for dtype in DTYPES.split(","):
            start = time.perf_counter()
            cpu.warmup([cell], [dtype])  # with no gradient of the output; the next has one
            projection = {"P": 1} if cell == "lstm_projected" else {}
            testing.run("cpu", testing.problem(cell.removesuffix("_projected"), 1, 1, 1, 1, dtype=dtype, **projection))
            print(f"{cell} {dtype}: {time.perf_counter() - start:.0f} s", flush=True)
