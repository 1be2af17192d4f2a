"""The backends by name: modules with the same ``forward``, ``backward`` and ``prepare``, imported when first used."""

import importlib
from types import ModuleType

NAMES = ("cpu", "reference", "cuda")
DEFAULT = "cpu"

_loaded: dict[str, ModuleType] = {}  # only modules whose import has ended: sys.modules also holds half-imported ones


def check(name: str | None) -> str:
    """Return the backend's name, the default's for None; nothing is imported.

    Parameters
    ----------
    name : str or None
        "cpu" (the default), "reference" or "cuda".

    Returns
    -------
    str

    Raises
    ------
    TypeError
        If `name` is neither None nor a string.
    ValueError
        If there is no such backend.
    NotImplementedError
        For "cuda", which this version does not have.

    Examples
    --------
    >>> check(None)
    'cpu'
    """
    if name is None:
        return DEFAULT
    if not isinstance(name, str):
        raise TypeError(f"backend is a {type(name).__name__}, expected one of {_names()}")
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}, expected one of {_names()}")
    if name == "cuda":
        raise NotImplementedError("backend 'cuda' is not part of this version of fastrnn: use 'cpu'")
    return name


def load(name: str | None = None) -> ModuleType:
    """Return the backend's module. Raises what `check` raises.

    Examples
    --------
    >>> load("reference").__name__
    'fastrnn.kernels.reference'
    """
    module = _loaded.get(name) if type(name) is str else None
    if module is None:
        name = check(name)
        module = _loaded[name] = importlib.import_module(f"fastrnn.kernels.{name}")
    return module


def _names() -> str:
    return ", ".join(map(repr, NAMES))
