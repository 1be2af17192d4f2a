"""Reinforcement learning: a recurrent policy remembers a sign until the end of a corridor (`reset=`).

The task is the T-maze (B. Bakker, Reinforcement learning with long short-term memory, 2002). At the start the agent
sees a sign, 011 or 110; in the corridor it sees 101 everywhere, and at the corridor's end, where it must turn north or
south, 010. The sign told which way: the reward is 4 for the right turn and -0.1 for the wrong one, and either ends the
episode. An agent that walks against a wall stays where it is, for a reward of -0.1; other steps have none. Here
corridors differ in length, so that counting steps does not help, and an episode ends after four times the longest
corridor's steps.

Many mazes run side by side, and their episodes end at different times. The policy goes through them step by step and
learns from windows of steps: each window begins with the state that the one before ended with, and `reset=` tells where
in it episodes begin. Training is by advantage actor-critic with generalised advantages (V. Mnih et al., 2016;
J. Schulman et al., 2016).

An agent without memory does the same at the end of every corridor, whatever the sign was: it turns the right way in
half of the episodes at most, for a mean reward of at most 1.95.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

from dataclasses import dataclass

import numpy as np

from common import is_quick, report
from fastrnn import LSTM
from fastrnn.train import Adam, Linear, Sequential, clip_by_norm, log_softmax

NORTH, EAST, SOUTH, WEST = range(4)
SIGNS, CORRIDOR, END = ((0, 1, 1), (1, 1, 0)), (1, 0, 1), (0, 1, 0)
VIEWS = np.array([*SIGNS, CORRIDOR, END], np.float32)
GOAL, MISTAKE = 4.0, -0.1
MEMORYLESS = (GOAL + MISTAKE) / 2  # the best mean reward without a memory
DISCOUNT, TRACE = 0.98, 0.9  # of rewards to come, and of advantages to come
ENTROPY, CRITIC = 0.02, 0.5  # weights in the loss


class Mazes:
    """Mazes side by side. Where an episode ends, the next begins at once.

    Parameters
    ----------
    count : int
    shortest, longest : int
        How many steps it is from the start to the end of a corridor.
    seed : int
    """

    def __init__(self, count: int, shortest: int, longest: int, seed: int) -> None:
        self.shortest, self.longest, self.limit = shortest, longest, 4 * longest
        self.random = np.random.default_rng(seed)
        self.length, self.sign, self.place, self.steps = np.zeros((4, count), int)
        self.begin(np.ones(count, bool))

    def begin(self, which: np.ndarray) -> None:
        count = which.sum()
        self.length[which] = self.random.integers(self.shortest, self.longest + 1, count)
        self.sign[which] = self.random.integers(2, size=count)
        self.place[which] = self.steps[which] = 0

    def view(self) -> np.ndarray:
        """Return what is seen, (mazes, 3)."""
        return VIEWS[np.where(self.place == 0, self.sign, np.where(self.place == self.length, 3, 2))]

    def act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rewards, which episodes have ended, and in which of them the turn was right."""
        turned = (self.place == self.length) & ((actions == NORTH) | (actions == SOUTH))
        right = turned & (actions == np.where(self.sign == 0, NORTH, SOUTH))
        place = np.clip(self.place + (actions == EAST) - (actions == WEST), 0, self.length)
        rewards = np.where(right, GOAL, np.where(turned | (place == self.place), MISTAKE, 0.0))
        self.place, self.steps = place, self.steps + 1
        ended = turned | (self.steps == self.limit)
        self.begin(ended)
        return rewards, ended, right


@dataclass
class Window:
    """What happened in some steps, each array (mazes, steps, ...), and the states around them."""

    views: np.ndarray
    begins: np.ndarray  # whether an episode begins with the step
    outputs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    ended: np.ndarray
    right: np.ndarray
    before: tuple
    after: tuple


def build(hidden: int) -> Sequential:
    """Return the policy and the critic: four logits of actions, and what reward is expected."""
    return Sequential(lstm=LSTM(3, hidden, seed=0, forget_bias=1.0), output=Linear(hidden, 5, seed=0))


def explore(model: Sequential, mazes: Mazes, state: tuple | None, begins: np.ndarray, steps: int) -> Window:
    """Go through the mazes step by step."""
    before, rows = state, []
    for _ in range(steps):
        if state is not None:
            state = tuple(np.where(begins[:, None], 0, part) for part in state[0]), None
        view = mazes.view()
        output, state = model.step(view, state)
        actions = choose(output[:, :4], mazes.random)
        outcome = mazes.act(actions)
        rows.append((view, begins, output, actions, *outcome))
        begins = outcome[1]
    return Window(*(np.stack(column, axis=1) for column in zip(*rows, strict=True)), before, state)


