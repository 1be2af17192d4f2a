"""In a process with PyTorch the kernels run on PyTorch's threads, and on as many: the same bits, whatever happens."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import fastrnn.torch  # noqa: E402
from fastrnn.kernels import cpu, threads  # noqa: E402

if threads._borrowed is None:
    pytest.skip("PyTorch's threads cannot be had here: not Linux, or another OpenMP", allow_module_level=True)

pytestmark = pytest.mark.serial


class Counted(threads._Borrowed):
    """Counts how often its threads were begun."""

    begun = 0

    def begin(self, tasks):
        self.begun += 1
        super().begin(tasks)


@pytest.fixture
def borrowed(monkeypatch):
    """PyTorch's threads, of which there are two, for the smallest piece of work; nobody is ever late."""
    library = f"{torch.__path__[0]}/lib/libtorch_cpu.so"
    monkeypatch.setattr(threads, "_borrowed", Counted(library, torch.get_num_threads))
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(threads, "LATE_SECONDS", 1e9)
    monkeypatch.setattr(threads, "REST_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(cpu, "THREAD_FLOPS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield threads._borrowed
    torch.set_num_threads(before)


def slow_parts(parts):
    """The system's number of the thread that each part ran on, where each takes its time."""
    numbers = {}

    def part(p, _):
        numbers[p] = threading.get_native_id()
        time.sleep(0.05)

    threads.run(part, parts)
    return [numbers[p] for p in range(parts)]


def step(layer, x):
    """The bytes of everything that a training step gives."""
    output, last = layer(x)
    last = last if isinstance(last, tuple) else (last,)
    gradients = torch.autograd.grad(output.pow(2).sum() + last[-1].sum(), [x, *layer.parameters()])
    return [tensor.detach().numpy().tobytes() for tensor in (output, *last, *gradients)]


def layer_and_input(kind="LSTM", T=30, B=9, I=20, H=70, **options):
    torch.manual_seed(0)
    return getattr(fastrnn.torch, kind)(I, H, **options), torch.randn(T, B, I, requires_grad=True)


# ---- whose threads


def test_parts_run_on_pytorchs_threads(borrowed):
    torch.set_num_threads(4)
    torch.ones(100_000) + 1  # makes them
    there = os.listdir("/proc/self/task")
    numbers = slow_parts(4)
    assert len(set(numbers)) == 4
    assert numbers[0] == threading.get_native_id()
    assert slow_parts(4) == numbers  # and none of them was ended in between, though not all of them were needed:
    assert slow_parts(2) == numbers[:2]
    torch.ones(100_000) + 1
    assert slow_parts(4) == numbers
    assert {str(number) for number in numbers} <= {*there}
    assert borrowed.begun == 4


def test_our_own_where_pytorch_has_not_so_many(borrowed):
    assert len(set(slow_parts(3))) == 3
    assert borrowed.begun == 0


def test_our_own_after_one_came_late(borrowed, monkeypatch):
    monkeypatch.setattr(threads, "REST_SECONDS", (0.5, 0.5))
    borrowed.rest.seconds = 0.5
    monkeypatch.setattr(threads, "LATE_SECONDS", -1)
    slow_parts(2)
    assert borrowed.begun == 1
    slow_parts(2)
    assert borrowed.begun == 1
    time.sleep(0.5)
    slow_parts(2)
    assert borrowed.begun == 2


def test_our_own_with_another_openmp(monkeypatch):
    monkeypatch.setattr(threads, "_borrowed", None)
    monkeypatch.setattr(threads, "_following", threads._following)
    for library in ("libc.so.6", "there is no such library"):
        threads.follow(lambda: 3, library)
        assert threads._borrowed is None
    assert threads._chosen is not None or threads.get_num_threads() == 3


def test_a_part_that_splits_its_work_again(borrowed):
    done = []

    def part(p, parts):
        threads.run(lambda q, _: done.append((p, q)), 2)

    threads.run(part, 2)
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert borrowed.begun == 1


def test_a_team_of_fewer_than_parts(borrowed, monkeypatch):
    """As OMP_DYNAMIC and OMP_THREAD_LIMIT make it: the caller does what nobody has begun."""
    monkeypatch.setattr(borrowed, "count", lambda: 1)
    monkeypatch.setattr(borrowed, "can_run", lambda parts: True)
    done = []
    threads.run(lambda p, parts: done.append((p, parts)), 3)
    assert sorted(done) == [(0, 3), (1, 3), (2, 3)]
    assert borrowed.begun == 1


# ---- how many


def test_the_number_is_pytorchs_until_another_is_chosen(borrowed):
    for number in (3, 1, 2):
        torch.set_num_threads(number)
        assert fastrnn.get_num_threads() == number
    threads.set_num_threads(5)
    torch.set_num_threads(2)
    assert fastrnn.get_num_threads() == 5


PROGRAM = """
import torch
before = torch.get_num_threads()
import fastrnn.torch
import sys
assert "numba" not in sys.modules, "it has been imported"
torch.set_num_threads(before + 1)
print(fastrnn.get_num_threads() - before)
"""


@pytest.mark.parametrize("number", [None, 17])
def test_a_new_process(number):
    environment = {name: value for name, value in os.environ.items() if name != "FASTRNN_NUM_THREADS"}
    if number:
        environment["FASTRNN_NUM_THREADS"] = str(number)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    difference = int(done.stdout or done.stderr)
    assert difference == 1 if number is None else difference > 1


def test_a_call_like_the_last_one_notices_the_number(borrowed):
    layer, x = layer_and_input(B=4)
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(3):
            expected = layer(x)[0].numpy().tobytes()
        assert borrowed.begun == 0
        torch.set_num_threads(2)
        assert layer(x)[0].numpy().tobytes() == expected
        assert borrowed.begun == 1


# ---- the same bits


@pytest.mark.parametrize("B", [1, 9], ids=["units", "rows"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_bits(kind, B, borrowed):
    layer, x = layer_and_input(kind, B=B, H=260 if B == 1 else 70, num_layers=2, bidirectional=True)
    torch.set_num_threads(1)
    expected = step(layer, x)
    assert borrowed.begun == 0
    for number in (2, 3, 4):
        torch.set_num_threads(number)
        assert step(layer, x) == expected
    assert borrowed.begun >= 3 * 4


def test_bits_of_many_callers(borrowed):
    layer, x = layer_and_input()
    expected = step(layer, x)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: step(layer, x.detach().clone().requires_grad_()), range(64)):
            assert found == expected
    assert not threads._pool.taken_by


# ---- what may go wrong


@pytest.mark.parametrize("where", [0, 1])
def test_an_exception_in_a_part(where, borrowed):
    done = []

    def part(p, _):
        time.sleep(0.02)
        done.append(p)
        if p == where:
            raise ValueError(f"part {p}")

    for _ in range(3):
        done.clear()
        with pytest.raises(ValueError, match=f"part {where}"):
            threads.run(part, 2)
        assert sorted(done) == [0, 1]
        assert borrowed.level() == 0
    assert borrowed.begun == 3
    assert len(set(slow_parts(2))) == 2


def test_interrupts_at_any_point_leave_nothing_behind(borrowed):
    layers = [layer_and_input(T=60, B=1, I=64, H=128), layer_and_input(T=30, B=32, I=64, H=128)]
    expected = [step(*one) for one in layers]
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    random = torch.Generator().manual_seed(2)
    try:
        for _ in range(60):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 2e-4 + 4e-3 * torch.rand(1, generator=random).item())
                while True:
                    threads.run(lambda p, parts: None, 2)
                    for layer, x in layers:
                        threads.run(lambda p, parts: None, 2)
                        with torch.no_grad():
                            layer(x)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert borrowed.level() == 0
            assert [step(*one) for one in layers] == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert not threads._pool.taken_by


def test_a_forked_child(borrowed):
    """PyTorch's threads are not there, and whoever began them would wait for ever."""
    layer, x = layer_and_input()
    expected = [tensor.numpy().tobytes() for tensor in (x.detach(), layer(x)[0].detach())]
    assert borrowed.begun == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about any fork with threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(30)
            with torch.no_grad():
                found = [x.detach().numpy().tobytes(), layer(x)[0].numpy().tobytes()]
            status = 0 if found == expected and fastrnn.get_num_threads() == 2 and len(threads._pool.own.helpers) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


LATE = """
import os, signal, torch
torch.set_num_threads(2)
torch.ones(100_000) + 1  # makes PyTorch's threads, which a child has not
child = os.fork()
if child == 0:
    signal.alarm(60)
    from fastrnn.kernels import cpu, threads
    from fastrnn.torch import LSTM
    cpu.THREAD_FLOPS = 1
    with torch.no_grad():
        LSTM(20, 70)(torch.ones(3, 9, 20))
    os._exit(0 if threads._pool.own.helpers else 2)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_that_imports_it_after_the_fork():
    result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr)


# ---- what is PyTorch's stays PyTorch's


def test_flush_denormal_holds_for_a_pass_and_no_longer(borrowed):
    """Each thread computes as the caller does; afterwards PyTorch's threads are as they were."""
    torch.set_num_threads(4)
    tiny = torch.full((1_000_000,), 1e-20)
    assert (tiny * tiny).count_nonzero() == len(tiny)

    def product():
        time.sleep(0.05)
        return bool((tiny[:1] * tiny[:1]).view(torch.int32).item())

    def of_each():
        found = {}
        threads.run(lambda p, parts: found.setdefault(p, product()), 4)
        return [found[p] for p in range(4)]

    assert torch.set_flush_denormal(True)
    try:
        assert of_each() == [False] * 4
    finally:
        torch.set_flush_denormal(False)
    assert borrowed.begun == 1
    assert (tiny * tiny).view(torch.int32).count_nonzero() == len(tiny)
    assert of_each() == [True] * 4


TIGHT = """
import os, resource, torch
import fastrnn.torch
from fastrnn.kernels import threads
torch.set_num_threads(4)
if os.getuid() == 0:
    os.setuid(65534)  # root is not limited
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
done = []
threads.run(lambda p, parts: done.append(p), 4)
print(sorted(done))
"""


def test_where_no_thread_can_be_started():
    """GNU's OpenMP would end the process."""
    result = subprocess.run([sys.executable, "-c", TIGHT], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "[0, 1, 2, 3]\n"), result.stderr
