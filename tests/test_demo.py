"""The demonstration: a short training, what it prints, and the command line."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest

from fastrnn import demo, train

TEXT = "the cat sat on the mat and the rat sat on the cat; " * 1100


@pytest.fixture(scope="module")
def corpus():
    return demo.Corpus.from_text(TEXT)


def small_model(corpus, seed=0):
    return demo.character_model(len(corpus.vocabulary), 24, seed=seed, backend="reference")


def test_standard_library_text():
    text = demo.standard_library_text()
    assert len(text) == demo.LENGTH
    assert "def __init__(self" in text
    assert demo.standard_library_text(1000) == text[:1000]


def test_missing_modules_are_left_out(monkeypatch):
    whole = demo.standard_library_text(1000)
    monkeypatch.setattr(demo, "MODULES", ["no_such_module", "sys", *demo.MODULES])  # sys is built in: no source
    assert demo.standard_library_text(1000) == whole


def test_a_text_that_is_too_short():
    with pytest.raises(ValueError, match=r"the text has 5 characters; a model needs at least 50000"):
        demo.Corpus.from_text("short")


def test_windows_go_on_where_the_last_ended():
    pairs = demo.windows(np.arange(10_000))
    assert len(pairs) == 4
    for inputs, targets in pairs:
        assert inputs.shape == targets.shape == (demo.BATCH, demo.WINDOW)
        np.testing.assert_array_equal(targets, inputs + 1)
    for (inputs, _), (following, _) in itertools.pairwise(pairs):
        np.testing.assert_array_equal(following[:, 0], inputs[:, -1] + 1)


def test_a_step_goes_along_the_clipped_gradient(corpus, monkeypatch):
    monkeypatch.setattr(demo, "CLIP", 0.01)
    model, pair = small_model(corpus), demo.windows(corpus.training)[0]
    before = model.state_dict()
    loss, state = demo.train_step(model, train.SGD(1.0), pair, None)
    again, _ = demo.train_step(model, train.SGD(1e-9), pair, None)
    assert again < loss
    moved = {name: before[name] - array for name, array in model.parameters.items()}
    assert train.global_norm(moved) == pytest.approx(0.01, rel=1e-3)  # rounding of the parameters
    assert state[1].shape == (1, demo.BATCH, 24)


def short_training(corpus, seed, seconds=60.0):
    model, out = small_model(corpus, seed), io.StringIO()
    reached = demo.train(model, corpus, 2, seconds, demo.Progress(out))
    return model, reached, out.getvalue()


def test_training_lowers_the_loss_and_is_reproducible(corpus):
    first, reached, printed = short_training(corpus, seed=3)
    assert reached.epochs == 2
    assert reached.validation_loss < 0.7 * np.log(len(corpus.vocabulary))
    assert printed.count("validation loss") == 2
    assert "\r" not in printed
    again, _, _ = short_training(corpus, seed=3)
    other, _, _ = short_training(corpus, seed=4)
    for name, parameter in first.parameters.items():
        np.testing.assert_array_equal(parameter, again.parameters[name])
    assert not np.array_equal(first.parameters["output.weight"], other.parameters["output.weight"])
    written, _ = demo.write_and_time(first, corpus, 40)
    assert written == demo.write_and_time(again, corpus, 40)[0]
    assert len(written) == 41  # the prompt has a letter that this text has not: its first character stands for it


def test_training_stops_when_its_time_is_over(corpus):
    _, reached, printed = short_training(corpus, seed=0, seconds=1e-9)
    assert reached.epochs == 0
    assert "1e-09 s are over in epoch 1" in printed


@pytest.mark.parametrize(("seconds", "epochs"), [(1e-3, 1), (29.0, 1), (56.0, 2), (1e6, 6)])
def test_as_many_epochs_as_fit(corpus, seconds, epochs, monkeypatch):
    share = 25.0 / len(demo.windows(corpus.training))
    monkeypatch.setattr(demo.Learner, "step", lambda learner, pair: (share, 1.0))
    assert demo.epochs_in_time(corpus, 8, 6, seconds) == epochs


def test_interrupted_training_tells_what_it_reached(corpus, monkeypatch):
    steps = []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return 1.0, None

    monkeypatch.setattr(demo, "train_step", step)
    _, reached, printed = short_training(corpus, seed=0)
    assert reached.interrupted
    assert reached.characters > 0
    assert "interrupted in epoch 1" in printed


def test_progress_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    progress = demo.Progress(out)
    progress.show(0.5, "loss 1.0")
    progress.line("done")
    bar, line = out.getvalue().split("\r\x1b[K")[1:]
    assert bar == "  [############............] loss 1.0"
    assert line == "done\n"


def test_progress_elsewhere(monkeypatch):
    """A line after a second, and then seldom: every epoch has one of its own."""
    clock = iter([0.0, 0.5, 1.1, 1.1, 5.0, 11.2, 11.2, 11.3, 12.0, 21.0, 21.9, 22.1, 22.1])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    out = io.StringIO()
    progress = demo.Progress(out)
    for step in range(5):
        progress.show(0.5, f"step {step}")
    progress.line("epoch")
    for step in range(5, 8):
        progress.show(0.5, f"step {step}")
    assert out.getvalue().split("\n") == ["  step 1", "  step 3", "epoch", "  step 7", ""]


def test_comparison_takes_the_pair_in_the_middle(corpus, monkeypatch):
    seconds = {None: iter([9.0, 9.0, *[1.0] * 5]), "reference": iter([1.0, 1.0, 100.0, 2.0, 4.0, 3.0, 5.0])}

    class Learner:
        def __init__(self, characters, hidden, backend):
            self.seconds = seconds[backend]

        def step(self, pair):
            return next(self.seconds), 1.5

    monkeypatch.setattr(demo, "Learner", Learner)
    assert demo.compare_with_reference(corpus, 8, seconds=0.0) == demo.Comparison(1.0, 4.0, 5)


def test_comparison_looks_at_the_losses(corpus, monkeypatch):
    losses = itertools.count(1.0)
    monkeypatch.setattr(demo.Learner, "step", lambda learner, pair: (1.0, next(losses)))
    with pytest.raises(RuntimeError, match="with the NumPy reference"):
        demo.compare_with_reference(corpus, 8)


def test_whole_demonstration(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert demo.run(epochs=1, hidden=8, text=path) == 0
    printed = capsys.readouterr().out
    for part in ("perplexity", "characters/s", "With NumPy alone", "times as long"):
        assert part in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--epochs", "0"], "argument --epochs: a whole number of 1 or more was expected, not '0'"),
        (["demo", "--hidden", "-3"], "argument --hidden: a whole number of 1 or more was expected, not '-3'"),
        (["demo", "--hidden", "1.5"], "argument --hidden: a whole number of 1 or more was expected, not '1.5'"),
        (["demo", "--seconds", "nan"], "argument --seconds: a number above 0 was expected, not 'nan'"),
        (["demo", "--seconds", "soon"], "argument --seconds: a number above 0 was expected, not 'soon'"),
        (["demo", "--text", "no/such/file"], "No such file or directory: 'no/such/file'"),
        (["demo", "--text", __file__], "a model needs at least"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_options(arguments, message, capsys):
    from fastrnn.__main__ import main

    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "fastrnn", "--help"], capture_output=True, text=True, check=True)
    assert "clear-cache" in done.stdout
