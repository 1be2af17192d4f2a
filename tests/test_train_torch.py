"""The training kit against torch: losses and their gradients, optimisers step by step, schedules, clipping, a model."""

import copy

import numpy as np
import pytest

import fastrnn
from fastrnn import train

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
F = torch.nn.functional

EXACT = {"rtol": 1e-10, "atol": 1e-13}  # float64: the same sums in another order


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(array):
    return torch.tensor(array, requires_grad=np.asarray(array).dtype.kind == "f")


# ---- losses


@pytest.mark.parametrize("ignore_index", [None, -1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6,), (4, 7)])
def test_cross_entropy(shape, weighted, ignore_index):
    random = np.random.default_rng(1)
    output, targets = 3 * numbers(*shape, 5), random.integers(0, 5, shape)
    if ignore_index == -1:
        targets[random.random(shape) < 0.3] = -1
    weight = random.random(5) if weighted else None
    found = train.CrossEntropy(ignore_index, weight)(output, targets)

    logits = tensor(output)
    options = {"ignore_index": -100 if ignore_index is None else ignore_index}
    if weighted:
        options["weight"] = torch.tensor(weight)
    expected = F.cross_entropy(logits.reshape(-1, 5), torch.tensor(targets.reshape(-1)), **options)
    expected.backward()
    np.testing.assert_allclose(found.value, expected.item(), **EXACT)
    np.testing.assert_allclose(found.gradient, logits.grad.numpy(), **EXACT)


def test_cross_entropy_with_lengths():
    output, targets, lengths = numbers(4, 6, 3), np.random.default_rng(2).integers(0, 3, (4, 6)), [6, 0, 2, 5]
    found = train.CrossEntropy()(output, targets, lengths)
    logits, ignored = tensor(output), targets.copy()
    for row, length in enumerate(lengths):
        ignored[row, length:] = -100
    expected = F.cross_entropy(logits.reshape(-1, 3), torch.tensor(ignored.reshape(-1)))
    expected.backward()
    np.testing.assert_allclose(found.value, expected.item(), **EXACT)
    np.testing.assert_allclose(found.gradient, logits.grad.numpy(), **EXACT)
    assert found.terms == sum(lengths)


@pytest.mark.parametrize("positive_weight", [1.0, 2.5])
def test_binary_cross_entropy(positive_weight):
    output, targets = 20 * numbers(5, 3), np.random.default_rng(3).random((5, 3)).round(1)
    found = train.BinaryCrossEntropy(positive_weight)(output, targets)
    logits = tensor(output)
    weight = torch.tensor(positive_weight, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor(targets), pos_weight=weight)
    expected.backward()
    np.testing.assert_allclose(found.value, expected.item(), **EXACT)
    np.testing.assert_allclose(found.gradient, logits.grad.numpy(), **EXACT)


def test_mean_squared_error():
    output, targets = numbers(5, 4, 3), numbers(5, 4, 3, seed=1)
    found = train.MeanSquaredError()(output, targets)
    x = tensor(output)
    expected = F.mse_loss(x, torch.tensor(targets))
    expected.backward()
    np.testing.assert_allclose(found.value, expected.item(), **EXACT)
    np.testing.assert_allclose(found.gradient, x.grad.numpy(), **EXACT)


def torch_ctc(output, labels, steps, blank, zero_infinity=False):
    logits = tensor(output)
    counts = torch.tensor((labels >= 0).sum(axis=1))
    logs = logits.log_softmax(-1).swapaxes(0, 1)
    known = torch.tensor(np.where(labels >= 0, labels, 0))
    loss = F.ctc_loss(logs, known, torch.tensor(steps), counts, blank=blank, zero_infinity=zero_infinity)
    loss.backward()
    return loss.item(), logits.grad.numpy()


@pytest.mark.parametrize("blank", [0, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_ctc(blank, seed):
    random = np.random.default_rng(seed)
    B, T, K, S = 5, 13, 5, 5
    others = [k for k in range(K) if k != blank]
    labels = random.choice(others[:2] if seed % 2 else others, (B, S))  # of two, many repeat the one before
    for row, count in enumerate([5, 0, 1, 3, 4]):
        labels[row, count:] = -1
    steps = np.array([13, 4, 1, 9, 11])
    output = 3 * random.standard_normal((B, T, K))
    found = train.CTC(blank)(output, labels, steps)
    value, gradient = torch_ctc(output, labels, steps, blank)
    np.testing.assert_allclose(found.value, value, rtol=1e-10)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-8, atol=1e-12)  # torch subtracts probabilities
    assert found.terms == B


def test_ctc_leaves_out_what_has_no_path():
    output, labels = numbers(3, 4, 3), np.array([[1, 1, 1], [1, 2, -1], [2, 2, 2]])
    steps = np.array([4, 4, 3])
    found = train.CTC(zero_infinity=True)(output, labels, steps)
    value, gradient = torch_ctc(output, labels, steps, 0, zero_infinity=True)
    np.testing.assert_allclose(found.value, value, rtol=1e-10)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-8, atol=1e-12)
    assert found.value > 0
    assert not found.gradient[[0, 2]].any()


