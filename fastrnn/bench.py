"""fastrnn timed beside NumPy, PyTorch, ONNX Runtime and JAX: ``python -m fastrnn bench`` and the suite in benchmarks/.

A contestant is one layer of one library, with the same parameters, input and gradient of the output as every other:
its answer is checked against the NumPy reference before it is timed. Each library runs in a process of its own, so
that no pool of threads meets another's, and is imported there only. All are asked in turn, in rounds: what disturbs
the machine disturbs them alike, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

import fastrnn
from fastrnn.testing import assert_close
from fastrnn.weights import to_onnx

Shape = tuple[int, int, int, int]  # T, B, I, H
Answer = dict[str, np.ndarray]

CLASSES = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU"}
OPERATIONS = ("forward", "backward", "training", "step")
SUFFIX = "_l0"

#: Seconds before a measurement. The threads of NumPy's OpenBLAS spin for 20 ms after a product, whosever core it is.
REST = 0.03


class Case(NamedTuple):
    """What is timed: one operation of one layer."""

    cell: str
    shape: Shape
    operation: str  # forward is inference, training is forward and every gradient
    lengths: bool = False  # rows of `lengths_of` steps, or all of T

    def __str__(self) -> str:
        """'LSTM training 100,32,128,128': T, B, I, H."""
        name = {"forward": "inference"}.get(self.operation, self.operation)
        return f"{CLASSES[self.cell]} {name} {','.join(map(str, self.shape))}{' lengths' * self.lengths}"


def lengths_of(shape: Shape) -> np.ndarray:
    """Return B lengths, uniform in 1..T and in no order.

    Examples
    --------
    >>> lengths_of((200, 4, 8, 8))
    array([ 95, 103, 152, 191])
    """
    return np.random.default_rng(1).integers(1, shape[0] + 1, shape[1])


# ---- the contestants


class Contestant:
    """One layer. `forward`, `backward`, `training` and `step` do the work and nothing else."""

    modules: tuple[str, ...] = ()  #: what has to be installed
    operations: tuple[str, ...] = OPERATIONS  #: those that it has

    def __init__(self, case: Case) -> None:
        T, B, I, H = case.shape
        random = np.random.default_rng(0)
        self.cell, self.hidden = case.cell, H
        self.parameters: Any = getattr(fastrnn, CLASSES[case.cell])(I, H, seed=0).parameters
        self.x: Any = random.standard_normal((T, B, I), np.float32)
        self.d_output: Any = random.standard_normal((T, B, H), np.float32)
        self.lengths: Any = lengths_of(case.shape) if case.lengths else None

    def answer(self, result: Any) -> Answer:
        """Return the arrays of what an operation returned, by name, for comparison."""
        raise NotImplementedError

    def prepare(self, operation: str) -> None:
        """Compile what `operation` needs, where that can be had without running it."""


class Fastrnn(Contestant):
    """fastrnn, with its kernels."""

    backend = "cpu"
    options: Mapping[str, Any] = {}  #: of the layer's forward

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        _, _, I, H = case.shape
        self.layer = getattr(fastrnn, CLASSES[case.cell])(I, H, seed=0, backend=self.backend)

    @functools.cached_property
    def _tape(self) -> Any:
        return self._forward()[2]

    @functools.cached_property
    def _state(self) -> Any:
        return self.layer.step(self.x[0])[1]

    def _forward(self) -> Any:
        return self.layer.forward(self.x, lengths=self.lengths, **self.options)

    def forward(self) -> Any:
        return self.layer(self.x, lengths=self.lengths)[0]

    def backward(self) -> Any:
        return self.layer.backward(self._tape, self.d_output)

    def training(self) -> Any:
        return self.layer.backward(self._forward()[2], self.d_output)

    def step(self) -> Any:
        return self.layer.step(self.x[0], self._state)[0]

    def answer(self, result: Any) -> Answer:
        if isinstance(result, np.ndarray):
            return {"output": result}
        return {"dx": result.x, **{f"d{name}": gradient for name, gradient in result.params.items()}}


class Reference(Fastrnn):
    """The NumPy reference."""

    backend = "reference"


class Torch(Contestant):
    """torch.nn's layer; rows of different length packed and padded again, as its users do."""

    modules = ("torch",)

    def __init__(self, case: Case) -> None:
        import torch

        super().__init__(case)
        self.torch = torch
        self.layer = getattr(torch.nn, CLASSES[case.cell])(case.shape[2], self.hidden)
        self.layer.load_state_dict({name: torch.from_numpy(array) for name, array in self.parameters.items()})
        self.x = torch.from_numpy(self.x).requires_grad_()
        self.d_output = torch.from_numpy(self.d_output)
        self.lengths = None if self.lengths is None else torch.from_numpy(self.lengths)

    @functools.cached_property
    def _output(self) -> Any:
        return self._run()

    @functools.cached_property
    def _state(self) -> Any:
        with self.torch.inference_mode():
            return self.layer(self.x[:1])[1]

    def _run(self) -> Any:
        if self.lengths is None:
            return self.layer(self.x)[0]
        pack, pad = self.torch.nn.utils.rnn.pack_padded_sequence, self.torch.nn.utils.rnn.pad_packed_sequence
        packed = pack(self.x, self.lengths, enforce_sorted=False)
        return pad(self.layer(packed)[0], total_length=len(self.x))[0]

    def _gradients(self, output: Any, keep: bool) -> Any:
        self.x.grad = None
        self.layer.zero_grad()
        output.backward(self.d_output, retain_graph=keep)
        return self.layer

    def forward(self) -> Any:
        with self.torch.inference_mode():
            return self._run()

    def backward(self) -> Any:
        return self._gradients(self._output, keep=True)

    def training(self) -> Any:
        return self._gradients(self._run(), keep=False)

    def step(self) -> Any:
        with self.torch.inference_mode():
            return self.layer(self.x[:1], self._state)[0][0]

    def answer(self, result: Any) -> Answer:
        if result is not self.layer:
            return {"output": result.numpy()}
        gradients = {f"d{name}": parameter.grad.numpy() for name, parameter in self.layer.named_parameters()}
        return {"dx": self.x.grad.numpy(), **gradients}


