"""Compilation for a GPU without one: it gives the same again, and disk keeps it but nothing stale."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from fastrnn.kernels.cuda import compiled, text

cuda = pytest.importorskip("numba.cuda", reason="this Numba has no CUDA target")
if cuda.implementation == "Built-in":
    pytest.skip("numba-cuda is not installed", allow_module_level=True)


def make(ops, stage, dtype, n):
    """h' of many units from their gate sums, which come by way of shared memory."""
    stage = text.STAGES[stage]
    step, load = text.formula(ops, stage.forward, dtype), text.load_each(ops, range(stage.gates))
    cuda, number = ops.cuda, getattr(ops, dtype)

    def kernel(sums, h, size):
        shared = cuda.shared.array(n, number, alignment=16)
        i = cuda.blockIdx.x * n + cuda.threadIdx.x
        shared[cuda.threadIdx.x] = h[i]
        cuda.syncthreads()
        if i < size:
            results, _ = step(load(sums, i, size), (shared[n - 1 - cuda.threadIdx.x],))
            h[i] = results[0]

    return kernel


def kernel(stage="lstm", dtype="float32", threads=64):
    return text.Kernel(make, (stage, dtype, threads), (f"{dtype}*", f"{dtype}*", "int32"), threads)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastrnn-cuda"


@pytest.fixture
def compilations(monkeypatch):
    """The kernels that were compiled and not read."""
    done, really = [], compiled._compile

    def count(kernel, capability):
        done.append((kernel, capability))
        return really(kernel, capability)

    monkeypatch.setattr(compiled, "_compile", count)
    return done


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_a_cubin_and_what_the_assembler_says(capability):
    cubin, entry, log = compiled.compile_kernel(kernel(), capability)
    assert cubin.startswith(b"\x7fELF")
    assert entry == "make"
    assert f"for 'sm_{capability[0]}{capability[1]}'" in log
    assert "0 bytes spill stores" in log
    assert "registers" in log


def test_the_same_kernel_gives_the_same_cubin_in_any_process():
    program = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import test_cuda_compiled as test
for stage in ("rnn_relu", "lstm", "lstm"):
    made = test.compiled._compile(test.kernel(stage), (9, 0))
