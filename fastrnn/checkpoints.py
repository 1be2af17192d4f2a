"""What a checkpoint of `fastrnn.train.Trainer` holds: one schema, for what is written and for what is read.

A checkpoint is arrays, and what JSON can hold beside them. `check` looks at the latter and at the arrays' names, shapes
and dtypes, before any array is read; `check_values` at the few arrays whose numbers count or index something. What both
let through can be taken without another question.

=============================  ===============================================================================
``model/`` + parameter         all of them
``optimizer/`` + slot + name   of the parameters that had updates
``best/`` + parameter          all or, before there is a best epoch, none
``random/`` + layer            the state of its generator, 32 bits in each number
``updates``                    of each parameter
``history/`` + key             rows (epoch, value)
``state/`` + number            the arrays of the state that is carried on, of which ``state`` gives the structure
=============================  ===============================================================================
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fastrnn import weights
from fastrnn.layers import Recurrent
from fastrnn.models import Model, Sequential
from fastrnn.weights import Header, Params

Array = np.ndarray
Check = Callable[[str, Any], None]

FORMAT = 1
_MOST = 2**53  # what floats can count, too
_DEEPEST = 50  # models in models
_FLOAT = np.dtype(float)


def check(trainer: Any, meta: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Raise ValueError if that is no checkpoint of such a trainer."""
    if not weights.same(meta.get("checkpoint"), FORMAT):
        raise ValueError(f"it is no checkpoint of format {FORMAT}: a model's weights are read by model.load")
    for name in (*_SCHEMA, "model", "optimizer"):
        if name not in meta:
            raise ValueError(f"it has no {name!r}")
    described, optimizer = describe(trainer.model), type(trainer.optimizer).__name__
    if not weights.same(meta["model"], described):
        raise ValueError(f"it is of another model, {str(meta['model'])[:4000]}, expected {described}")
    if not weights.same(meta["optimizer"], optimizer):
        raise ValueError(f"it is of the optimiser {str(meta['optimizer'])[:80]}, expected {optimizer}")
    _record(_SCHEMA | {"checkpoint": _any, "model": _any, "optimizer": _any})("meta", meta)
    if meta["best"] is not None and meta["best"]["epoch"] > meta["epoch"]:
        raise ValueError(f"its best epoch is {meta['best']['epoch']} of {meta['epoch']}")
    expected = _expected(trainer, meta, headers)
    _check_arrays(trainer, headers, expected)


