"""Speech or silence, 512 samples at a time: a published model's LSTM, read from its ONNX file and run as a stream.

The model is silero-vad for 16 kHz, version 6, as silero_vad_16k_op15.onnx at github.com/snakers4/silero-vad; the
recording is a WAV file of one channel and 16 bits at 16 kHz. ONNX Runtime runs what stands before and behind the LSTM,
and the whole model for comparison.

Usage: python examples/speech_activity.py [--quick] [MODEL WAV]

Without MODEL and WAV they are silero_vad_16k_op15.onnx and test.wav in the folder that the environment variable
FASTRNN_SILERO_VAD names.
"""

import argparse
import os
import sys
import tempfile
import time
import wave
from pathlib import Path

import numpy as np
import onnx
import onnx.utils
import onnxruntime

import fastrnn.onnx
from common import report

RATE, FRAME, CONTEXT = 16000, 512, 64  # samples a second, a frame, and before each frame
THRESHOLD, PAUSE = 0.5, 0.1  # of the probability; seconds of silence that end a segment
FEATURES, HIDDEN = "/model/decoder/If_output_0", "/model/decoder/If_1_output_0"  # what goes into the LSTM, its h
TOLERANCE = 1e-5  # float32 in two programs, fed back over thousands of steps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first ten seconds of the recording")
    parser.add_argument("files", nargs="*", metavar="MODEL WAV")
    given = parser.parse_args()
    if len(given.files) not in (0, 2):
        parser.error(f"{len(given.files)} files are given, expected MODEL and WAV, or none")
    if not given.files:
        folder = os.environ.get("FASTRNN_SILERO_VAD")
        if not folder:
            print("skipped: there is no model. Give MODEL and WAV, or their folder in FASTRNN_SILERO_VAD")
            sys.exit()
        given.files = [Path(folder) / "silero_vad_16k_op15.onnx", Path(folder) / "test.wav"]
    return given


def frames(path: str) -> np.ndarray:
    """Return (frames, 64 + 512) samples in ±1: each frame behind the last samples of the one before."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            raise SystemExit(f"{path} is {file.getparams()}, expected one channel, 16 bits and {RATE} Hz")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    samples = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    return np.lib.stride_tricks.sliding_window_view(samples, CONTEXT + FRAME)[::FRAME]


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def with_features(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with one output more: what goes into the LSTM."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    new.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    return new


def behind_the_lstm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the part of the model that makes the probability of h."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    del new.graph.value_info[:]
    new.graph.value_info.append(onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, [1, 128]))
    return onnx.utils.Extractor(new).extract_model([HIDDEN], [model.graph.output[0].name])


def run_whole(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ONNX Runtime's probabilities, hidden states and what went into the LSTM, frame by frame."""
    whole, state, rate = session(with_features(model)), np.zeros((2, 1, 128), np.float32), np.array(RATE)
    results = []
    for frame in x:
        probability, state, features = whole.run(None, {"input": frame[None], "state": state, "sr": rate})
        results.append((probability[0, 0], state[0], features))
    return tuple(np.stack(column) for column in zip(*results, strict=True))


def segments(speech: np.ndarray) -> list[tuple[float, float]]:
    """Return when speech begins and ends, in seconds; short pauses do not end it."""
    found: list[tuple[float, float]] = []
    for k in np.flatnonzero(speech):
        start, end = k * FRAME / RATE, (k + 1) * FRAME / RATE
        if found and start - found[-1][1] < PAUSE:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def step_times(layer: fastrnn.LSTM, features: np.ndarray) -> tuple[float, float]:
    """Return the median microseconds of the LSTM's step here and in ONNX Runtime, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        fastrnn.onnx.export(layer, f"{folder}/lstm.onnx", state=True)
        theirs = session(onnx.load(f"{folder}/lstm.onnx"))
    ours_state, (h, c) = None, np.zeros((2, 1, 1, 128), np.float32)
    times = []
    for x in features:
        start = time.perf_counter()
        _, ours_state = layer.step(x, ours_state)
        middle = time.perf_counter()
        _, h, c = theirs.run(None, {"x": x[None], "h_0": h, "c_0": c})
        times.append((middle - start, time.perf_counter() - middle))
    ours, others = np.median(times, axis=0) * 1e6
    return float(ours), float(others)


def main() -> None:
    given = arguments()
    model, x = onnx.load(given.files[0]), frames(given.files[1])
    x = x[: 10 * RATE // FRAME] if given.quick else x
    probability, hidden, features = run_whole(model, x)

    operator = next(iter(fastrnn.onnx.load(model).values()))
    layer, state = operator.to_layer(), None
    ours = np.empty_like(hidden)
    for k, x_t in enumerate(features):
        ours[k], state = layer.step(x_t, state)
    tail = session(behind_the_lstm(model))
    speech = np.array([tail.run(None, {HIDDEN: h})[0][0, 0] for h in ours])

    print(f"{operator!r} as {layer!r}")
    for start, end in segments(speech > THRESHOLD):
        print(f"speech from {start:.2f} s to {end:.2f} s")
    marked, different = int(np.sum(speech > THRESHOLD)), np.sum((speech > THRESHOLD) != (probability > THRESHOLD))
    print(f"{marked} of {len(x)} frames are speech; {different} differ from ONNX Runtime's")
    print(f"largest difference of a probability: {np.abs(speech - probability).max():.2g}")
    report("largest difference of a hidden state", float(np.abs(ours - hidden).max()), "tolerance", TOLERANCE)
    if different:
        raise SystemExit(f"{different} frames differ from ONNX Runtime's, expected none")
    times = step_times(layer, features)
    report("microseconds for a step of the LSTM", times[0], "ONNX Runtime", times[1])


if __name__ == "__main__":
    main()
