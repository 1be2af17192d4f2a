"""Loops that :mod:`fastrnn.train` needs compiled: the CTC loss with its gradient, and sums of rows by their label.

CTC is connectionist temporal classification; source: A. Graves et al., of that name, 2006. A row's labels l_1 ... l_S
stand for every path of T symbols that becomes them when repeats are merged and blanks dropped. With blanks before,
between and after the labels there are 2S+1 places; a path stays, goes to the next place, or skips a blank between two
different labels. ``alpha[t, s]`` is the logarithm of the probability of all beginnings of paths that are at place s
after step t, ``beta[s]`` that of all their ends without step t itself. Logarithms, in float64: the probability of a
long path is too small for a number.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from fastrnn.kernels.cached import kernel


@register_jitable
def _add(a, b):
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -np.inf else high + np.log1p(np.exp(low - high))


@register_jitable
def _symbol(labels, s, blank):
    """The symbol at place s."""
    return labels[s // 2] if s % 2 else blank


@register_jitable
def _skips(labels, s, blank):
    """Whether a path may come to place s from place s - 2."""
    return s % 2 == 1 and s >= 3 and labels[s // 2] != labels[s // 2 - 1]


@register_jitable
def _forward(logs, labels, blank, alpha):
    """Fill alpha (T, 2S+1) (is modified); return the logarithm of the probability of the labels."""
    T, places = alpha.shape
    alpha[:] = -np.inf
    alpha[0, 0] = logs[0, blank]
    if places > 1:
        alpha[0, 1] = logs[0, labels[0]]
    for t in range(1, T):
        for s in range(places):
            total = alpha[t - 1, s]
            if s >= 1:
                total = _add(total, alpha[t - 1, s - 1])
            if _skips(labels, s, blank):
                total = _add(total, alpha[t - 1, s - 2])
            alpha[t, s] = total + logs[t, _symbol(labels, s, blank)]
    if places == 1:
        return alpha[T - 1, 0]
    return _add(alpha[T - 1, places - 1], alpha[T - 1, places - 2])


@register_jitable
def _backward(logs, labels, blank, alpha, beta, next_beta, log_probability, gradient):
    """Take from gradient (T, K) (is modified) how probable each symbol is at each step, given the labels.

    Is modified: beta, next_beta (2S+1,).
    """
    T, places = alpha.shape
    beta[:places] = -np.inf
    beta[max(places - 2, 0) : places] = 0.0
    for t in range(T - 1, -1, -1):
        if t < T - 1:
            next_beta[:places] = beta[:places]
            for s in range(places):
                total = next_beta[s] + logs[t + 1, _symbol(labels, s, blank)]
                if s + 1 < places:
                    total = _add(total, next_beta[s + 1] + logs[t + 1, _symbol(labels, s + 1, blank)])
                if s + 2 < places and _skips(labels, s + 2, blank):
                    total = _add(total, next_beta[s + 2] + logs[t + 1, _symbol(labels, s + 2, blank)])
                beta[s] = total
        for s in range(places):
            gradient[t, _symbol(labels, s, blank)] -= np.exp(alpha[t, s] + beta[s] - log_probability)


@kernel
def ctc(logs, labels, steps, counts, blank, losses, gradient):
    """The losses of a batch, and their gradients with respect to what `logs` are the logarithms of the softmax of.

    Parameters
    ----------
    logs : (T, B, K) float64
        Logarithms of probabilities.
    labels : (B, S) integers
        The first counts[b] of row b count, each from 0 to K-1 and none of them `blank`.
    steps, counts : (B,) integers
        How many steps and labels a row has.
    blank : int
    losses : (B,) float64
        (is modified) Infinite where a row has no path.
    gradient : (T, B, K) float64
        (is modified) 0 beyond a row's steps, and everywhere in a row whose loss is infinite.
    """
    T, B, K = logs.shape
    places = 2 * labels.shape[1] + 1
    alpha = np.empty((T, places))
    beta, next_beta = np.empty(places), np.empty(places)
    for b in range(B):
        n, own, places = steps[b], labels[b, : counts[b]], 2 * counts[b] + 1
        gradient[:, b] = 0.0
        if n == 0:
            losses[b] = 0.0 if counts[b] == 0 else np.inf
            continue
        row = alpha[:n, :places]
        log_probability = _forward(logs[:, b], own, blank, row)
        losses[b] = -log_probability
        if np.isfinite(log_probability):
            for t in range(n):
                for k in range(K):
                    gradient[t, b, k] = np.exp(logs[t, b, k])
            _backward(logs[:, b], own, blank, row, beta, next_beta, log_probability, gradient[:, b])


@kernel
def add_rows(labels, rows, total):
    """Add each of `rows` (N, E) to the row of `total` (V, E) (is modified) that `labels` (N,) names, in their order."""
    for n in range(len(labels)):
        to = total[labels[n]]
        for e in range(len(to)):
            to[e] += rows[n, e]
