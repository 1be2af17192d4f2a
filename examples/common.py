"""What the examples share: their one option, and the last line, which says how good it was beside a baseline."""

import argparse
import json


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