def test_ctc_of_a_long_row():
    """The probability of a path of 1500 steps is far below the smallest float."""
    random = np.random.default_rng(0)
    output, labels = random.standard_normal((1, 1500, 30)), random.integers(1, 30, (1, 200))
    found = train.CTC()(output.astype(np.float32), labels)
    value, gradient = torch_ctc(output.astype(np.float32).astype(float), labels, np.array([1500]), 0)
    np.testing.assert_allclose(found.value, value, rtol=1e-10)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-5, atol=1e-9)  # float32 at the end
    assert found.gradient.dtype == np.float32


# ---- optimisers

OPTIMIZERS = [
    (train.SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (train.SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    (
        train.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.03),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.03),
    ),
    (train.RMSprop(), lambda p: torch.optim.RMSprop(p)),
    (
        train.RMSprop(0.02, alpha=0.9, epsilon=1e-3, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.02, alpha=0.9, eps=1e-3, weight_decay=0.1),
    ),
    (
        train.RMSprop(0.02, momentum=0.8, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.8, centered=True),
    ),
    (train.Adam(), lambda p: torch.optim.Adam(p)),
    (
        train.Adam(0.05, betas=(0.8, 0.95), epsilon=1e-4, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    ),
    (train.AdamW(), lambda p: torch.optim.AdamW(p)),
    (train.AdamW(0.05, weight_decay=0.2), lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.2)),
]


@pytest.mark.parametrize(("ours", "make"), OPTIMIZERS, ids=lambda o: type(o).__name__ if o.__class__.__module__ else "")
def test_optimizer_step_by_step(ours, make):
    parameters = {"a": numbers(3, 4), "b": numbers(5, seed=1)}
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in parameters.values()]
    optimizer = make(theirs)
    for step in range(20):
        gradients = {name: numbers(*p.shape, seed=100 + step) * p for name, p in parameters.items()}
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = torch.tensor(gradient)
        before = {name: gradient.copy() for name, gradient in gradients.items()}
        ours.step(parameters, gradients)
        optimizer.step()
        for name, parameter, expected in zip(parameters, parameters.values(), theirs, strict=True):
            np.testing.assert_allclose(parameter, expected.detach().numpy(), rtol=1e-12, err_msg=f"{name}, step {step}")
            np.testing.assert_array_equal(gradients[name], before[name])


@pytest.mark.parametrize(("ours", "make"), OPTIMIZERS, ids=lambda o: type(o).__name__ if o.__class__.__module__ else "")
def test_optimizer_of_a_parameter_that_is_frozen_for_a_while(ours, make):
    ours = copy.deepcopy(ours)
    ours.steps, ours.updates, ours.slots = 0, {}, {slot: {} for slot in ours.slots}
    parameters = {"a": numbers(3, 4), "b": numbers(5, seed=1)}
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in parameters.items()}
    optimizer = make(list(theirs.values()))
    for step in range(12):
        names = ["a"] if step < 4 or 6 <= step < 8 else ["a", "b"]
        gradients = {name: numbers(*parameters[name].shape, seed=100 + step) for name in names}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name]) if name in gradients else None
        ours.step(parameters, gradients)
        optimizer.step()
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter, theirs[name].detach().numpy(), rtol=1e-12, err_msg=f"{name}, {step}")


def torch_rates(make, steps, values=None):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    schedule = make(optimizer)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([] if values is None else [values[step]]))
    return rates


L = torch.optim.lr_scheduler


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch's own, from within SequentialLR
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (train.Constant(0.5), lambda o: L.ConstantLR(o, factor=1.0)),
        (train.StepDecay(0.5, every=4, factor=0.3), lambda o: L.StepLR(o, 4, gamma=0.3)),
        (train.Cosine(0.5, steps=25, minimum=0.01), lambda o: L.CosineAnnealingLR(o, 25, eta_min=0.01)),
        (
            train.Warmup(train.Cosine(0.5, steps=18), steps=7, start=0.2),
            lambda o: L.SequentialLR(
                o, [L.LinearLR(o, 0.2, total_iters=7), L.CosineAnnealingLR(o, 18)], milestones=[7]
            ),
        ),
    ],
)
def test_schedule(schedule, make):
    np.testing.assert_allclose([schedule(step) for step in range(25)], torch_rates(make, 25), rtol=1e-12)


