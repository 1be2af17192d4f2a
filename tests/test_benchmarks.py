"""The parts of benchmarks/ that compute no time: merging, tables, names, slopes, floors, pictures."""

import argparse
import json

import pytest

import compare
import disturbed
import floors
import grid
import growth
import report
import results
from fastrnn import bench

CASE = {"cell": "lstm", "shape": [100, 32, 128, 128], "operation": "forward", "lengths": False, "threads": 2}


def case(ratios=None, **changes):
    """A record of the grid."""
    ratios = {"reference": 4.0, "torch": 2.0, "jax": 1.5} if ratios is None else ratios
    peers = [name for name in ratios if name != "reference"]
    figures = {
        "milliseconds": {"fastrnn": 2.0, **{name: 2 * ratio for name, ratio in ratios.items()}},
        "ratio": ratios,
        "best_peer": min(peers, key=ratios.get) if peers else None,
    }
    return {**CASE, **changes, **figures}


def everything():
    """Results with a record in every section."""
    key = {"cell": "lstm", "shape": [50, 64, 512, 512], "operation": "training"}
    small = {**key, "shape": [200, 32, 256, 256]}
    cold = {"import": 90.0, "first": 9000.0, "cached": 400.0, "second": 20.0}
    trouble = {**CASE, "library": "fastrnn", "disturbance": "spinning", "alone": 3.0, "median": 1.25, "slow": 2.0}
    return {
        "name": "somewhere",
        "date": "2026-01-31",
        "machine": {"processor": "A processor", "numpy": "2.0"},
        "cases": [
            case(),
            case({"reference": 1.0, "torch": 0.5}, shape=[101, 33, 77, 150]),
            case(operation="training"),
            case({"reference": 8.0}, shape=[200, 32, 128, 128], lengths=True),
            case(shape=[1, 1, 64, 64], operation="step"),
        ],
        "limits": [{**key, "limit": "multiply-adds", "threads": 1, "reached": 9e10, "possible": 1.2e11, "share": 0.75}],
        "growth": [{"cell": "gru", "operation": "forward", "size": "T", "sizes": [1, 2], "milliseconds": [1.0, 2.0],
                    "slope": 1.0}],
        "threads": [{**key, "threads": 2, "speed_up": 1.8}],
        "memory": [{**small, "library": "fastrnn", "bytes": 3 << 20, "results": 1}],
        "start": [{"library": "fastrnn", "cell": "lstm", "operation": "training", **cold}],
        "disturbed": [trouble],
        "steps": [
            {"cell": "gru", "shape": CASE["shape"], "threads": 1, "milliseconds": {"torch": 9.0, "fastrnn": 3.0},
             "ratio": 3.0},
            {"cell": "lstm", "shape": CASE["shape"], "threads": 1, "milliseconds": {"torch": 2.4, "fastrnn": 2.0},
             "ratio": 1.2},
            {"cell": "lstm", "shape": small["shape"], "threads": 2, "milliseconds": {"torch": 9.0, "fastrnn": 2.0},
             "ratio": 4.5},
        ],
    }  # fmt: skip


# ---- the grid


def test_odd_shapes_fill_no_vector():
    assert len(grid.ODD) == len(grid.SHAPES)
    assert not [size for shape in grid.ODD for size in shape[1:] if size % 8 == 0]


def test_cases():
    cases = list(grid.cases(grid.SETS[:4], ["gru"], ["forward"]))
    assert len(cases) == 26 + 1 + 1
    assert [str(one) for one in cases[-2:]] == ["GRU inference 200,32,128,128 lengths", "GRU step 1,1,64,64"]
    assert list(grid.cases(["lengths"], ["rnn_tanh"])) == [
        ("rnn_tanh", grid.LENGTHS, operation, True) for operation in grid.PASSES
    ]


# ---- results


def test_a_record_replaces_the_one_of_its_key_and_no_other():
    old = [case(), case(threads=1), case(lengths=True)]
    new = [case({"torch": 9.0}), case(cell="gru")]
    merged = results.merged(old, new, "cases")
    assert merged == [new[0], old[1], old[2], new[1]]
    assert results.merged(merged, [], "cases") == merged


