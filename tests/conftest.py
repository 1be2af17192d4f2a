"""What all tests have in common.

Every call of a kernel is looked at before it is made (:mod:`fastrnn.kernels.guard`). Kernels are compiled, also where
this folder has machine code that was made for a wheel: FASTRNN_SHIPPED=linux-x86-64-v3, say, tests that.
"""

import os

os.environ.setdefault("FASTRNN_CHECK_CALLS", "1")
os.environ.setdefault("FASTRNN_SHIPPED", "0")
