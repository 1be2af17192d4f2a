"""The walks through time: everything that computes, installed as ``fastrnn.kernels``.

Where the kernel for X is
-------------------------
============================================  =================================================
a cell's formula, forward and backward        :mod:`fastrnn.kernels.cells`, written once for all targets
the walk through time on the CPU              :mod:`fastrnn.kernels.walk`
its set-up: plans, buffers, shares of work    :mod:`fastrnn.kernels.cpu`
what a kernel is called with                  :mod:`fastrnn.kernels.records`; looked at by :mod:`~fastrnn.kernels.guard`
a kernel by its name                          :mod:`fastrnn.kernels.native`
... from the machine code in the package      :mod:`fastrnn.kernels.shipped`
... or compiled on the spot                   :mod:`fastrnn.kernels.compiled`, :mod:`~fastrnn.kernels.lean`
products with packed weights                  :mod:`fastrnn.kernels.product`
packing weights, noticing that they changed   :mod:`fastrnn.kernels.packing`
exp, sigmoid, tanh of a vector                :mod:`fastrnn.kernels.simd`
CPU features, and what is cut to them         :mod:`fastrnn.kernels.tiles`
a cell as an argument of a kernel             :mod:`fastrnn.kernels.stage`
splitting a pass over threads                 :mod:`fastrnn.kernels.threads`
threads that meet at every step               :mod:`fastrnn.kernels.barrier`, :mod:`~fastrnn.kernels.meeting`
the same in plain NumPy, to read and compare  :mod:`fastrnn.kernels.reference`
ONNX's operators with all their attributes    :mod:`fastrnn.kernels.general`, in NumPy
what training needs besides: CTC, sums        :mod:`fastrnn.kernels.train`
a function for XLA to call                    :mod:`fastrnn.kernels.xla`
everything on an NVIDIA GPU                   :mod:`fastrnn.kernels.cuda`, which has such a table of its own
the few instructions that only a GPU has      :mod:`fastrnn.kernels.ptx`
compiled kernels on disk                      :mod:`fastrnn.kernels.cached`; who compiles: :mod:`~fastrnn.kernels.turns`
a line for who waits for a compilation        :mod:`fastrnn.kernels.notice`
importing all of this in the middle of a call :mod:`fastrnn.kernels.loading`
============================================  =================================================

Letters
-------
T time, B batch, I input, H hidden, P projection, G gates, L layers, D directions. W is the size of h and of the output:
P where there is a projection, else H. ``d`` + name is the gradient of the loss with respect to what is named.

Conventions
-----------
A backend (``cpu``, ``reference``, an object of ``cuda``) has three functions, for one layer in one direction::

    forward(cell, x, params, state, *, lengths=None, reset=None, reverse=False, training=False, recompute=False,
            output=None, column=0, recurrent_masks=None)
        -> output, state, tape
    backward(tape, d_output, d_state)
        -> dx, dparams, dstate
    prepare(cell, params)
        -> the layer for many calls: .forward(x, state, ...) as above, and .again(x, steps, state), a short way for a
           call like the last one

* `x` is (T, B, I), `output` and `d_output` (T, B, W). `state` is a tuple, h first: (h,), or (h, c) for LSTM; h is
  (B, W), c (B, H). `params` has PyTorch's names, shapes and order of gates (i f g o; r z n), and so have its gradients.
* :mod:`fastrnn.functional` has checked the arguments: kernels raise nothing. Arrays are C-contiguous, aligned and of
  one dtype. None is written, except ``output[..., column : column + W]`` where a buffer is given.
* Beyond a row's length, output and dx are 0, whatever stands there in x, reset or d_output. The final state is that of
  the row's last step, without any step the initial state.
* Where reset[t, b] is true, row b's state is zero before step t, in the order in which the direction walks.
* recurrent_masks, (B, W) or (G, B, W), are factors of what is multiplied by weight_hh: one for all gates, or one for
  each. That is the previous h, and r h for the candidate of gru_reset_before. CUDA has none.
* The tape refers to x, params and output. Backward only reads it, and may run any number of times.
"""

from fastrnn.kernels.loading import attribute


def __getattr__(name):
    return attribute(__name__, name)
