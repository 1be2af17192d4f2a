"""Derivatives of any order and kind, and the transforms of torch.func, against torch.nn and finite differences."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

import fastrnn.torch as ours  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Of PyTorch's own code, at its first forward-mode derivative and its first trace.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

T, B, I, H, V = 4, 3, 2, 3, 5
KINDS = [
    pytest.param("RNN", {}, id="rnn-tanh"),
    pytest.param("RNN", {"nonlinearity": "relu", "num_layers": 2, "bias": False}, id="rnn-relu"),
    pytest.param("LSTM", {"num_layers": 2, "bidirectional": True}, id="lstm"),
    pytest.param("LSTM", {"proj_size": 2, "bidirectional": True}, id="lstm-projected"),
    pytest.param("GRU", {"num_layers": 2}, id="gru"),
]
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads take long for small things where others use the machine, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def pair(kind, options):
    """torch.nn's layer and ours, with the same parameters."""
    layers = []
    for module in (torch.nn, ours):
        torch.manual_seed(1)
        layers.append(getattr(module, kind)(I, H, **options, dtype=torch.float64))
    torch.manual_seed(2)
    return layers


def states_of(layer, *batch, **options):
    K = len(layer.all_weights)
    h, c = (random(K, *batch, size, **options) for size in (layer.proj_size or H, H))
    return (h, c) if layer.mode == "LSTM" else h


def assert_close(actual, expected):
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    for one, other in zip(actual, expected, strict=True):
        # Sums of a few numbers around 1, in another order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert any(other.abs().max() > 1e-6 for other in expected)


def looped(function, in_dims=0):
    """vmap by a loop: torch.nn's layers have no vmap."""

    def mapped(*arguments):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)

        def at(i):
            return [
                a if d is None else tree_map(lambda t: t.select(d, i), a)  # noqa: B023 - called at once
                for a, d in zip(arguments, dims, strict=True)
            ]

        (size,) = {tree_leaves(a)[0].shape[d] for a, d in zip(arguments, dims, strict=True) if d is not None}
        return tree_map(lambda *same: torch.stack(same), *[function(*at(i)) for i in range(size)])

    return mapped


# ---- finite differences


@pytest.mark.parametrize("rows", [False, True], ids=["", "lengths-reset"])
@each_kind
def test_gradients_of_first_and_second_order(kind, options, rows):
    _, layer = pair(kind, {**options, "dropout": 0.4 * (options.get("num_layers", 1) > 1)})
    names, params = zip(*layer.named_parameters(), strict=True)
    more = {"lengths": torch.tensor([4, 2, 0]), "reset": torch.rand(T, B) > 0.6} if rows else {}
    hx = states_of(layer, B, requires_grad=True)

    def function(x, *others):
        torch.manual_seed(3)  # of dropout
        n = len(others) - len(params)
        state = others[0] if n == 1 else others[:n]
        named = dict(zip(names, others[n:], strict=True))
        return tuple(tree_leaves(functional_call(layer, named, (x, state), more)))

    inputs = random(T, B, I, requires_grad=True), *tree_leaves(hx), *params
    # Along a random direction each, or every number of the input would be a call.
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


# ---- torch.nn, which has these derivatives


@each_kind
def test_second_derivatives_are_torchs(kind, options):
    found = []
    for layer in pair(kind, options):
        torch.manual_seed(2)
        x, hx = random(T, B, I, requires_grad=True), states_of(layer, B, requires_grad=True)
        inputs = [x, *tree_leaves(hx), *layer.parameters()]
        values = tree_leaves(layer(x, hx))
        first = torch.autograd.grad(sum(v.pow(2).sum() for v in values), inputs, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in first)
        second = torch.autograd.grad(penalty, inputs, create_graph=True)
        found.append([*first, *second, *torch.autograd.grad(sum(g.sum() for g in second), inputs)])
    assert_close(found[1], found[0])


@each_kind
def test_a_graph_of_the_gradients_does_not_change_them(kind, options):
    _, layer = pair(kind, options)
    x = random(T, B, I, requires_grad=True)
    inputs = [x, *layer.parameters()]
    plain, graph = (torch.autograd.grad(layer(x)[0].pow(2).sum(), inputs, create_graph=g) for g in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, graph, strict=True))
    assert graph[0].requires_grad


