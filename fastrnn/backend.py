"""The backends by name, with the same ``forward``, ``backward`` and ``prepare``, imported when first used."""

from typing import Any

NAMES = ("cpu", "reference", "cuda")
DEFAULT = "cpu"

# What may stand behind "cuda": how recurrent products are made on tensor cores, and which way the walk takes.
MODES = ("float32", "tf32", "bfloat16", "float16")
WAYS = ("simple", "steps", "persistent")

_loaded: dict[str, Any] = {}  # only those whose import has ended: sys.modules also holds half-imported modules


def check(name: str | None) -> str:
    """Return the backend's name, the default's for None; nothing is imported.

    Parameters
    ----------
    name : str or None
        "cpu" (the default), "reference" or "cuda". Behind "cuda" may stand how recurrent products are made where tensor
        cores make them, "cuda-tf32", "cuda-bfloat16" or "cuda-float16" ("cuda" alone is as accurate as float32); and
        the way that the walk takes, "cuda-simple", "cuda-steps" or "cuda-persistent" ("cuda" alone takes the fastest).

    Returns
    -------
    str

    Raises
    ------
    TypeError
        If `name` is neither None nor a string.
    ValueError
        If there is no such backend.

    Examples
    --------
    >>> check(None), check("cuda-tf32-persistent")
    ('cpu', 'cuda-tf32-persistent')
    """
    if name is None:
        return DEFAULT
    if not isinstance(name, str):
        raise TypeError(f"backend is a {type(name).__name__}, expected one of {_names()}")
    base, *options = name.split("-")
    if base not in NAMES or (base != "cuda" and options):
        raise ValueError(f"backend is {name!r}, expected one of {_names()}")
    for known in MODES, WAYS:
        options = [option for option in options if option not in known] + [o for o in options if o in known][1:]
    if options:
        every = ", ".join(f"'-{option}'" for option in (*MODES, *WAYS))
        raise ValueError(f"backend is {name!r}, expected 'cuda', and behind it at most a mode and a way: {every}")
    return name


def load(name: str | None = None) -> Any:
    """Return the backend, a module or an object with the same functions. Raises what `check` raises.

    Examples
    --------
    >>> load("reference").__name__
    'fastrnn.kernels.reference'
    """
    module = _loaded.get(name) if type(name) is str else None
    if module is None:
        name = check(name)
        from fastrnn import kernels

        module = kernels.cuda.backend.backend(name) if name.startswith("cuda") else getattr(kernels, name)
        _loaded[name] = module
    return module


def is_on_gpu(value: Any) -> bool:
    """Whether `value` is an array on an NVIDIA GPU: a tensor of PyTorch, an array of CuPy, JAX or Numba, ...

    Examples
    --------
    >>> import numpy as np
    >>> is_on_gpu(np.zeros(3))
    False
    """
    if type(value).__module__.partition(".")[0] in ("numpy", "builtins") or not hasattr(value, "shape"):
        return False
    from fastrnn.kernels.cuda import arrays

    return arrays.is_on_gpu(value)


def _names() -> str:
    return ", ".join(map(repr, NAMES))
