"""What a program does with the modules of fastrnn.torch: compile, copy, save, checkpoint, tie, replace."""

import copy
import functools
import importlib
import io
import pickle
import subprocess
import sys
import weakref

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import fastrnn.torch as ours  # noqa: E402
from fastrnn import functional  # noqa: E402

T, B, I, H = 5, 3, 4, 6
KINDS = [("RNN", "rnn_tanh", {}), ("LSTM", "lstm", {}), ("LSTM", "lstm", {"proj_size": 2}), ("GRU", "gru", {})]
each_kind = pytest.mark.parametrize(("kind", "cell", "own"), KINDS, ids=["rnn", "lstm", "lstm-projected", "gru"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads take long for small things where others use the machine, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def layer_of(kind="LSTM", **options):
    torch.manual_seed(0)
    return getattr(ours, kind)(I, H, **options, dtype=torch.float64)


def gradients(layer, x, **options):
    output, last = layer(x, **options)
    last = last if isinstance(last, tuple) else (last,)
    loss = output.pow(2).sum() + sum(state.sum() for state in last)
    return [output, *last, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# ---- operators and compilation

OPCHECKS = [f"test_{name}" for name in "schema autograd_registration faketensor aot_dispatch_static".split()]
OPCHECKS.append("test_aot_dispatch_dynamic")


@each_kind
@pytest.mark.filterwarnings("ignore")
def test_opcheck(kind, cell, own):
    layer = layer_of(kind, num_layers=2, bidirectional=True, **own)
    params, x = list(layer.parameters()), random(T, B, I, requires_grad=True)
    K, W = 4, layer.proj_size or H
    h, c = random(K, B, W, requires_grad=True), random(K, B, H, requires_grad=True)
    c = c if kind == "LSTM" else None
    masks, each = [random(T, B, 2 * W)], len(params) // K
    forward, backward = torch.ops.fastrnn.forward.default, torch.ops.fastrnn.backward.default
    check = functools.partial(torch.library.opcheck, test_utils=OPCHECKS)
    check(forward, (x, h, c, params, masks, None, None, cell, each, 2, True))
    # Without a tape: what stands in that beyond a row's length is anything.
    lengths, reset = torch.tensor([5, 2, 0]), torch.rand(T, B) > 0.5
    params, x = [param.detach() for param in params], x.detach()
    check(forward, (x, None, None, params, [], lengths, reset, cell, each, 2, False))
    output, _, _, kept = forward(x, None, None, params, masks, None, None, cell, each, 2, True)
    tensors = torch.ones_like(output), None, None, x, None, None, output, params, masks, kept, None, None
    check(backward, (*tensors, cell, each, 2))


def test_operators_with_wrong_operands():
    """The kernels would read and write beside them."""
    layer, x = layer_of("LSTM", num_layers=2, proj_size=2), random(T, B, I)
    params, masks = [p.detach() for p in layer.parameters()], [random(T, B, 2)]
    forward, backward = torch.ops.fastrnn.forward.default, torch.ops.fastrnn.backward.default
    given = {"x": x, "h": random(2, B, 2), "c": random(2, B, H), "params": params, "masks": masks}
    output, _, _, kept = forward(*given.values(), None, None, "lstm", 5, 1, True)
    back = {"d_output": output, "d_h": random(2, B, 2), "d_c": random(2, B, H)}
    tape = {"output": output, "kept": kept}

    def there_and_back(options=("lstm", 5, 1), **changes):
        now = {**given, **back, **tape, **changes}
        x, h, c, params, masks, *gradients, output, kept = now.values()
        if not {*changes} & {*back, *tape}:
            forward(x, h, c, params, masks, None, None, *options, True)
        backward(*gradients, x, h, c, output, params, masks, kept, None, None, *options)

    there_and_back()
    for name, value in {**given, **back, **tape}.items():
        for i in range(len(value)) if isinstance(value, list) else [None]:
            one = value if i is None else value[i]
            for wrong in (one[..., :-1], one[:-1], one.double() if one.dtype == torch.float32 else one.float()):
                with pytest.raises(ValueError, match="expected"):
                    there_and_back(**{name: wrong if i is None else [*value[:i], wrong, *value[i + 1 :]]})
    for changes in ({"x": x[0]}, {"params": params[1:]}, {"params": []}, {"masks": masks * 2}, {"kept": kept[1:]}):
        with pytest.raises(ValueError, match=r"expected|shorter"):
            there_and_back(**changes)
    for options in (("lstm", 5, 2), ("gru", 5, 1), ("lstm", 0, 1), ("lstm", 4, 1), ("other", 5, 1)):
        with pytest.raises(ValueError, match="expected"):
            there_and_back(options)


def test_the_operator_without_a_tape_cannot_go_back():
    layer, x = layer_of("GRU"), random(T, B, I, requires_grad=True)
    params = list(layer.parameters())
    output, *_ = torch.ops.fastrnn.forward.default(x, None, None, params, [], None, None, "gru", 4, 1, False)
    with pytest.raises(RuntimeError, match="training=False"):
        output.sum().backward()


@each_kind
@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_break(kind, cell, own):
    torch._dynamo.reset()
    layer = layer_of(kind, num_layers=2, bidirectional=True, batch_first=True, **own)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random(B, T, I, requires_grad=True)
    assert_same(gradients(compiled, x), gradients(layer, x))
    lengths, reset = torch.tensor([2, 0, 5]), torch.rand(B, T) > 0.5
    options = {"lengths": lengths, "reset": reset}
    assert_same(gradients(compiled, x, **options), gradients(layer, x, **options))
    for batch in (2, 5, 7):
        x = random(batch, T + batch, I, requires_grad=True)
        assert_same(gradients(compiled, x), gradients(layer, x))
    with torch.no_grad():
        assert_same([compiled(x)[0]], [layer(x)[0]])


def test_compiled_with_dropout_and_wrong_lengths():
    torch._dynamo.reset()
    layer = layer_of("GRU", num_layers=2, dropout=0.5)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), random(T, B, I)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    with pytest.raises(ValueError, match="lengths"):
        compiled(x, lengths=torch.tensor([1, 2, T + 1]))


@each_kind
@pytest.mark.filterwarnings("ignore")
def test_compiled_once_for_all_batches_and_times(kind, cell, own):
    torch._dynamo.reset()
    graphs, backend = [], torch._dynamo.lookup_backend("aot_eager")
    layer = layer_of(kind, num_layers=2, **own)
    compiled = torch.compile(
        layer, fullgraph=True, backend=lambda *given: graphs.append(given) or backend(*given), dynamic=True
    )
    counts = set()
    for steps, batch in ((5, 3), (9, 2), (2, 8)):
        x, lengths = random(steps, batch, I, requires_grad=True), torch.arange(batch) % (steps + 1)
        assert_same(gradients(compiled, x, lengths=lengths), gradients(layer, x, lengths=lengths))
        counts.add(len(graphs))
    assert len(counts) == 1


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_cells_in_a_loop(kind):
    torch._dynamo.reset()
    cell, x = layer_of(kind), random(T, B, I, requires_grad=True)

    def run(x):
        state = None
        for x_t in x:
            state = cell(x_t, state)
        return state if isinstance(state, torch.Tensor) else state[0]

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        output = function(x)
        found.append([output, *torch.autograd.grad(output.pow(2).sum(), [x, *cell.parameters()])])
    assert_same(*found)


@each_kind
@pytest.mark.filterwarnings("ignore")
def test_exported_saved_and_loaded(kind, cell, own):
    layer, x, file = layer_of(kind, num_layers=2, **own).eval(), random(T, B, I), io.BytesIO()
    sizes = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}
    arguments = {"input": x, "lengths": torch.tensor([2, 0, 5])}
    shapes = {"input": sizes, "lengths": {0: sizes[1]}}
    torch.export.save(torch.export.export(layer, (), arguments, dynamic_shapes=shapes), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for given in (arguments, {"input": random(T + 4, 2, I), "lengths": torch.tensor([9, 1])}):
        expected, found = layer(**given), program(**given)
        assert_same(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected))
    plain = torch.export.export(layer, (x,)).module()
    assert_same([plain(x)[0]], [layer(x)[0]])


def test_meta():
    layer = ours.LSTM(I, H, device="meta")
    output, (h, c) = layer(torch.zeros(T, B, I, device="meta"))
    assert (output.shape, h.shape, c.shape) == ((T, B, H), (1, B, H), (1, B, H))
    assert output.device.type == "meta"
    x = torch.zeros(T, B, I, device="meta", requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore")  # of checks, which a trace does not repeat
def test_traced_without_gradients():
    layer, x = layer_of("GRU"), random(T, B, I)
    with torch.no_grad():
        traced, longer = torch.jit.trace(layer, x), random(T + 3, B + 1, I)
        assert_same([traced(longer)[0]], [layer(longer)[0]])


def test_reload_does_not_define_twice():
    library = ours._library
    assert importlib.reload(ours)._library is library


# ---- copies and files


@each_kind
def test_copies_and_files(kind, cell, own, tmp_path):
    layer, x = layer_of(kind, num_layers=2, **own), random(T, B, I, requires_grad=True)
    expected = gradients(layer, x)
    layer.eval()
    with torch.no_grad():
        layer(x)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    torch.save(layer, tmp_path / "layer.pt")
    fresh = layer_of(kind, num_layers=2, **own)
    fresh.reset_parameters()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    others = [
        fresh,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ]
    for other in others:
        assert other._kept is None
        assert_same(gradients(other, x), expected)
        assert not other.training or other is fresh
    others[1].weight_hh_l0.data.zero_()
    assert_same(gradients(layer, x), expected)


def test_functional_call():
    layer, x = layer_of(), random(T, B, I, requires_grad=True)
    parameters = {name: random(*p.shape, requires_grad=True) for name, p in layer.named_parameters()}
    other = layer_of()
    other.load_state_dict(parameters)
    output, _ = torch.func.functional_call(layer, parameters, (x,))
    found = torch.autograd.grad(output.sum(), list(parameters.values()))
    expected = other(x)[0]
    assert_same([output, *found], [expected, *torch.autograd.grad(expected.sum(), list(other.parameters()))])
    assert layer._kept is None


@each_kind
def test_tied_parameters(kind, cell, own):
    layer = layer_of(kind, num_layers=3, **own)
    if layer.weight_ih_l1.shape != layer.weight_ih_l2.shape:
        pytest.fail("layers above the first have one shape")
    separate, x = copy.deepcopy(layer), random(T, B, I)
    layer.weight_ih_l2 = layer.weight_ih_l1
    separate.weight_ih_l2.data = separate.weight_ih_l1.data
    layer(x)[0].sum().backward()
    separate(x)[0].sum().backward()
    assert len(list(layer.parameters())) == len(list(separate.parameters())) - 1
    torch.testing.assert_close(layer.weight_ih_l1.grad, separate.weight_ih_l1.grad + separate.weight_ih_l2.grad)


def test_checkpoint_keeps_nothing_and_gives_the_same_gradients():
    layer, x = layer_of(num_layers=2, dropout=0.5), random(T, B, I, requires_grad=True)
    inputs = [x, *layer.parameters()]
    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(x)[0].pow(2).sum(), inputs)
    torch.manual_seed(3)
    output = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    assert_same(torch.autograd.grad(output.pow(2).sum(), inputs), expected)
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=True).pow(2).sum().backward()
    assert_same([tensor.grad for tensor in inputs], expected)


