"""Video-like: which digit moves and bounces over a canvas, in 16 frames of which none shows enough (many to one).

After Moving MNIST (N. Srivastava et al., Unsupervised learning of video representations using LSTMs, 2015), with
scikit-learn's handwritten digits of 8 by 8 pixels. A digit begins anywhere on a canvas of 16 by 16, moves by 1 or 2
pixels a frame along each axis and bounces from the edges. In each frame only half of the pixels is seen, others
each time, and noise of standard deviation 0.2 is over all; ink is 0 to 1. The last 500 of the 1797 digits are for
testing alone; the others move in new ways in every epoch.

The baselines are logistic regressions on the last frame, on the mean of all frames, and on the 16 frames side by side.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from common import is_quick, report
from fastrnn import GRU
from fastrnn.train import Activation, Adam, Cosine, CrossEntropy, Last, Linear, Sequential, Trainer, accuracy

CANVAS, DIGIT, FRAMES = 16, 8, 16
SEEN, NOISE = 0.5, 0.2
HELD_OUT = 500


def paths(count: int, random: np.random.Generator) -> np.ndarray:
    """Return where the digits' corners are, (count, FRAMES, 2)."""
    free = CANVAS - DIGIT
    start = random.integers(0, free + 1, (count, 1, 2))
    speed = random.choice([-2, -1, 1, 2], (count, 1, 2))
    # To bounce is to go on in a mirror: a wave of triangles.
    unfolded = (start + speed * np.arange(FRAMES)[:, None]) % (2 * free)
    return np.where(unfolded > free, 2 * free - unfolded, unfolded)


def films(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a film of each image, (N, FRAMES, CANVAS * CANVAS)."""
    corners = paths(len(images), random)[..., None]
    pixels = np.arange(DIGIT)
    rows, columns = corners[:, :, 0] + pixels, corners[:, :, 1] + pixels
    canvas = np.zeros((len(images), FRAMES, CANVAS, CANVAS), np.float32)
    film, frame = np.ogrid[: len(images), :FRAMES]
    film, frame = film[..., None, None], frame[..., None, None]
    canvas[film, frame, rows[..., :, None], columns[..., None, :]] = images[:, None]
    canvas *= random.random(canvas.shape, np.float32) < SEEN
    canvas += NOISE * random.standard_normal(canvas.shape, np.float32)
    return canvas.reshape(len(images), FRAMES, -1)


def build(hidden: int) -> Sequential:
    return Sequential(
        frame=Linear(CANVAS**2, hidden, seed=0),
        relu=Activation("relu"),
        gru=GRU(hidden, hidden, seed=0, recurrent_init="orthogonal"),
        last=Last(),
        output=Linear(hidden, 10, seed=1),
    )


def draw(film: np.ndarray, after: list[float], baselines: dict[str, float]) -> None:
    """Draw a film, and how many digits are known after each frame."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8, 4.2), layout="constrained")
    strip, below = figure.subfigures(2, 1, height_ratios=[1, 2])
    for number, (axes, frame) in enumerate(zip(strip.subplots(1, FRAMES // 2), film[::2], strict=True)):
        axes.imshow(frame.reshape(CANVAS, CANVAS), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"frame {2 * number + 1}")
    axes = below.subplots()
    axes.plot(range(1, FRAMES + 1), after, "o-", color="C1", label="GRU")
    for (name, value), style in zip(baselines.items(), (":", "--", "-."), strict=True):
        axes.axhline(value, color="0.4", linestyle=style, label=f"logistic regression, {name}")
    axes.set(xlabel="frames seen", ylabel="accuracy", ylim=(0, 1))
    axes.legend(frameon=False)
    pictures = Path(__file__).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    figure.savefig(pictures / "moving_digits.svg", dpi=100)


def main() -> None:
    quick = is_quick(__doc__)
    random, (images, digits) = np.random.default_rng(0), load_digits(return_X_y=True)
    images = images.reshape(-1, DIGIT, DIGIT).astype(np.float32) / 16
    copies, epochs, hidden, batch, rate = (2, 3, 96, 8, 6e-3) if quick else (4, 20, 256, 32, 3e-3)
    learned, y = np.repeat(images[:-HELD_OUT], copies, axis=0), np.repeat(digits[:-HELD_OUT], copies)
    x_test, y_test = films(np.repeat(images[-HELD_OUT:], 2, axis=0), random), np.repeat(digits[-HELD_OUT:], 2)

    schedule = Cosine(rate, steps=epochs * len(y) // batch, minimum=rate / 20)
    trainer = Trainer(build(hidden), CrossEntropy(), Adam(schedule), clip_norm=1.0, metrics={"accuracy": accuracy})
    for epoch in range(1, epochs + 1):
        x = films(learned, random)
        trainer.fit(x, y, epochs=epoch, batch_size=batch)

    looks = {
        "last frame": lambda x: x[:, -1],
        "mean frame": lambda x: x.mean(axis=1),
        "frames side by side": lambda x: x.reshape(len(x), -1),
    }
    baselines = {}
    for name, look in looks.items():
        model = LogisticRegression(C=0.1, max_iter=500).fit(look(x), y)
        baselines[name] = float(model.score(look(x_test), y_test))
    after = [
        trainer.evaluate(x_test, y_test, lengths=np.full(len(x_test), frames))["accuracy"]
        for frames in ([FRAMES] if quick else range(1, FRAMES + 1))
    ]
    if not quick:
        draw(x_test[0], after, baselines)
    for name, value in baselines.items():
        report("accuracy of the digit", after[-1], f"logistic regression of the {name}", value, larger_is_better=True)


if __name__ == "__main__":
    main()
