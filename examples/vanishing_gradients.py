"""Vanishing and exploding gradients: the adding problem by RNN, LSTM and GRU, and what clipping changes.

The adding problem (Hochreiter & Schmidhuber, Long short-term memory, 1997; here with numbers from 0 to 1, as later
authors have it): each step of a sequence has a number and a mark, and two numbers are marked, one in each half. Their
sum is asked for at the end. Who always answers 1 has a mean squared error of 1/6, about 0.167: whoever does no better
has not learned to keep a number in mind.

How much of the error's gradient comes back to the step where it is needed decides whether that can be learned. It is
measured before training and after it, for a tanh RNN, an LSTM (whose forget gates start open, by a bias of 3) and a
GRU. The other way round, the gradient of an RNN with large recurrent weights explodes: there, gradient descent on
sequences of 20 steps is compared with and without clipping (Pascanu et al., On the difficulty of training recurrent
neural networks, 2013). The picture, pictures/vanishing_gradients.svg, shows both.

With --quick the sequences have 30 steps in place of 100, and no picture is drawn.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

from pathlib import Path

import numpy as np

from common import is_quick, report
from fastrnn import GRU, LSTM, RNN
from fastrnn.layers import Recurrent
from fastrnn.train import (
    SGD,
    Adam,
    Last,
    Linear,
    MeanSquaredError,
    Sequential,
    Trainer,
    clip_by_norm,
    gradient_norms,
)

HIDDEN, BATCH = 32, 20
LARGE = "RNN, large weights"


def adding(rows: int, steps: int, seed: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences (rows, steps, 2), and the sums that are asked for, (rows, 1)."""
    random = np.random.default_rng(seed)
    numbers, marks, row = random.random((rows, steps)), np.zeros((rows, steps)), np.arange(rows)
    marks[row, random.integers(0, steps // 2, rows)] = 1
    marks[row, random.integers(steps // 2, steps, rows)] = 1
    sums = (numbers * marks).sum(axis=1, keepdims=True)
    return np.stack([numbers, marks], axis=2).astype(np.float32), sums.astype(np.float32)


def build(layer: Recurrent) -> Sequential:
    return Sequential(layer=layer, last=Last(), output=Linear(HIDDEN, 1, seed=0))


def shares(model: Sequential, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how large the gradient of the error by the state after each step is, as a multiple of the last one."""
    trained = model.layers["layer"]
    layer = type(trained)(2, HIDDEN, dtype=np.float64)  # gradients that vanish are soon too small for float32
    layer.load_state_dict(trained.parameters)
    d_output = np.zeros((*x.shape[:2], HIDDEN))
    d_output[:, -1] = MeanSquaredError()(model(x)[0], y).gradient @ model.parameters["output.weight"]
    norms = gradient_norms(layer, x.astype(float), d_output)
    return norms / norms[-1]


def large(seed: int) -> RNN:
    """Return an RNN whose state's gradient grows on its way back, where no unit is saturated."""
    layer = RNN(2, HIDDEN, seed=seed, recurrent_init="orthogonal")
    layer.parameters["weight_hh_l0"] *= 1.6
    return layer


def descend(seed: int, updates: int, clip_norm: float | None) -> np.ndarray:
    """Train an RNN with large weights by gradient descent with momentum; return the error before each update."""
    model, optimizer, errors = build(large(seed)), SGD(0.02, momentum=0.9), []
    for update in range(updates):
        x, y = adding(BATCH, 20, seed=(seed, update))
        output, _, tape = model.forward(x)
        loss = MeanSquaredError()(output, y)
        gradients = model.backward(tape, loss.gradient).params
        if clip_norm is not None:
            clip_by_norm(gradients, clip_norm)
        optimizer.step(model.parameters, gradients)
        errors.append(loss.value)
    return np.array(errors)


def draw(before: dict[str, np.ndarray], after: dict[str, np.ndarray], runs: dict[str, list[np.ndarray]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (first, second, third) = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    for axes, title, norms in ((first, "before training", before), (second, "after training", after)):
        for name, values in norms.items():
            axes.semilogy(values, label=name)
        axes.set(title=title, xlabel="time step", ylim=(1e-30, 1e5), yticks=10.0 ** np.arange(-30, 6, 5))
        axes.minorticks_off()
        axes.legend(frameon=False, loc="lower right", fontsize="small")
    second.tick_params(labelleft=False)  # they are those of the first
    first.set_ylabel("norm of the error's gradient by the state,\nas a multiple of that at the last step")
    for color, (name, errors) in zip(("C3", "C0"), runs.items(), strict=True):
        for i, values in enumerate(errors):
            smooth = np.convolve(values, np.full(100, 0.01), "valid")[::100]
            label = None if i else name
            third.semilogy(100 + 100 * np.arange(len(smooth)), smooth, color=color, linewidth=1, label=label)
    third.axhline(1 / 6, color="0.5", linestyle=":", label="always 1")
    third.set(title=f"{LARGE}, 20 steps", xlabel="update", ylabel="mean squared error, mean of 100 updates")
    third.legend(frameon=False, loc="lower left")
    pictures = Path(__file__).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    figure.savefig(pictures / "vanishing_gradients.svg")


def main() -> None:
    quick = is_quick(__doc__)
    steps, examples, epochs, seeds, updates = (30, 5000, 4, 1, 3000) if quick else (100, 10000, 10, 3, 4000)
    x, y = adding(examples, steps, seed=0)
    x_test, y_test = adding(1000, steps, seed=1)
    layers = {
        "RNN": RNN(2, HIDDEN, seed=0),
        "LSTM": LSTM(2, HIDDEN, seed=0, forget_bias=3.0),
        "GRU": GRU(2, HIDDEN, seed=0),
    }
    before, after, errors = {}, {}, {}
    for name, layer in layers.items():
        model = build(layer)
        before[name] = shares(model, x_test, y_test)
        trainer = Trainer(model, MeanSquaredError(), Adam(5e-3), clip_norm=1.0)
        trainer.fit(x, y, epochs=epochs, batch_size=BATCH, progress=False)
        after[name], errors[name] = shares(model, x_test, y_test), trainer.evaluate(x_test, y_test)["loss"]
        print(f"{name}: mean squared error {errors[name]:.2g}; of the gradient's norm at the last step, the first has")
        print(f"    {before[name][0]:.1e} before training and {after[name][0]:.1e} after it", flush=True)
    before[LARGE] = shares(build(large(1)), x_test, y_test)
    print(f"{LARGE}: {before[LARGE][0]:.1e} before training")

    runs = {
        name: [descend(seed, updates, clip_norm) for seed in range(1, seeds + 1)]
        for name, clip_norm in (("not clipped", None), ("clipped to a norm of 1", 1.0))
    }
    plain, clipped = (float(np.mean([values[-100:] for values in errors])) for errors in runs.values())
    if not quick:
        draw(before, after, runs)

    constant = float(np.square(y_test - 1).mean())
    report("mean squared error, LSTM", errors["LSTM"], "always 1", constant)
    report("mean squared error, GRU", errors["GRU"], "tanh RNN", errors["RNN"])
    share, theirs = after["LSTM"][0], after["RNN"][0]
    report("share of the gradient at the first step, LSTM", share, "tanh RNN", theirs, larger_is_better=True)
    report(f"mean squared error, {LARGE}, clipped", clipped, "not clipped", plain)


if __name__ == "__main__":
    main()