def test_saved_tensors_hooks_see_all_that_is_large():
    layer, x = layer_of("GRU", num_layers=2), random(20, B, I, requires_grad=True)
    expected, seen = gradients(layer, x), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t.clone(), lambda t: t):
        found = gradients(layer, x)
    assert_same(found, expected)
    assert sum(seen) > 2 * 20 * B * (H + 4 * H)  # outputs and tapes


def test_a_graph_frees_its_memory_without_the_garbage_collector():
    import gc

    layer, x = layer_of(), random(T, B, I)
    gone = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        output, _ = layer(x)
        output.sum().backward()
        del output, x
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", ["parametrization", "hook"])
def test_weight_norm(make):
    found = []
    for module in (torch.nn, ours):
        torch.manual_seed(0)
        layer = module.GRU(I, H, dtype=torch.float64)
        if make == "parametrization":
            torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        else:
            pytest.importorskip("torch.nn.utils.weight_norm")
            with pytest.warns(FutureWarning):
                torch.nn.utils.weight_norm(layer, "weight_hh_l0")
        torch.manual_seed(1)
        x = random(T, B, I)
        layer(x)[0].sum().backward()
        names = sorted(name for name, _ in layer.named_parameters())
        found.append([layer.get_parameter(name).grad for name in names])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_moved_to_another_dtype():
    layer, x = layer_of("GRU"), random(T, B, I)
    with torch.no_grad():
        layer(x)
        narrow = layer.float()(x.float())[0]
        torch.testing.assert_close(narrow.double(), layer.double()(x)[0], rtol=1e-4, atol=1e-5)