def test_sections_merge_into_one_file(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    assert results.read("here") == {"name": "here"}
    tuples = {**case(), "shape": (100, 32, 128, 128)}  # as scripts have it, and as JSON gives it back
    results.merge("here", "cases", [tuples])
    results.merge("here", "memory", everything()["memory"])
    path = results.merge("here", "cases", [tuples, case(threads=1)])
    found = json.loads(path.read_text())
    assert found["cases"] == [case(), case(threads=1)]
    assert found["memory"] == everything()["memory"]
    assert found["machine"]["numba"]
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text().count("\n    {") == 3  # a line for each record


def test_every_section_has_a_key_and_a_table():
    assert set(results.KEYS) == {"cases", *report.SECTIONS}
    for section, records in everything().items():
        if section in results.KEYS:
            assert set(results.KEYS[section]) <= set(records[0])


@pytest.mark.parametrize(
    ("processor", "cores", "name"),
    [
        ("AMD EPYC (znver5)", 2, "amd-epyc-znver5-2-cores"),
        ("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz (skylake)", 8, "intel-core-i7-9700k-skylake-8-cores"),
        ("AMD EPYC 7763 64-Core Processor (znver3)", 1, "amd-epyc-7763-znver3-1-core"),
    ],
)
def test_names_of_machines(processor, cores, name):
    assert results.name_of(processor, cores) == name
    assert results.file_name(name) == name


def test_a_name_is_no_path():
    with pytest.raises(argparse.ArgumentTypeError):
        results.file_name("../elsewhere")


def test_figures_of_rounds():
    seconds = {"fastrnn": [1e-3, 2e-3, 4e-3], "reference": [3e-3, 5e-3, 8e-3], "torch": [2e-3, 2e-3, 2e-3]}
    assert compare.figures(seconds) == {
        "milliseconds": {"fastrnn": 2.0, "reference": 5.0, "torch": 2.0},
        "ratio": {"reference": 2.5, "torch": 1.0},
        "best_peer": "torch",
    }
    assert compare.figures({name: seconds[name] for name in ("fastrnn", "reference")})["best_peer"] is None


def test_missing_cases(monkeypatch):
    monkeypatch.setattr(results, "read", lambda name: {"cases": [case(), case(operation="training", threads=1)]})
    forward, training = cases = list(grid.cases(["quick"], ["lstm"]))[:2]
    there = bench.Case(*(tuple(value) if isinstance(value, list) else value for value in list(CASE.values())[:4]))
    assert compare.missing("here", [*cases, there], 2) == [forward, training]
    assert compare.missing("here", [there._replace(operation="training"), there], 1) == [there]


def test_slope_and_percentile():
    assert growth.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert disturbed.percentile(list(range(100, 0, -1)), 0.9) == 91
    assert disturbed.percentile([7.0], 0.9) == 7


# ---- training steps


def test_training_steps(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    import training

    for cell in grid.CELLS:
        medians = training.measure(cell, grid.TINY[0], rounds=2, seconds=0)
        assert [len(times) for times in medians.values()] == [2, 2]
        assert training.figures(medians)["ratio"] > 0
    assert training.figures({"torch": [3.0, 4.0, 5.0], "fastrnn": [1.0, 2.0, 2.0]}) == {
        "milliseconds": {"torch": 4000.0, "fastrnn": 2000.0},
        "ratio": 2.5,
    }

    def replace_with_another(model):
        model.layer.weight_hh_l0.data *= 1.2

    monkeypatch.setitem(training.SWAP, "fastrnn", replace_with_another)
    with pytest.raises(AssertionError):
        training.check(training.Model("lstm", grid.TINY[0]), grid.TINY[0])
    assert training.options([]).shapes == ["grid", "odd"]


# ---- floors


def test_every_case_has_a_floor():
    assert set(json.loads(floors.FLOORS.read_text())) == {str(one) for one in floors.CASES}


def test_a_slow_case_is_measured_again_before_it_counts(monkeypatch):
    measured = iter([0.8, 0.9, 1.1, 0.7, 0.9, 0.6])
    monkeypatch.setattr(floors, "advantage", lambda case, rounds: next(measured))
    monkeypatch.setattr(floors.time, "sleep", lambda seconds: None)
    assert floors.below(floors.CASES[0], 1.0) is None
    assert floors.below(floors.CASES[0], 1.0) == 0.9


# ---- tables and pictures


def test_numbers():
    assert [report.times(x) for x in (0.456, 0.96, 3.44, 34.4)] == ["0.46×", "1.0×", "3.4×", "34×"]
    assert [report.milliseconds(x) for x in (0.0456, 3.444, 34.44)] == ["0.046", "3.44", "34.4"]


def test_summary_has_means_and_the_smallest():
    lines = report.summary(report.whole(everything())).splitlines()
    assert lines[0] == "|  | threads | torch.nn | JAX | best of them | NumPy |"
    assert lines[2] == "| LSTM inference | 2 | 1.0× (0.50×) | 1.5× (1.5×) | 0.87× (0.50×) | 2.0× (1.0×) |"


def test_the_readme_shows_each_part():
    text = report.section(everything())
    assert "| 100, 32, 128, 128 | 2.00 · 1.5× | 2.00 · 1.5× |  |" in text
    assert "| LSTM inference, 32 rows of 1 to 200 | 2 | 2.00 |  |  | 8.0× |" in text
    assert "| LSTM, one step, H = 64 | 2 | 2.00 | 2.0× | 1.5× | 4.0× |" in text
    assert "| fastrnn | 3 |" in text
    assert "| LSTM training | fastrnn | 90.0 ms | 9.00 s | 0.40 s | 20.0 ms |" in text
    assert "| LSTM inference 100, 32, 128, 128 | fastrnn | 1.25 (2.00) |" in text
    assert "|  | 1 thread | 2 threads |\n| --- | --- | --- |\n| LSTM | 1.2× (1.2×) | 4.5× (4.5×) |" in text


def test_the_page_shows_every_section():
    text = report.page(everything())
    assert "| 101, 33, 77, 150 | 2" not in text
    assert "| LSTM inference 101, 33, 77, 150 | 2 | 2.00 | 0.50× |  | 1.0× |" in text
    assert "| LSTM training 50, 64, 512, 512 | 1 | multiply-adds a second | 90·10⁹ | 120·10⁹ | 75% |" in text
    assert "| GRU inference | T 1 to 2 | 1.00 · 2.00 | 1.00 |" in text
    assert "| LSTM training 50, 64, 512, 512 | 2 | 1.8× |" in text
    assert "| T, B, I, H | LSTM, 1 thread | LSTM, 2 threads | GRU, 1 thread |" in text
    assert "| 100, 32, 128, 128 | 2.00 · 1.2× |  | 3.00 · 3.0× |" in text


def test_a_part_that_was_not_measured_is_left_out():
    whole = everything()
    bare = {name: whole[name] for name in ("name", "date", "machine")} | {"cases": whole["cases"][:1]}
    assert "Memory" not in report.section(bare)
    assert "### Limits" not in report.page(bare)


def test_the_page_is_generated():
    assert report.PAGE.read_text(encoding="utf-8") == report.results_page(), "make bench-report writes it anew"


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
    import pictures

    whole = everything()
    whole["cases"] += [case(shape=[100, 1, H, H]) for H in (32, 128)]
    drawn = pictures.draw(whole)
    assert set(drawn) == {"hidden", "batch", "speedup", "limits", "start"}
    for kind, figure in drawn.items():
        figure.savefig(tmp_path / f"{kind}.svg")
        pictures.plt.close(figure)
    assert "ONNX" not in (tmp_path / "hidden.svg").read_text(encoding="utf-8")
    assert "JAX" in (tmp_path / "hidden.svg").read_text(encoding="utf-8")


def test_a_library_measured_later_stands_beside_the_others():
    old = {"milliseconds": {"fastrnn": 1.0, "torch": 9.0, "jax": 3.0}, "ratio": {"torch": 9.0, "jax": 3.0}}
    new = {"milliseconds": {"fastrnn": 1.1, "torch": 2.2}, "ratio": {"torch": 2.0}}
    assert compare.beside(None, new) == new
    assert compare.beside(old, new) == {
        "milliseconds": {"fastrnn": 1.1, "torch": 2.2, "jax": 3.0},
        "ratio": {"torch": 2.0, "jax": 3.0},
        "best_peer": "torch",
    }
