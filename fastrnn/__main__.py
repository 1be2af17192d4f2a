"""``python -m fastrnn``: a demonstration, a benchmark, what this machine offers, the cache of compiled kernels."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from fastrnn.weights import CELLS

WARM = (*CELLS, "lstm_projected")  # what can be compiled ahead


def positive_integer(text: str) -> int:
    """An argument that must be a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more was expected, not {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """An argument that must be a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 was expected, not {text!r}")
    return value


def demo(options: argparse.Namespace) -> int:
    """Run the demonstration."""
    from fastrnn import demo

    try:
        return demo.run(options.epochs, options.hidden, options.seconds, options.text)
    except (OSError, ValueError) as error:
        print(f"python -m fastrnn demo: {error}", file=sys.stderr)
        return 2


def bench(options: argparse.Namespace) -> int:
    """Time some layers beside other libraries."""
    from fastrnn import bench, get_num_threads

    try:
        return bench.run(options.seconds, options.threads or get_num_threads(), options.libraries)
    except (OSError, ValueError) as error:
        print(f"python -m fastrnn bench: {error}", file=sys.stderr)
        return 2


def info(options: argparse.Namespace) -> int:
    """Print versions, processor, kernels, threads, cache and GPU."""
    from fastrnn import machine

    for name, value in machine.describe().items():
        print(f"{name:<14} {value}")
    return 0


def warmup(options: argparse.Namespace) -> int:
    """Compile ahead and print how long it took: each line as it begins, and the total."""
    import fastrnn

    total = 0.0
    for cell in options.cell or WARM:
        for dtype in options.dtype or ("float32",):
            done = fastrnn.warmup([cell], [dtype], begin=lambda name: print(f"{name:<24}", end=" ", flush=True))
            print(f"{sum(done.values()):6.2f} s", flush=True)
            total += sum(done.values())
    print(f"{'total':<24} {total:6.2f} s")
    return 0


def clear_cache(options: argparse.Namespace) -> int:
    """Remove the compiled kernels, of the CPU and of GPUs."""
    from fastrnn import machine
    from fastrnn.kernels.cuda import compiled

    found, cubins = machine.cache_files(), compiled.cache_files()
    kept = {file: error for file in found + cubins if (error := _remove(file))}
    files, cubins = ([file for file in some if file not in kept] for some in (found, cubins))
    folder = machine.cache_folder()
    where = f"from {folder}" if folder else "(none are kept: no folder can be written to)"
    print(f"Removed {len(files)} files of compiled kernels {where}")
    if cubins:
        folders = ", ".join(sorted({str(file.parent) for file in cubins}))
        print(f"Removed {len(cubins)} kernels for GPUs from {folders}")
    for error in kept.values():
        print(f"python -m fastrnn clear-cache: {error}", file=sys.stderr)
    return 1 if kept else 0


def _remove(file: Path) -> OSError | None:
    """Remove a file, or return why it cannot be."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each function above."""
    whole = argparse.ArgumentParser(prog="python -m fastrnn", description="Recurrent layers for NumPy arrays.")
    commands = whole.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("demo", help="train a character-level language model and let it write")
    command.add_argument("--epochs", type=positive_integer, default=6, metavar="N", help="how often the text is read")
    command.add_argument("--hidden", type=positive_integer, default=256, metavar="N", help="hidden units of the GRU")
    command.add_argument(
        "--seconds", type=positive_number, default=60.0, metavar="S", help="longest time for the training"
    )
    command.add_argument("--text", type=Path, metavar="FILE", help="learn from this file, not Python's own sources")
    command.set_defaults(run=demo)

    command = commands.add_parser("bench", help="time some layers beside NumPy and the libraries that are installed")
    command.add_argument(
        "--seconds", type=positive_number, default=60.0, metavar="S", help="longest time for all of it"
    )
    command.add_argument("--threads", type=positive_integer, metavar="N", help="threads; all cores by default")
    command.add_argument(
        "--libraries",
        nargs="*",
        choices=("torch", "onnxruntime", "jax"),
        help="compare with these; all that are installed by default, none without a name",
    )
    command.set_defaults(run=bench)

    command = commands.add_parser("warmup", help="compile the kernels ahead")
    command.add_argument(
        "--cell", action="append", choices=WARM, metavar="NAME", help=f"one of {', '.join(WARM)}; again for more"
    )
    command.add_argument(
        "--dtype", action="append", choices=("float32", "float64"), help="float32 by default; again for both"
    )
    command.set_defaults(run=warmup)

    for name, function, text in (
        (
            "info",
            info,
            "versions, processor, kernels (compiled, or machine code of the package), threads, cache and GPU",
        ),
        ("clear-cache", clear_cache, "remove the compiled kernels"),
    ):
        commands.add_parser(name, help=text).set_defaults(run=function)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        from fastrnn.demo import start_anew_with_resting_blas

        start_anew_with_resting_blas()
    sys.exit(main())
