"""The parts of benchmarks/gpu.py and gpu_limits.py that need no GPU: points, the model, records, tables, kernels."""

import math
import time
from types import SimpleNamespace

import gpu
import gpu_limits
import numpy as np
import pytest

import results
from fastrnn.kernels.cuda import plan

DEVICE = SimpleNamespace(
    multiprocessors=132, shared_memory=227 << 10, capability=(9, 0), library_product=None, has_library=True
)
POINT = gpu.Point("lstm", "bfloat16", 64, 16, 512, 1, "training")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The results', and the keys of their sections."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "KEYS", results.KEYS | gpu.KEYS | gpu_limits.KEYS)
    return tmp_path


@pytest.fixture
def device():
    pytest.importorskip("greenlet", reason="the simulated GPU needs greenlet")
    from simulated_device import SimulatedDevice

    return SimulatedDevice(seed=1)


# ---- options and points


def test_all_points():
    every = list(gpu.points(gpu.options([])))
    assert len(every) == len(set(every)) == 3 * 4 * 2 * 5 * 5 * 2 * 2
    assert every[0] == ("lstm", "float32", 1024, 16, 512, 1, "forward")
    assert {(point.T, point.directions) for point in every[: len(every) // 4]} == {(1024, 1)}


def test_few_points():
    given = gpu.options("--cells gru --modes tf32 float16 --hidden 256 --batches 1 --steps 64 --directions 1".split())
    assert [point[:2] for point in gpu.points(given)] == [("gru", "tf32")] * 2 + [("gru", "float16")] * 2
    quick = gpu.options(["--quick", "--limit-seconds", "9"])
    assert len(list(gpu.points(quick))) == 3 * 4 * 2
    assert quick.limit_seconds == 9
    assert quick.name is None
    assert str(POINT) == "LSTM training bfloat16 T=64 B=16 H=512"
    assert str(POINT._replace(directions=2)).endswith("H=512 both ways")


def test_options_that_are_not_there(capsys):
    for wrong in (["--cells", "mamba"], ["--modes", "int8"], ["--name", "a/b"], ["--hidden", "many"]):
        with pytest.raises(SystemExit, match="2"):
            gpu.options(wrong)
    assert "--hidden" in capsys.readouterr().err


def test_the_name_of_a_gpu():
    assert gpu.name_of("NVIDIA H200") == "nvidia-h200"
    assert gpu.name_of("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


@pytest.mark.parametrize("script", [gpu, gpu_limits])
def test_without_a_gpu(script, monkeypatch, capsys):
    def none():
        raise RuntimeError("the NVIDIA driver sees no GPU")

    monkeypatch.setattr(gpu, "get_device", none)
    monkeypatch.setattr("sys.argv", ["script", "--quick"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err == "nothing is measured without an NVIDIA GPU: the NVIDIA driver sees no GPU\n"
    assert not list(results.FOLDER.iterdir())


# ---- the model


def test_every_point_has_a_plan_and_a_model():
    for point in gpu.points(gpu.options([])):
        chosen = gpu.planned(DEVICE, point)
        assert chosen.way in plan.WAYS
        assert 1e-7 < gpu.modelled(DEVICE, point, chosen) < 1e-3
    assert gpu.planned(DEVICE, POINT).way == "persistent"


def test_training_has_two_passes():
    for H in (64, 512, 4096):
        point, chosen = POINT._replace(H=H), gpu.planned(DEVICE, POINT._replace(H=H))
        forward = gpu.modelled(DEVICE, point._replace(operation="forward"), chosen)
        assert gpu.modelled(DEVICE, point, chosen) > 1.5 * forward


def test_kernels_to_compile():
    forward = POINT._replace(operation="forward")
    names = [kernel.make.__name__ for kernel in gpu.kernels(DEVICE, [forward, POINT, POINT._replace(T=1024)])]
    assert names == ["make_forward", "make_forward", "make_backward"]
    gpu.compile_all([], (9, 0), 2, math.inf)
    gpu.compile_all([], (9, 0), 2, time.monotonic())


# ---- records


def record(point=POINT, ours=2e-4, theirs=3e-4):
    return gpu.figures(point, {"fastrnn": (ours, 5e-5), "cudnn": (theirs, 4e-5)}, "persistent", 1e-6)


def test_figures():
    assert record() == {
        **POINT._asdict(),
        "microseconds": {"fastrnn": 3.125, "cudnn": 4.688},
        "ratio": 1.5,
        "way": "persistent",
        "modelled": 1.0,
        "share": 0.32,
        "host_microseconds": {"fastrnn": 50.0, "cudnn": 40.0},
    }
    assert gpu.line(record()) == "   3.125 µs a step, cuDNN    4.688: 1.50×, persistent, 32%"


def torch_that_waits(fails=()):
    def synchronize():
        if fails:
            raise fails[0]

    return SimpleNamespace(cuda=SimpleNamespace(synchronize=synchronize))


def test_points_are_written_one_by_one(monkeypatch, capsys):
    some = [POINT._replace(B=B) for B in (1, 8, 64)]

    def measure(torch, device, point, seconds):
        if point.B == 8:
            raise ValueError("fastrnn: dx is off by 1.0e+00 of its norm")
        return record(point)

    monkeypatch.setattr(gpu, "measure", measure)
    given = SimpleNamespace(name="a-gpu", seconds=0.1)
    assert gpu.run(torch_that_waits(), DEVICE, given, some, math.inf) == (3, 1)
    found = results.read("a-gpu")["gpu"]
    assert [one.get("ratio") for one in found] == [1.5, None, 1.5]
    assert found[1]["error"] == "ValueError: fastrnn: dx is off by 1.0e+00 of its norm"
    assert gpu.missing("a-gpu", [*some, POINT]) == [POINT]
    assert gpu.run(torch_that_waits(), DEVICE, given, some, time.monotonic() - 1) == (0, 0)
    assert "the time is up after 0 of 3 points" in capsys.readouterr().out


def test_a_gpu_that_has_failed_ends_the_run(monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda *arguments: record())
    torch = torch_that_waits([RuntimeError("CUDA error: an illegal memory access was encountered")])
    with pytest.raises(RuntimeError, match="illegal memory"):
        gpu.run(torch, DEVICE, SimpleNamespace(name="a-gpu", seconds=0.1), [POINT] * 2, math.inf)
    assert len(results.read("a-gpu")["gpu"]) == 1


def test_tables(monkeypatch, capsys):
    failed = {**POINT._replace(B=8)._asdict(), "error": "RuntimeError: no"}
    results.merge("a-gpu", "gpu", [record(), record(POINT._replace(B=1), theirs=1e-4), failed])
    monkeypatch.setattr("sys.argv", ["gpu.py", "--table", "--name", "a-gpu"])
    gpu.main()
    means, rows, wrong = capsys.readouterr().out.strip().split("\n\n")
    assert means.splitlines()[2] == "| lstm | bfloat16 | training | 1 | 2 | 0.87× | 0.50× |"
    assert rows.splitlines()[2].startswith("| lstm | bfloat16 | 64 | 16 | 512 | 1 | training | 3.125 | 4.688 | 1.5× |")
    assert wrong == "* LSTM training bfloat16 T=64 B=8 H=512: RuntimeError: no"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--table"])
    with pytest.raises(SystemExit, match="--name"):
        gpu.main()


# ---- with PyTorch on the CPU in the GPU's place


class Stand(gpu.Theirs):
    """For ours: PyTorch's in float32."""

    error = 0.0

    def __init__(self, torch, point, module, x, d_output):
        super().__init__(torch, point._replace(mode="float32"), module, x, d_output)

    def training(self):
        output, dx = super().training()
        return output, dx * (1 + self.error)


@pytest.mark.parametrize("cell", gpu.CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_answers_are_checked(monkeypatch, cell, directions):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for name, value in (("PLACE", "cpu"), ("Ours", Stand), ("OursBothWays", Stand)):
        monkeypatch.setattr(gpu, name, value)
    for mode in ("float32", "bfloat16"):
        point = gpu.Point(cell, mode, 70, 2, 8, directions, "training")
        gpu.check(torch, point)
        with monkeypatch.context() as patch:
            patch.setattr(Stand, "error", 2 * gpu.TOLERANCE[mode])
            with pytest.raises(ValueError, match="fastrnn: dx is off by"):
                gpu.check(torch, point)


@pytest.mark.parametrize("cell", gpu.CELLS)
def test_both_directions_in_the_simulator(monkeypatch, device, cell):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    class Simulated(gpu.OursBothWays):
        def _in(self, array):
            return device.upload(array.numpy())

        def _out(self, buffer):
            return torch.from_numpy(device.download(buffer))

    monkeypatch.setattr(gpu, "get_device", lambda like: device)
    for name, value in (("PLACE", "cpu"), ("OursBothWays", Simulated)):
        monkeypatch.setattr(gpu, name, value)
    gpu.check(torch, gpu.Point(cell, "float32", 3, 2, 5, 2, "training"))


def test_tf32_is_switched_and_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting")
    before = matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    try:
        for on in (True, False):
            gpu.use_tf32(torch, on)
            assert {matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision} == {"tf32" if on else "ieee"}
    finally:
        matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = before


def test_times():
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.now = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.now - self.now)

    torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event, synchronize=lambda: None))
    called = []
    on_gpu, host = gpu.times(torch, lambda: (called.append(None), time.sleep(2e-3)), 0.02)
    assert 2e-3 <= on_gpu <= host < 0.1
    assert 3 + 1 + 5 <= len(called) <= 3 + 1 + 10


# ---- limits


@pytest.mark.parametrize(
    ("kernel", "blocks", "words"),
    [
        (gpu_limits.answers_kernel(32), 2, 8),
        (gpu_limits.answers_kernel(32), 4, 8),
        (gpu_limits.exchange_kernel(4, 32), 3, 12),
        (gpu_limits.exchange_kernel(16, 32), 5, 80),
    ],
)
def test_kernels_of_limits(device, monkeypatch, kernel, blocks, words):
    """All words come, and nobody waits for ever; the time of a step is that between runs of two lengths."""
    counts = []

    def seconds(device, prepare, call):
        prepare()
        call()
        counts.append(None)
        return [7.0, 4.0][len(counts) - 1]

    assert gpu_limits.step_seconds(device, kernel, blocks, words, 6, seconds) == 1.0


def test_a_word_that_never_comes(device, monkeypatch):
    monkeypatch.setattr(gpu_limits, "LOOKS", 20)

    def seconds(device, prepare, call):
        prepare()
        call()
        return 1.0

    with pytest.raises(RuntimeError, match="make_answers waited in vain"):
        gpu_limits.step_seconds(device, gpu_limits.answers_kernel(32), 1, 8, 4, seconds)


def test_machine_code_of_limits():
    from sass import report

    for kernel in (gpu_limits.answers_kernel(256), gpu_limits.exchange_kernel(8, 256), gpu_limits.NOTHING):
        code = report(kernel)
        assert code.spills == code.local_loads == code.doubles == 0
        assert code.registers <= 64


def test_clocks():
    assert gpu_limits.parsed_clocks("1980, 3201, 1980, 3201, 41, 120.5, [N/A]") == {
        "clocks.sm": 1980.0, "clocks.mem": 3201.0, "clocks.max.sm": 1980.0, "clocks.max.mem": 3201.0,
        "temperature.gpu": 41.0, "power.draw": 120.5,
    }  # fmt: skip


def test_records_of_limits(capsys):
    (one,) = gpu_limits.records("answer", [("0 watching blocks", {"microseconds": 0.512345})])
    results.merge("a-gpu", "gpu limits", [one])
    assert results.read("a-gpu")["gpu limits"] == [
        {"limit": "answer", "of": "0 watching blocks", "microseconds": 0.5123}
    ]
    assert capsys.readouterr().out == "answer: 0 watching blocks: microseconds 0.5123\n"


def test_what_limits_ask_of_the_gpu(monkeypatch):
    """Every generator, with a GPU that does nothing and a clock that stands at 1."""
    device = SimpleNamespace(
        multiprocessors=132, wait=lambda: None, fill=lambda *_: None, launch=lambda *_, **__: None,
        graph=lambda key, record: record(), empty=lambda *_: None, upload=lambda array: array, download=np.asarray,
    )  # fmt: skip
    monkeypatch.setattr(gpu_limits, "gpu_seconds", lambda *_: 1.0)
    monkeypatch.setattr(gpu_limits, "step_seconds", lambda *_: 1e-6)
    assert [of for of, _ in gpu_limits.answers(device, 10)][-1] == "130 watching blocks of 256 threads"
    assert len(list(gpu_limits.exchanges(device, 10))) == 16
    assert [of for of, _ in gpu_limits.launches(device, 3)] == [
        "empty kernel, alone", "empty kernel, cooperative", "empty kernel, graph",
    ]  # fmt: skip
    monkeypatch.setattr(gpu_limits, "read_clocks", lambda: {"clocks.sm": 1.0})
    assert [found for _, found in gpu_limits.clocks(device, 0.01)] == [{"clocks.sm": 1.0}] * 2
