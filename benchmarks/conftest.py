"""The option --quick, and the machine. With --benchmark-disable every benchmark is a test that runs once."""

import pytest

import grid
from fastrnn import bench, machine


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmark a few small shapes")


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        option = metafunc.config.option
        shapes = grid.TINY if option.benchmark_disable else grid.QUICK if option.quick else grid.SHAPES
        metafunc.parametrize("shape", shapes, ids=grid.shape_name)


@pytest.fixture(scope="session", name="machine")
def _machine():
    """The processor and the versions, for the record of each benchmark."""
    return machine.versions() | machine.processor() | bench.versions()