def choose(logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw an action of each row's softmax: the largest logit after Gumbel noise."""
    return (logits + random.gumbel(size=logits.shape)).argmax(axis=-1)


def advantages(window: Window, following: np.ndarray) -> np.ndarray:
    """Return how much better each step went than the critic expected; `following` is its value after the last."""
    values = np.column_stack([window.outputs[..., 4], following]).astype(float)
    goes_on = DISCOUNT * ~window.ended
    errors = window.rewards + goes_on * values[:, 1:] - values[:, :-1]
    found, later = np.empty_like(errors), np.zeros(len(errors))
    for t in reversed(range(errors.shape[1])):
        found[:, t] = later = errors[:, t] + TRACE * goes_on[:, t] * later
    return found


def gradient_of_loss(outputs: np.ndarray, actions: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean over steps of the actor-critic's loss with respect to the outputs.

    It is -log p(action) · advantage - ENTROPY · entropy + CRITIC / 2 · (value - target)²; the advantage and
    the target, which is the value plus the advantage, count as constants.
    """
    logs = log_softmax(outputs[..., :4].astype(float))
    p = np.exp(logs)
    entropy = -(p * logs).sum(axis=-1, keepdims=True)
    policy = (p - np.eye(4)[actions]) * advantage[..., None] + ENTROPY * p * (logs + entropy)
    gradient = np.concatenate([policy, -CRITIC * advantage[..., None]], axis=-1) / actions.size
    return gradient.astype(np.float32)


def learn(model: Sequential, optimizer: Adam, window: Window, following: np.ndarray) -> None:
    """Make one update from a window, which is run again as a whole."""
    outputs, (state, _), tape = model.forward(window.views, window.before, reset=window.begins)
    # The recurrent layer gives the same bits; NumPy's product behind it may round differently.
    assert all(map(np.array_equal, state, window.after[0]))
    np.testing.assert_allclose(outputs, window.outputs, rtol=1e-4, atol=1e-5)
    gradient = gradient_of_loss(outputs, window.actions, advantages(window, following))
    gradients = model.backward(tape, gradient).params
    clip_by_norm(gradients, 0.5)
    optimizer.step(model.parameters, gradients)


def build_random() -> Sequential:
    """Return the policy that takes each action equally often."""
    model = build(1)
    for name in ("output.weight", "output.bias"):
        model.parameters[name][...] = 0.0
    return model


def first_episodes(model: Sequential, mazes: Mazes, count: int) -> tuple[float, float]:
    """Return how many of the mazes' first episodes end with the right turn, of 1, and their mean reward."""
    window = explore(model, mazes, None, np.ones(count, bool), mazes.limit)
    first = window.ended.cumsum(axis=1) - window.ended == 0
    return float(window.right[first].sum() / count), float(window.rewards[first].sum() / count)


def main() -> None:
    quick = is_quick(__doc__)
    shortest, longest, steps, updates = (2, 6, 32, 150) if quick else (10, 30, 64, 800)
    model, optimizer = build(32), Adam(5e-3)
    mazes = Mazes(64, shortest, longest, seed=0)
    state, begins = None, np.ones(64, bool)
    for update in range(1, updates + 1):
        window = explore(model, mazes, state, begins, steps)
        state, begins = window.after, window.ended[:, -1]
        following = model.step(mazes.view(), state)[0][:, 4]
        learn(model, optimizer, window, following)
        if update % (updates // 10) == 0:
            episodes, right = max(window.ended.sum(), 1), window.right.sum()
            print(f"update {update}: {episodes} episodes ended, {right / episodes:.1%} with the right turn", flush=True)

    (success, reward), (random_success, random_reward) = (
        first_episodes(policy, Mazes(1000, shortest, longest, seed=1), 1000) for policy in (model, build_random())
    )
    report("share of right turns", success, "the best without memory", 0.5, larger_is_better=True)
    report("share of right turns", success, "the random policy", random_success, larger_is_better=True)
    report("mean reward", reward, "the best without memory", MEMORYLESS, larger_is_better=True)
    report("mean reward", reward, "the random policy", random_reward, larger_is_better=True)


if __name__ == "__main__":
    main()
