"""Several threads in one walk, each with hidden units of its own: how they meet after every step.

A plain barrier is the fastest while every thread has a core, and hundreds of times slower than one thread where other
processes hold the cores, because each step waits for a thread that is not running. So nobody waits here for long:

* The first thread begins alone. Once all others have come it invites them, and they share every step from then on.
* Whoever has waited too long for another goes on alone: he does the absent one's part of the step and then all of every
  step. States go to a new place at each step, so what is done twice writes the same bits twice, and who comes late
  finds nothing broken; he sees what has happened and leaves.

The threads share an array of integers, a cache line for each of them. What kernels do with it, without the
interpreter's lock, is :mod:`fastrnn.kernels.meeting`.
"""

from __future__ import annotations

import numpy as np

LINE = 8  # integers in a cache line
MODE, COME, PATIENCE = 0, 1, 2  # places in the first line; the others hold how many meetings a thread has come to

OPEN = 0  # the first thread is alone, the others may come; a mode s + 1 means that all share the steps from s on
CLOSED = -1  # the first thread stays alone
# -2 - part: that part goes on alone, all others leave

TOGETHER, ALONE, LEAVE = 0, 1, 2  # what a meeting ends with


def new(parts: int, patience: int) -> np.ndarray:
    """What `parts` threads share in a walk; `patience` is how many pauses one of them waits for another."""
    sync = np.zeros(LINE * (1 + parts), np.int64)
    sync[PATIENCE] = patience
    return sync


def renew(sync: np.ndarray) -> None:
    """Make it ready for another walk."""
    patience = sync[PATIENCE]
    sync[:] = 0
    sync[PATIENCE] = patience


def failed(sync: np.ndarray) -> bool:
    """Whether some thread did not get a core in time, or came when the work was done."""
    return bool(sync[MODE] <= CLOSED)