class OnnxRuntime(Contestant):
    """ONNX Runtime's operator RNN, LSTM or GRU, which it has for inference only."""

    modules = ("onnxruntime", "onnx")
    operations = ("forward", "step")

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        weights = {name.removesuffix(SUFFIX): array for name, array in self.parameters.items()}
        self.model = onnx_model(case.cell, weights, case.lengths)
        lengths = {} if self.lengths is None else {"sequence_lens": self.lengths.astype(np.int32)}
        self.inputs = {"X": self.x, **self._state(np.zeros((1, case.shape[1], self.hidden), np.float32)), **lengths}

    def _state(self, h: np.ndarray, c: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {"initial_h": h, "initial_c": h if c is None else c} if self.cell == "lstm" else {"initial_h": h}

    @functools.cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = fastrnn.get_num_threads()  # no variable sets it
        options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])

    @functools.cached_property
    def _step_inputs(self) -> Any:
        outputs = ["Y_h", "Y_c"] if self.cell == "lstm" else ["Y_h"]
        return {"X": self.x[:1], **self._state(*self._session.run(outputs, {**self.inputs, "X": self.x[:1]}))}

    def forward(self) -> Any:
        return self._session.run(["Y"], self.inputs)[0][:, 0]

    def step(self) -> Any:
        return self._session.run(["Y"], self._step_inputs)[0][0, 0]

    def answer(self, result: Any) -> Answer:
        return {"output": result}


