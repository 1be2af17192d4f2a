"""The README's example runs, and its figures are those of the results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a checkpoint
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_figures_are_generated(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    shown = README.split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == report.figures().strip(), "python benchmarks/report.py writes them anew"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_named_files_and_targets_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", text) + re.findall(r"\]\((\w[\w./-]*)\)", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    commands = re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)
    assert commands
    assert set(commands) <= set(targets)
