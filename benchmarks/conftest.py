"""The option --quick, and the machine. With --benchmark-disable every benchmark is a test that runs once."""

import pytest

import fastrnn.machine
from grid import QUICK, SHAPES, TINY, shape_name


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmark a few small shapes")


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        option = metafunc.config.option
        shapes = TINY if option.benchmark_disable else QUICK if option.quick else SHAPES
        metafunc.parametrize("shape", shapes, ids=shape_name)


@pytest.fixture(scope="session")
def machine():
    """The processor and the versions, for the record of each benchmark."""
    return {**fastrnn.machine.versions(), **fastrnn.machine.processor()}