def onnx_model(cell: str, weights: Mapping[str, np.ndarray], lengths: bool) -> bytes:
    """Return a model of one operator that takes X and the initial state, and sequence_lens if there are `lengths`."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = [numpy_helper.from_array(array, name) for name, array in to_onnx(cell, [weights]).items()]
    state = "hc" if cell == "lstm" else "h"
    given = [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["T", "B", "I"])]
    given += [helper.make_tensor_value_info(f"initial_{s}", TensorProto.FLOAT, [1, "B", "H"]) for s in state]
    if lengths:
        given.append(helper.make_tensor_value_info("sequence_lens", TensorProto.INT32, ["B"]))
    results = [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["T", 1, "B", "H"])]
    results += [helper.make_tensor_value_info(f"Y_{s}", TensorProto.FLOAT, [1, "B", "H"]) for s in state]
    node = helper.make_node(
        CLASSES[cell],
        ["X", "W", "R", "B", "sequence_lens" if lengths else "", *(f"initial_{s}" for s in state)],
        [result.name for result in results],
        hidden_size=weights["weight_hh"].shape[1],
        **({"linear_before_reset": 1} if cell == "gru" else {}),
    )
    graph = helper.make_graph([node], "layer", given, results, tensors)
    opset = [helper.make_opsetid("", 14)]  # the operators' last but one; every ONNX Runtime of today reads it
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


class Jax(Contestant):
    """A scan that jax.jit compiles, with the input's product before it, for all steps at once."""

    modules = ("jax",)

    def __init__(self, case: Case) -> None:
        import jax

        super().__init__(case)
        self.jax, np_ = jax, jax.numpy
        # (I, G·H), as JAX's libraries keep them
        self.parameters = {name: np_.asarray(array.T.copy()) for name, array in self.parameters.items()}
        mask = None
        if self.lengths is not None:
            mask = np_.asarray(np.arange(len(self.x))[:, None, None] < self.lengths[:, None])
        self.x, self.d_output = np_.asarray(self.x), np_.asarray(self.d_output)
        state = (np_.zeros((case.shape[1], self.hidden), "float32"),) * (2 if case.cell == "lstm" else 1)
        layer = functools.partial(jax_layer, jax, case.cell)

        def training(parameters: Any, x: Any, state: Any, mask: Any, d_output: Any) -> Any:
            output, pull = jax.vjp(lambda parameters, x: layer(parameters, x, state, mask)[0], parameters, x)
            return output, pull(d_output)

        def first(parameters: Any, x: Any, state: Any, mask: Any) -> Any:
            return jax.vjp(lambda parameters, x: layer(parameters, x, state, mask)[0], parameters, x)[1]

        self._layer, self._training, self._first = jax.jit(layer), jax.jit(training), jax.jit(first)
        self._pull = jax.jit(lambda pull, d_output: pull(d_output))
        self._inputs = (self.parameters, self.x, state, mask)

    @functools.cached_property
    def _tape(self) -> Any:
        return self._first(*self._inputs)

    @functools.cached_property
    def _step_inputs(self) -> Any:
        parameters, x, state, _ = self._inputs
        return parameters, x[:1], self._layer(parameters, x[:1], state, None)[1], None

    def forward(self) -> Any:
        return self._layer(*self._inputs)[0].block_until_ready()

    def backward(self) -> Any:
        return self.jax.block_until_ready(self._pull(self._tape, self.d_output))

    def training(self) -> Any:
        return self.jax.block_until_ready(self._training(*self._inputs, self.d_output)[1])

    def step(self) -> Any:
        return self._layer(*self._step_inputs)[0].block_until_ready()

    def prepare(self, operation: str) -> None:
        if operation == "forward":
            self._layer.lower(*self._inputs).compile()
        if operation == "training":
            self._training.lower(*self._inputs, self.d_output).compile()

    def answer(self, result: Any) -> Answer:
        if not isinstance(result, tuple):
            return {"output": np.asarray(result).reshape(-1, *result.shape[-2:])}
        parameters, dx = result
        return {"dx": np.asarray(dx), **{f"d{name}": np.asarray(d).T for name, d in parameters.items()}}


def jax_layer(jax: Any, cell: str, parameters: Any, x: Any, state: Any, mask: Any) -> Any:
    """Return the output and the final state; `mask`, (T, B, 1) or None, says which steps there are."""
    w, b = parameters["weight_hh" + SUFFIX], parameters["bias_hh" + SUFFIX]
    # behind the reset gate b is not a part of the sum that stands before it
    ahead = parameters["bias_ih" + SUFFIX] + (0 if cell == "gru" else b)
    sums = x @ parameters["weight_ih" + SUFFIX] + ahead

    def step(state: Any, given: Any) -> Any:
        row, valid = given
        new = jax_step(jax, cell, row, state, w, b)
        if valid is None:
            return new, new[0]
        kept = tuple(jax.numpy.where(valid, s, old) for s, old in zip(new, state, strict=True))
        return kept, jax.numpy.where(valid, new[0], 0)

    state, output = jax.lax.scan(step, state, (sums, mask))
    return output, state


