"""Many batches at once: a layer in the workers of Dask, or with --ray of Ray Data.

The layer travels to the workers with its parameters: it pickles as it is. Each worker computes on one thread, since
there is a worker for each core. Batches may come as read-only arrays, which are taken without a copy. The result must
be that of one call here, to the last bit: a row's numbers do not depend on its batch.

So short a job is faster without workers: what is shown is that it works, and what the start of workers costs.
"""

import argparse
import logging
import time

import numpy as np

import fastrnn

ROWS, STEPS, INPUTS, HIDDEN, BATCH, WORKERS = 2048, 50, 32, 64, 128, 2


class Encoder:
    """Sequences (B, T, I) to the last state of a GRU (B, H)."""

    def __init__(self, layer: fastrnn.GRU) -> None:
        self.layer = layer

    def __call__(self, sequences: np.ndarray) -> np.ndarray:
        fastrnn.set_num_threads(1)
        return self.layer(sequences)[1][-1]


class RayEncoder(Encoder):
    """The same of Ray Data's batches, which are dicts of arrays."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"code": super().__call__(batch["data"])}


def with_dask(encode: Encoder, x: np.ndarray) -> tuple[np.ndarray, float]:
    import dask.array

    blocks = dask.array.from_array(x, chunks=(BATCH, STEPS, INPUTS))
    codes = blocks.map_blocks(encode, drop_axis=[1, 2], new_axis=1, chunks=(BATCH, HIDDEN), dtype=x.dtype)
    start = time.perf_counter()
    result = codes.compute(scheduler="processes", num_workers=WORKERS)
    return result, time.perf_counter() - start


def with_ray(encode: Encoder, x: np.ndarray) -> tuple[np.ndarray, float]:
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="error")
    logging.disable(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = ray.data.from_numpy(np.array_split(x, len(x) // BATCH))
    workers = ray.data.ActorPoolStrategy(size=WORKERS)
    codes = rows.map_batches(RayEncoder, fn_constructor_args=(encode.layer,), batch_size=BATCH, compute=workers)
    start = time.perf_counter()
    result = np.stack([row["code"] for row in codes.take_all()])
    seconds = time.perf_counter() - start
    ray.shutdown()
    return result, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="with Ray Data; without, with Dask")
    parser.add_argument("--quick", action="store_true", help="a quarter of the sequences")
    arguments = parser.parse_args()
    ray, rows = arguments.ray, ROWS // 4 if arguments.quick else ROWS
    x = np.random.default_rng(0).standard_normal((rows, STEPS, INPUTS)).astype(np.float32)
    encode = Encoder(fastrnn.GRU(INPUTS, HIDDEN, batch_first=True, seed=0))
    encode(x[:BATCH])  # compile, or load what was compiled: the workers find it
    start = time.perf_counter()
    expected = encode(x)
    direct = time.perf_counter() - start
    result, seconds = (with_ray if ray else with_dask)(encode, x)
    if not np.array_equal(result, expected):
        raise SystemExit("the workers' results differ from those of one call")
    print(f"{rows} sequences of {STEPS} steps: {direct:.2f} s in one call on one thread,")
    print(
        f"{seconds:.2f} s in {WORKERS} workers of {'Ray Data' if ray else 'Dask'}, their start included; the same bits"
    )


if __name__ == "__main__":
    main()
