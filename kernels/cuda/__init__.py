"""The backend for NVIDIA GPUs, :mod:`fastrnn.kernels.cuda.backend`, and what its kernels agree on.

Where the kernel for X is
-------------------------
============================================  =================================================
what all texts of kernels are made with       :mod:`fastrnn.kernels.cuda.text`, and :mod:`fastrnn.kernels.ptx`
the plain walk through time                   :mod:`fastrnn.kernels.cuda.simple`
a product and a kernel for each step          :mod:`fastrnn.kernels.cuda.steps`
one kernel that keeps the weights             :mod:`fastrnn.kernels.cuda.persistent`
its products                                  :mod:`fastrnn.kernels.cuda.fragments`
its exchange between blocks                   :mod:`fastrnn.kernels.cuda.exchange`
which of them is taken                        :mod:`fastrnn.kernels.cuda.plan`
the layer around a walk                       :mod:`fastrnn.kernels.cuda.layer`
gradients of the parameters                   :mod:`fastrnn.kernels.cuda.parameters`
large products                                :mod:`fastrnn.kernels.cuda.products`
those of PyTorch, CuPy and cuBLAS             :mod:`fastrnn.kernels.cuda.libraries`
compiling and keeping kernels                 :mod:`fastrnn.kernels.cuda.compiled`
memory, streams, launches                     :mod:`fastrnn.kernels.cuda.device`
arrays of PyTorch, CuPy, JAX and Numba        :mod:`fastrnn.kernels.cuda.arrays`
============================================  =================================================

Conventions
-----------
A walk gets buffers of all D directions, which are the z axis of its grid; `reverse` has a bit for each of them.

* sums [D, T, B, G*H]: W_ih x, without a bias, in PyTorch's blocks.
* weights: W_hh [D, G*H, W] and, of a projection, W_hr [D, P, H].
* bias [D, S, H]: what is added to each slot's sum, the slots of both stages.
* initial and final states: h [D, B, W], c [D, B, H].
* output [T, B, row]: direction d has W columns from `column` + d W on; 0 beyond lengths.
* states [D, T+1, B, W]: h in the order of time; step t leads from slot t to t + 1, in reverse from t + 1 to t. A row
  that is not active passes its h on; resets are not seen here.
* tape [D, T, B, cell.tape, H]: what the stages save; LSTM's c stands in it beyond lengths, too.
* d [D, T, B, slots*H (+ P)]: gradients of the gates, slot behind slot; 0 beyond lengths.
* lengths [B] int32, reset [T, B] bytes, or None. Kernels know by a flag what is there, and never ask a pointer.
"""

from fastrnn.kernels.loading import attribute


def __getattr__(name):
    return attribute(__name__, name)
