"""What all tests have in common: every call of a kernel is looked at before it is made (`fastrnn.kernels.guard`)."""

import os

os.environ.setdefault("FASTRNN_CHECK_CALLS", "1")
