"""Whether this machine has its cores to itself: what shows a second thread's worth needs a second core."""

import subprocess
import sys

from fastrnn.kernels import threads

SHARE = """
import time
start, used = time.perf_counter(), time.process_time()
while time.perf_counter() - start < 0.5:
    pass
print((time.process_time() - used) / (time.perf_counter() - start))
"""


def others_hold_cores():
    """Whether a process on each core gets less than all of it."""
    spin = [subprocess.Popen([sys.executable, "-c", SHARE], stdout=subprocess.PIPE) for _ in range(threads.cores())]
    return min(float(process.communicate()[0]) for process in spin) < 0.9
