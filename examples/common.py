"""What the examples share: their one option, the lines that say how good it was, a text and a baseline for it."""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def is_quick(description: str) -> bool:
    """Read the command line; whether a small run is asked for, of seconds in place of minutes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run of less than 20 seconds")
    return parser.parse_args().quick


def report(measure: str, ours: float, baseline: str, theirs: float, *, larger_is_better: bool = False) -> None:
    """Print the figure beside the baseline's, and stop with an error if it is no better.

    Parameters
    ----------
    measure : str
        What was measured, with its unit.
    ours : float
    baseline : str
        What it is compared with.
    theirs : float
        The baseline's figure.
    larger_is_better : bool
    """
    better = ours > theirs if larger_is_better else ours < theirs
    print(f"{measure}: {ours:.4g}; {baseline}: {theirs:.4g}")
    print(json.dumps({"measure": measure, "ours": ours, "baseline": baseline, "theirs": theirs}))
    if not better:
        raise SystemExit(f"{measure} is {ours:.4g}, expected better than the baseline's {theirs:.4g}")


def documentation() -> str:
    """Return Python's documentation of its own language, which comes with it: half a million characters of English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def ngram_perplexity(training: Sequence[Hashable], test: Sequence[Hashable], order: int, symbols: int) -> float:
    """Return the perplexity of an n-gram model with Witten-Bell smoothing, the usual one that needs no tuning.

    p(w | context) = (count(context, w) + kinds(context) · p(w | shorter context)) / (count(context) + kinds(context)),
    where kinds(context) is how many different symbols have followed it (Witten & Bell 1991; Chen & Goodman 1998).

    Parameters
    ----------
    training, test : sequence
        Of symbols: a string, or a list of words or numbers. No context reaches from one into the other.
    order : int
        n: 1 looks at no context, 3 at the two symbols before.
    symbols : int
        How many different symbols there are: the shortest context's smoothing is uniform over them.
    """
    followers: dict[tuple[Hashable, ...], Counter[Hashable]] = defaultdict(Counter)
    for at, symbol in enumerate(training):
        for length in range(min(order - 1, at) + 1):
            followers[tuple(training[at - length : at])][symbol] += 1
    totals = {context: counts.total() for context, counts in followers.items()}
    surprise = 0.0
    for at, symbol in enumerate(test):
        probability = 1.0 / symbols
        for length in range(min(order - 1, at) + 1):
            context = tuple(test[at - length : at])
            if context not in followers:
                break
            kinds = len(followers[context])
            probability = (followers[context][symbol] + kinds * probability) / (totals[context] + kinds)
        surprise -= math.log(probability)
    return math.exp(surprise / len(test))