@each_kind
def test_dual_tensors(kind, options):
    found = []
    for layer in pair(kind, options):
        torch.manual_seed(2)
        x, t, hx, s = random(T, B, I), random(T, B, I), *(states_of(layer, B) for _ in range(2))
        with forward_ad.dual_level():
            state = tree_map(forward_ad.make_dual, hx, s)
            values = tree_leaves(layer(forward_ad.make_dual(x, t), state))
            values += tree_leaves(layer(x, state))
            # A tangent that comes in on the way back alone.
            x.requires_grad_()
            output, _ = layer(x)
            gradient = forward_ad.make_dual(random(*output.shape), random(*output.shape))
            values += torch.autograd.grad(output, [x, *layer.parameters()], gradient)
            found.append([list(forward_ad.unpack_dual(value)) for value in values])
    assert_close(found[1], found[0])
    assert all(tangent is not None for _, tangent in found[1])


def transforms(layer):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def output(x):
        return layer(x)[0]

    def loss(params, x):
        return functional_call(layer, params, (x,))[0].pow(2).sum()

    def meta_learning(x):
        params = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        gradients = grad(loss)(params, x)
        stepped = {name: p - 0.1 * gradients[name] for name, p in params.items()}
        return torch.autograd.grad(loss(stepped, x * 2), list(params.values()))

    def tangent_of_the_way_back(x):
        out, pull = vjp(output, x)
        return jvp(pull, (out,), (out * 2,))

    square = lambda x: output(x).pow(2).sum()  # noqa: E731
    return {
        "grad": lambda x: grad(loss)(parameters, x),
        "jacrev": jacrev(output),
        "jacrev of parameters": lambda x: jacrev(loss)(parameters, x),
        "jacfwd": jacfwd(output),
        "jvp": lambda x: jvp(layer, (x,), (x.flip(0),)),
        "hessian": hessian(square),
        "jacrev jacrev": jacrev(jacrev(square)),
        "jacfwd jacfwd": lambda x: jacfwd(jacfwd(square))(x[:2, :1]),
        "jacrev jacfwd": lambda x: jacrev(jacfwd(square))(x[:2, :1]),
        "third": grad(lambda x: jacrev(jacrev(lambda x: (3 * output(x)).exp().sum()))(x[:2, :1]).pow(2).sum()),
        "meta-learning": meta_learning,
        "tangent of the way back": tangent_of_the_way_back,
    }


@pytest.mark.parametrize("name", list(transforms(torch.nn.GRU(1, 1))))
@each_kind
def test_transforms_are_torchs(kind, options, name):
    theirs, layer = pair(kind, options)
    x = random(T, B, I)
    assert_close(transforms(layer)[name](x), transforms(theirs)[name](x))


# ---- maps


@each_kind
def test_vmap(kind, options):
    theirs, layer = pair(kind, options)
    x, hx = random(V, T, B, I), states_of(layer, B, V)
    assert_close(vmap(layer)(x), looped(theirs)(x))
    assert_close(vmap(layer, in_dims=2)(x.movedim(0, 2)), looped(theirs)(x))
    dims = 0, tree_map(lambda _: 2, hx)
    assert_close(vmap(layer, in_dims=dims)(x, hx), looped(theirs, (0, 2))(x, hx))
    assert_close(vmap(layer, in_dims=(None, dims[1]))(x[0], hx), looped(theirs, (None, 2))(x[0], hx))
    state = tree_map(lambda s: s[:, :, 0], hx)
    assert_close(vmap(lambda x: layer(x, state))(x), looped(lambda x: theirs(x, state))(x))
    two = random(2, V, T, B, I)
    assert_close(vmap(vmap(layer), in_dims=0)(two), looped(looped(theirs))(two))
    found = []
    for output in (vmap(layer)(x)[0], looped(theirs)(x)[0]):
        module = layer if not found else theirs
        found.append(torch.autograd.grad(output.pow(2).sum(), list(module.parameters())))
    assert_close(*found)


