"""How kernels of many functions are compiled at half of what it costs by itself.

Numba optimises a function and makes machine code of it wherever it is called from another one: once for itself, and
once more in each function around it, up to the kernel, which alone is ever run. Here a callee is lowered to LLVM and
tidied up cheaply; all other work is done once, on the kernel.

This looks into Numba's code generator. Where that is not as it is known here, functions are compiled as Numba does.
"""

from __future__ import annotations

import inspect

from numba import extending
from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_machinery import AnalysisPass, register_pass
from numba.core.typed_passes import AnnotateTypes

from fastrnn.kernels import cached

_CHEAP = {"loop_vectorize": False, "slp_vectorize": False, "opt": 0, "cost": "cheap"}


class _WithoutEnvironment:
    """A code generator that is not asked for the address of what was never made."""

    def __init__(self, codegen):
        self._of = codegen

    def __getattr__(self, name):
        return getattr(self._of, name)

    def set_env(self, name, env):
        pass


class _Library(JITCodeLibrary):
    def _optimize_functions(self, module):
        """What comes later does it all again."""
        module.data_layout = self._codegen._data_layout

    def _optimize(self, **level):
        passes, builder = self._codegen._module_pass_manager(**level)
        passes.run(self._final_module, builder)


class CalleeLibrary(_Library):
    """Code that is only ever linked into other code."""

    def _optimize_final_module(self):
        self._optimize(**_CHEAP)

    def _finalize_final_module(self):
        """As Numba, but that there is no machine code."""
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0

    @property
    def codegen(self):
        return _WithoutEnvironment(self._codegen)


class KernelLibrary(_Library):
    """Code that Python calls."""

    def _optimize_final_module(self):
        self._optimize(**_CHEAP)
        self._optimize(opt=2)


def _compiler(library, name):
    """Numba's, with another library for what it makes."""

    @register_pass(mutates_CFG=False, analysis_only=True)
    class Prepare(AnalysisPass):
        _name = f"fastrnn_{name}"

        def __init__(self):
            AnalysisPass.__init__(self)

        def run_pass(self, state):
            state.library = library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.library.enable_object_caching()
            return True

    class Compiler(compiler.CompilerBase):
        def define_pipelines(self):
            passes = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes.add_pass_after(Prepare, AnnotateTypes)
            passes.finalize()
            return [passes]

    return Compiler


def _is_known() -> bool:
    """Whether Numba's code generator is the one that the classes above stand in for."""
    from numba.core import codegen

    names = "_optimize_functions _optimize_final_module _finalize_final_module _finalize_dynamic_globals"
    if not all(hasattr(JITCodeLibrary, name) for name in names.split()):
        return False
    try:
        return "return pm, pb" in inspect.getsource(codegen.CPUCodegen._module_pass_manager)
    except (AttributeError, OSError):
        return False


CALLEE: dict = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "nopython": True}
KERNEL: dict = {"no_cfunc_wrapper": True}
if _is_known():
    CALLEE["pipeline_class"] = _compiler(CalleeLibrary, "callee")
    KERNEL["pipeline_class"] = _compiler(KernelLibrary, "kernel")


def register_jitable(function):
    """Let kernels call it; it stays a Python function as well."""
    return extending.register_jitable(**CALLEE)(function)


def kernel(function):
    """As :func:`fastrnn.kernels.cached.kernel`, for a function that calls many."""
    return cached.kernel(function, **KERNEL)
