"""What stands around recurrent layers in a model: Embedding, Linear, Dropout, and models made of layers.

Everything here is called as `fastrnn.RNN`, `fastrnn.LSTM` and `fastrnn.GRU` are, so that models hold models::

    output, state = layer(x, state, lengths=lengths, reset=reset)  # inference; layers without a state return None
    output, state, tape = layer.forward(x, state, lengths=lengths, reset=reset)  # training
    gradients = layer.backward(tape, d_output, d_state)  # .x, .state, .params
    y, state = layer.step(x_t, state)  # one step

The batch comes first: x is (B, T, size) for sequences, (B, size) for one vector a row; labels are (B, T) or (B,). In a
model, a recurrent layer may have been made with batch_first or without, and is given what it takes.

>>> import numpy as np
>>> from fastrnn import LSTM
>>> model = Sequential(embedding=Embedding(1000, 64), lstm=LSTM(64, 128), last=Last(), output=Linear(128, 10))
>>> logits, state = model(np.zeros((2, 7), int), lengths=[7, 3])
>>> logits.shape
(2, 10)
"""

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastrnn import functional, layers, losses, weights
from fastrnn.layers import Gradients, LoadedKeys, Recurrent
from fastrnn.losses import by_time, from_rows, rows_of
from fastrnn.optimizers import check_number
from fastrnn.weights import Parameters, Params

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Tape:
    """What `backward` needs of a `forward`. It may be used any number of times, by the layer that made it."""

    layer: Any
    kept: Any
    output: Array | None  # whose shape and dtype the gradient has


class Layer:
    """What Embedding, Linear, Dropout, Activation and Last share: a layer without a state."""

    parameters: Parameters
    output_size: int | None = None  # None: as the input's

    def __call__(self, x: Array, state: None = None, *, lengths: Any = None, reset: Any = None) -> tuple[Array, None]:
        """Return the output, and None for the state. Lengths are for `Last`; a reset does nothing without a state."""
        self._check_no_state(state)
        return self._apply(x, lengths, False)[0], None

    def forward(
        self, x: Array, state: None = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Array, None, Tape]:
        """Do as a call does, for training: dropout acts, and a tape is kept for `backward`."""
        self._check_no_state(state)
        output, kept = self._apply(x, lengths, True)
        return output, None, Tape(self, kept, output)

    def backward(self, tape: Tape, d_output: Array | None = None, d_state: None = None) -> Gradients:
        """Return the gradients of x (None if it is labels) and of every parameter, for that of the output."""
        self._check_no_state(d_state)
        check_tape(self, tape)
        if d_output is None:
            raise ValueError("d_output is None, expected the gradient of the output")
        expected = tape.output
        assert expected is not None
        functional.check_array("d_output", d_output, (expected.dtype,), expected.shape, "the output's shape")
        dx: Any
        dx, params = self._derive(tape.kept, d_output)
        return Gradients(dx, None, params)

    def step(self, x_t: Array, state: None = None) -> tuple[Array, None]:
        """Return the output of one step, x_t (B, size) or (B,) labels."""
        return self(x_t, state)

    def check(self, x: Any) -> None:
        """Raise what a call would raise for x."""
        losses.check_float("x", x)

    def _check_no_state(self, state: Any) -> None:
        if state is not None:
            raise ValueError(f"state is a {type(state).__name__}, expected None: {type(self).__name__} has no state")

    def _apply(self, x: Array, lengths: Any, training: bool) -> tuple[Array, Any]:
        """Return the output and what `_derive` needs."""
        raise NotImplementedError

    def _derive(self, kept: Any, d_output: Array) -> tuple[Array | None, Params]:
        """Return the gradients of x and of the parameters."""
        raise NotImplementedError