def test_vmap_is_one_call_where_parameters_are_not_mapped(monkeypatch):
    _, layer = pair("GRU", {})
    sizes, forward = [], ours.stack.forward
    monkeypatch.setattr(ours.stack, "forward", lambda *a: sizes.append(a[2].shape) or forward(*a))
    vmap(layer)(random(V, T, B, I))
    layer.requires_grad_(False)
    jacrev(lambda x: layer(x)[0])(random(T, B, I))
    assert sizes == [(T, V * B, I), (T, B, I), (T, T * B * H * B, I)]  # the last: all numbers of the output


@each_kind
def test_vmap_of_lengths_and_resets(kind, options):
    _, layer = pair(kind, options)
    x, lengths, reset = random(V, T, B, I), torch.randint(0, T + 1, (V, B)), torch.rand(V, T, B) > 0.6
    function = lambda x, lengths, reset: layer(x, lengths=lengths, reset=reset)  # noqa: E731
    for dims in ((0, 0, 0), (0, None, 0), (None, 0, None)):
        given = [t[0] if d is None else t for t, d in zip((x, lengths, reset), dims, strict=True)]
        assert_close(vmap(function, dims)(*given), looped(function, dims)(*given))
    squares = lambda x, *rows: function(x, *rows)[0].pow(2).sum()  # noqa: E731
    assert_close(vmap(grad(squares))(x, lengths, reset), looped(grad(squares))(x, lengths, reset))
    # Forward mode, which goes another way.
    tangents = lambda *all: jvp(lambda x: function(x, *all[1:]), (all[0],), (all[0],))  # noqa: E731
    assert_close(vmap(tangents)(x, lengths, reset), looped(tangents)(x, lengths, reset))
    lengths[1, 1] = T + 1
    for mapped in (function, grad(squares), tangents):
        with pytest.raises(ValueError, match=rf"lengths.* {T + 1}, expected 0 to T = {T}"):
            vmap(mapped)(x, lengths, reset)


@each_kind
def test_gradients_of_each_sample_and_ensembles(kind, options):
    theirs, layer = pair(kind, options)
    xs = random(V, T, B, I)
    found = []
    for module, mapped in ((layer, vmap), (theirs, looped)):
        models = [copy.deepcopy(module) for _ in range(V)]
        torch.manual_seed(4)
        for model in models:
            model.reset_parameters()
        many = torch.func.stack_module_state(models)[0]
        many = {name: p.detach() for name, p in many.items()}
        one = {name: p[0] for name, p in many.items()}

        def call(params, x, module=module):
            return functional_call(module, params, (x,))

        def loss(params, x, call=call):
            return call(params, x)[0].pow(2).sum()

        found.append(
            [
                mapped(grad(loss), (None, 0))(one, xs),
                mapped(call, (0, None))(many, xs[0]),
                mapped(call, (0, 0))(many, xs),
                mapped(grad(loss), (0, 0))(many, xs),
                mapped(mapped(grad(loss), (None, 0)), (0, None))(many, xs),
                mapped(hessian(lambda x, loss=loss, one=one: loss(one, x)))(xs[:2, :2, :1]),
                mapped(lambda x, call=call, one=one: jvp(lambda x: call(one, x), (x,), (x,)))(xs),
                jvp(mapped(lambda x, call=call, one=one: call(one, x)), (xs,), (xs,)),
            ]
        )
    assert_close(*found)


def test_dropout_under_vmap():
    _, layer = pair("GRU", {"num_layers": 2, "dropout": 0.5})
    x = random(T, B, I).expand(V, T, B, I)
    different = vmap(layer, randomness="different")(x)[0]
    assert not torch.equal(different[0], different[1])
    same = vmap(layer, randomness="same")(x)[0]
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)


def test_cells():
    for kind in ("RNNCell", "LSTMCell", "GRUCell"):
        cells = []
        for module in (torch.nn, ours):
            torch.manual_seed(0)
            cells.append(getattr(module, kind)(I, H, dtype=torch.float64))
        theirs, cell = cells
        x = random(V, B, I)
        assert_close(vmap(cell)(x), looped(theirs)(x))
        ours_and_theirs = [lambda x, c=c: tree_leaves(c(x))[-1].pow(2).sum() for c in (cell, theirs)]
        assert_close(*(hessian(square)(x[0]) for square in ours_and_theirs))


