"""Threads that share the hidden units of one walk: the same bits, whoever is late, and nobody waits for long."""

import collections
import threading
import time

import numpy as np
import pytest
from numba import njit

from calm import others_hold_cores
from fastrnn import GRU, LSTM, RNN, functional
from fastrnn.kernels import barrier, cpu, meeting, threads
from fastrnn.kernels.records import address
from fastrnn.kernels.simd import integers_at
from fastrnn.testing import problem

pytestmark = pytest.mark.serial


@pytest.fixture(autouse=True)
def own_threads(monkeypatch):
    """And not PyTorch's, where another test has imported fastrnn.torch: tests/test_torch_threads.py is about those."""
    monkeypatch.setattr(threads, "_borrowed", None)


@pytest.fixture
def shared(monkeypatch):
    """Every pass is shared by as many threads as there are; the fixture counts how each sharing ended."""
    ends = collections.Counter()
    failed = barrier.failed

    def counted(sync):
        mode = int(sync[barrier.MODE])
        ends["shared" if mode > 0 else "closed" if mode == barrier.CLOSED else "taken over"] += 1
        return failed(sync)

    monkeypatch.setattr(barrier, "failed", counted)
    monkeypatch.setattr(cpu, "THREAD_FLOPS", 1)
    monkeypatch.setattr(cpu, "FEW_ROWS", 1000)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "REST_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    before = threads.get_num_threads()
    yield ends
    threads.set_num_threads(before)


def results(cell, one, recompute=False):
    """The bytes of everything that forward and backward give."""
    output, last, tape = functional.forward(
        cell, one.x, one.params, one.state, lengths=one.lengths, reverse=one.reverse, training=True, recompute=recompute
    )
    dx, dparams, dstate = functional.backward(tape, one.d_output, one.d_state)
    inference, _, _ = functional.forward(cell, one.x, one.params, one.state, lengths=one.lengths, reverse=one.reverse)
    return [array.tobytes() for array in (output, *last, dx, *dparams.values(), *dstate, inference)]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_projected", "gru", "gru_reset_before"])
def test_bits(cell, lengths, reverse, shared, monkeypatch):
    """With so little patience that threads are given up all the time, and with a lot."""
    name, options = ("lstm", {"P": 137}) if cell == "lstm_projected" else (cell, {})
    sizes = [(40, 1, 20, 260), (90, 3, 70, 200)]
    for T, B, I, H in sizes * 4:  # more than once only where no other thread has come
        if shared["shared"] + shared["taken over"] > 0 and sizes[0] == (T, B, I, H):
            break
        one = problem(name, T, B, I, H, dtype="float32", lengths=lengths, reverse=reverse, **options)
        threads.set_num_threads(1)
        expected = results(name, one)
        for patience in (1, 5, 20, 100, 1000, 100_000):
            monkeypatch.setattr(cpu, "_patience", lambda flops, patience=patience: patience)
            for count in (2, 3):
                threads.set_num_threads(count)
                assert results(name, one) == expected, (patience, count)
    if shared["shared"] + shared["taken over"] == 0 and others_hold_cores():
        pytest.skip("other processes hold the cores: no second thread has come in time")
    assert shared["shared"] + shared["taken over"] > 0, shared