def jax_step(jax: Any, cell: str, row: Any, state: Any, w: Any, b: Any) -> Any:
    """Return the next state, of the sums that the input has made and of what the state adds."""
    split, sigmoid, tanh = jax.numpy.split, jax.nn.sigmoid, jax.numpy.tanh
    h = state[0]
    if cell == "rnn_tanh":
        return (tanh(row + h @ w),)
    if cell == "lstm":
        i, f, g, o = split(row + h @ w, 4, axis=-1)
        c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c
    (xr, xz, xn), (hr, hz, hn) = split(row, 3, axis=-1), split(h @ w + b, 3, axis=-1)
    z = sigmoid(xz + hz)
    return ((1 - z) * tanh(xn + sigmoid(xr + hr) * hn) + z * h,)


LIBRARIES: dict[str, type[Contestant]] = {
    "fastrnn": Fastrnn,
    "reference": Reference,
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
}
PEERS = ("torch", "onnxruntime", "jax")


def installed() -> list[str]:
    """Return the names of the libraries that are there, without importing one."""
    return [name for name, made in LIBRARIES.items() if all(map(importlib.util.find_spec, made.modules))]


def versions() -> dict[str, str]:
    """Return the versions of the other libraries that are there."""
    return {name: metadata.version(name) for name in installed() if name in PEERS}


@functools.lru_cache(maxsize=4)
def expected(case: Case) -> Answer:
    """Return the reference's answer."""
    reference = Reference(case)
    return reference.answer(getattr(reference, case.operation)())


def check(contestant: Contestant, case: Case) -> None:
    """Raise AssertionError unless `contestant` gives the reference's answer."""
    answer = contestant.answer(getattr(contestant, case.operation)())
    T, B, I, H = case.shape
    for name, array in expected(case).items():
        assert_close(answer[name].reshape(array.shape), array, f"{case}: {name}", terms=T * (B + I + H))


# ---- the clock, and a process for each library


