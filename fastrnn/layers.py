"""The layers RNN, LSTM and GRU: parameters, stacks and directions, and ``batch_first``, which is known here alone."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from fastrnn import backend as backends
from fastrnn import functional, weights
from fastrnn.weights import GATES, Architecture, Parameters, Params

Array = np.ndarray
LayerState = Any  # h, or (h, c) for the LSTM: a type checker cannot tell which from the base class

FORMAT = 1  # of the architecture that save() writes into a file


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of one `backward`.

    Attributes
    ----------
    x : numpy.ndarray
        As the layer's x.
    state : numpy.ndarray or tuple
        The gradient of the initial state, as the layer's state: h, or (h, c).
    params : dict of str to numpy.ndarray
        As the layer's ``parameters``, under the same names.
    """

    x: Array
    state: LayerState
    params: Params


@dataclass(frozen=True, eq=False)
class Tape:
    """What `backward` needs of a `forward`. It may be used any number of times, by the layer that made it.

    It refers to what forward was given, what it returned and the layer's parameters, and copies none of them: backward
    has to see them as forward left them.
    """

    layer: "Recurrent"
    backend: Any
    tapes: list[Any]
    masks: list[Array]  # of the dropout before layer 1, 2, ...; empty without dropout
    T: int
    B: int
    batched: bool
    stack: Any = None  # where the backend runs all layers at once, what it keeps of them; `tapes` is its tape then
    like: Any = None  # an array on a GPU, in whose kind gradients are given