def check_values(meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Raise ValueError if numbers of a checkpoint that `check` let through are not what they have to be."""
    _check_whole("updates", arrays["updates"], _MOST)
    seen: set[int] = set()
    for name, array in arrays.items():
        if name.startswith("random/"):
            _check_whole(name, array, 2**32 - 1)
            if array[4] % 2 != 1 or array[8] > 1:  # PCG64 has an odd increment
                raise ValueError(f"its {name} is no state of a random generator")
        if name.startswith("history/"):
            epochs = array[:, 0]
            _check_whole(name, epochs, meta["epoch"] - 1)
            if not (np.diff(epochs) > 0).all():
                raise ValueError(f"its {name} has epochs that do not grow")
            seen.update(map(int, epochs))
    if len(seen) != meta["epoch"]:
        raise ValueError(f"its epoch is {meta['epoch']}, and its history has {len(seen)}: expected an entry for each")


def describe(model: Model) -> str:
    """Return the model's architecture as a text that a file's header can hold."""
    text = repr(model)
    return text if len(text) < 4000 else f"{text[:1000]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()})"


# ---- what JSON holds


def _any(name: str, value: Any) -> None:
    """Let everything through."""


def _integer(low: int, high: int | None = _MOST) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or value < low or (high is not None and value > high):
            limits = f"of {low} or more" if high is None else f"from {low} to {high}"
            raise ValueError(f"its {name} is {_shown(value)}, expected an integer {limits}")

    return check


def _number(finite: bool) -> Check:
    def check(name: str, value: Any) -> None:
        known = type(value) in (int, float) and abs(value) <= (_LARGEST if finite else math.inf)  # NaN is not
        if not known or (type(value) is int and abs(value) > _LARGEST):
            raise ValueError(f"its {name} is {_shown(value)}, expected a {'finite ' * finite}number")

    return check


_LARGEST = float(np.finfo(float).max)


def _of_type(kind: type, what: str) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not kind:
            raise ValueError(f"its {name} is {_shown(value)}, expected {what}")

    return check


def _or(other: Any, otherwise: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if not weights.same(value, other):
            otherwise(name, value)

    return check


def _several(count: int, one: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not list or len(value) != count:
            raise ValueError(f"its {name} is {_shown(value)}, expected {count} numbers")
        for i, part in enumerate(value):
            one(f"{name}[{i}]", part)

    return check


def _record(fields: Mapping[str, Check]) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, Mapping) or set(value) != set(fields):
            given = list(value) if isinstance(value, Mapping) else value
            raise ValueError(f"its {name} has {_shown(given)}, expected {', '.join(fields)}")
        for key, own in fields.items():
            own(key if name == "meta" else f"{name}[{key!r}]", value[key])

    return check


_PLAN = {
    "examples": _integer(1),
    "batch_size": _integer(1),
    "shuffle": _of_type(bool, "True or False"),
    "truncate": _or(None, _integer(1)),
    "stateful": _of_type(bool, "True or False"),
}
_BEST = {"epoch": _integer(1), "monitor": _of_type(str, "a name"), "value": _number(finite=False)}
_SCHEMA: dict[str, Check] = {
    "steps": _integer(0),
    "schedule": _of_type(dict, "a mapping"),  # which it takes itself, and before all else
    "seed": _integer(0, None),
    "epoch": _integer(0),
    "position": _integer(0),
    "sums": _several(3, _number(finite=True)),
    "plan": _or({}, _record(_PLAN)),
    "state": _any,  # by the model
    "best": _or(None, _record(_BEST)),
}


def _shown(value: Any) -> str:
    return weights._some([value])


# ---- arrays


def _expected(trainer: Any, meta: Mapping[str, Any], headers: Mapping[str, Header]) -> dict[str, Header]:
    """Return the headers of all arrays that may be there."""
    like = {name: Header(array.shape, array.dtype) for name, array in trainer.model.parameters.items()}
    groups = ["model", *(["best"] if meta["best"] is not None else [])]
    groups += [f"optimizer/{slot}" for slot in trainer.optimizer.slots]
    expected = {f"{group}/{name}": header for group in groups for name, header in like.items()}
    expected |= {f"random/{path}": Header((RANDOM_WORDS,), _FLOAT) for path in trainer.model.generators()}
    expected["updates"] = Header((len(like),), _FLOAT)
    for name, header in headers.items():
        if name.startswith("history/"):
            rows = min(max(header.shape[0], 1), meta["epoch"]) if header.shape else 1
            expected[name] = Header((rows, 2), _FLOAT)
    rows = meta["plan"].get("batch_size", _MOST)
    states = list(_state_arrays("state", meta["state"], trainer.model, headers, rows))
    if [name for name, _ in states] != [f"state/{i}" for i in range(len(states))]:
        raise ValueError(f"its state names {_shown([name for name, _ in states])}, expected state/0 and so on")
    return expected | dict(states)


def _check_arrays(trainer: Any, headers: Mapping[str, Header], expected: Mapping[str, Header]) -> None:
    for group in ("model/", "best/"):
        names, wanted = ([name for name in one if name.startswith(group)] for one in (headers, expected))
        if set(names) != set(wanted):
            raise ValueError(f"its parameters are {weights._some(names)}, expected {weights._some(wanted)}")
    for full, header in headers.items():
        if full not in expected:
            raise ValueError(_unexpected(trainer, full))
        if header != expected[full]:
            (shape, dtype), (given, kind) = expected[full], header
            raise ValueError(f"its {_shown(full)[1:-1]} is {kind} {given}, expected {dtype} {shape}")
    missing = [name for name in expected if name not in headers and not name.startswith("optimizer/")]
    if missing:
        raise ValueError(f"it has no {weights._some(missing)}")


def _unexpected(trainer: Any, full: str) -> str:
    """Return what to say of an array that is not expected."""
    group, _, name = full.partition("/")
    if group == "optimizer":
        slot, _, name = name.partition("/")
        wrong = name if slot in trainer.optimizer.slots else slot
        return f"its optimiser remembers {_shown(wrong)}, expected {list(trainer.optimizer.slots)}"
    if group == "random":
        return "its random generators are those of other layers"
    return f"it has an array {_shown(full)}, which no checkpoint of such a trainer has"


def _state_arrays(
    name: str, state: Any, layer: Any, headers: Mapping[str, Header], rows: int, depth: int = 0
) -> Iterator[tuple[str, Header]]:
    """Yield the arrays of a layer's state, or of a model's, which may be None, with the headers that they must have."""
    if state is None:
        return
    if isinstance(layer, Recurrent):
        spec = layer._spec
        parts = state if len(spec.state_sizes) == 2 else [state]
        if (
            type(parts) is not list
            or len(parts) != len(spec.state_sizes)
            or any(type(part) is not str for part in parts)
        ):
            raise ValueError(f"its {name} is {_shown(state)}, expected that of {layer!r}")
        for part, size in zip(parts, spec.state_sizes, strict=True):
            given = headers[part].shape if part in headers else ()
            B = given[1] if len(given) == 3 and 1 <= given[1] <= rows else "B"
            yield part, Header((spec.num_layers * spec.directions, B, size), layer.dtype)  # type: ignore[arg-type]
    elif isinstance(layer, Sequential) or (isinstance(layer, Model) and type(state) is list):
        own = list(layer.layers.values()) if isinstance(layer, Sequential) else [layer] * len(state)
        if type(state) is not list or len(state) != len(own) or depth > _DEEPEST:
            raise ValueError(f"its {name} is {_shown(state)}, expected that of {len(own)} layers")
        for i, (part, inner) in enumerate(zip(state, own, strict=True)):
            yield from _state_arrays(f"{name}[{i}]", part, inner, headers, rows, depth + 1)
    elif isinstance(layer, Model) and type(state) is str and state in headers:
        yield state, headers[state]  # of a model of one's own, which knows what it is
    else:
        raise ValueError(f"its {name} is {_shown(state)}, expected None: {layer!r} has no such state")


def _check_whole(name: str, array: Array, most: int) -> None:
    if not ((array >= 0) & (array <= most) & (array == np.floor(array))).all():  # NaN is not
        raise ValueError(f"its {name} has other numbers than integers from 0 to {most}")


# ---- parts that are packed


RANDOM_WORDS = 10


def random_words(random: np.random.Generator) -> Array:
    """Return a generator's state as floats, which hold 32 bits of it each: files have floats alone."""
    state: Any = random.bit_generator.state
    numbers = state["state"]["state"], state["state"]["inc"]
    words = [number >> 32 * i & 0xFFFFFFFF for number in numbers for i in range(4)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], float)


def random_state(words: Array) -> dict[str, Any]:
    """Return the state that `random_words` was given."""
    state, inc = (sum(int(word) << 32 * i for i, word in enumerate(words[at : at + 4])) for at in (0, 4))
    has, left = map(int, words[8:])
    return {"bit_generator": "PCG64", "state": {"state": state, "inc": inc}, "has_uint32": has, "uinteger": left}


def pack(state: Any, arrays: Params) -> Any:
    """Put the arrays of a nested state into `arrays` (is modified); return its structure."""
    if isinstance(state, (tuple, list)):
        return [pack(part, arrays) for part in state]
    if state is None:
        return None
    name = f"state/{sum(key.startswith('state/') for key in arrays)}"
    arrays[name] = state
    return name


def unpack(structure: Any, arrays: Mapping[str, Array]) -> Any:
    """Return the state that `pack` was given."""
    if isinstance(structure, list):
        return tuple(unpack(part, arrays) for part in structure)
    return None if structure is None else arrays[structure].copy()
