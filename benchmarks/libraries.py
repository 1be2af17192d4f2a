"""The layer that is timed, in each library: the same parameters, input and gradients of the output in all of them.

Each class has the same methods. `forward`, `backward`, `training` and `step` do the work and nothing else; `answer`
turns what one of them returned into arrays by name, for comparison.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import fastrnn
from fastrnn.testing import assert_close

CLASSES = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU"}
OPERATIONS = ("forward", "backward", "training", "step")


class Fastrnn:
    """fastrnn, with its kernels or with the NumPy reference."""

    backend = "cpu"

    def __init__(self, cell: str, shape: tuple[int, int, int, int]) -> None:
        T, B, I, H = shape
        random = np.random.default_rng(0)
        self.layer = getattr(fastrnn, CLASSES[cell])(I, H, seed=0, backend=self.backend)
        self.x = random.standard_normal((T, B, I), np.float32)
        self.d_output = random.standard_normal((T, B, H), np.float32)
        _, self.state, self.tape = self.layer.forward(self.x)

    def forward(self) -> Any:
        return self.layer(self.x)[0]

    def backward(self) -> Any:
        return self.layer.backward(self.tape, self.d_output)

    def training(self) -> Any:
        _, _, tape = self.layer.forward(self.x)
        return self.layer.backward(tape, self.d_output)

    def step(self) -> Any:
        return self.layer.step(self.x[0], self.state)[0]

    def answer(self, result: Any) -> dict[str, np.ndarray]:
        if isinstance(result, np.ndarray):
            return {"output": result}
        return {"dx": result.x, **{f"d{name}": gradient for name, gradient in result.params.items()}}


class Reference(Fastrnn):
    backend = "reference"


class Torch:
    """torch.nn's layer."""

    def __init__(self, cell: str, shape: tuple[int, int, int, int]) -> None:
        import torch

        ours = Reference(cell, (1, *shape[1:]))
        T, B, I, H = shape
        random = np.random.default_rng(0)
        self.torch = torch
        self.layer = getattr(torch.nn, CLASSES[cell])(I, H)
        self.layer.load_state_dict({name: torch.from_numpy(p) for name, p in ours.layer.parameters.items()})
        self.x = torch.from_numpy(random.standard_normal((T, B, I), np.float32)).requires_grad_()
        self.d_output = torch.from_numpy(random.standard_normal((T, B, H), np.float32))
        self.output, self.state = self.layer(self.x)

    def forward(self) -> Any:
        with self.torch.inference_mode():
            return self.layer(self.x)[0]

    def _backward(self, output: Any, keep: bool) -> Any:
        self.x.grad = None
        self.layer.zero_grad()
        output.backward(self.d_output, retain_graph=keep)
        return self.layer

    def backward(self) -> Any:
        return self._backward(self.output, keep=True)

    def training(self) -> Any:
        return self._backward(self.layer(self.x)[0], keep=False)

    def step(self) -> Any:
        with self.torch.inference_mode():
            return self.layer(self.x[:1], self.state)[0][0]

    def answer(self, result: Any) -> dict[str, np.ndarray]:
        if result is not self.layer:
            return {"output": result.numpy()}
        gradients = {f"d{name}": parameter.grad.numpy() for name, parameter in self.layer.named_parameters()}
        return {"dx": self.x.grad.numpy(), **gradients}


LIBRARIES = {"fastrnn": Fastrnn, "reference": Reference, "torch": Torch}


@functools.lru_cache(maxsize=4)
def expected(cell: str, shape: tuple[int, int, int, int], operation: str) -> dict[str, np.ndarray]:
    """The reference's answer."""
    reference = Reference(cell, shape)
    return reference.answer(getattr(reference, operation)())


def check(contestant: Any, cell: str, shape: tuple[int, int, int, int], operation: str) -> None:
    """Raise AssertionError unless `contestant` gives the reference's answer for `operation`."""
    answer = contestant.answer(getattr(contestant, operation)())
    T, B, I, H = shape
    for name, array in expected(cell, shape, operation).items():
        assert_close(answer[name], array, f"{operation} {name}", terms=T * (B + I + H))
