"""Speech: telephone tones in noise become symbols, without being told where each one is (CTC).

It is speech recognition's task without its data. An utterance is 3 to 10 symbols; each is one of the telephone's 16
pairs of tones (ITU-T Q.23), sampled at 8 kHz, for 40 to 120 ms, with a pause of 40 to 120 ms before it and after the
last. Each of a symbol's two tones has an amplitude of its own, 0.1 to 1 and uniform in decibels, and any phase; over
everything is white noise of standard deviation 0.5. The features are logarithms of the spectrum's power from 594 to
1719 Hz, in windows of 32 ms, one every 10 ms. A bidirectional LSTM reads them. It is trained on the symbols alone, with
the loss of connectionist temporal classification (A. Graves et al., 2006).

The baseline is told more: what is heard in the middle of each window for training. Linear discriminant analysis finds
the symbol or pause whose mean spectrum is nearest to a window's, by the covariance that they have in common. Runs of
few windows are left out, where how few is what does best on the training utterances; then repeats are merged, and
pauses left out.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import itertools
from pathlib import Path

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from common import is_quick, report
from fastrnn import LSTM
from fastrnn.train import CTC, Adam, Cosine, Linear, Sequential, Trainer, error_rate, softmax

RATE, WINDOW, HOP = 8000, 256, 80  # samples a second, of a window, from window to window
TONES = np.array([(low, high) for low in (697, 770, 852, 941) for high in (1209, 1336, 1477, 1633)])  # Hz
KEYS = "123A456B789C*0#D"  # their names, in the order of the pairs
PAUSE, SYMBOLS = 0, len(TONES)  # symbols are numbered from 1; 0 is also CTC's blank
SHORTEST, LONGEST = 320, 960  # samples of a tone and of a pause
NOISE = 0.5
BINS = slice(19, 56)  # of the spectrum, 31.25 Hz each


def utterance(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the symbols, the sound, and which symbol or pause is heard in each sample."""
    symbols = random.integers(1, SYMBOLS + 1, random.integers(3, 11))
    parts = [PAUSE, *itertools.chain.from_iterable((symbol, PAUSE) for symbol in symbols)]
    durations = random.integers(SHORTEST, LONGEST + 1, len(parts))
    sound = NOISE * random.standard_normal(durations.sum())
    for symbol, end, duration in zip(parts, durations.cumsum(), durations, strict=True):
        if symbol != PAUSE:
            amplitudes, phases = 10 ** random.uniform(-1, 0, 2), random.uniform(0, 2 * np.pi, 2)
            waves = np.sin(2 * np.pi / RATE * TONES[symbol - 1] * np.arange(duration)[:, None] + phases)
            sound[end - duration : end] += waves @ amplitudes
    return symbols, sound, np.repeat(parts, durations)


def features(sound: np.ndarray) -> np.ndarray:
    """Return the logarithm of the power in each window and bin."""
    windows = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP]
    return np.log(np.abs(np.fft.rfft(windows * np.hanning(WINDOW))[:, BINS]) ** 2).astype(np.float32)


def padded(rows: list[np.ndarray], filler: int) -> np.ndarray:
    result = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), filler, rows[0].dtype)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


def data(count: int, seed: int) -> tuple[list, list, list]:
    """Return the symbols of some utterances, their features, and what is heard in the middle of each window."""
    random = np.random.default_rng(seed)
    symbols, sounds, heard = zip(*(utterance(random) for _ in range(count)), strict=True)
    spectra = [features(sound) for sound in sounds]
    middles = [row[WINDOW // 2 :: HOP][: len(x)] for row, x in zip(heard, spectra, strict=True)]
    return [row.tolist() for row in symbols], spectra, middles


def merged(windows: np.ndarray, shortest: int) -> list[int]:
    """Return the symbols without repeats and pauses, after leaving out runs of fewer windows than `shortest`."""
    runs = ((symbol, len(list(run))) for symbol, run in itertools.groupby(windows.tolist()))
    kept = [symbol for symbol, length in runs if length >= shortest]
    return [symbol for symbol, _ in itertools.groupby(kept) if symbol != PAUSE]


def baseline(training: tuple[list, list, list], test: tuple[list, list, list]) -> float:
    """Return the error rate of the nearest mean spectrum, window by window."""
    symbols, spectra, heard = training
    model = LinearDiscriminantAnalysis().fit(np.concatenate(spectra), np.concatenate(heard))
    found = [model.predict(x) for x in spectra]
    rates = {n: error_rate(symbols, [merged(row, n) for row in found]) for n in range(1, 10)}
    shortest = min(rates, key=rates.get)
    print(f"baseline: runs of {shortest} windows and more count")
    return error_rate(test[0], [merged(model.predict(x), shortest) for x in test[1]])


def draw(symbols: list[int], spectra: np.ndarray, heard: np.ndarray, logits: np.ndarray) -> None:
    """Draw an utterance: its spectra, when its symbols sound, and the probability of each that is ever likely."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 4.2), layout="constrained")
    times = (np.arange(len(spectra)) * HOP + WINDOW / 2) / RATE
    lowest, highest = BINS.start * RATE / WINDOW, (BINS.stop - 1) * RATE / WINDOW
    above.imshow(spectra.T, aspect="auto", origin="lower", extent=(times[0], times[-1], lowest, highest), cmap="magma")
    above.set(ylabel="frequency, Hz")
    probabilities = softmax(logits)
    below.plot(times, probabilities[:, PAUSE], color="0.6", linestyle=":", label="blank")
    for symbol in np.flatnonzero(probabilities.max(axis=0) > 0.2)[1:]:  # the first is the blank
        below.plot(times, probabilities[:, symbol], label=KEYS[symbol - 1])
    below.fill_between(times, heard != PAUSE, step="mid", color="0.92", label="a symbol sounds")
    below.set(xlabel="time, s", ylabel="probability", xlim=(times[0], times[-1]), ylim=(0, 1.02))
    figure.suptitle(f"symbols {' '.join(KEYS[symbol - 1] for symbol in symbols)}", fontsize="medium")
    below.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    pictures = Path(__file__).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    figure.savefig(pictures / "speech_symbols.svg")


def main() -> None:
    quick = is_quick(__doc__)
    training, test = data(500 if quick else 6000, seed=0), data(100 if quick else 1000, seed=1)
    frames = np.concatenate(training[1])
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)

    def arrays(part: tuple[list, list, list]) -> dict[str, np.ndarray]:
        symbols, spectra, _ = part
        x = padded([(row - mean) / deviation for row in spectra], 0)
        return {"x": x, "y": padded([np.array(row) for row in symbols], -1), "lengths": np.array([*map(len, spectra)])}

    hidden, epochs, batch, rate = (64, 5, 8, 8e-3) if quick else (128, 5, 16, 5e-3)
    model = Sequential(
        lstm=LSTM(len(mean), hidden, bidirectional=True, seed=0), output=Linear(2 * hidden, SYMBOLS + 1, seed=0)
    )
    schedule = Cosine(rate, steps=epochs * len(training[0]) // batch, minimum=rate / 20)
    trainer = Trainer(model, CTC(), Adam(schedule), clip_norm=1.0, metrics={"error_rate": error_rate})
    trainer.fit(**arrays(training), epochs=epochs, batch_size=batch)
    if not quick:
        symbols, spectra, heard = (column[0] for column in test)
        draw(symbols, spectra, heard, model(((spectra - mean) / deviation)[None])[0][0])
    ours = trainer.evaluate(**arrays(test))["error_rate"]
    report("symbol error rate", ours, "nearest spectrum in each window", baseline(training, test))


if __name__ == "__main__":
    main()