class Embedding(Layer):
    """A vector for each label: row `label` of a matrix.

    Parameters
    ----------
    num_labels : int
    size : int
        Of the vectors.
    padding_index : int, optional
        A label whose vector is zero and stays so.
    dtype : numpy.float32 or numpy.float64
    seed : int, optional
        Of the initial vectors, which are normal with variance 1 as PyTorch's.

    Attributes
    ----------
    parameters : dict of str to numpy.ndarray
        ``weight`` (num_labels, size).

    Examples
    --------
    >>> embedding = Embedding(10, 3, padding_index=0)
    >>> vectors, _ = embedding(np.array([[1, 2, 0]]))
    >>> vectors.shape, vectors[0, 2]
    ((1, 3, 3), array([0., 0., 0.], dtype=float32))
    """

    def __init__(
        self,
        num_labels: int,
        size: int,
        padding_index: int | None = None,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        self.num_labels = functional.check_integer("num_labels", num_labels, 1)
        self.output_size = functional.check_integer("size", size, 1)
        dtype = functional.check_dtype(dtype)
        weight = np.random.default_rng(seed).standard_normal((self.num_labels, self.output_size)).astype(dtype)
        self.padding_index = padding_index
        if padding_index is not None:
            self.padding_index = functional.check_integer("padding_index", padding_index, 0)
            if self.padding_index >= self.num_labels:
                raise ValueError(f"padding_index is {padding_index}, expected less than num_labels = {num_labels}")
            weight[self.padding_index] = 0.0
        self.parameters = Parameters({"weight": weight})

    def check(self, x: Any) -> None:
        """Raise what a call would raise for x."""
        losses.check_labels("x", x, self.num_labels)

    def _apply(self, x: Array, lengths: Any, training: bool) -> tuple[Array, Any]:
        labels = losses.check_labels("x", x, self.num_labels)
        swapped = labels.ndim > 1
        labels = labels.swapaxes(0, 1) if swapped else labels
        vectors = self.parameters["weight"][labels]  # of (B, T) labels in memory (T, B, size), as the layers want it
        # A copy: compiled code writes where these labels say, which must stay as they were checked.
        kept = (np.array(labels, np.int64, order="C", subok=False).reshape(-1), swapped) if training else None
        return vectors.swapaxes(0, 1) if swapped else vectors, kept

    def _derive(self, kept: Any, d_output: Array) -> tuple[Array | None, Params]:
        from fastrnn.kernels import train as kernels

        labels, swapped = kept
        total = np.zeros_like(self.parameters["weight"])
        kernels.add_rows(labels, functional.contiguous(rows_of(d_output, swapped)), total)
        if self.padding_index is not None:
            total[self.padding_index] = 0.0
        return None, {"weight": total}

    def __repr__(self) -> str:
        padding = "" if self.padding_index is None else f", padding_index={self.padding_index}"
        return f"Embedding({self.num_labels}, {self.output_size}{padding}{_dtype_shown(self)})"


class Linear(Layer):
    """``y = x W^T + b`` along the last axis.

    Parameters
    ----------
    input_size, size : int
        Of x and of y.
    bias : bool
    dtype : numpy.float32 or numpy.float64
    seed : int, optional
        Of the initial parameters, uniform in ±1/sqrt(input_size) as PyTorch's.

    Attributes
    ----------
    parameters : dict of str to numpy.ndarray
        ``weight`` (size, input_size) and ``bias`` (size,).

    Examples
    --------
    >>> y, _ = Linear(3, 5)(np.zeros((2, 7, 3), np.float32))
    >>> y.shape
    (2, 7, 5)
    """

    def __init__(
        self, input_size: int, size: int, bias: bool = True, *, dtype: Any = np.float32, seed: int | None = None
    ) -> None:
        self.input_size = functional.check_integer("input_size", input_size, 1)
        self.output_size = functional.check_integer("size", size, 1)
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.output_size, self.input_size)}
        if functional.check_flag("bias", bias):
            shapes["bias"] = (self.output_size,)
        random, bound, dtype = np.random.default_rng(seed), self.input_size**-0.5, functional.check_dtype(dtype)
        self.parameters = Parameters(
            {name: random.uniform(-bound, bound, shape).astype(dtype) for name, shape in shapes.items()}
        )

    def check(self, x: Any) -> None:
        """Raise what a call would raise for x."""
        shape = (None,) * (max(np.ndim(x), 2) - 1) + (self.input_size,)
        functional.check_array("x", x, (self.parameters["weight"].dtype,), shape, "(B, ..., input_size)")

    def _apply(self, x: Array, lengths: Any, training: bool) -> tuple[Array, Any]:
        self.check(x)
        swapped = by_time(x)
        rows = rows_of(x, swapped)
        y = rows @ self.parameters["weight"].T
        if "bias" in self.parameters:
            y += self.parameters["bias"]
        return from_rows(y, x.shape[:-1], swapped), (rows, x.shape[:-1], swapped)

    def _derive(self, kept: Any, d_output: Array) -> tuple[Array | None, Params]:
        rows, shape, swapped = kept
        d_rows = rows_of(d_output, swapped)
        params = {"weight": d_rows.T @ rows}
        if "bias" in self.parameters:
            params["bias"] = d_rows.sum(axis=0)
        return from_rows(d_rows @ self.parameters["weight"], shape, swapped), params

    def __repr__(self) -> str:
        bias = "" if "bias" in self.parameters else ", bias=False"
        return f"Linear({self.input_size}, {self.output_size}{bias}{_dtype_shown(self)})"


class Dropout(Layer):
    """In training, set each element to zero with a probability, and scale the others so that the mean stays.

    Parameters
    ----------
    probability : float
        0 to below 1.
    seed : int, optional
        Of the masks.

    Examples
    --------
    >>> y, _, tape = Dropout(0.5, seed=0).forward(np.ones((1, 6), np.float32))
    >>> sorted(set(y[0].tolist()))
    [0.0, 2.0]
    """

    def __init__(self, probability: float, *, seed: int | None = None) -> None:
        self.probability = check_number("probability", probability, 0.0, 1.0, below=True)
        self.parameters = Parameters({})
        self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))

    def _apply(self, x: Array, lengths: Any, training: bool) -> tuple[Array, Any]:
        losses.check_float("x", x)
        if not training or not self.probability:
            return x, None
        swapped = by_time(x)
        shape = x.swapaxes(0, 1).shape if swapped else x.shape
        mask = self._random.random(shape, np.float32) >= self.probability
        mask = mask * x.dtype.type(1.0 / (1.0 - self.probability))
        mask = mask.swapaxes(0, 1) if swapped else mask
        return x * mask, mask

    def _derive(self, kept: Any, d_output: Array) -> tuple[Array | None, Params]:
        return (d_output if kept is None else d_output * kept), {}

    def __repr__(self) -> str:
        return f"Dropout({self.probability})"


class Activation(Layer):
    """A function of the last axis: "relu", "tanh", "sigmoid" or "softmax".

    The cross-entropies of `fastrnn.losses` take logits: a model that is trained with them ends without it.

    Examples
    --------
    >>> y, _ = Activation("relu")(np.array([[-1.0, 2.0]]))
    >>> y
    array([[0., 2.]])
    """

    FUNCTIONS: ClassVar[dict[str, Callable[[Array], Array]]] = {
        "relu": lambda x: np.maximum(x, 0),
        "tanh": np.tanh,
        "sigmoid": losses.sigmoid,
        "softmax": losses.softmax,
    }
    SLOPES: ClassVar[dict[str, Callable[[Array, Array], Array]]] = {  # the gradient of x, by y and d_output
        "relu": lambda y, d: d * (y > 0),
        "tanh": lambda y, d: d * (1 - y * y),
        "sigmoid": lambda y, d: d * y * (1 - y),
        "softmax": lambda y, d: y * (d - (y * d).sum(axis=-1, keepdims=True)),
    }

    def __init__(self, name: str) -> None:
        if name not in self.FUNCTIONS:
            raise ValueError(f"name is {name!r}, expected one of {', '.join(map(repr, self.FUNCTIONS))}")
        self.name = name
        self.parameters = Parameters({})

    def _apply(self, x: Array, lengths: Any, training: bool) -> tuple[Array, Any]:
        y = self.FUNCTIONS[self.name](losses.check_float("x", x))
        return y, y

    def _derive(self, kept: Any, d_output: Array) -> tuple[Array | None, Params]:
        return self.SLOPES[self.name](kept, d_output), {}

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"