class LoadedKeys(NamedTuple):
    """What `load_state_dict` did not find in a state dict, and what it found beyond the layer's names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Recurrent:
    """What RNN, LSTM and GRU share: all but their arguments and formulas."""

    cell = property(attrgetter("_spec.cell"), doc="The cell's name in `fastrnn.functional`.")
    input_size = property(attrgetter("_spec.input_size"))
    hidden_size = property(attrgetter("_spec.hidden_size"))
    num_layers = property(attrgetter("_spec.num_layers"))
    bias = property(attrgetter("_spec.bias"))
    bidirectional = property(attrgetter("_spec.bidirectional"))
    batch_first = property(attrgetter("_batch_first"))
    dropout = property(attrgetter("_dropout"))
    dtype = property(attrgetter("_dtype"))
    backend = property(attrgetter("_backend"))
    parameters = property(attrgetter("_parameters"), doc="The parameters by name; see `fastrnn.weights.Parameters`.")

    def __init__(
        self, *, seed: int | None, recurrent_init: str, forget_bias: float | None = None, **options: Any
    ) -> None:
        self._configure(**options)
        seed = None if seed is None else functional.check_integer("seed", seed, 0)
        if recurrent_init not in ("uniform", "orthogonal"):
            raise ValueError(f"recurrent_init is {recurrent_init!r}, expected 'uniform' or 'orthogonal'")
        if forget_bias is not None:
            forget_bias = _check_number("forget_bias", forget_bias)
            if not self._spec.bias:
                raise ValueError(f"forget_bias is {forget_bias} with bias=False, expected None")
        self._check_memory()
        self._start(_initial(self._spec, self._dtype, seed, recurrent_init, forget_bias), seed)
        if self._dropout and self._spec.num_layers == 1:
            message = f"dropout is {self._dropout}, which does nothing with num_layers=1: it acts between layers"
            warnings.warn(message, stacklevel=3)

    def _configure(
        self,
        *,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int = 0,
        dtype: Any,
        backend: str | None,
    ) -> None:
        """Check and keep what does not depend on the parameters' values."""
        H = functional.check_integer("hidden_size", hidden_size, 1)
        P = functional.check_integer("proj_size", proj_size, 0)
        if P >= H:
            raise ValueError(f"proj_size is {P}, expected less than hidden_size = {H}, or 0 for no projection")
        self._spec = Architecture(
            cell=cell,
            input_size=functional.check_integer("input_size", input_size, 1),
            hidden_size=H,
            num_layers=functional.check_integer("num_layers", num_layers, 1),
            bias=functional.check_flag("bias", bias),
            bidirectional=functional.check_flag("bidirectional", bidirectional),
            proj_size=P,
        )
        self._batch_first = functional.check_flag("batch_first", batch_first)
        self._dropout = _check_number("dropout", dropout)
        if not 0.0 <= self._dropout < 1.0:
            raise ValueError(f"dropout is {self._dropout}, expected a probability of at least 0 and less than 1")
        self._dtype = functional.check_dtype(dtype)
        self._backend = backends.check(backend)

    def _check_memory(self) -> None:
        spec = self._spec
        size = spec.num_parameters * self._dtype.itemsize + spec.num_arrays * 256  # an array object and its name
        sizes = f"input_size {spec.input_size}, hidden_size {spec.hidden_size} and num_layers {spec.num_layers}"
        functional.check_memory(size, f"{type(self).__name__} with {sizes}")

    def _start(self, parameters: Params, seed: int | None) -> None:
        self._parameters = Parameters(parameters)
        self._parts = self._spec.split(self._parameters)
        self._prepared: list[Any] | None = None
        self._stack: Any = None
        # A stream of its own: how many numbers the initial parameters took does not change the masks.
        self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_parts", "_prepared", "_stack")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parts = self._spec.split(self._parameters)
        self._prepared = self._stack = None

    def _prepare(self) -> list[Any]:
        """Return each layer's directions in the backend's hands, which may keep what it makes of the parameters."""
        prepare = backends.load(self._backend).prepare
        self._prepared = [prepare(self._spec.cell, part) for part in self._parts]
        return self._prepared

    def __call__(
        self, x: Array, state: LayerState = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Array, LayerState]:
        """Run the layer over a batch of sequences. Dropout does not act here.

        Parameters
        ----------
        x : numpy.ndarray
            (T, B, input_size); (B, T, input_size) with batch_first; (T, input_size) for one sequence without a batch.
            Of the layer's dtype, with any strides; never written. With a backend "cuda", it may also be an array on a
            GPU, of PyTorch, CuPy, JAX or Numba, C-contiguous: `state` is then there, too, and so are the results.
        state : numpy.ndarray or tuple, optional
            The initial h, or (h, c) for the LSTM, zeros by default: each (num_layers · D, B, size), without B if x is
            without. D is 2 for a bidirectional layer, else 1; index layer · D + direction.
        lengths : (B,) integers, optional
            How many steps each row has, 0 to T, in any order; an integer if x is without B. The output is 0 beyond
            them, the final state is that of the row's last step, and the reverse direction starts there.
        reset : booleans, optional
            (T, B); (B, T) with batch_first; (T,) if x is without B. Where true, the row's state is zero before that
            step, in all layers and directions.

        Returns
        -------
        output : numpy.ndarray
            As x, but with D · h's size in place of input_size: the last layer's h of every step.
        state : numpy.ndarray or tuple
            The final state, as the initial.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind or dtype.
        ValueError
            If a shape or a value is wrong.
        MemoryError
            If the result cannot fit into this machine's memory. All of them before anything is computed.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrnn import GRU
        >>> gru = GRU(3, 5, num_layers=2, bidirectional=True)
        >>> output, h = gru(np.zeros((7, 4, 3), np.float32), lengths=[7, 2, 0, 5])
        >>> output.shape, h.shape
        ((7, 4, 10), (4, 4, 5))
        """
        if lengths is None and reset is None and type(x) is Array and x.ndim == 3 and not self._batch_first:
            T, B, I = x.shape
            result = self._again(x.reshape(T * B, I), T, state)
            if result is not None:
                return result[0].reshape(T, B, self._spec.output_size), result[1]  # a batch of 0, too
        output, state, _ = self._run(x, state, lengths, reset, training=False)
        return output, state

    def forward(
        self,
        x: Array,
        state: LayerState = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        recompute: bool = False,
    ) -> tuple[Array, LayerState, Tape]:
        """Run the layer as a call does, for training: dropout acts, and a tape is kept for `backward`.

        Every call draws new dropout masks; the layers made with one seed draw the same ones, call by call.

        Parameters
        ----------
        x, state, lengths, reset
            As for a call of the layer.
        recompute : bool
            Keep no activations but the layers' outputs and a state now and then, and let `backward` run the forward
            pass again, piece by piece: the same gradients, to the last bit, for less memory and more time.

        Returns
        -------
        output, state
            As from a call of the layer.
        tape : Tape
            It refers to x, state, output and the parameters: until `backward` has been called, leave them as they are.

        Raises
        ------
        TypeError, ValueError, MemoryError
            As a call of the layer.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrnn import LSTM
        >>> lstm = LSTM(3, 5)
        >>> output, state, tape = lstm.forward(np.zeros((7, 4, 3), np.float32))
        >>> gradients = lstm.backward(tape, d_output=np.ones_like(output))
        >>> gradients.x.shape, gradients.params["weight_hh_l0"].shape
        ((7, 4, 3), (20, 5))
        """
        return self._run(x, state, lengths, reset, training=True, recompute=recompute)

    def backward(self, tape: Tape, d_output: Array | None = None, d_state: LayerState = None) -> Gradients:
        """Return the gradients of x, of the initial state and of every parameter.

        Parameters
        ----------
        tape : Tape
            What this layer's `forward` returned.
        d_output : numpy.ndarray, optional
            The gradient of the output, of its shape. Zero by default.
        d_state : numpy.ndarray or tuple, optional
            The gradient of the final state, of its structure; in a tuple an entry may be None. Zero by default.

        Returns
        -------
        Gradients
            ``.x``, ``.state`` and ``.params``. New arrays at every call: nothing accumulates. Where x was on a GPU, the
            gradients of x and of the state are there, and those of the parameters are NumPy arrays as these are.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind or dtype.
        ValueError
            If the tape is another layer's, a shape is wrong, or there is no gradient at all.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrnn import GRU
        >>> gru = GRU(3, 5)
        >>> output, h, tape = gru.forward(np.zeros((7, 4, 3), np.float32))
        >>> gradients = gru.backward(tape, d_state=np.ones_like(h))
        >>> gradients.state.shape
        (1, 4, 5)
        """
        if not isinstance(tape, Tape):
            raise TypeError(f"tape is a {type(tape).__name__}, expected what this layer's forward returned")
        if tape.layer._parameters is not self._parameters:
            raise ValueError(f"tape is of another layer, {tape.layer!r}, expected one of this {self!r}")
        spec, D, W = self._spec, self._spec.directions, self._spec.output_size
        if tape.like is not None:
            d_output, d_state = self._take_gradients_from_gpu(tape, d_output, d_state)
        d_h = self._check_state("d_state", d_state, tape.B, tape.batched, optional=True)
        functional.check_any_gradient(d_output, d_h)
        gradient: Any = None if d_output is None else self._check_d_output(d_output, tape)
        if tape.stack is not None:
            return self._backward_stack(tape, gradient, d_h)

        parts: list[Params] = [{}] * (spec.num_layers * D)
        d_initial: list[Any] = [None] * (spec.num_layers * D)
        for layer in reversed(range(spec.num_layers)):
            dx = None
            for d in range(D):
                k = layer * D + d
                columns = gradient if D == 1 or gradient is None else gradient[..., d * W : (d + 1) * W]
                own = tuple(None if array is None else array[k] for array in d_h)
                dx_d, parts[k], d_initial[k] = tape.backend.backward(
                    tape.tapes[k],
                    None if columns is None else np.ascontiguousarray(columns),
                    None if all(array is None for array in own) else own,
                )
                dx = dx_d if dx is None else np.add(dx, dx_d, out=dx)
            if layer and tape.masks:
                dx *= tape.masks[layer - 1]
            gradient = dx
        return Gradients(self._give(gradient, tape.batched), self._join(d_initial, tape.batched), spec.join(parts))

    def step(self, x_t: Array, state: LayerState = None) -> tuple[Array, LayerState]:
        """Run one step, for input that arrives step by step. Its results have the bits of a call with all steps.

        Parameters
        ----------
        x_t : numpy.ndarray
            (B, input_size), or (input_size,) for one sequence without a batch; whatever batch_first is.
        state : numpy.ndarray or tuple, optional
            What the step before returned; zeros by default. As for a call of the layer.

        Returns
        -------
        y : numpy.ndarray
            (B, size of h), without B if x_t is without: the last layer's h.
        state : numpy.ndarray or tuple
            For the next step. New arrays: the one given is not written.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind or dtype.
        ValueError
            If a shape is wrong, or the layer is bidirectional: its other half would need the future.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrnn import GRU
        >>> gru, state = GRU(3, 5), None
        >>> for x_t in np.zeros((7, 3), np.float32):
        ...     y, state = gru.step(x_t, state)
        >>> y.shape, state.shape
        ((5,), (1, 5))
        """
        if type(x_t) is Array and x_t.ndim < 3:
            result = self._again(x_t, 1, state) if x_t.ndim == 2 else self._again_unbatched(x_t, state)
            if result is not None:
                return result
        spec, dtype = self._spec, self._dtype
        if spec.bidirectional:
            raise ValueError("step: the layer is bidirectional, expected one that needs no future input")
        if not (type(x_t) is Array and x_t.ndim == 2 and x_t.shape[1] == spec.input_size and x_t.dtype == dtype):
            batched = not (isinstance(x_t, Array) and x_t.ndim == 1)
            shape, letters = (
                ((None, spec.input_size), "(B, input_size)") if batched else ((spec.input_size,), "(input_size,)")
            )
            functional.check_array("x_t", x_t, (dtype,), shape, letters)
        else:
            batched = True
        B = x_t.shape[0] if batched else 1
        output = functional.contiguous(x_t).reshape(1, B, spec.input_size)
        states = self._check_state("state", state, B, batched)
        last = []
        for k, layer in enumerate(self._prepared or self._prepare()):
            output, new, _ = layer.forward(output, tuple([array[k] for array in states]))
            last.append(new)
        return output[0] if batched else output[0, 0], self._join(last, batched)

    def _again(self, x: Array, T: int, state: LayerState) -> tuple[Array, LayerState] | None:
        """Return what a call would with x (T * B, I), in less time, if the last call was alike; else None."""
        prepared = self._prepared
        if prepared is None or len(prepared) > 1:
            return None
        if type(state) is tuple:
            return prepared[0].again(x, T, state) if len(state) == 2 else None
        result = prepared[0].again(x, T, None if state is None else (state,))
        return (result[0], result[1][0]) if result is not None and len(result[1]) == 1 else result

    def _again_unbatched(self, x_t: Array, state: LayerState) -> tuple[Array, LayerState] | None:
        """Return what `_again` does of one step without a batch."""
        arrays = state if type(state) is tuple else (state,)
        if x_t.ndim != 1 or any(type(array) is not Array or array.ndim != 2 for array in arrays):
            return None
        wide = tuple([array[:, None] for array in arrays])
        result = self._again(x_t[None], 1, wide if type(state) is tuple else wide[0])
        if result is None:
            return None
        output, new = result
        return output[0], tuple([array[:, 0] for array in new]) if type(new) is tuple else new[:, 0]

    def _run(
        self, x: Array, state: LayerState, lengths: Any, reset: Any, training: bool, recompute: bool = False
    ) -> tuple[Array, LayerState, Any]:
        spec, D, W = self._spec, self._spec.directions, self._spec.output_size
        like = x if type(x) is not Array and backends.is_on_gpu(x) else None
        if like is not None:
            x, state = self._take_from_gpu(x, state)
        batched = not (functional.is_array(x) and x.ndim == 2)
        batch_first = self._batch_first and batched
        letters = ("(B, T, input_size)" if batch_first else "(T, B, input_size)") if batched else "(T, input_size)"
        shape = (None, None, spec.input_size) if batched else (None, spec.input_size)
        x = functional.check_array("x", x, (self._dtype,), shape, letters)
        if not batched:
            x = functional.contiguous(x).reshape(x.shape[0], 1, x.shape[1])
        elif batch_first:
            x = x.swapaxes(0, 1)
        T, B = x.shape[:2]
        if like is not None and state is None:
            sizes = [(len(self._parts), B, size) for size in spec.state_sizes]
            states = tuple(backends.load(self._backend).zeros(x, sizes))
        else:
            states = self._check_state("state", state, B, batched)
        lengths = functional.check_lengths(lengths, T, B if batched else None)
        reset = self._check_reset(reset, T, B, batched)
        recompute = functional.check_recompute(recompute, training)
        if like is None:
            self._check_run(x, training, recompute)

        x = functional.contiguous(x)
        if hasattr(backends.load(self._backend), "prepare_stack"):
            options = {"lengths": lengths, "reset": reset, "training": training, "recompute": recompute}
            return self._run_stack(x, states, batched, like, **options)
        kernels, prepared = backends.load(self._backend), self._prepared or self._prepare()
        tapes, masks, last = [], [], []
        for layer in range(spec.num_layers):
            if layer and training and self._dropout:
                masks.append(self._mask(x.shape))
                x = x * masks[-1]
            # Both directions write into one buffer, which is the next layer's input as it is.
            output = np.empty((T, B, D * W), self._dtype)
            for d in range(D):
                k = layer * D + d
                _, new, tape = prepared[k].forward(
                    x,
                    tuple([array[k] for array in states]),
                    lengths=lengths,
                    reset=reset,
                    reverse=d == 1,
                    training=training,
                    recompute=recompute,
                    output=output,
                    column=d * W,
                )
                last.append(new)
                tapes.append(tape)
            x = output
        tape = Tape(self, kernels, tapes, masks, T, B, batched) if training else None
        return self._give(x, batched), self._join(last, batched), tape

    def _run_stack(
        self, x: Any, states: tuple[Any, ...], batched: bool, like: Any, *, training: bool, **options: Any
    ) -> tuple[Any, LayerState, Any]:
        """Run with a backend that runs all layers at once."""
        spec, kernels = self._spec, backends.load(self._backend)
        if self._stack is None:
            self._stack = kernels.prepare_stack(spec.cell, self._parts, spec.directions)
        T, B, _ = x.shape
        masks = []
        if training and self._dropout:
            between = T, B, spec.directions * spec.output_size
            masks = [self._mask(between) for _ in range(1, spec.num_layers)]
        output, last, stack_tape = self._stack.forward(x, states, masks=masks, training=training, **options)
        output, last = self._give(output, batched), [self._give_state(part, batched) for part in last]
        if like is not None:
            output, *last = kernels.give([output, *last], like)
        tape = Tape(self, kernels, stack_tape, [], T, B, batched, self._stack, like) if training else None
        return output, tuple(last) if len(last) == 2 else last[0], tape

    def _backward_stack(self, tape: Tape, d_output: Any, d_h: tuple[Any, ...]) -> Gradients:
        """Go back with a backend that runs all layers at once."""
        dx, parts, d_initial = tape.stack.backward(tape.tapes, d_output, d_h)
        params = self._spec.join(parts)
        dx, d_state = self._give(dx, tape.batched), [self._give_state(part, tape.batched) for part in d_initial]
        if tape.like is not None:
            dx, *d_state = tape.backend.give([dx, *d_state], tape.like)
            params = tape.backend.to_numpy(params)  # as the parameters are
        return Gradients(dx, tuple(d_state) if len(d_state) == 2 else d_state[0], params)

    def _take_from_gpu(self, x: Any, state: Any) -> tuple[Any, Any]:
        """Return x and the state as buffers that share the arrays' memory."""
        kernels = backends.load(self._backend)
        if not hasattr(kernels, "take"):
            wanted = "a NumPy array, or a layer with backend='cuda'"
            raise TypeError(f"x is a {type(x).__name__} on a GPU and backend is {self._backend!r}, expected {wanted}")
        x = kernels.take("x", x)
        if isinstance(state, (tuple, list)):
            return x, tuple(
                None if part is None else kernels.take(f"state[{i}]", part, x) for i, part in enumerate(state)
            )
        return x, None if state is None else kernels.take("state", state, x)

    def _take_gradients_from_gpu(self, tape: Tape, d_output: Any, d_state: Any) -> tuple[Any, Any]:
        """Return them as buffers."""
        take = tape.backend.take
        if d_output is not None:
            d_output = take("d_output", d_output)
        if isinstance(d_state, (tuple, list)):
            return d_output, tuple(None if d is None else take(f"d_state[{i}]", d) for i, d in enumerate(d_state))
        return d_output, None if d_state is None else take("d_state", d_state)

    @staticmethod
    def _give_state(array: Any, batched: bool) -> Any:
        """Return (layers · D, B, size) as the caller has it."""
        return array if batched else array.reshape(array.shape[0], array.shape[2])

    def _mask(self, shape: tuple[int, ...]) -> Array:
        """Draw what dropout multiplies by: 0, or what keeps the mean."""
        kept = self._random.random(shape, np.float32) >= self._dropout
        return kept * self._dtype.type(1.0 / (1.0 - self._dropout))

    def _give(self, array: Array, batched: bool) -> Array:
        """Return (T, B, ...) in the layout that the caller uses."""
        if not batched:
            return array.reshape(array.shape[0], array.shape[2])
        return array.swapaxes(0, 1) if self._batch_first else array

    def _join(self, parts: list[Any], batched: bool) -> LayerState:
        """Return the states of all layers and directions as the caller's h, or (h, c)."""
        if len(parts) == 1:
            arrays = [array[None] for array in parts[0]] if batched else parts[0]
        else:
            arrays = [np.stack(same) for same in zip(*parts, strict=True)]
            arrays = arrays if batched else [array[:, 0] for array in arrays]
        return tuple(arrays) if len(arrays) == 2 else arrays[0]

    def _check_state(
        self, name: str, state: LayerState, B: int, batched: bool, optional: bool = False
    ) -> tuple[Any, ...]:
        """Return the arrays of a state as (layers · D, B, size); zeros for None, or None itself if it is optional."""
        spec, dtype = self._spec, self._dtype
        K, sizes = len(self._parts), spec.state_sizes
        if state is None:
            return tuple([None if optional else np.zeros((K, B, size), dtype) for size in sizes])
        if len(sizes) == 2:
            functional.check_structure(name, state, 2)
        else:
            state = (state,)
        letters = "(num_layers * directions, B, size)" if batched else "(num_layers * directions, size)"
        arrays: list[Array | None] = []
        for i, size in enumerate(sizes):
            array = state[i]
            if array is None and optional:
                arrays.append(None)
                continue
            shape = (K, B, size) if batched else (K, size)
            if not (type(array) is Array and array.shape == shape and array.dtype == dtype):
                label = f"{name}[{i}]" if len(sizes) == 2 else name
                functional.check_array(label, array, (dtype,), shape, letters)
            array = functional.contiguous(array)
            arrays.append(array if batched else array.reshape(K, 1, size))
        return tuple(arrays)

    def _check_reset(self, reset: Any, T: int, B: int, batched: bool) -> Array | None:
        """Return `reset` as (T, B)."""
        if not batched:
            reset = functional.check_reset(reset, (T,), "(T,)")
            return None if reset is None else reset[:, None]
        if self._batch_first:
            reset = functional.check_reset(reset, (B, T), "(B, T)")
            return None if reset is None else functional.contiguous(reset.swapaxes(0, 1))
        return functional.check_reset(reset, (T, B), "(T, B)")

    def _check_d_output(self, d_output: Array, tape: Tape) -> Array:
        """Return `d_output` as (T, B, D · W)."""
        width = self._spec.directions * self._spec.output_size
        shape: tuple[int, ...]
        if not tape.batched:
            shape, letters = (tape.T, width), "(T, size)"
        elif self._batch_first:
            shape, letters = (tape.B, tape.T, width), "(B, T, size)"
        else:
            shape, letters = (tape.T, tape.B, width), "(T, B, size)"
        array = functional.check_array("d_output", d_output, (self._dtype,), shape, letters)
        if not tape.batched:
            array = functional.contiguous(array).reshape(tape.T, 1, width)
        elif self._batch_first:
            array = array.swapaxes(0, 1)
        return functional.contiguous(array)

    def _check_run(self, x: Array, training: bool, recompute: bool) -> None:
        """Raise MemoryError if the outputs and tapes cannot fit into memory."""
        spec = self._spec
        T, B, I = x.shape
        K, W, H = len(self._parts), spec.output_size, spec.hidden_size
        numbers = W * (K if training else min(K, 2 * spec.directions))
        if training and not recompute:
            numbers += K * (GATES[spec.cell] + len(spec.state_sizes)) * H
        size = T * B * numbers * self._dtype.itemsize + functional.copied_bytes(x)
        functional.check_memory(size, f"{type(self).__name__} with T = {T}, B = {B}, I = {I} and H = {H}")

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold.

        Examples
        --------
        >>> from fastrnn import GRU
        >>> GRU(3, 4).num_parameters  # 12 · 3 + 12 · 4 + 12 + 12
        108
        """
        return self._spec.num_parameters

    def state_dict(self) -> Params:
        """Return a copy of the parameters, by name and in PyTorch's order.

        Examples
        --------
        >>> from fastrnn import GRU
        >>> list(GRU(3, 4).state_dict())
        ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
        """
        return {name: array.copy() for name, array in self._parameters.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Copy parameters into the layer, rounding them to its dtype.

        Parameters
        ----------
        state_dict : mapping of str to array
            This method's inverse `state_dict`, or that of PyTorch's layer; anything that NumPy can read floats from.
        strict : bool
            Whether every name has to be there, and no other.

        Returns
        -------
        LoadedKeys
            ``missing_keys`` and ``unexpected_keys``; both are empty if `strict`.

        Raises
        ------
        TypeError
            If `state_dict` is not a mapping, or an array in it is not of floats.
        ValueError
            If a shape differs or, if `strict`, a name. The layer is as it was then.

        Examples
        --------
        >>> from fastrnn import GRU
        >>> a, b = GRU(3, 4, seed=1), GRU(3, 4, seed=2)
        >>> b.load_state_dict(a.state_dict())
        LoadedKeys(missing_keys=[], unexpected_keys=[])
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}, expected a dict of names to arrays")
        strict = functional.check_flag("strict", strict)
        keys = LoadedKeys(*weights.compare_names(state_dict, self._parameters))
        if strict and (keys.missing_keys or keys.unexpected_keys):
            raise weights.names_error("state_dict", *keys)
        self._parameters.update({name: state_dict[name] for name in self._parameters if name in state_dict})
        return keys

    def save(self, path: weights.Path) -> None:
        """Write the parameters and the architecture to a .npz or .safetensors file, in one step.

        Parameters
        ----------
        path : str or path
            Its ending decides the format. .safetensors needs the package of that name.

        Raises
        ------
        TypeError
            If `path` is not a path.
        ValueError
            If it has another ending.
        ModuleNotFoundError
            For .safetensors without the package.
        OSError
            If the file cannot be written; one that was there is as it was.

        Examples
        --------
        >>> import tempfile, fastrnn
        >>> gru = fastrnn.GRU(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gru.save(f"{folder}/gru.npz")
        ...     fastrnn.load(f"{folder}/gru.npz")
        GRU(3, 4)
        """
        spec = self._spec
        meta = {"format": FORMAT, **spec.__dict__, "batch_first": self._batch_first, "dropout": self._dropout}
        weights.write(path, self._parameters, {**meta, "dtype": self._dtype.name})

    def load(self, path: weights.Path, strict: bool = True) -> LoadedKeys:
        """Read the parameters from a .npz or .safetensors file. `fastrnn.load` makes the layer as well.

        Parameters
        ----------
        path : str or path
            What `save` wrote, or a file of arrays under the same names that somebody else wrote.
        strict : bool
            As for `load_state_dict`.

        Returns
        -------
        LoadedKeys
            As from `load_state_dict`.

        Raises
        ------
        TypeError
            If `path` is not a path.
        ValueError
            If the file is not what its ending says or does not fit the layer, which is as it was then.
        ModuleNotFoundError
            For .safetensors without the package of that name.
        OSError
            If the file cannot be opened.

        Examples
        --------
        >>> import tempfile
        >>> from fastrnn import GRU
        >>> a, b = GRU(3, 4, seed=1), GRU(3, 4, seed=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a.save(f"{folder}/gru.npz")
        ...     b.load(f"{folder}/gru.npz")
        LoadedKeys(missing_keys=[], unexpected_keys=[])
        """
        strict = functional.check_flag("strict", strict)
        expected = self._spec.shapes()
        missing: list[str] = []
        unexpected: list[str] = []

        def select(meta: Mapping[str, Any], headers: Mapping[str, weights.Header]) -> list[str]:
            missing[:], unexpected[:] = weights.compare_names(headers, expected)
            if strict and (missing or unexpected):
                raise weights.names_error(os.fsdecode(path), missing, unexpected)
            _check_shapes(path, headers, expected)
            return [name for name in expected if name in headers]

        arrays, _ = weights.read(path, select)
        self._parameters.update(arrays)
        return LoadedKeys(missing, unexpected)

    def __repr__(self) -> str:
        spec = self._spec
        options = {
            "num_layers": (spec.num_layers, 1),
            **self._own_options(),
            "bias": (spec.bias, True),
            "batch_first": (self._batch_first, False),
            "dropout": (self._dropout, 0.0),
            "bidirectional": (spec.bidirectional, False),
            "dtype": (self._dtype.name, "float32"),
            "backend": (self._backend, backends.DEFAULT),
        }
        shown = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return f"{type(self).__name__}({', '.join([str(spec.input_size), str(spec.hidden_size), *shown])})"

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        """Return the options that this layer alone has, each with its default."""
        raise NotImplementedError


class RNN(Recurrent):
    """Elman's recurrent layer, with the arguments of ``torch.nn.RNN``.

    For each step t, in each layer and direction::

        h_t = act(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

    Source: J. Elman, Finding structure in time, 1990; in PyTorch's notation.

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of x and of h, 1 or more.
    num_layers : int
        How many layers are stacked, each on the output of the one before.
    nonlinearity : str
        act: "tanh", "relu" or "sigmoid".
    bias : bool
        Whether there are biases.
    batch_first : bool
        Whether x and the output are (B, T, size) in place of (T, B, size). The states are as they are.
    dropout : float
        With what probability `forward` sets each element to zero that goes from one layer to the next: 0 to below 1.
    bidirectional : bool
        Whether a second direction runs backward in time; the output is [forward, reverse].
    dtype : numpy.float32 or numpy.float64
        Of all arrays, in and out.
    seed : int, optional
        Of the initial parameters and of dropout; by default different ones each time.
    backend : str, optional
        "cpu" (the default) or "reference", plain NumPy.
    recurrent_init : str
        "uniform", PyTorch's, or "orthogonal": each gate's block of weight_hh is a random orthogonal matrix.

    Attributes
    ----------
    parameters : dict of str to numpy.ndarray
        ``weight_ih_l0`` (H, input_size), ``weight_hh_l0`` (H, H), ``bias_ih_l0`` (H,), ``bias_hh_l0`` (H,), and so on;
        above layer 0 weight_ih has D · H columns. The names in the reverse direction end in ``_reverse``. At first all
        are uniform in ±1/sqrt(H), drawn in this order from ``np.random.default_rng(seed)``.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If it has a wrong value.
    NotImplementedError
        For a backend that this version does not have.
    MemoryError
        If the parameters cannot fit into this machine's memory.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrnn import RNN
    >>> rnn = RNN(3, 5, nonlinearity="relu", seed=0)
    >>> output, h = rnn(np.zeros((7, 4, 3), np.float32))
    >>> output.shape, h.shape
    ((7, 4, 5), (1, 4, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
        backend: str | None = None,
        recurrent_init: str = "uniform",
    ) -> None:
        if nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise ValueError(f"nonlinearity is {nonlinearity!r}, expected 'tanh', 'relu' or 'sigmoid'")
        super().__init__(
            cell=f"rnn_{nonlinearity}",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            dtype=dtype,
            seed=seed,
            backend=backend,
            recurrent_init=recurrent_init,
        )

    @property
    def nonlinearity(self) -> str:
        return self._spec.cell.removeprefix("rnn_")

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        return {"nonlinearity": (self.nonlinearity, "tanh")}


class LSTM(Recurrent):
    """Long short-term memory, with the arguments of ``torch.nn.LSTM``.

    For each step t, in each layer and direction::

        i = σ(W_ii x_t + b_ii + W_hi h_(t-1) + b_hi)        input gate
        f = σ(W_if x_t + b_if + W_hf h_(t-1) + b_hf)        forget gate
        g = tanh(W_ig x_t + b_ig + W_hg h_(t-1) + b_hg)     cell gate
        o = σ(W_io x_t + b_io + W_ho h_(t-1) + b_ho)        output gate
        c_t = f * c_(t-1) + i * g
        h_t = o * tanh(c_t)              or, projected,  W_hr (o * tanh(c_t))

    Source: S. Hochreiter and J. Schmidhuber, Long short-term memory, 1997; F. Gers et al., Learning to forget, 2000;
    the projection is of H. Sak et al., 2014. In PyTorch's notation.

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of x and of c, 1 or more.
    num_layers, bias, batch_first, dropout, bidirectional
        As for `RNN`.
    proj_size : int
        P, the size of h if it is projected, less than hidden_size; 0 for no projection.
    dtype, seed, backend, recurrent_init
        As for `RNN`. A gate's block of a projected layer, (H, P), gets orthonormal columns.
    forget_bias : float, optional
        Set the sum of the two forget biases to it at first: 1 helps to remember long.

    Attributes
    ----------
    parameters : dict of str to numpy.ndarray
        ``weight_ih_l0`` (4·H, input_size), ``weight_hh_l0`` (4·H, H or P), ``bias_ih_l0`` and ``bias_hh_l0`` (4·H,),
        ``weight_hr_l0`` (P, H) if projected; gates in the order i f g o. Else as for `RNN`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, MemoryError
        As `RNN`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrnn import LSTM
    >>> lstm = LSTM(3, 5, num_layers=2, proj_size=2, forget_bias=1.0)
    >>> output, (h, c) = lstm(np.zeros((7, 4, 3), np.float32))
    >>> output.shape, h.shape, c.shape
    ((7, 4, 2), (2, 4, 2), (2, 4, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
        backend: str | None = None,
        recurrent_init: str = "uniform",
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(
            cell="lstm",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            dtype=dtype,
            seed=seed,
            backend=backend,
            recurrent_init=recurrent_init,
            forget_bias=forget_bias,
        )

    proj_size = property(attrgetter("_spec.proj_size"))

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        return {"proj_size": (self._spec.proj_size, 0)}


class GRU(Recurrent):
    """Gated recurrent unit, with the arguments of ``torch.nn.GRU``.

    For each step t, in each layer and direction::

        r = σ(W_ir x_t + b_ir + W_hr h_(t-1) + b_hr)              reset gate
        z = σ(W_iz x_t + b_iz + W_hz h_(t-1) + b_hz)              update gate
        n = tanh(W_in x_t + b_in + r * (W_hn h_(t-1) + b_hn))     new gate
        h_t = (1 - z) * n + z * h_(t-1)

    or, with ``reset_after=False``, ``n = tanh(W_in x_t + b_in + W_hn (r * h_(t-1)) + b_hn)``.

    Source: K. Cho et al., Learning phrase representations, 2014, for the form with the reset before the product (the
    default of ONNX, and Keras' reset_after=False); the other is that of PyTorch and cuDNN. In PyTorch's notation.

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of x and of h, 1 or more.
    num_layers, bias, batch_first, dropout, bidirectional
        As for `RNN`.
    reset_after : bool
        Whether the reset gate acts after the recurrent product. Trained weights fit one form only.
    dtype, seed, backend, recurrent_init
        As for `RNN`.

    Attributes
    ----------
    parameters : dict of str to numpy.ndarray
        ``weight_ih_l0`` (3·H, input_size), ``weight_hh_l0`` (3·H, H), ``bias_ih_l0`` and ``bias_hh_l0`` (3·H,);
        gates in the order r z n. Else as for `RNN`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, MemoryError
        As `RNN`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrnn import GRU
    >>> gru = GRU(3, 5, batch_first=True)
    >>> output, h = gru(np.zeros((4, 7, 3), np.float32))
    >>> output.shape, h.shape
    ((4, 7, 5), (1, 4, 5))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        reset_after: bool = True,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
        backend: str | None = None,
        recurrent_init: str = "uniform",
    ) -> None:
        super().__init__(
            cell="gru" if functional.check_flag("reset_after", reset_after) else "gru_reset_before",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            dtype=dtype,
            seed=seed,
            backend=backend,
            recurrent_init=recurrent_init,
        )

    @property
    def reset_after(self) -> bool:
        return self._spec.cell == "gru"

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        return {"reset_after": (self.reset_after, True)}


def load(path: weights.Path, *, seed: int | None = None, backend: str | None = None) -> RNN | LSTM | GRU:
    """Return the layer that ``layer.save(path)`` wrote.

    Parameters
    ----------
    path : str or path
        A .npz or .safetensors file. It need not be trusted: nothing in it is executed.
    seed : int, optional
        Of the new layer's dropout.
    backend : str, optional
        The new layer's; "cpu" by default.

    Returns
    -------
    RNN, LSTM or GRU

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If the file is not what its ending says, tells no architecture, or one that its arrays do not fit.
    ModuleNotFoundError
        For .safetensors without the package of that name.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile, fastrnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fastrnn.LSTM(3, 4, num_layers=2).save(f"{folder}/lstm.npz")
    ...     fastrnn.load(f"{folder}/lstm.npz")
    LSTM(3, 4, num_layers=2)
    """
    seed = None if seed is None else functional.check_integer("seed", seed, 0)
    backend = backends.check(backend)
    made: list[Any] = []

    def select(meta: Mapping[str, Any], headers: Mapping[str, weights.Header]) -> list[str]:
        layer = _from_meta(path, meta, backend)
        if layer._spec.num_arrays != len(headers):  # before a list of names that a hostile file could make endless
            message = f"it has {len(headers)} arrays, and the layer that it tells of has {layer._spec.num_arrays}"
            raise ValueError(f"{os.fsdecode(path)} cannot be loaded: {message}")
        expected = layer._spec.shapes()
        missing, unexpected = weights.compare_names(headers, expected)
        if missing or unexpected:
            raise weights.names_error(os.fsdecode(path), missing, unexpected)
        _check_shapes(path, headers, expected)
        made.append(layer)
        return list(expected)

    arrays, _ = weights.read(path, select)
    (layer,) = made
    layer._start({name: np.array(array, layer.dtype, order="C") for name, array in arrays.items()}, seed)
    return layer


def _from_meta(path: Any, meta: Mapping[str, Any], backend: str) -> Any:
    """Return a layer without parameters, of the architecture that a file tells."""
    name = os.fsdecode(path)
    if not meta:
        raise ValueError(f"{name} tells no architecture: make the layer, and call its load()")
    known = dict(meta)
    if not weights.same(known.pop("format", None), FORMAT):
        raise ValueError(f"{name} cannot be loaded: its format is {meta.get('format')!r}, expected {FORMAT}")
    cell = known.get("cell")
    if not isinstance(cell, str) or cell not in GATES:
        raise ValueError(f"{name} cannot be loaded: its cell is {cell!r}, expected one of {', '.join(GATES)}")
    kind = LSTM if cell == "lstm" else GRU if cell.startswith("gru") else RNN
    layer = kind.__new__(kind)
    try:
        layer._configure(**known, backend=backend)
        if cell != "lstm" and layer._spec.proj_size:
            raise ValueError(f"proj_size is {layer._spec.proj_size}, expected 0 for {cell}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded: the architecture that it tells is wrong: {error}") from error
    return layer


def _check_shapes(path: Any, headers: Mapping[str, weights.Header], expected: Mapping[str, weights.Shape]) -> None:
    wrong = [
        f"{name} has shape {headers[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"{os.fsdecode(path)} does not fit the layer; {'; '.join(wrong)}")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, expected a finite number")
    return number


def _initial(
    spec: Architecture, dtype: np.dtype, seed: int | None, recurrent_init: str, forget_bias: float | None
) -> Params:
    """Draw the initial parameters. The options change those that they are about, and no other."""
    random = np.random.default_rng(seed)
    bound = 1.0 / math.sqrt(spec.hidden_size)
    parameters = {name: random.uniform(-bound, bound, shape).astype(dtype) for name, shape in spec.shapes().items()}
    H = spec.hidden_size
    for part in spec.split(parameters):
        if recurrent_init == "orthogonal":
            for block in part["weight_hh"].reshape(-1, H, spec.output_size):
                block[...] = _orthogonal(random, *block.shape)
        if forget_bias is not None:
            part["bias_ih"][H : 2 * H] = forget_bias
            part["bias_hh"][H : 2 * H] = 0.0
    return parameters


def _orthogonal(random: np.random.Generator, rows: int, columns: int) -> Array:
    """Return a random matrix with orthonormal columns, each as likely as another (F. Mezzadri, 2007)."""
    q, r = np.linalg.qr(random.standard_normal((rows, columns)))
    return q * np.copysign(1.0, np.diag(r))
