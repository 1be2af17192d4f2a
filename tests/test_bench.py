"""`python -m fastrnn bench`: its table, its end in time, what it says when something is wrong."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from fastrnn import bench
from fastrnn.__main__ import main
from fastrnn.bench import Case, Worker, WorkerError

TINY = Case("gru", (3, 2, 5, 7), "forward")


class FakeWorker:
    """Takes so many seconds for every call; fails where it has something to say."""

    seconds = {"fastrnn": 0.001, "reference": 0.002, "torch": 0.004, "onnxruntime": 0.003, "jax": 0.008}  # noqa: RUF012
    errors = {}  # noqa: RUF012
    late = ()

    def __init__(self, library, threads):
        self.library, self.factor, self.calls = library, 1 if threads > 1 else 1.5, itertools.count()

    def times(self, case, seconds, *, check, patience):
        if self.library in self.errors:
            raise WorkerError(self.library, self.errors[self.library])
        if case in self.late:
            raise TimeoutError
        return [self.factor * self.seconds[self.library]]

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    """No process, three cases, every library there."""
    cases = (
        Case("lstm", (9, 8, 7, 6), "forward"),
        Case("lstm", (9, 8, 7, 6), "training"),
        Case("gru", (9, 8, 7, 6), "step"),
    )
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "SUBSET", cases)
    monkeypatch.setattr(bench, "installed", lambda: list(bench.LIBRARIES))
    monkeypatch.setattr(bench, "versions", dict)
    monkeypatch.setattr(FakeWorker, "errors", {})
    monkeypatch.setattr(FakeWorker, "late", ())


def table(text):
    """Its lines, split where two spaces are."""
    lines = text.split("\n\n", 1)[1].splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


@pytest.mark.usefixtures("fake")
def test_table(capsys):
    assert main(["bench", "--threads", "2"]) == 0
    lines = table(capsys.readouterr().out)
    assert lines[0] == ["fastrnn", "fastrnn", "NumPy", "torch onnxruntime", "jax"]
    assert lines[1] == ["1 thread", "2 threads"]
    assert lines[2] == ["LSTM inference 9,8,7,6", "1.500 ms", "1.000 ms", "2.00×", "4.00×", "3.00×", "8.00×"]
    assert lines[3] == ["LSTM training 9,8,7,6", "1.500 ms", "1.000 ms", "2.00×", "4.00×", "-", "8.00×"]
    assert lines[5] == ["geometric mean", "2.00×", "4.00×", "3.00×", "8.00×"]


@pytest.mark.usefixtures("fake")
def test_one_thread_and_chosen_libraries(capsys):
    assert main(["bench", "--threads", "1", "--libraries", "jax"]) == 0
    lines = table(capsys.readouterr().out)
    assert lines[:2] == [["fastrnn", "NumPy", "jax"], ["1 thread"]]
    assert main(["bench", "--threads", "1", "--libraries"]) == 0
    assert table(capsys.readouterr().out)[0] == ["fastrnn", "NumPy"]


@pytest.mark.usefixtures("fake")
def test_a_library_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(FakeWorker, "errors", {"torch": "ImportError: libtorch.so is not there"})
    assert main(["bench", "--threads", "2"]) == 1
    captured = capsys.readouterr()
    assert table(captured.out)[2] == ["LSTM inference 9,8,7,6", "1.500 ms", "1.000 ms", "2.00×", "-", "3.00×", "8.00×"]
    assert captured.err == "python -m fastrnn bench: torch: ImportError: libtorch.so is not there\n"


@pytest.mark.usefixtures("fake")
def test_fastrnn_that_fails_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(FakeWorker, "errors", {"fastrnn": "AssertionError: output[0] is 1, expected 2"})
    assert main(["bench"]) == 1
    captured = capsys.readouterr()
    assert table(captured.out)[2] == ["LSTM inference 9,8,7,6", "failed"]
    assert "expected 2" in captured.err


@pytest.mark.usefixtures("fake")
def test_what_the_time_was_enough_for(monkeypatch, capsys):
    monkeypatch.setattr(FakeWorker, "late", bench.SUBSET[2:])
    assert main(["bench", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert table(out)[4] == ["GRU step 9,8,7,6", "time is up"]
    assert "2 of 3 were timed; --seconds allows more." in out
    monkeypatch.setattr(FakeWorker, "late", bench.SUBSET)
    assert main(["bench", "--threads", "2"]) == 1


def test_a_library_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "installed", lambda: ["fastrnn", "reference"])
    assert main(["bench", "--libraries", "onnxruntime"]) == 2
    expected = "python -m fastrnn bench: onnxruntime is not installed; it needs: onnxruntime, onnx\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--threads", "none"], ["--libraries", "tensorflow"]])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_it_ends_in_time_and_leaves_no_process(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SUBSET", (TINY, TINY._replace(operation="training")))
    start = time.monotonic()
    assert bench.run(60, 1, []) == 0
    assert time.monotonic() - start < 60
    lines = table(capsys.readouterr().out)
    assert [line[0] for line in lines[2:]] == ["GRU inference 3,2,5,7", "GRU training 3,2,5,7", "geometric mean"]
    assert bench.run(0.01, 1, []) == 1
    assert "time is up" in capsys.readouterr().out


def test_importing_it_imports_no_other_library():
    program = "import sys, fastrnn.bench; print({'torch', 'jax', 'onnx', 'onnxruntime', 'numba'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- a worker


@pytest.fixture
def worker():
    made = Worker("reference", 1)
    yield made
    made.close()


@pytest.mark.serial
def test_worker_times_calls(worker):
    times = worker.times(TINY, 0.2, check=True)
    assert len(times) > 1
    assert all(0 < time < 1 for time in times)
    assert worker.times(TINY, 0.01, product=True)


def test_worker_says_what_went_wrong(worker):
    with pytest.raises(WorkerError, match=r"^reference: RNN inference 1,1: ValueError: ") as caught:
        worker.times(Case("rnn_tanh", (1, 1), "forward"), 0.01)
    assert caught.value.library == "reference"
    assert worker.times(TINY, 0.01)  # and goes on


def test_worker_that_has_ended():
    gone = Worker("nothing of that name", 1)
    try:
        with pytest.raises(WorkerError, match="its process ended with status 1: KeyError"):
            gone.times(TINY, 0.01)
    finally:
        gone.close()


def test_worker_is_not_waited_for_longer_than_patience_lasts(worker):
    with pytest.raises(TimeoutError, match="GRU inference 3,2,5,7"):
        worker.times(TINY, 100, patience=0.1)


def test_threads_reach_the_worker(worker, monkeypatch):
    assert {"FASTRNN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"} <= set(bench.environment(3))
    program = "import fastrnn; print(fastrnn.get_num_threads())"
    for name, value in bench.environment(3).items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


# ---- the clock and the check


@pytest.mark.serial
def test_the_first_call_counts_only_if_it_is_the_only_one():
    durations = iter([0.05, *[0.001] * 1000])
    assert max(bench.call_times(lambda: time.sleep(next(durations)), 0.1)) < 0.05
    assert len(bench.call_times(lambda: time.sleep(0.02), 0.01)) == 1


@pytest.mark.serial
def test_what_is_called_before_is_not_counted():
    called = []
    times = bench.call_times(lambda: None, 0.05, lambda: called.append(time.sleep(0.01)))
    assert len(called) == len(times) + 1
    assert max(times) < 0.01


@pytest.mark.serial
def test_rounds_end_at_the_limit(monkeypatch):
    class Slow(FakeWorker):
        def times(self, *arguments, **options):
            time.sleep(0.01)
            return [0.01]

    workers = {"fastrnn": Slow("fastrnn", 1), "onnxruntime": Slow("onnxruntime", 1)}
    assert {name: len(times) for name, times in bench.measure(workers, TINY, rounds=9, limit=0).items()} == {
        "fastrnn": 3,
        "onnxruntime": 3,
    }
    assert list(bench.measure(workers, TINY._replace(operation="training"), rounds=1)) == ["fastrnn"]


def test_a_wrong_answer_is_noticed():
    case = TINY._replace(operation="training")
    contestant = bench.Reference(case)
    bench.check(contestant, case)
    contestant.layer.parameters["weight_hh_l0"] += 1e-3
    with pytest.raises(AssertionError, match=r"GRU training 3,2,5,7: d"):
        bench.check(contestant, case)


def test_lengths():
    lengths = bench.lengths_of((200, 1000, 1, 1))
    assert (lengths.min(), lengths.max(), lengths.dtype) == (1, 200, np.int64)
    assert str(TINY._replace(lengths=True)) == "GRU inference 3,2,5,7 lengths"