def call_times(function: Callable[[], Any], seconds: float, before: Callable[[], Any] | None = None) -> list[float]:
    """Return the seconds of each call for so long, and of one at least.

    The first fills the caches and is not counted, unless it is so long that it has done so by its end.
    `before` is called before each one, and its time is not counted.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < seconds:
        if before:
            before()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times[1:] or times


def environment(threads: int) -> dict[str, str]:
    """Return the variables that give every library so many threads.

    JAX has no option: XLA's own (``--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1``) leave a product
    on all cores. NPROC sets the size of its pool, which processor time by the wall clock shows. ONNX Runtime knows no
    variable; its contestant sets the session's option.
    """
    names = ("FASTRNN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    apple = ("VECLIB_MAXIMUM_THREADS",)
    return {**{name: str(threads) for name in names + apple}, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


class WorkerError(Exception):
    """A library could not do what it was asked for, or its answer was wrong."""

    def __init__(self, library: str, text: str) -> None:
        super().__init__(f"{library}: {text}")
        self.library = library


class Worker:
    """A process that runs one library on some threads.

    Parameters
    ----------
    library : str
        A name in `LIBRARIES`.
    threads : int
    variables : mapping, optional
        More variables of its environment, or others.
    """

    def __init__(self, library: str, threads: int, variables: Mapping[str, str] | None = None) -> None:
        self.library = library
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  until close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastrnn.bench", library],
            env={**os.environ, **environment(threads), **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            bufsize=1,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def times(
        self, case: Case, seconds: float, *, check: bool = False, product: bool = False, patience: float | None = None
    ) -> list[float]:
        """Return the seconds of each call, of calls for so long.

        Parameters
        ----------
        case : Case
        seconds : float
        check : bool
            Check the answer first.
        product : bool
            Multiply two matrices with NumPy before each call.
        patience : float, optional
            Wait no longer than that for the answer.

        Raises
        ------
        WorkerError
            If the library fails, and TimeoutError if it is not done in time.
        """
        request = {"case": case, "seconds": seconds, "check": check, "product": product}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: _read says so
            self._process.stdin.write(json.dumps(request) + "\n")
        try:
            line = self._lines.get(timeout=None if patience is None else max(patience, 0))
        except queue.Empty:
            raise TimeoutError(f"{self.library}: {case} was not done in time") from None
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise WorkerError(self.library, f"{case}: {answer['error']}")
        return answer["seconds"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {status}" + "".join(f": {line}" for line in lines[-1:])

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # it has nothing to tidy up, and may be in the middle of a long call
        self._process.communicate()
        self._errors.close()


def serve(library: str) -> None:
    """Answer the requests of a `Worker`, one a line, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    contestant = functools.lru_cache(maxsize=1)(LIBRARIES[library])
    square = np.ones((512, 512), np.float32)
    for line in sys.stdin:
        request = json.loads(line)
        cell, shape, operation, lengths = request["case"]
        case = Case(cell, tuple(shape), operation, lengths)
        try:
            runner = contestant(case._replace(operation=""))
            if request["check"] and library != "reference":
                check(runner, case)
            time.sleep(REST)
            before = functools.partial(np.matmul, square, square) if request["product"] else None
            answer: dict[str, Any] = {"seconds": call_times(getattr(runner, operation), request["seconds"], before)}
        except Exception as error:  # the other side decides what becomes of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def measure(
    workers: Mapping[str, Worker],
    case: Case,
    *,
    seconds: float = 0.1,
    rounds: int = 5,
    limit: float = math.inf,
    deadline: float = math.inf,
) -> dict[str, list[float]]:
    """Ask each worker whose library has the operation, in turn, for the median time of some calls.

    Parameters
    ----------
    workers : mapping of str to Worker
    case : Case
    seconds : float
        Of calls, for each worker in each round.
    rounds : int
    limit : float
        No round is begun after so many seconds, once there are three.
    deadline : float
        By `time.monotonic`. TimeoutError after it.

    Returns
    -------
    dict
        The seconds of each round, by the workers' names.
    """
    medians: dict[str, list[float]] = {
        name: [] for name, worker in workers.items() if case.operation in LIBRARIES[worker.library].operations
    }
    begin = time.monotonic()
    for i in range(rounds):
        if i >= 3 and time.monotonic() - begin > limit:
            break
        for name, times in medians.items():
            patience = None if deadline == math.inf else deadline - time.monotonic()
            answer = workers[name].times(case, seconds, check=i == 0, patience=patience)
            times.append(statistics.median(answer))
    return medians


