"""Numba on this machine, making code for another one: nothing that it compiles is run here."""

from __future__ import annotations

import platform


def target_machine(target):
    """LLVM's description of a target, for code that may stand anywhere in memory."""
    from llvmlite import binding

    return binding.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.cpu_features, opt=2, reloc="pic", codemodel="default"
    )


def compile_for(target) -> None:
    """From here on Numba compiles for a target; in a process that has not imported it yet."""
    if platform.machine() in target.machines and platform.system() == target.system:
        return  # by NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, which are set
    import llvmlite.binding as llvm
    from llvmlite.binding import targets

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    for module in (llvm, targets):
        module.get_process_triple = module.get_default_triple = lambda: target.triple
        module.get_host_cpu_name = lambda: target.cpu
        module.get_host_cpu_features = lambda: _Features(target.cpu_features)
    _replace_engine(target)


class _Features(dict):
    def __init__(self, text):
        super().__init__()
        self.text = text

    def flatten(self, sort=True):
        return self.text


class _Engine:
    """In the place of the one that would map and run what is compiled."""

    def __init__(self):
        self.names = set()

    def is_symbol_defined(self, name):
        return name in self.names

    def add_module(self, module):
        self._load_defined_symbols(module)

    def _load_defined_symbols(self, module):
        for things in (module.functions, module.global_variables):
            self.names |= {thing.name for thing in things if not thing.is_declaration}

    def add_global_mapping(self, variable, address):
        self.names.add(variable.name)

    def set_object_cache(self, *hooks):
        pass

    def finalize_object(self):
        pass

    def get_function_address(self, name):
        return 0x1000

    def get_global_value_address(self, name):
        return 0


def _replace_engine(target):
    from numba.core import codegen

    def init(self, module):
        self._tm_features = self._customize_tm_features()
        self._tm = target_machine(target)
        self._engine = _Engine()
        self._target_data = self._tm.target_data
        self._data_layout = str(self._target_data)
        self._loopvect, self._opt_level = True, 3

    codegen.CPUCodegen._init = init
    codegen.JITCPUCodegen.set_env = lambda self, name, environment: None
    codegen.CodeLibrary._get_compiled_object = lambda self: b""