print(hashlib.sha256(made.cubin).hexdigest(), hashlib.sha256(repr(made.log).encode()).hexdigest())
"""
    folder = os.path.dirname(__file__)
    printed = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1


def test_each_stage_and_dtype_has_its_own_code():
    kernels = [kernel(stage, dtype) for stage in ("gru", "lstm") for dtype in ("float32", "float64")]
    assert len({compiled._compile(each, (9, 0)).cubin for each in kernels}) == 4


def test_float32_stays_float32():
    """No double anywhere, whatever Python numbers the formulas hold."""
    with compiled._device_of((9, 0)):
        from fastrnn.kernels import ptx

        arguments = [compiled._type(argument) for argument in kernel().arguments]
        code, _ = cuda.compile_ptx(make(ptx, "lstm", "float32", 64), tuple(arguments), device=False, cc=(9, 0))
    assert ".f64" not in code


def test_a_second_time_it_comes_from_disk(compilations, cache):
    first = compiled.compile_kernel(kernel(), (9, 0))
    assert compiled.compile_kernel(kernel(), (9, 0)) == first
    assert len(compilations) == 1
    assert compiled.cache_files() == list(cache.iterdir())


@pytest.mark.parametrize(
    ("other", "capability"),
    [
        (kernel("gru"), (9, 0)),
        (kernel(dtype="float64"), (9, 0)),
        (kernel(threads=32), (9, 0)),
        (kernel()._replace(threads=32), (9, 0)),
        (kernel()._replace(arguments=("float32*", "float32*", "int64")), (9, 0)),
        (kernel(), (8, 0)),
    ],
)
def test_every_part_of_a_kernel_is_in_the_key(other, capability):
    assert compiled._key(other, capability) != compiled._key(kernel(), (9, 0))


def test_sources_and_versions_are_in_the_key(monkeypatch):
    before = compiled._key(kernel(), (9, 0))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_sources", lambda: "other")
        assert compiled._key(kernel(), (9, 0)) != before
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_versions", lambda: "other")
        assert compiled._key(kernel(), (9, 0)) != before
    names = dict(compiled._versions()[1])
    assert {"numba", "numba-cuda", "llvmlite"} <= set(names)
    assert compiled._key(kernel(), (9, 0)) == before


def test_what_is_made_of_a_local_function_is_not_kept(compilations, cache):
    local = kernel()._replace(make=lambda ops, *constants: make(ops, *constants))
    with pytest.raises(TypeError):
        compiled._compile(local, "no capability")
    assert "<locals>" in local.make.__qualname__
    compilations.clear()
    for _ in range(2):
        with pytest.raises(Exception, match=r"."):
            compiled.compile_kernel(local._replace(arguments=("nonsense",)), (9, 0))
    assert len(compilations) == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\nx", b"not json", b"\xff\xfe\n"])
def test_a_damaged_file_is_compiled_anew(damage, compilations, cache):
    good = compiled.compile_kernel(kernel(), (9, 0))
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for bad in (damage, content[:-1], content[:40] + b"?" + content[41:]):
        file.write_bytes(bad)
        assert compiled.compile_kernel(kernel(), (9, 0)) == good
        assert file.read_bytes() == content
    assert len(compilations) == 4


def test_another_kernels_file_is_not_taken_for_this_one(compilations, cache):
    good = compiled.compile_kernel(kernel(), (9, 0))
    (file,) = cache.iterdir()
    other = compiled.compile_kernel(kernel("gru"), (9, 0))
    assert other != good
    (another,) = set(cache.iterdir()) - {file}
    file.write_bytes(another.read_bytes())
    assert compiled.compile_kernel(kernel(), (9, 0)) == good
    assert len(compilations) == 3


def test_a_full_disk_leaves_no_half_file(compilations, cache, monkeypatch):
    def write_bytes(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(type(cache), "write_bytes", write_bytes)
    assert compiled.compile_kernel(kernel(), (9, 0)).cubin
    assert list(cache.iterdir()) == []


def test_a_folder_that_takes_nothing_is_tolerated(compilations, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder can be here")
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path / "file" / "x", tmp_path / "second"])
    first = compiled.compile_kernel(kernel(), (9, 0))
    assert [path.parent for path in compiled.cache_files()] == [tmp_path / "second"]
    assert compiled.compile_kernel(kernel(), (9, 0)) == first
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path / "file" / "x"])
    assert compiled.compile_kernel(kernel(), (9, 0)) == first
    assert len(compilations) == 2


def test_folders_without_numba_cache_dir(monkeypatch):
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", "")
    beside, users = compiled.folders()
    assert beside.parent == type(beside)(compiled.__file__).parent
    assert users.name == "fastrnn-cuda"


def test_numbas_device_is_replaced_for_this_thread_and_this_time_only(monkeypatch):
    from numba.cuda import dispatcher

    monkeypatch.setattr(dispatcher, "get_current_device", lambda: "the GPU")
    seen = []
    with compiled._device_of((8, 6)):
        other = threading.Thread(target=lambda: seen.append(dispatcher.get_current_device()))
        other.start()
        other.join()
        assert dispatcher.get_current_device().compute_capability == (8, 6)
    assert seen == ["the GPU"]
    assert dispatcher.get_current_device() == "the GPU"
    with pytest.raises(ZeroDivisionError), compiled._device_of((8, 6)):
        raise ZeroDivisionError
    assert dispatcher.get_current_device() == "the GPU"


def test_a_compiler_that_is_missing(monkeypatch, cache):
    from numba.cuda.cudadrv.error import NvvmSupportError

    def compile_ptx(*arguments, **options):
        raise NvvmSupportError("libNVVM cannot be found")

    monkeypatch.setattr(cuda, "compile_ptx", compile_ptx)
    with pytest.raises(ImportError, match=r"without its compiler, NVVM: pip install 'fastrnn\[cuda13\]'"):
        compiled.compile_kernel(kernel(), (9, 0))
    assert not cache.exists()


def test_clear_cache_removes_cubins_too(monkeypatch, tmp_path, cache, capsys):
    from fastrnn import machine
    from fastrnn.__main__ import main

    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    compiled.compile_kernel(kernel(), (9, 0))
    assert main(["clear-cache"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"Removed 1 kernels for GPUs from {cache}"
    assert list(cache.iterdir()) == []