def ratio(other: Sequence[float], own: Sequence[float]) -> float:
    """Return the median of the rounds' ratios.

    Examples
    --------
    >>> ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(other, own, strict=True))


# ---- python -m fastrnn bench

#: In the order of what they tell: the time may be up before the last.
SUBSET = (
    Case("lstm", (100, 32, 128, 128), "forward"),
    Case("lstm", (100, 32, 128, 128), "training"),
    Case("gru", (100, 32, 128, 128), "forward"),
    Case("gru", (100, 32, 128, 128), "training"),
    Case("lstm", (100, 1, 256, 256), "forward"),
    Case("gru", (100, 1, 256, 256), "forward"),
    Case("lstm", (1, 1, 64, 64), "step"),
    Case("lstm", (200, 32, 128, 128), "forward", lengths=True),
    Case("lstm", (200, 32, 128, 128), "training", lengths=True),
    Case("lstm", (50, 64, 512, 512), "forward"),
    Case("lstm", (50, 64, 512, 512), "training"),
    Case("gru", (50, 64, 512, 512), "forward"),
    Case("gru", (50, 64, 512, 512), "training"),
    Case("rnn_tanh", (100, 32, 128, 128), "training"),
)
TITLES = {"reference": "NumPy", "torch": "torch", "onnxruntime": "onnxruntime", "jax": "jax"}
_LABEL = 42  # columns for the name of a case


def run(seconds: float, threads: int, libraries: Iterable[str] | None = None) -> int:
    """Time some layers on this machine and print a table.

    Parameters
    ----------
    seconds : float
        The longest time for all of it.
    threads : int
        As many as every library gets; fastrnn is timed on one, too.
    libraries : iterable of str, optional
        Of `PEERS`, those to compare with; all that are installed by default.

    Returns
    -------
    int
        The exit status: 0, or 1 where a library failed or gave a wrong answer.

    Raises
    ------
    ValueError
        If a library is not installed.
    """
    there = installed()
    peers = [name for name in there if name in PEERS] if libraries is None else list(dict.fromkeys(libraries))
    for name in peers:
        if name not in there:
            raise ValueError(f"{name} is not installed; it needs: {', '.join(LIBRARIES[name].modules)}")
    deadline = time.monotonic() + seconds
    others = ["reference", *peers]
    _print_head(seconds, threads, others)
    workers = {name: Worker(name, threads) for name in ("fastrnn", *others)}
    if threads > 1:
        workers["fastrnn on one"] = Worker("fastrnn", 1)
    try:
        return _run(workers, others, threads, deadline)
    finally:
        for worker in workers.values():
            worker.close()


def _print_head(seconds: float, threads: int, others: Sequence[str]) -> None:
    from fastrnn import machine

    known = machine.versions() | versions()
    named = ("fastrnn", "numpy", "numba", *(name for name in others if name in known))
    print(f"{machine.processor()['processor']}; {', '.join(f'{name} {known[name]}' for name in named)}")
    print(f"float32; each library in a process of its own, with {_threads(threads)}; every answer is checked first.")
    print(
        "T,B,I,H: steps, rows, sizes of input and state. Under fastrnn milliseconds, under the others how many times as"
    )
    print(f"long as fastrnn with {_threads(threads)} they take. It ends within {seconds:g} s; a first run compiles.\n")
    columns = ["fastrnn"] * (1 + (threads > 1)) + [TITLES[name] for name in others]
    print(f"{'':<{_LABEL}}" + "".join(f"{name:>12}" for name in columns))
    counts = [1, threads] if threads > 1 else [1]
    print(f"{'':<{_LABEL}}" + "".join(f"{_threads(n):>12}" for n in counts), flush=True)


def _run(workers: dict[str, Worker], others: Sequence[str], threads: int, deadline: float) -> int:
    found: dict[str, list[float]] = {name: [] for name in others}
    failed: dict[str, str] = {}
    done = 0
    for case in SUBSET:
        print(f"{case!s:<{_LABEL}}", end="", flush=True)
        try:
            medians = _measure_what_works(workers, case, deadline, failed)
        except TimeoutError:
            print(f"{'time is up':>12}")
            break
        if "fastrnn" not in medians:
            print(f"{'failed':>12}")
            break
        done += 1
        milliseconds = [medians[name] for name in ("fastrnn on one", "fastrnn") if name in medians]
        ratios = {name: ratio(medians[name], medians["fastrnn"]) for name in others if name in medians}
        for name, value in ratios.items():
            found[name].append(value)
        cells = [f"{1e3 * statistics.median(times):.3f} ms" for times in milliseconds]
        cells += [f"{ratios[name]:.2f}×" if name in ratios else "-" for name in others]
        print("".join(f"{cell:>12}" for cell in cells), flush=True)
    means = [f"{statistics.geometric_mean(found[name]):.2f}×" if found[name] else "-" for name in others]
    print(f"{'geometric mean':<{_LABEL}}{'':>{12 * (1 + (threads > 1))}}" + "".join(f"{mean:>12}" for mean in means))
    if done < len(SUBSET) and not failed:
        print(f"\n{done} of {len(SUBSET)} were timed; --seconds allows more.")
    for text in failed.values():
        print(f"python -m fastrnn bench: {text}", file=sys.stderr)
    return 1 if failed or not done else 0


def _measure_what_works(
    workers: dict[str, Worker], case: Case, deadline: float, failed: dict[str, str]
) -> dict[str, list[float]]:
    """Measure; a library that fails is dropped (from `workers`, is modified) and noted (in `failed`, is modified)."""
    while True:
        try:
            return measure(workers, case, seconds=0.05, rounds=3, deadline=deadline)
        except WorkerError as error:
            failed[error.library] = str(error)
            for name in [name for name, worker in workers.items() if worker.library == error.library]:
                workers.pop(name).close()
            if error.library == "fastrnn":
                return {}


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


if __name__ == "__main__":
    serve(sys.argv[1])