# ---- with the rest of PyTorch


@pytest.mark.filterwarnings("ignore")
def test_compiled_transforms():
    _, layer = pair("LSTM", {"num_layers": 2})
    params, xs = {name: p.detach() for name, p in layer.named_parameters()}, random(V, T, B, I)
    loss = lambda params, x: functional_call(layer, params, (x,))[0].pow(2).sum()  # noqa: E731
    for function in (lambda xs: vmap(layer)(xs), lambda xs: vmap(grad(loss), (None, 0))(params, xs)):
        torch._dynamo.reset()
        assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(xs), function(xs))
    torch._dynamo.reset()
    parameters = list(layer.parameters())
    compiled = torch.compile(lambda xs: vmap(layer)(xs)[0], fullgraph=True, backend="aot_eager")(xs)
    expected = torch.stack([layer(x)[0] for x in xs])
    assert_close(*(torch.autograd.grad(output.pow(2).sum(), parameters) for output in (compiled, expected)))


def test_operators_under_vmap_and_where_they_have_no_derivatives():
    _, layer = pair("LSTM", {})
    params, x = [p.detach() for p in layer.parameters()], random(V, T, B, I)
    forward, backward = torch.ops.fastrnn.forward.default, torch.ops.fastrnn.backward.default

    def both(x):
        output, h, c, kept = forward(x, None, None, params, [], None, None, "lstm", 4, 1, True)
        gradients = backward(output, h, c, x, None, None, output, params, [], kept, None, None, "lstm", 4, 1)
        return output, h, c, gradients

    assert_close(vmap(both)(x), looped(both)(x))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        both(forward_ad.make_dual(x[0], x[0]))
    weights = [random(H, I, requires_grad=True), random(H, H, requires_grad=True)]
    output, *_ = forward(x[0], None, None, weights, [], None, None, "rnn_sigmoid", 2, 1, True)
    (gradient,) = torch.autograd.grad(output.sum(), weights[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="cell is 'rnn_sigmoid'"):
        gradient.sum().backward()
    weights = [p.requires_grad_() for p in params]
    output, h, c, kept = forward(x[0], None, None, weights, [], None, None, "lstm", 4, 1, True)
    gradients = backward(output, h, c, x[0], None, None, output, weights, [], kept, None, None, "lstm", 4, 1)
    with pytest.raises(RuntimeError, match="fastrnn::backward has no derivatives"):
        gradients[0].sum().backward()


def test_second_derivatives_of_the_operator():
    found = []
    for layer in pair("LSTM", {}):
        torch.manual_seed(2)
        x = random(T, B, I, requires_grad=True)
        params = list(layer.parameters())
        if isinstance(layer, torch.nn.LSTM):
            output, _ = layer(x)
        else:
            output = torch.ops.fastrnn.forward.default(x, None, None, params, [], None, None, "lstm", 4, 1, True)[0]
        first = torch.autograd.grad(output.pow(2).sum(), [x, *params], create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), [x, *params]))
    assert_close(found[1], found[0])


def test_autocast_does_not_reach_into_the_layers():
    layer, x = ours.LSTM(I, H, 2), torch.randn(T, B, I, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(layer(x)[0].pow(2).sum(), x, create_graph=True)
            found.append([first, *torch.autograd.grad(first.pow(2).sum(), [x, *layer.parameters()])])
            found[-1] += tree_leaves([jvp(layer, (x,), (x,)), grad(lambda x: layer(x)[0].pow(2).sum())(x)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_packed_sequences():
    """No more than second derivatives: PyTorch itself has neither transforms nor forward mode of packed sequences."""
    _, layer = pair("GRU", {"bidirectional": True, "batch_first": True})
    lengths, x, found = torch.tensor([2, 4, 1]), random(B, T, I, requires_grad=True), []
    inputs = [x, *layer.parameters()]
    for packed in (True, False):

        def square(x, packed=packed):
            if packed:
                x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
                return layer(x)[0].data.pow(2).sum()
            return layer(x, lengths=lengths)[0].pow(2).sum()

        first = torch.autograd.grad(square(x), inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)])
    assert_close(*found)
