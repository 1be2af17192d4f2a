"""What all tests have in common.

Every call of a kernel is looked at before it is made (:mod:`fastrnn.kernels.guard`). Kernels are compiled, also where
this folder has machine code that was made for a wheel: FASTRNN_SHIPPED=linux-x86-64-v3, say, tests that.

Of the cases of a parametrised test some are run: each pair of values of two parameters is in one of them.
FASTRNN_TEST_SEED chooses others, FASTRNN_TEST_ALL=1 runs all, and the tests marked `slow`. With pytest-xdist,
`python -m pytest -n auto`, processes share what has been compiled before; the tests marked `serial` are left out, and
`python -m pytest -m serial` runs them alone.
"""

import itertools
import os
import random
import time

import compiling

os.environ.setdefault("FASTRNN_CHECK_CALLS", "1")
os.environ.setdefault("FASTRNN_SHIPPED", "0")

ALL = os.environ.get("FASTRNN_TEST_ALL", "0") not in ("", "0")
SEED = os.environ.setdefault("FASTRNN_TEST_SEED", str(time.time_ns() % 10**6))  # the workers' too


def pytest_report_header(config):
    if ALL:
        return "cases: all (FASTRNN_TEST_ALL)"
    return f"cases: a sample, FASTRNN_TEST_SEED={SEED}; all of them with FASTRNN_TEST_ALL=1"


def pytest_collection_modifyitems(config, items):
    left_out = set()
    if hasattr(config, "workerinput"):
        left_out |= {item for item in items if item.get_closest_marker("serial")}
    if not ALL and not config.getoption("lf"):
        left_out |= {item for item in items if item.get_closest_marker("slow")}
        tests = {}
        for item in items:
            if hasattr(item, "callspec"):
                tests.setdefault(item.nodeid.split("[")[0], []).append(item)
        for name, cases in tests.items():
            left_out |= set(cases).difference(sample(name, cases))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def sample(name, cases):
    """Those cases of a test that meet each pair of values; where it is marked `sampled`, so many, each value first."""
    chance = random.Random(f"{SEED} {name}")
    masked, sampled = (cases[0].get_closest_marker(mark) for mark in ("masked", "sampled"))
    if masked:
        cases = [case for case in cases if compiling.is_chosen(SEED, **{**masked.kwargs, **case.callspec.params})]
    cases = chance.sample(cases, len(cases))
    meets = {case: met_by(case, 1 if sampled else 2) for case in cases}
    met, kept = set(), {}
    for wanted in range(max(map(len, meets.values()), default=0), 0, -1):  # those first that meet many at once
        for case in cases:
            if len(meets[case] - met) >= wanted:
                met |= meets[case]
                kept[case] = True
    return list(kept | dict.fromkeys(cases))[: sampled.args[0]] if sampled else kept


def met_by(case, strength):
    """Its parameters' values, or the pairs of them; those that one mark gives together are one."""
    names = [mark.args[0] for mark in case.iter_markers("parametrize")]
    names = [name.replace(",", " ").split() if isinstance(name, str) else name for name in names]
    names += [[name] for name in case.callspec.params.keys() - {*itertools.chain(*names)}]
    values = {(*group, *(id(case.callspec.params[name]) for name in group)) for group in map(sorted, names)}
    return {frozenset(some) for some in itertools.combinations(values, min(strength, len(values)))}


def pytest_sessionstart(session):
    """Compile, on every core, what would be compiled by each process for itself."""
    config = session.config
    processes = getattr(config.option, "numprocesses", None)  # with pytest-xdist
    if processes and not hasattr(config, "workerinput"):
        masked = compiling.ALL_MASKED if ALL else compiling.chosen(SEED)
        whole = any(map(os.path.isdir, config.args))  # and with it tests/test_recurrent_dropout.py
        compiling.ahead(masked if whole else (), processes)