@pytest.mark.parametrize("sizes", [(0, 1), (4, 0), (0, 0), (1, 0), (0, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_nothing_to_share(kind, sizes, shared):
    """No steps or no rows, at sizes where threads share units, rows, or nothing."""
    for H in (5, 600):
        layer, (T, B) = kind(9, H, seed=0), sizes
        x = np.ones((T, B, 9), np.float32)
        for count in (1, 2, 3):
            threads.set_num_threads(count)
            for _ in range(2):  # the second time by what the first has kept
                output, state = layer(x)
                assert output.shape == (T, B, H)
                y, _ = layer.step(np.ones((B, 9), np.float32))
                assert y.shape == (B, H)
                for options in ({}, {"recompute": True}, {"lengths": [T] * B}):
                    output, state, tape = layer.forward(x, **options)
                    gradients = layer.backward(tape, output, state)
                    assert gradients.x.shape == x.shape
                    if 0 in sizes:
                        assert not gradients.params["weight_ih_l0"].any()


def test_bits_with_recompute(shared):
    one = problem("lstm", 70, 1, 20, 200, dtype="float32")
    threads.set_num_threads(1)
    expected = results("lstm", one)
    threads.set_num_threads(2)
    assert results("lstm", one, recompute=True) == expected


def test_states_of_more_steps_than_there_are_slots(shared, monkeypatch):
    monkeypatch.setattr(cpu, "SLOT_BYTES", 1)
    one = problem("lstm", 50, 1, 20, 200, dtype="float32")
    threads.set_num_threads(1)
    expected = results("lstm", one)
    threads.set_num_threads(2)
    assert results("lstm", one) == expected


def test_a_new_number_of_threads_counts_from_the_next_call_on(shared):
    layer, x = LSTM(20, 200, seed=0), problem("lstm", 30, 1, 20, 200, dtype="float32").x
    threads.set_num_threads(1)
    for _ in range(3):
        expected = layer(x)[0].tobytes()
    assert not shared
    threads.set_num_threads(2)
    assert layer(x)[0].tobytes() == expected
    assert sum(shared.values()) == 1


# ---- the protocol, one function at a time


@njit(nogil=True)
def _meet(sync, part, parts, n):
    return meeting.meet(integers_at(sync), part, parts, n)


@njit(nogil=True)
def _join(sync):
    return meeting.join(integers_at(sync))


@njit(nogil=True)
def _invite(sync, parts, s):
    return meeting.invite(integers_at(sync), parts, s)


@njit(nogil=True)
def _close(sync):
    meeting.close(integers_at(sync))


def meet(sync, *numbers):
    return _meet(address(sync), *numbers)


def join(sync):
    return _join(address(sync))


def invite(sync, *numbers):
    return _invite(address(sync), *numbers)


def close(sync):
    _close(address(sync))


def test_nobody_is_invited_before_all_have_come():
    sync = barrier.new(3, 10)
    sync[barrier.COME] = 1
    assert not invite(sync, 3, 7)
    sync[barrier.COME] = 2
    assert invite(sync, 3, 7)
    assert join(sync) == 7
    assert not barrier.failed(sync)


def test_who_comes_too_late_leaves():
    sync = barrier.new(2, 10)
    close(sync)
    assert join(sync) == -1
    assert barrier.failed(sync)


def test_who_is_not_invited_leaves_and_says_so():
    sync = barrier.new(2, 10)
    assert join(sync) == -1
    assert not invite(sync, 2, 3)


def test_who_waits_too_long_goes_on_alone():
    sync = barrier.new(2, 10)
    sync[barrier.COME] = 1
    assert invite(sync, 2, 0)
    assert meet(sync, 0, 2, 0) == barrier.ALONE
    assert meet(sync, 1, 2, 0) == barrier.TOGETHER  # the other one was there: it need not wait
    assert meet(sync, 1, 2, 1) == barrier.LEAVE
    assert barrier.failed(sync)
    barrier.renew(sync)
    assert not barrier.failed(sync)


def test_all_who_come_meet():
    sync = barrier.new(2, 10**7)
    sync[barrier.COME] = 1
    assert invite(sync, 2, 0)
    ends = []
    other = threading.Thread(target=lambda: ends.append([meet(sync, 1, 2, n) for n in range(100)]))
    other.start()
    ends.append([meet(sync, 0, 2, n) for n in range(100)])
    other.join()
    assert ends == [[barrier.TOGETHER] * 100] * 2


# ---- the pool


def test_parts_that_no_thread_begins_are_done_by_the_caller(monkeypatch):
    pool = threads._Pool()
    monkeypatch.setattr(threads, "_pool", pool)

    class Asleep:
        processor = -1

        def __init__(self):
            self.tasks = threads.SimpleQueue()

    pool.own.helpers = [Asleep(), Asleep()]
    done = []
    threads.run(lambda p, parts: done.append((p, parts)), 3)
    assert sorted(done) == [(0, 3), (1, 3), (2, 3)]
    done.clear()
    threads.share(lambda p, parts: done.append((p, parts)), 3)
    assert done == [(0, 3)]


def test_after_a_failure_nothing_is_shared_for_a_while(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads, "REST_SECONDS", (0.2, 10.0))
    threads._pool.rest.seconds = 0.2
    done = []

    def part(p, parts):
        done.append(parts)

    threads.share(part, 2)
    assert set(done) == {2}
    threads.shared(False)
    done.clear()
    threads.share(part, 2)
    assert done == [1]
    time.sleep(0.25)
    done.clear()
    threads.share(part, 2)
    assert set(done) == {2}


def test_rests_grow_with_failures_and_shrink_with_success(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    rests = []
    for _ in range(20):
        threads.shared(False)
        rests.append(threads._pool.rest.seconds)
    shortest, longest = threads.REST_SECONDS
    assert rests[:2] == [4 * shortest, 16 * shortest]
    assert rests[-1] == longest
    for _ in range(20):
        threads.shared(True)
    assert threads._pool.rest.seconds == shortest


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, np.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, np.inf),
        ({"cpu.max": "what is this"}, np.inf),
        ({}, np.inf),
    ],
)
def test_quota(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._quota(str(tmp_path)) == expected


def test_a_quota_limits_the_threads(monkeypatch):
    monkeypatch.setattr(threads, "_quota", lambda: 0.5)
    assert threads.cores() == 1
