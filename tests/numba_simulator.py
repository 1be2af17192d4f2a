"""Run the plain kernels in the simulator that Numba brings, and compare with the reference: a program of its own.

NUMBA_ENABLE_CUDASIM=1 must be set. With "built-in" as its argument, it takes the CUDA target that is part of Numba,
whether numba-cuda is installed or not.
"""

import sys

if "built-in" in sys.argv[1:]:  # numba-cuda takes the built-in target's place by a finder
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "NumbaCudaFinder"]

import numba
import test_cuda_simple as simple
from numba import cuda

import simulator
from simulated_device import SimulatedDevice, argument

sys.setswitchinterval(5e-5)  # its threads are Python's, and wait for each other all the time


CELLS = ["gru", "lstm_projected", "gru_reset_before"]  # a step takes this simulator a while


class Cuda:
    """What `cuda` is to a kernel: in it, Numba's simulator gives this module's name `cuda` another meaning."""

    def __getattr__(self, name):
        return getattr(cuda, name)


class Ops:
    """As fastrnn.kernels.ptx."""

    cuda = Cuda()
    float32, float64 = numba.float32, numba.float64
    activations = staticmethod(simulator.Ops.activations)

    @staticmethod
    def device(function):
        return function


class NumbaDevice(SimulatedDevice):
    library_product = staticmethod(simple.numpy_product)

    def launch(self, kernel, grid, arguments, *, shared=0, cooperative=False):
        function = kernel.make(Ops, *kernel.constants)

        def entry(*arguments):
            function(*arguments)

        given = [argument(*pair) for pair in zip(arguments, kernel.arguments, strict=True)]
        cuda.jit(entry)[grid, kernel.threads](*given)


def main():
    for cell in CELLS:
        tasks = simple.task(cell, 2, 2, 2, 3, directions=(False, True), lengths=[2, 1], reset=[[0, 0], [1, 0]])
        layer = simple.Layer(NumbaDevice(), tasks, threads=2)
        layer.forward()
        layer.backward()
        for task, results in zip(tasks, layer.results(), strict=True):
            simple.compare(task, results)
        print(cell, flush=True)
    print(getattr(cuda, "implementation", "Built-in"))


main()