def test_data_parallel_replicas_keep_nothing_of_the_layer():
    layer = layer_of()
    layer(random(T, B, I))
    assert layer._kept is not None
    assert layer._replicate_for_data_parallel()._kept is None


# ---- on a GPU, by way of NumPy: what stands between the modules and fastrnn.functional


@each_kind
def test_the_way_to_the_gpu(kind, cell, own, monkeypatch):
    def forward(cell, x, params, state, *, backend, **options):
        assert backend == "cuda"
        params = {name: param.numpy() for name, param in params.items()}
        state = None if state is None else [s.numpy() for s in state]
        output, last, tape = original[0](cell, x.numpy(), params, state, **options)
        return torch.from_numpy(output), tuple(map(torch.from_numpy, last)), tape

    def backward(tape, d_output, d_state):
        given = [None if d is None else d.numpy() for d in (d_output, *d_state)]
        dx, d_params, d_start = original[1](tape, given[0], tuple(given[1:]))
        d_params = {name: torch.from_numpy(array) for name, array in d_params.items()}
        return torch.from_numpy(dx), d_params, tuple(map(torch.from_numpy, d_start))

    original = functional.forward, functional.backward
    layer = layer_of(kind, num_layers=2, bidirectional=True, **own)
    monkeypatch.setattr(functional, "forward", forward)
    monkeypatch.setattr(functional, "backward", backward)
    params, x = list(layer.parameters()), random(T, B, I, requires_grad=True)
    h, c = random(4, B, layer.proj_size or H, requires_grad=True), random(4, B, H, requires_grad=True)
    c = c if kind == "LSTM" else None
    masks, lengths = [torch.rand(T, B, 2 * (layer.proj_size or H), dtype=torch.float64)], torch.tensor([5, 2, 0])
    rows = ours._rows(lengths, None, T, B)
    found = []
    for results in (
        ours._run_on_gpu(layer._spec, x, h, c, params, masks, rows, True),
        layer._compute(x, h, c, params, masks, lengths, None),
    ):
        inputs = [tensor for tensor in (x, h, c, *params) if tensor is not None]
        loss = sum(r.pow(2).sum() for r in results)
        found.append([*results, *torch.autograd.grad(loss, inputs, retain_graph=True)])
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        found[-1] += [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    first, *_ = ours._run_on_gpu(layer._spec, x, None, None, params, [], (None, None), True)
    torch.testing.assert_close(first, layer(x)[0])


@pytest.mark.gpu
@each_kind
def test_on_a_gpu(kind, cell, own):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no NVIDIA GPU")
    layer, x = getattr(ours, kind)(I, H, num_layers=2, bidirectional=True, **own), torch.randn(T, B, I)
    x.requires_grad_()
    expected = gradients(layer, x)
    found = gradients(layer.cuda(), x.detach().cuda().requires_grad_())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


# ---- replace_ and restore_


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(I, H, 2, bidirectional=True, dropout=0.2, dtype=torch.float64)
        self.blocks = torch.nn.ModuleList([torch.nn.GRU(2 * H, H, bias=False, dtype=torch.float64)])
        self.blocks.append(self.blocks[0].__class__(H, H, dtype=torch.float64))
        self.rnn = torch.nn.RNN(H, 3, nonlinearity="relu", dtype=torch.float64)
        self.again = self.rnn
        self.projected = torch.nn.LSTM(3, 5, proj_size=2, dtype=torch.float64)

    def forward(self, x):
        x, _ = self.encoder(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.projected(self.again(x)[0])[0]


NAMES = ["encoder", "blocks.0", "blocks.1", "rnn", "again", "projected"]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_replace_and_restore():
    torch.manual_seed(0)
    model, x = Model(), random(T, B, I)
    before = {name: model.get_submodule(name) for name in NAMES}
    parameters, names = list(model.parameters()), list(model.state_dict())
    called = []
    handle = model.rnn.register_forward_hook(lambda module, args, output: called.append(type(module)))
    model.encoder.eval()
    model.rnn.note = "kept"
    expected = model(x)
    expected_gradients = torch.autograd.grad(expected.sum(), parameters)

    assert ours.replace_(model) == NAMES
    assert ours.replace_(model) == []
    for name in NAMES:
        assert type(model.get_submodule(name)) is getattr(ours, type(before[name]).__name__)
    assert model.again is model.rnn
    assert model.rnn.note == "kept"
    assert not model.encoder.training
    assert model.rnn.training
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    output = model(x)
    torch.testing.assert_close(output, expected)
    for one, other in zip(torch.autograd.grad(output.sum(), parameters), expected_gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert called == [torch.nn.RNN, ours.RNN]

    assert ours.restore_(model) == NAMES
    for name in NAMES:
        assert type(model.get_submodule(name)) is type(before[name])
        assert repr(model.get_submodule(name)) == repr(before[name])
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), expected)
    handle.remove()
    model(x)
    assert len(called) == 3
    assert model.rnn.note == "kept"


def test_cells_stay():
    model = torch.nn.ModuleList([torch.nn.LSTMCell(I, H), torch.nn.GRU(I, H)])
    assert ours.replace_(model) == ["1"]
    assert type(model[0]) is torch.nn.LSTMCell


def test_a_filter_chooses():
    model = Model()
    assert ours.replace_(model, lambda module, name: isinstance(module, torch.nn.GRU)) == ["blocks.0", "blocks.1"]
    assert type(model.encoder) is torch.nn.LSTM
    assert ours.restore_(model, lambda module, name: name.endswith("1")) == ["blocks.1"]


def test_what_cannot_be_replaced_leaves_the_model_as_it_was():
    class Own(torch.nn.LSTM):
        pass

    def with_own_forward():
        layer = torch.nn.GRU(I, H)
        layer.forward = lambda x: x
        return layer

    def with_buffer():
        layer = torch.nn.GRU(I, H)
        layer.register_buffer("mask", torch.ones(3))
        return layer

    def with_bound_hook():
        layer = torch.nn.GRU(I, H)
        layer._register_load_state_dict_pre_hook(lambda *arguments: None, with_module=True)
        return layer

    norm = torch.nn.utils.parametrizations.weight_norm
    for error, message, layer in [
        (TypeError, "odd cannot be replaced: layer is a .*Own, expected torch.nn.*subclass", Own(I, H)),
        (TypeError, "subclass", norm(torch.nn.GRU(I, H), "weight_hh_l0")),
        (TypeError, r"weight_ih_l0 is torch.bfloat16.*\.float\(\)", torch.nn.GRU(I, H).bfloat16()),
        (ValueError, "forward of its own", with_own_forward()),
        (ValueError, "mask", with_buffer()),
        (ValueError, "load_state_dict hook", with_bound_hook()),
    ]:
        model = torch.nn.ModuleDict({"fine": torch.nn.LSTM(I, H), "odd": layer})
        with pytest.raises(error, match=message):
            ours.replace_(model)
        assert type(model["fine"]) is torch.nn.LSTM
        assert ours.replace_(model, lambda module, name: name != "odd") == ["fine"]
    with pytest.raises(ValueError, match=r"from_torch\(model\)"):
        ours.replace_(torch.nn.GRU(I, H))
    with pytest.raises(ValueError, match=r"to_torch\(model\)"):
        ours.restore_(ours.GRU(I, H))
    with pytest.raises(TypeError, match="model is a list"):
        ours.replace_([])
    with pytest.raises(
        TypeError, match=r"layer is a .*Linear, expected torch\.nn\.RNN or torch\.nn\.LSTM or torch\.nn\.GRU$"
    ):
        ours.from_torch(torch.nn.Linear(1, 1))


def test_an_optimizer_goes_on():
    torch.manual_seed(0)
    losses = []
    for replace in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.GRU(I, H, dtype=torch.float64)])
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        if replace:
            ours.replace_(model)
        torch.manual_seed(1)
        x = random(T, B, I)
        for _ in range(5):
            loss = model[0](x)[0].pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


