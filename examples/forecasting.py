"""Forecasting: carbon dioxide in the air, each of the next 12 months, from the months before (many-to-many).

The series is Mauna Loa's weekly one of 1958 to 2001 (Keeling & Whorf, CDIAC), which statsmodels brings, as monthly
means. The usual simple forecast of a series with seasons is the same month a year ago, plus the growth of the last
year. That is as good as the growth over a year is steady, and so the model reads that growth month by month, and
foretells at each step by how much it will differ 1 to 12 months later. It learns from the months before 1988; which
epoch was the best is decided on those up to 1992; the forecasts of the years after are compared.
"""

from pathlib import Path

import numpy as np
from statsmodels.datasets import co2

from common import is_quick, report
from fastrnn import GRU
from fastrnn.train import Adam, Linear, MeanSquaredError, Sequential, Trainer

AHEAD = 12  # months
LEARNED, CHOSEN = 1988, 1992  # the first years that are not learned from, and that decide nothing
WINDOW = 96  # months that one example has


def series() -> tuple[np.ndarray, np.ndarray]:
    """Return the monthly means in parts per million, and the time of each in years; gaps are interpolated."""
    weekly = co2.load_pandas().data["co2"]
    monthly = weekly.resample("MS").mean().interpolate()
    return monthly.to_numpy(), (monthly.index.year + (monthly.index.month - 1) / 12).to_numpy()


def examples(level: np.ndarray, years: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is known in each month, (T, 4), and the growth in the next 12 less the present one, (T - 12, 12)."""
    growth = level[AHEAD:] - level[:-AHEAD]
    change, season = np.diff(growth, prepend=growth[:1]), 2 * np.pi * years[AHEAD:]
    known = np.stack([growth - 1.3, change, np.sin(season), np.cos(season)], axis=1)
    later = [growth[k : len(growth) - AHEAD + k] - growth[:-AHEAD] for k in range(1, AHEAD + 1)]
    return known.astype(np.float32), np.stack(later, axis=1).astype(np.float32)


def windows(x: np.ndarray, y: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    starts = range(0, len(y) - WINDOW + 1, step)
    return np.stack([x[s : s + WINDOW] for s in starts]), np.stack([y[s : s + WINDOW] for s in starts])


def draw(level: np.ndarray, years: np.ndarray, growth_later: np.ndarray, start: int) -> None:
    """Draw the level, and the forecast of every second year."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot(years[start:], level[start:], color="0.7", linewidth=3, label="measured")
    for at in range(start, len(growth_later) + AHEAD, 24):
        year_before = level[at - AHEAD + 1 : at + 1]
        forecast = year_before + growth_later[at - AHEAD] + level[at] - level[at - AHEAD]
        label = "forecast from the point on" if at == start else None
        axes.plot(years[at : at + AHEAD + 1], [level[at], *forecast], color="C1", label=label)
        axes.plot(years[at], level[at], "o", color="C1", markersize=4)
    axes.set(xlabel="year", ylabel="CO₂ at Mauna Loa, parts per million")
    axes.legend(frameon=False)
    pictures = Path(__file__).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    figure.savefig(pictures / "forecasting.svg")


def main() -> None:
    quick = is_quick(__doc__)
    level, years = series()
    x, y = examples(level, years)
    # A target reaches a year ahead: what is learned must not look into the years that are foretold.
    learned, chosen = (int(np.searchsorted(years[AHEAD:], year)) - AHEAD for year in (LEARNED, CHOSEN))
    training = windows(x[:learned], y[:learned], step=3)
    validation = x[None, chosen - WINDOW : chosen], y[None, chosen - WINDOW : chosen]

    model = Sequential(GRU(4, 8, seed=0, batch_first=True), Linear(8, AHEAD, seed=0))
    trainer = Trainer(model, MeanSquaredError(), Adam(3e-3), clip_norm=1.0)
    epochs = 20 if quick else 100
    trainer.fit(*training, epochs=epochs, batch_size=16, validation=validation, patience=30, progress=False)
    print(f"{trainer.epoch} epochs, the best was number {trainer.best['epoch']}")

    forecast = model(x[None, : len(y)])[0][0]
    test = slice(chosen + AHEAD, len(y))
    error, simple = np.abs(forecast - y)[test], np.abs(y)[test]
    print("months ahead  ", *[f"{k:5d}" for k in (1, 3, 6, 9, 12)])
    for name, values in (("GRU", error), ("simple", simple)):
        print(f"{name:6s}, in ppm", *[f"{values[:, k - 1].mean():5.2f}" for k in (1, 3, 6, 9, 12)])
    if not quick:
        draw(level, years, forecast, test.start + AHEAD)
    measure = "mean error in ppm, 1 to 12 months ahead"
    report(measure, float(error.mean()), "a year ago, plus last year's growth", float(simple.mean()))


if __name__ == "__main__":
    main()