def test_reduce_on_plateau():
    values = np.abs(numbers(60, seed=4)).tolist()
    schedule = train.ReduceOnPlateau(0.5, factor=0.3, patience=2, threshold=1e-2, minimum=1e-3)
    expected = torch_rates(
        lambda o: L.ReduceLROnPlateau(o, factor=0.3, patience=2, threshold=1e-2, min_lr=1e-3), 60, values
    )
    found = []
    for value in values:
        found.append(schedule(0))
        schedule.observe(value)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(found)) > 4


@pytest.mark.parametrize("limit", [0.7, 1e3])
def test_clipping(limit):
    gradients = {"a": numbers(3, 4), "b": numbers(5, seed=1)}
    theirs = [torch.zeros(g.shape, dtype=torch.float64) for g in gradients.values()]

    def give():
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = torch.tensor(gradient)

    give()
    torch.nn.utils.clip_grad_value_(theirs, limit)
    clipped = {name: g.copy() for name, g in gradients.items()}
    train.clip_by_value(clipped, limit)
    for one, other in zip(clipped.values(), theirs, strict=True):
        np.testing.assert_array_equal(one, other.grad.numpy())
    give()
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert train.clip_by_norm(gradients, limit) == pytest.approx(norm.item(), rel=1e-14)
    for one, other in zip(gradients.values(), theirs, strict=True):
        np.testing.assert_allclose(one, other.grad.numpy(), rtol=1e-14)


# ---- a whole model


def test_model_trains_as_torch():
    """Embedding, LSTM, Linear, cross-entropy, clipping and Adam: ten updates with the same numbers as torch's."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 11, (4, 6)), random.integers(0, 3, (4, 6))
    ours = train.Sequential(
        embedding=train.Embedding(11, 5, padding_index=0, dtype=np.float64),
        lstm=fastrnn.LSTM(5, 7, num_layers=2, bidirectional=True, dtype=np.float64),
        act=train.Activation("relu"),
        linear=train.Linear(14, 3, dtype=np.float64),
    )
    embedding = torch.nn.Embedding(11, 5, padding_idx=0)
    lstm = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    linear = torch.nn.Linear(14, 3)
    modules = torch.nn.ModuleDict({"embedding": embedding, "lstm": lstm, "linear": linear}).double()
    modules.load_state_dict({name: torch.tensor(p) for name, p in ours.parameters.items()})
    optimizer = torch.optim.Adam(modules.parameters(), 0.05)
    trainer = train.Trainer(ours, train.CrossEntropy(), train.Adam(0.05), clip_norm=0.3)
    for _ in range(10):
        optimizer.zero_grad()
        logits = linear(lstm(embedding(torch.tensor(x)))[0].relu())
        loss = F.cross_entropy(logits.reshape(-1, 3), torch.tensor(y.reshape(-1)))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(modules.parameters(), 0.3)
        optimizer.step()
        trainer.fit(x, y, epochs=trainer.epoch + 1, shuffle=False, progress=False)
        assert trainer.history[-1]["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert trainer.history[-1]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-9)
    for name, parameter in modules.named_parameters():
        # Adam divides by a root that may be tiny: a relative error of the gradient grows there
        np.testing.assert_allclose(ours.parameters[name], parameter.detach().numpy(), rtol=1e-7, atol=1e-9)


def test_gradient_norms():
    x, d_output, d_c = numbers(3, 8, 4), numbers(3, 8, 5, seed=1), numbers(1, 3, 5, seed=2)
    lstm = fastrnn.LSTM(4, 5, dtype=np.float64, seed=0)
    theirs = torch.nn.LSTMCell(4, 5).double()
    theirs.load_state_dict({name.removesuffix("_l0"): torch.tensor(p) for name, p in lstm.parameters.items()})
    state = (torch.zeros(3, 5, dtype=torch.float64),) * 2
    following, expected = state, []
    for begin in range(9):  # the state after so many steps, handed on as if it were given
        h, c = (part.detach().clone().requires_grad_() for part in state)
        state, loss = (h, c), 0
        for t in range(begin, 9):
            loss = loss + (state[0] * torch.tensor(d_output[:, t - 1] if t else np.zeros((3, 5)))).sum()
            loss = loss + (state[1] * torch.tensor(d_c[0] * (t == 8))).sum()
            state = theirs(torch.tensor(x[:, t]), state) if t < 8 else state
            following = state if t == begin else following
        dh, dc = torch.autograd.grad(loss, (h, c))
        expected.append(float(((dh**2).sum() + (dc**2).sum()).sqrt()))
        state = following
    np.testing.assert_allclose(train.gradient_norms(lstm, x, d_output, (None, d_c)), expected, rtol=1e-10)