# ---- processes

WORKER = """
import sys
import torch
import fastrnn.torch

def train(rank, size, backend):
    torch.manual_seed(0)
    rnn, head = fastrnn.torch.LSTM(4, 6, 2), torch.nn.Linear(6, 1)
    model = torch.nn.ModuleDict({"rnn": rnn, "head": head}).double()
    model.forward = lambda x: head(rnn(x)[0])
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)[:, :, rank::size]  # batches, steps, rows, inputs
    run = model if size == 1 else torch.nn.parallel.DistributedDataParallel(model)
    run = torch.compile(run, backend=backend) if backend else run
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in x:
        optimizer.zero_grad()
        run(batch).pow(2).mean().backward()
        optimizer.step()
    return model.state_dict()

if __name__ == "__main__":
    rank, store, path = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.save([train(rank, 2, backend) for backend in (None, "aot_eager")], path)
    torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_parameters_of_one(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    program = [sys.executable, "-W", "ignore", "-c", WORKER]
    running = [
        subprocess.Popen(
            [*program, str(rank), str(tmp_path / "store"), str(tmp_path / str(rank))], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        worker = {"__name__": "worker"}
        exec(WORKER, worker)
        expected = worker["train"](0, 1, None)
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.wait()
    for one, other in zip(*(torch.load(tmp_path / str(rank)) for rank in range(2)), strict=True):
        assert_same(one.values(), other.values())
        for name, parameter in expected.items():
            # Half a batch each, and then the mean of their gradients.
            torch.testing.assert_close(one[name], parameter, rtol=1e-10, atol=1e-12)
    torch.manual_seed(0)
    assert not torch.equal(expected["rnn.weight_hh_l0"], ours.LSTM(4, 6, 2).weight_hh_l0.double())


# ---- import


def test_fastrnn_imports_no_torch_and_its_absence_is_explained():
    program = """
import sys, fastrnn
assert "torch" not in sys.modules and "fastrnn.torch" not in sys.modules
sys.modules["torch"] = None
try:
    import fastrnn.torch
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "pip install 'fastrnn[torch]'" in done.stdout, done.stderr


def test_a_file_object_holds_a_state_dict():
    layer, file = layer_of("GRU"), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.nn.GRU(I, H, dtype=torch.float64).load_state_dict(torch.load(file, weights_only=True))
