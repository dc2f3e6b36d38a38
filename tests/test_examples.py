"""The programs of the gallery run at a small size and print what docs/gallery.md shows; the page names all of them."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import jax
import pytest

from es_jax import run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/gallery.md").read_text()
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
# The last line, or the heading of the table, that a program prints.
SHOWN = {
    "black_box": "es_jax",
    "branch": "branch of the middle",
    "forgetting": "penalty  rate",
    "kappa_sweep": "known before",
    "own_columns": "held-out accuracy at step",
    "own_task": "held-out reward at step",
}


@pytest.fixture
def small(tmp_path, monkeypatch, capsys):
    """Runs a program at its small size in an empty folder; its lines."""
    monkeypatch.chdir(tmp_path)

    def lines(name):
        program = importlib.import_module(f"examples.{name}")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            program.main(["--small"])
        return capsys.readouterr().out.splitlines()

    return lines


@pytest.mark.parametrize("name", NAMES)
def test_a_program_runs(name, small, tmp_path):
    if name == "branch" and "branch_from" not in inspect.signature(run).parameters:
        pytest.skip("run has no branch_from yet")
    lines = small(name)
    assert any(SHOWN[name] in line for line in lines)
    if name == "kappa_sweep":
        assert (tmp_path / "runs/kappa/kappa.png").stat().st_size > 1000
    if name == "own_task":
        assert lines[-1].startswith("step 2: D") and lines[-2].startswith("step 0: D")


def test_the_page_has_every_program_and_what_it_prints():
    assert set(SHOWN) == set(NAMES) == set(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", PAGE))
    for name in NAMES:
        part = PAGE.partition(f"](../examples/{name}.py)")[2].partition("\n## ")[0]
        assert f"python examples/{name}.py" in part and SHOWN[name] in part, name


def test_without_evosax_a_sentence_says_so(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "evosax", None)
    assert small("black_box")[0] == "evosax is not installed, so es_jax is alone here: pip install evosax"