class Last(Layer):
    """The output of each row's last step: many to one.

    Parameters
    ----------
    bidirectional : bool
        Of a bidirectional layer's output, take the second half where the reverse direction ends: at the first step.

    Examples
    --------
    >>> y, _ = Last()(np.arange(6.0).reshape(2, 3, 1), lengths=[3, 2])
    >>> y[:, 0]
    array([2., 4.])
    """

    def __init__(self, bidirectional: bool = False) -> None:
        self.bidirectional = functional.check_flag("bidirectional", bidirectional)
        self.parameters = Parameters({})

    def _apply(self, x: Array, lengths: Any, training: bool) -> tuple[Array, Any]:
        functional.check_array("x", x, functional.DTYPES, (None, None, None), "(B, T, size)")
        B, T, size = x.shape
        if T == 0:
            raise ValueError(f"x has shape {x.shape}, expected at least one step")
        steps = functional.check_lengths(np.full(B, T) if lengths is None else lengths, T, B)
        assert steps is not None
        at, empty = np.maximum(steps - 1, 0), steps == 0
        y = x[np.arange(B), at]
        if self.bidirectional:
            y[:, size // 2 :] = x[:, 0, size // 2 :]
        y[empty] = 0.0
        return y, (x.shape, at, empty)

    def _derive(self, kept: Any, d_output: Array) -> tuple[Array | None, Params]:
        (B, T, size), at, empty = kept
        d_output = np.where(empty[:, None], 0, d_output)
        dx = np.zeros((T, B, size), d_output.dtype).swapaxes(0, 1)
        middle = size // 2 if self.bidirectional else size
        dx[np.arange(B), at, :middle] = d_output[:, :middle]
        dx[:, 0, middle:] = d_output[:, middle:]
        return dx, {}

    def step(self, x_t: Array, state: None = None) -> tuple[Array, None]:
        """Return x_t: the step is the last so far."""
        if self.bidirectional:
            raise ValueError("step: Last is bidirectional, expected a model that needs no future input")
        return x_t, None

    def __repr__(self) -> str:
        return f"Last({'bidirectional=True' if self.bidirectional else ''})"


# ---- models


class Model:
    """What Sequential and EncoderDecoder share: named layers, their parameters, which of them are trained, files.

    For a model of your own, pass the layers to ``__init__`` and write ``__call__``, ``forward`` and ``backward`` as
    this module's docstring has them; `fastrnn.train.Trainer` asks for no more.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        if not layers:
            raise ValueError("there are no layers, expected at least one")
        for name, layer in layers.items():
            if not isinstance(layer, (Layer, Recurrent, Model)):
                raise TypeError(f"layer {name!r} is a {type(layer).__name__}, expected a layer or a model")
        self.layers = dict(layers)
        inner = [id(layer) for _, layer in self._walk()]
        if len(set(inner)) < len(inner):
            raise ValueError("a layer occurs twice, expected different ones: their gradients would not be added")
        self._parameters = Parameters(
            {f"{name}.{own}": array for name, layer in layers.items() for own, array in layer.parameters.items()}
        )
        self._frozen: set[str] = set()  # of the layers that are no models, which know their own

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None, reset: Any = None) -> tuple[Array, Any]:
        """Return the output, and the final state."""
        raise NotImplementedError

    def forward(self, x: Any, state: Any = None, *, lengths: Any = None, reset: Any = None) -> tuple[Array, Any, Tape]:
        """Do as a call does, for training: dropout acts, and a tape is kept for `backward`."""
        raise NotImplementedError

    def backward(self, tape: Tape, d_output: Array | None = None, d_state: Any = None) -> Gradients:
        """Return the gradients of x, of the initial state and of every parameter."""
        raise NotImplementedError

    @property
    def parameters(self) -> Parameters:
        """All parameters by name, "layer.parameter": the layers' own arrays, to be modified in place."""
        return self._parameters

    @property
    def trainable(self) -> Params:
        """Those parameters that are not frozen, here or in the model that they belong to."""
        return {
            full: self._parameters[full] for full, (model, name) in self._places().items() if name not in model._frozen
        }

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(array.size for array in self.trainable.values())

    @property
    def output_size(self) -> int | None:
        """The size of the output's last axis, None if only a call tells."""
        return None

    def check(self, x: Any) -> None:
        """Raise what a call would raise for x, where that can be told before."""

    def check_carried(self) -> None:
        """Raise if the final state cannot be the initial one of what comes next."""
        for path, layer in self._walk():
            if isinstance(layer, Recurrent) and layer.bidirectional:
                raise ValueError(
                    f"layer {path!r} is {layer!r}, whose reverse direction begins at the end: no state of it goes on, "
                    "expected neither truncate nor stateful"
                )

    def freeze(self, *names: str) -> None:
        """Train these parameters no more: names of parameters or layers, or patterns such as "*.bias_hh*".

        Examples
        --------
        >>> model = Sequential(embedding=Embedding(10, 4), output=Linear(4, 2))
        >>> model.freeze("embedding")
        >>> list(model.trainable)
        ['output.weight', 'output.bias']
        """
        for model, name in self._find(names):
            model._frozen.add(name)

    def unfreeze(self, *names: str) -> None:
        """Train these parameters again; see `freeze`."""
        for model, name in self._find(names):
            model._frozen.discard(name)

    def _places(self) -> dict[str, tuple["Model", str]]:
        """Return, for each parameter, the model whose layer has it and its name there."""
        places: dict[str, tuple[Model, str]] = {}
        for name, layer in self.layers.items():
            if isinstance(layer, Model):
                places |= {f"{name}.{own}": place for own, place in layer._places().items()}
            else:
                places |= {f"{name}.{own}": (self, f"{name}.{own}") for own in layer.parameters}
        return places

    def _find(self, names: tuple[str, ...]) -> list[tuple["Model", str]]:
        """Return the places of the parameters that each name stands for."""
        places, found = self._places(), []
        for name in names:
            own = [full for full in places if fnmatch.fnmatchcase(full, name) or full.startswith(f"{name}.")]
            if not own:
                raise ValueError(f"no parameter is called {name!r}; there are {', '.join(places)}")
            found += [places[full] for full in own]
        return found

    def single_bias(self) -> None:
        """Make of the two biases of every recurrent layer one that is trained: the other is added to it, and becomes a
        frozen zero.

        The layers compute what they did, by half as many numbers: so does Keras count. A GRU whose reset gate acts
        after the product has two biases of different effect and cannot be had so.

        Raises
        ------
        ValueError
            For such a GRU; nothing is changed.

        Examples
        --------
        >>> from fastrnn import LSTM
        >>> model = Sequential(lstm=LSTM(64, 128))
        >>> before = model.num_parameters
        >>> model.single_bias()
        >>> before, model.num_parameters
        (99328, 98816)
        """
        recurrent = {path: layer for path, layer in self._walk() if isinstance(layer, Recurrent) and layer.bias}
        for path, layer in recurrent.items():
            if layer.cell == "gru":
                raise ValueError(f"layer {path!r} is {layer!r}: one bias for two needs reset_after=False")
        for path, layer in recurrent.items():
            for name, array in layer.parameters.items():
                if name.startswith("bias_hh"):
                    layer.parameters[name.replace("_hh", "_ih")] += array
                    array[...] = 0.0
                    self.freeze(f"{path}.{name}")

    def _walk(self) -> Iterator[tuple[str, Any]]:
        """Yield every layer that is no model, by its full name."""
        for name, layer in self.layers.items():
            if isinstance(layer, Model):
                for own, inner in layer._walk():
                    yield f"{name}.{own}", inner
            else:
                yield name, layer

    def generators(self) -> dict[str, np.random.Generator]:
        """Return the random generators of dropout, by layer."""
        return {path: layer._random for path, layer in self._walk() if hasattr(layer, "_random")}

    def summary(self) -> None:
        """Print the layers, the sizes of their outputs and how many numbers each has.

        Examples
        --------
        >>> from fastrnn import LSTM
        >>> model = Sequential(Embedding(1000, 64), LSTM(64, 128), Last(), Linear(128, 10))
        >>> model.single_bias()
        >>> model.summary()
        layer                   output  trained  frozen
        0  Embedding(1000, 64)      64   64,000       0
        1  LSTM(64, 128)           128   98,816     512
        2  Last()                  128        0       0
        3  Linear(128, 10)          10    1,290       0
        all                             164,106     512
        """
        rows, size = [("layer", "output", "trained", "frozen")], None
        wide = max(len(path) for path, _ in self._walk())
        for path, layer in self._walk():
            size = output_size(layer) or size
            trained, frozen = self._count(f"{path}.")
            rows.append((f"{path:<{wide}}  {layer!r}", str(size or ""), f"{trained:,}", f"{frozen:,}"))
        trained, frozen = self._count("")
        rows.append(("all", "", f"{trained:,}", f"{frozen:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            numbers = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
            print("  ".join((f"{first:<{widths[0]}}", *numbers)).rstrip())

    def _count(self, prefix: str) -> tuple[int, int]:
        """Return how many numbers under a prefix are trained, and frozen."""
        total, trained = (
            sum(array.size for name, array in arrays.items() if name.startswith(prefix))
            for arrays in (self._parameters, self.trainable)
        )
        return trained, total - trained

    def state_dict(self) -> Params:
        """Return a copy of the parameters by name."""
        return {name: array.copy() for name, array in self._parameters.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Copy parameters into the model, rounding them to its dtype.

        Parameters
        ----------
        state_dict : mapping of str to array
        strict : bool
            Whether every name has to be there, and no other.

        Returns
        -------
        LoadedKeys
            ``missing_keys`` and ``unexpected_keys``.

        Raises
        ------
        TypeError, ValueError
            If a shape differs or, if `strict`, a name. The model is as it was then.
        """
        keys = LoadedKeys(*weights.compare_names(state_dict, self._parameters))
        if functional.check_flag("strict", strict) and (keys.missing_keys or keys.unexpected_keys):
            raise weights.names_error("state_dict", *keys)
        self._parameters.update({name: state_dict[name] for name in self._parameters if name in state_dict})
        return keys

    def save(self, path: weights.Path) -> None:
        """Write the parameters to a .npz or .safetensors file, in one step."""
        weights.write(path, self._parameters)

    def load(self, path: weights.Path, strict: bool = True) -> LoadedKeys:
        """Read parameters from a .npz or .safetensors file, which need not be trusted.

        Parameters
        ----------
        path : str or path
            What `save` wrote, of this model or, with ``strict=False``, of one that shares some layers' names: for
            fine-tuning, load what is shared, `freeze` it, and train the rest.
        strict : bool
            As for `load_state_dict`.

        Returns
        -------
        LoadedKeys
            As from `load_state_dict`.

        Raises
        ------
        TypeError, ValueError, OSError
            If the file cannot be read or does not fit the model, which is as it was then.

        Examples
        --------
        >>> import tempfile
        >>> a = Sequential(body=Linear(3, 4), head=Linear(4, 2))
        >>> b = Sequential(body=Linear(3, 4), new_head=Linear(4, 7))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a.save(f"{folder}/a.npz")
        ...     keys = b.load(f"{folder}/a.npz", strict=False)
        >>> keys.missing_keys
        ['new_head.weight', 'new_head.bias']
        """
        strict = functional.check_flag("strict", strict)
        expected = {name: array.shape for name, array in self._parameters.items()}
        missing: list[str] = []
        unexpected: list[str] = []

        def select(meta: Mapping[str, Any], headers: Mapping[str, weights.Header]) -> list[str]:
            missing[:], unexpected[:] = weights.compare_names(headers, expected)
            if strict and (missing or unexpected):
                raise weights.names_error(os.fsdecode(path), missing, unexpected)
            layers._check_shapes(path, headers, expected)
            return [name for name in expected if name in headers]

        arrays, _ = weights.read(path, select)
        self._parameters.update(arrays)
        return LoadedKeys(missing, unexpected)

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={layer!r}" for name, layer in self.layers.items())
        return f"{type(self).__name__}({inner})"


class Sequential(Model):
    """Layers, or models, one after the other.

    Parameters
    ----------
    *layers, **named
        In their order. Those without a name are called "0", "1", ...

    Examples
    --------
    >>> from fastrnn import GRU
    >>> model = Sequential(Embedding(50, 8), GRU(8, 16), Linear(16, 50))
    >>> logits, state = model(np.zeros((2, 7), int))
    >>> logits.shape, [None if part is None else part.shape for part in state]
    ((2, 7, 50), [None, (1, 2, 16), None])
    """

    def __init__(self, *layers: Any, **named: Any) -> None:
        super().__init__({**{str(i): layer for i, layer in enumerate(layers)}, **named})

    @property
    def output_size(self) -> int | None:
        """The size of the output's last axis, None if that is as the input's."""
        sizes = [size for size in map(output_size, self.layers.values()) if size is not None]
        return sizes[-1] if sizes else None

    def check(self, x: Any) -> None:
        """Raise what a call would raise for x, where the first layer can tell."""
        if isinstance(x, (tuple, list)):
            raise TypeError(f"x is a {type(x).__name__}, expected one array")
        name, layer = next(iter(self.layers.items()))
        with _Naming(name, layer):
            if isinstance(layer, Recurrent):
                _check_x(layer, x)
            else:
                layer.check(x)

    def __call__(
        self, x: Array, state: Any = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Array, tuple[Any, ...]]:
        """Run the model over a batch. Dropout does not act here.

        Parameters
        ----------
        x : numpy.ndarray
            (B, T, size), (B, T) labels, or (B, size): what the first layer takes.
        state : tuple, optional
            The initial state of each layer, None for one without or for zeros: what a call before returned.
        lengths : (B,) integers, optional
            How many steps each row has; see `fastrnn.RNN`.
        reset : (B, T) booleans, optional
            Where true, the row's state is zero before that step.

        Returns
        -------
        output : numpy.ndarray
            The last layer's.
        state : tuple
            The final state of each layer.

        Raises
        ------
        TypeError, ValueError
            Of the layer that is given something wrong: the message names it.
        """
        after = []
        for (name, layer), own in zip(self.layers.items(), self._states(state), strict=True):
            with _Naming(name, layer):
                x, new = _run(layer, layer, x, own, lengths, reset)
            after.append(new)
        return x, tuple(after)

    def forward(
        self, x: Array, state: Any = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Array, tuple[Any, ...], Tape]:
        """Do as a call does, for training: dropout acts, and a tape is kept for `backward`."""
        after, tapes = [], []
        for (name, layer), own in zip(self.layers.items(), self._states(state), strict=True):
            with _Naming(name, layer):
                x, new, tape = _run(layer, layer.forward, x, own, lengths, reset)
            after.append(new)
            tapes.append(tape)
        return x, tuple(after), Tape(self, tapes, x)

    def backward(self, tape: Tape, d_output: Array | None = None, d_state: Any = None) -> Gradients:
        """Return the gradients of x, of the initial state and of every parameter.

        Parameters
        ----------
        tape : Tape
            What `forward` returned.
        d_output : numpy.ndarray, optional
            The gradient of the output. Zero by default.
        d_state : tuple, optional
            The gradient of the final state of each layer, None for zero.

        Returns
        -------
        Gradients
            ``.x`` (None for labels), ``.state`` and ``.params``, as `parameters`.
        """
        check_tape(self, tape)
        gradient = d_output
        states: list[Any] = []
        params: Params = {}
        for (name, layer), own, d_own in reversed(
            list(zip(self.layers.items(), tape.kept, self._states(d_state), strict=True))
        ):
            if gradient is None and (d_own is None or isinstance(layer, Layer)):
                found = Gradients(None, None, {n: np.zeros_like(p) for n, p in layer.parameters.items()})  # type: ignore[arg-type]
            else:
                with _Naming(name, layer):
                    found = _run_back(layer, own, gradient, d_own)
            gradient = found.x
            states.append(found.state)
            params |= {f"{name}.{own_name}": array for own_name, array in found.params.items()}
        ordered = {name: params[name] for name in self._parameters}
        return Gradients(gradient, tuple(reversed(states)), ordered)  # type: ignore[arg-type]

    def step(self, x_t: Array, state: Any = None) -> tuple[Array, tuple[Any, ...]]:
        """Run one step; see `fastrnn.RNN.step`.

        Parameters
        ----------
        x_t : numpy.ndarray
            (B, size), or (B,) labels.
        state : tuple, optional
            What the step before returned; zeros by default.

        Returns
        -------
        y : numpy.ndarray
        state : tuple
            For the next step.
        """
        after = []
        for (name, layer), own in zip(self.layers.items(), self._states(state), strict=True):
            with _Naming(name, layer):
                x_t, new = layer.step(x_t, own)
            after.append(new)
        return x_t, tuple(after)

    def _states(self, state: Any) -> tuple[Any, ...]:
        """Return the state of each layer."""
        if state is None:
            return (None,) * len(self.layers)
        if not isinstance(state, (tuple, list)):
            raise TypeError(f"state is a {type(state).__name__}, expected a tuple with an entry for each layer")
        if len(state) != len(self.layers):
            raise ValueError(f"state has {len(state)} entries, expected {len(self.layers)}: one for each layer")
        return tuple(state)


class EncoderDecoder(Model):
    """Two models: the decoder's recurrent layers start from the state in which the encoder's end.

    Its input is a pair (source, target input), and so are lengths: the encoder reads the one, the decoder the other,
    which in training is the target a step late (teacher forcing). The output is the decoder's.

    Source: I. Sutskever et al., Sequence to sequence learning, 2014.

    Parameters
    ----------
    encoder, decoder : Sequential
        With as many recurrent layers each, of the same kind and sizes, in order. If one of the encoder's is
        bidirectional, its two states are put side by side: the decoder's has twice the hidden size.

    Examples
    --------
    >>> from fastrnn import GRU
    >>> encoder = Sequential(Embedding(30, 8), GRU(8, 16, bidirectional=True))
    >>> decoder = Sequential(Embedding(20, 8), GRU(8, 32), Linear(32, 20))
    >>> model = EncoderDecoder(encoder, decoder)
    >>> logits, _ = model((np.zeros((2, 7), int), np.zeros((2, 5), int)), lengths=([7, 3], [5, 2]))
    >>> logits.shape
    (2, 5, 20)
    >>> [len(row) <= 9 for row in model.decode(np.zeros((2, 7), int), start=1, stop=2, limit=9)]
    [True, True]
    """

    def __init__(self, encoder: Sequential, decoder: Sequential) -> None:
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(part, Sequential):
                raise TypeError(f"{name} is a {type(part).__name__}, expected a Sequential")
        super().__init__({"encoder": encoder, "decoder": decoder})
        self.encoder, self.decoder = encoder, decoder
        self._pairs = list(zip(_recurrent(encoder), _recurrent(decoder), strict=False))
        if len(_recurrent(encoder)) != len(_recurrent(decoder)) or not self._pairs:
            counts = f"{len(_recurrent(encoder))} and {len(_recurrent(decoder))}"
            raise ValueError(f"encoder and decoder have {counts} recurrent layers, expected as many, at least one")
        for (_, first), (_, second) in self._pairs:
            given, wanted = _sizes_after_bridge(first, second), _sizes(second)
            if given != wanted:
                raise ValueError(
                    f"the decoder's {second!r} needs a state of {wanted}, the encoder's {first!r} has {given}"
                )

    @property
    def output_size(self) -> int | None:
        """The size of the output's last axis."""
        return self.decoder.output_size

    def check_carried(self) -> None:
        """Raise: what comes next is another pair."""
        raise ValueError(
            "the model is an EncoderDecoder, whose final state is not the next pair's initial one: expected neither "
            "truncate nor stateful"
        )

    def check(self, x: Any) -> None:
        """Raise what a call would raise for x, where the first layers can tell."""
        (source, target), _ = self._split(x, None, None)
        self.encoder.check(source)
        self.decoder.check(target)

    def __call__(
        self, x: Any, state: Any = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Array, tuple[Any, ...]]:
        """Run the model over a batch.

        Parameters
        ----------
        x : tuple of numpy.ndarray
            (source, target input), each with the batch first.
        state : tuple, optional
            Of the encoder.
        lengths : tuple, optional
            Those of the source and those of the target; either may be None.
        reset : None

        Returns
        -------
        output : numpy.ndarray
            (B, T of the target, size)
        state : tuple
            The decoder's final state.
        """
        (source, target), (source_lengths, target_lengths) = self._split(x, lengths, reset)
        _, coded = self.encoder(source, state, lengths=source_lengths)
        return self.decoder(target, self._bridge(coded), lengths=target_lengths)

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Array, tuple[Any, ...], Tape]:
        """Do as a call does, for training: dropout acts, and a tape is kept for `backward`."""
        (source, target), (source_lengths, target_lengths) = self._split(x, lengths, reset)
        _, coded, first = self.encoder.forward(source, state, lengths=source_lengths)
        output, state, second = self.decoder.forward(target, self._bridge(coded), lengths=target_lengths)
        return output, state, Tape(self, (first, second), output)

    def backward(self, tape: Tape, d_output: Array | None = None, d_state: Any = None) -> Gradients:
        """Return the gradients of x (a pair), of the encoder's initial state and of every parameter."""
        check_tape(self, tape)
        first, second = tape.kept
        of_decoder = self.decoder.backward(second, d_output, d_state)
        of_encoder = self.encoder.backward(first, None, self._bridge_back(of_decoder.state))
        params = {f"encoder.{name}": array for name, array in of_encoder.params.items()}
        params |= {f"decoder.{name}": array for name, array in of_decoder.params.items()}
        return Gradients((of_encoder.x, of_decoder.x), of_encoder.state, params)  # type: ignore[arg-type]

    def decode(self, source: Array, *, start: int, stop: int, limit: int, lengths: Any = None) -> list[list[int]]:
        """Let the decoder read its own most probable labels.

        Parameters
        ----------
        source : numpy.ndarray
            As the encoder takes it.
        start : int
            The label that the decoder reads first.
        stop : int
            The label that ends a row.
        limit : int
            After so many labels a row ends anyway.
        lengths : (B,) integers, optional
            Of the source.

        Returns
        -------
        list of list of int
            The labels of each row, without `stop`.
        """
        limit, stop = functional.check_integer("limit", limit, 0), functional.check_integer("stop", stop, 0)
        if self.output_size is not None and stop >= self.output_size:
            raise ValueError(f"stop is {stop}, expected one of the output's {self.output_size} labels")
        _, coded = self.encoder(source, lengths=lengths)
        state: Any = self._bridge(coded)
        label = np.full(len(source), functional.check_integer("start", start, 0))
        found: list[Array] = []
        going = np.ones(len(source), bool)
        while going.any() and len(found) < limit:
            logits, state = self.decoder.step(label, state)
            label = logits.argmax(axis=-1)
            going &= label != stop
            found.append(np.where(going, label, -1))
        rows = np.array(found, int).reshape(len(found), len(source)).T
        return [row[row >= 0].tolist() for row in rows]

    def _split(self, x: Any, lengths: Any, reset: Any) -> tuple[Any, Any]:
        if reset is not None:
            raise ValueError("reset is given, expected None: a row of an encoder and decoder is one pair")
        for name, value in (("x", x), ("lengths", (None, None) if lengths is None else lengths)):
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a pair: the encoder's, the decoder's")
            if len(value) != 2:
                raise ValueError(f"{name} has {len(value)} entries, expected 2: the encoder's and the decoder's")
        if len(x[0]) != len(x[1]):
            raise ValueError(f"x holds batches of {len(x[0])} and {len(x[1])} rows, expected as many")
        return x, (None, None) if lengths is None else lengths

    def _bridge(self, coded: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the decoder's initial state for the encoder's final one."""
        state: list[Any] = [None] * len(self.decoder.layers)
        for (i, first), (j, second) in self._pairs:
            state[j] = _each(coded[i], _side_by_side) if _meet(first, second) else coded[i]
        return tuple(state)

    def _bridge_back(self, d_state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the gradient of the encoder's final state for that of the decoder's initial one."""
        state: list[Any] = [None] * len(self.encoder.layers)
        for (i, first), (j, second) in self._pairs:
            state[i] = _each(d_state[j], _apart) if _meet(first, second) else d_state[j]
        return tuple(state)


# ---- what models share


def output_size(layer: Any) -> int | None:
    """Return the size of the last axis of a layer's output, None if it is as the input's."""
    if isinstance(layer, Recurrent):
        return layer._spec.directions * layer._spec.output_size
    size: int | None = layer.output_size
    return size


def _dtype_shown(layer: Layer) -> str:
    """What a layer's repr says of its dtype."""
    name = layer.parameters["weight"].dtype.name
    return "" if name == "float32" else f", dtype={name!r}"


def check_tape(layer: Any, tape: Any) -> None:
    """Check that a tape is what this layer's forward returned."""
    if not isinstance(tape, Tape):
        raise TypeError(f"tape is a {type(tape).__name__}, expected what this layer's forward returned")
    if tape.layer is not layer:
        raise ValueError(f"tape is of another layer, {tape.layer!r}, expected one of this {layer!r}")


class _Naming:
    """Lets the message of an error begin with the layer's name. A step of a model is too short for contextlib."""

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (TypeError, ValueError)):
            raise type(error)(f"layer {self.name!r}, {self.layer!r}: {error}") from error


def _check_x(layer: Recurrent, x: Any) -> None:
    functional.check_array("x", x, (layer.dtype,), (None, None, layer.input_size), "(B, T, input_size)")


def _run(layer: Any, call: Any, x: Array, state: Any, lengths: Any, reset: Any) -> Any:
    """Call a layer, or its forward, with x (B, T, ...)."""
    if not isinstance(layer, Recurrent):
        return call(x, state, lengths=lengths, reset=reset)
    _check_x(layer, x)
    if layer.batch_first:
        return call(x, state, lengths=lengths, reset=reset)
    if reset is not None:
        reset = np.asarray(functional.check_reset(reset, x.shape[:2], "(B, T)")).swapaxes(0, 1)
    output, *others = call(x.swapaxes(0, 1), state, lengths=lengths, reset=reset)
    return output.swapaxes(0, 1), *others


def _run_back(layer: Any, tape: Any, d_output: Array | None, d_state: Any) -> Gradients:
    """Call a layer's backward with d_output (B, T, ...)."""
    if not isinstance(layer, Recurrent) or layer.batch_first:
        return layer.backward(tape, d_output, d_state)
    found = layer.backward(tape, None if d_output is None else d_output.swapaxes(0, 1), d_state)
    return Gradients(found.x.swapaxes(0, 1), found.state, found.params)


def _recurrent(model: Sequential) -> list[tuple[int, Recurrent]]:
    return [(i, layer) for i, layer in enumerate(model.layers.values()) if isinstance(layer, Recurrent)]


def _sizes(layer: Recurrent) -> tuple[tuple[int, int], ...]:
    """The shapes of a layer's state, without the batch."""
    return tuple((layer.num_layers * layer._spec.directions, size) for size in layer._spec.state_sizes)


def _meet(first: Recurrent, second: Recurrent) -> bool:
    """Whether two directions of the encoder's layer become one of the decoder's."""
    return first.bidirectional and not second.bidirectional


def _sizes_after_bridge(first: Recurrent, second: Recurrent) -> tuple[tuple[int, int], ...]:
    return tuple((K // 2, 2 * size) if _meet(first, second) else (K, size) for K, size in _sizes(first))


def _side_by_side(array: Array) -> Array:
    """(2·L, B, H) as (L, B, 2·H)."""
    K, B, H = array.shape
    return array.reshape(K // 2, 2, B, H).swapaxes(1, 2).reshape(K // 2, B, 2 * H)


def _apart(array: Array) -> Array:
    """(L, B, 2·H) as (2·L, B, H)."""
    L, B, H = array.shape
    return array.reshape(L, B, 2, H // 2).swapaxes(1, 2).reshape(2 * L, B, H // 2)


def _each(state: Any, function: Any) -> Any:
    """Apply a function to h, or to h and c."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


# ---- generation


def generate(
    model: Any,
    prompt: Any,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> Array:
    """Let a model of labels go on: draw a label from its output, give it that label, and so on.

    Parameters
    ----------
    model : Sequential
        Of labels, each step's output being the logits of the next label.
    prompt : (P,) or (B, P) integers
        What it reads before; at least one label.
    length : int
        How many labels to draw.
    temperature : float
        What the logits are divided by: below 1 for what is probable, 0 for the most probable alone.
    top_k : int, optional
        Draw from so many most probable labels only.
    seed : int, optional

    Returns
    -------
    numpy.ndarray
        (length,), or (B, length): what was drawn, without the prompt.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or value.

    Examples
    --------
    >>> from fastrnn import GRU
    >>> model = Sequential(Embedding(50, 8), GRU(8, 16), Linear(16, 50))
    >>> generate(model, [1, 2, 3], 5, temperature=0.8, top_k=10, seed=0).shape
    (5,)
    """
    if not hasattr(model, "step"):
        raise TypeError(f"model is a {type(model).__name__}, expected a Sequential: an EncoderDecoder has decode")
    prompt = np.asarray(prompt)
    if prompt.dtype.kind not in "iu" or prompt.ndim not in (1, 2) or not prompt.size:
        raise ValueError(f"prompt is {prompt.dtype} {prompt.shape}, expected integers (P,) or (B, P), at least one")
    length = functional.check_integer("length", length, 0)
    temperature = check_number("temperature", temperature, 0.0)
    top_k = None if top_k is None else functional.check_integer("top_k", top_k, 1)
    random = np.random.default_rng(seed)
    rows = np.atleast_2d(prompt)
    state = None
    for t in range(rows.shape[1]):
        logits, state = model.step(rows[:, t], state)
    drawn = np.empty((len(rows), length), np.int64)
    for i in range(length):
        drawn[:, i] = _draw(logits, temperature, top_k, random)
        if i + 1 < length:
            logits, state = model.step(drawn[:, i], state)
    return drawn if prompt.ndim == 2 else drawn[0]


def _draw(logits: Array, temperature: float, top_k: int | None, random: np.random.Generator) -> Array:
    """Draw a label for each row of logits (B, K)."""
    logits = logits.astype(float)
    if temperature == 0.0:
        return logits.argmax(axis=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        others = np.argpartition(logits, -top_k, axis=-1)[:, :-top_k]
        np.put_along_axis(logits, others, -np.inf, axis=-1)
    logits -= logits.max(axis=-1, keepdims=True)
    # A temperature that is smaller still changes nothing, and overflows.
    sums = np.exp(logits / max(temperature, 1e-30)).cumsum(axis=-1)
    return (sums <= random.random((len(sums), 1)) * sums[:, -1:]).sum(axis=-1)


def gradient_norms(layer: Recurrent, x: Array, d_output: Array | None = None, d_state: Any = None) -> Array:
    """Return how large the gradient of a loss is with respect to the state after each step.

    So one sees gradients vanish or explode on the way back through time. The state is what a step hands to the next: h,
    or h and c together.

    Parameters
    ----------
    layer : RNN, LSTM or GRU
        Not bidirectional.
    x : numpy.ndarray
        (B, T, input_size)
    d_output : numpy.ndarray, optional
        (B, T, size), the gradient of the output.
    d_state : optional
        That of the final state.

    Returns
    -------
    numpy.ndarray
        (T+1,): the Euclidean norm after t steps, from the initial state to the final one.

    Raises
    ------
    ValueError
        If the layer is bidirectional, or there is no gradient.

    Examples
    --------
    >>> from fastrnn import RNN
    >>> rnn = RNN(3, 5, seed=0)
    >>> x = np.zeros((2, 50, 3), np.float32)
    >>> _, h = rnn(x.swapaxes(0, 1))
    >>> norms = gradient_norms(rnn, x, d_state=np.ones_like(h))
    >>> norms.shape, bool(norms[0] < 1e-3 * norms[-1])
    ((51,), True)
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer is a {type(layer).__name__}, expected an RNN, LSTM or GRU")
    if layer.bidirectional:
        raise ValueError("layer is bidirectional, expected one direction: the other has its states in another order")
    _check_x(layer, x)
    functional.check_any_gradient(d_output, d_state if isinstance(d_state, tuple | None) else (d_state,))
    if d_output is not None:
        functional.check_array("d_output", d_output, (layer.dtype,), (*x.shape[:2], output_size(layer)), "(B, T, size)")
    given = layer._check_state("d_state", d_state, len(x), True, optional=True)
    shapes = [(layer.num_layers, len(x), size) for size in layer._spec.state_sizes]
    d = [np.zeros(shape, layer.dtype) if own is None else own.copy() for own, shape in zip(given, shapes, strict=True)]
    state, tapes = None, []
    for t in range(x.shape[1]):
        _, state, tape = _run(layer, layer.forward, x[:, t : t + 1], state, None, None)
        tapes.append(tape)
    norms = []
    for t in reversed(range(len(tapes))):
        if d_output is not None:
            d[0][-1] += d_output[:, t]  # a step's output is the last layer's h
        norms.append(_norm(d))
        back = layer.backward(tapes[t], d_state=tuple(d) if len(d) == 2 else d[0]).state
        d = list(back) if len(d) == 2 else [back]
    return np.array([_norm(d), *norms[::-1]])


def _norm(arrays: list[Array]) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=float).sum() for array in arrays)))
