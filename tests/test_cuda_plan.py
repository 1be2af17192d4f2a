"""Which way a layer goes on a GPU, and how a persistent walk is laid out over it."""

import re

import pytest

pytest.importorskip("greenlet", reason="the simulated GPU needs greenlet")

from fastrnn import backend as backends
from fastrnn.kernels.cuda import exchange, plan
from fastrnn.kernels.cuda.backend import Backend, backend
from fastrnn.kernels.cuda.layer import Layer
from fastrnn.kernels.cuda.simple import Size
from simulated_device import SimulatedDevice

ONE_STAGE = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru"]


def chosen(cell, H, B, *, mode="float32", way=None, dtype="float32", D=1, **attributes):
    device = SimulatedDevice()
    for name, value in attributes.items():
        setattr(device, name, value)
    return plan.choose(device, Layer(None, cell, (), mode, way), Size(5, B, H, H, D), dtype)


@pytest.mark.parametrize("cell", ONE_STAGE)
@pytest.mark.parametrize("H", [64, 128, 200, 256, 512, 768, 1024])
@pytest.mark.parametrize("B", [1, 8, 16])
@pytest.mark.parametrize("D", [1, 2])
def test_layouts_fit_the_gpu(cell, H, B, D):
    found = chosen(cell, H, B, D=D)
    if found.way != "persistent":
        assert D == 2 or H > 768
        return
    for layout in (found.forward, found.backward):
        x, y, z = layout.grid(D)
        assert x * y * z <= 132
        assert x * layout.shape.units >= H
        assert layout.groups * layout.tiles * layout.shape.tile >= B
        assert layout.shape.items * 32 * layout.shape.warps >= layout.shape.units * layout.shape.tile * layout.tiles


def test_the_way_that_is_chosen():
    assert chosen("lstm", 512, 8).way == "persistent"
    assert chosen("lstm", 4096, 8).way == "steps"  # weights that no GPU has registers for
    assert chosen("lstm", 16, 8, dtype="float64").way == "simple"
    assert chosen("lstm_projected", 512, 8).way != "persistent"
    assert chosen("gru", 512, 8, capability=(7, 5)).way != "persistent"
    assert chosen("gru", 512, 8, way="simple").way == "simple"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("it is for float32, not float64", {"dtype": "float64"}),
        ("lstm_projected has two products in a step", {"cell": "lstm_projected"}),
        ("it needs a GPU of compute capability 8.0 or later", {"capability": (7, 5)}),
        ("H = 4096 with B = 8 does not fit into the registers of 132 multiprocessors", {"H": 4096}),
    ],
)
def test_a_way_that_cannot_be_gone(message, arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen(**{"cell": "lstm", "H": 512, "B": 8, "way": "persistent", **arguments})


def test_names_of_modes_and_ways_are_those_of_the_kernels():
    assert (*exchange.MODES,) == backends.MODES
    assert plan.WAYS == backends.WAYS
    assert isinstance(backend("cuda"), Backend)
