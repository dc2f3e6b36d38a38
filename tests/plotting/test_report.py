"""python -m es_jax.report: the page, its figures and tables, from runs with made-up numbers."""

import base64
import csv
import json
import re
import sys
from pathlib import Path

import matplotlib.image
import pytest
from fake_runs import make_run, write

from es_jax import report
from es_jax.plotting import figures
from es_jax.plotting.runs import group, read_run

FIGURES = {"accuracy", "reward", "target_against_prior", "prior_change", "drop", "kl", "drift", "strength"}
NASTY = "models/<script>alert(1)</script>$x_{1}$&"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[Path]]:
    """A report of six runs, everything measured, one not finished, one of a model with a hostile name."""
    root = tmp_path_factory.mktemp("report")
    common = {"kl": True, "split": True, "graded": True}
    runs = [
        make_run(root / "es-0", **common),
        make_run(root / "es-1", seed=1, accuracy=0.6, **common),
        make_run(root / "l2-weak", penalty="l2", strength=0.2, **common),
        make_run(root / "l2", penalty="l2", strength=2.0, accuracy=0.3, **common),
        make_run(root / "half", es__population=16, done=10),
        make_run(root / "other", model__source=NASTY, digest="e", rows="s", size=7_000_000, **common),
    ]
    return report.write_report(runs, root / "out"), runs


def rows_of(made: dict, name: str) -> list[dict[str, str]]:
    with open(made["figures"][name]["csv"], newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_is_there_as_png_pdf_and_csv(made: tuple) -> None:
    result, _ = made
    assert set(result["figures"]) == FIGURES and not result["absent"] and not result["marked"]
    for paths in result["figures"].values():
        assert matplotlib.image.imread(paths["png"]).std() > 0.01
        assert Path(paths["pdf"]).read_bytes().startswith(b"%PDF")


def test_the_data_are_what_was_measured(made: tuple) -> None:
    result, _ = made
    first = next(iter(result["series"]))
    mine = [row for row in rows_of(result, "accuracy") if row["series"] == first and row["task"] == "lab-countdown"]
    assert [(row["step"], row["runs"]) for row in mine] == [("0", "2"), ("10", "2"), ("20", "2")]
    assert float(mine[-1]["accuracy"]) == pytest.approx(0.55) and float(mine[-1]["accuracy_se"]) == pytest.approx(0.05)
    both = [row for row in rows_of(result, "target_against_prior") if row["series"] == first]
    assert float(both[-1]["target"]) == pytest.approx(0.55) and float(both[-1]["prior"]) == pytest.approx(0.45)
    rewards = [row for row in rows_of(result, "reward") if row["series"] == first]
    assert [float(row["reward"]) for row in rewards] == pytest.approx([0.3, 0.4375, 0.575])
    assert float(rewards[-1]["reward_se"]) == pytest.approx(0.025) and rewards[-1]["runs"] == "2"
    assert result["results"][0]["Δ target's reward"] == "0.275 ± 0.025"
    assert {float(row["ratio"]) for row in rows_of(result, "drift")} == {1.0}
    assert float(rows_of(result, "kl")[0]["kl"]) == pytest.approx(0.2)
    lost = {row["reason"]: float(row["lost"]) for row in rows_of(result, "drop") if row["series"] == first}
    assert lost == pytest.approx({"format": 0.11, "truncation": 0.165, "knowledge": 0.275})
    swept = [(row["penalty"], float(row["lambda"]), float(row["accuracy"])) for row in rows_of(result, "strength")]
    assert swept[:4] == [("l2", 0.2, 0.5), ("l2", 2.0, 0.3), ("none", 0.0, pytest.approx(0.55)), ("base", 0.0, 0.0)]
    boxes = rows_of(result, "prior_change")
    assert {row["family of the model"] for row in boxes} >= {"Tiny"} and len(boxes) == 12
    assert {row["size of the model"] for row in boxes} == {"1k", "7M"}


def test_the_page_needs_nothing_beside_it_and_says_what_it_shows(made: tuple) -> None:
    result, runs = made
    page = Path(result["page"]).read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(address.startswith(("data:", "#")) for address in addresses)
    images = [a for a in addresses if a.startswith("data:image/png")]
    assert len(images) == len(FIGURES) and all(base64.b64decode(a.partition(",")[2]) for a in images)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.S)
    assert len(captions) == len(FIGURES)
    for words in (
        "Tiny-1B",
        "lab-countdown",
        "N = 8, 16",
        "σ = 0.01",
        "α = 0.005",
        "λ = 0.2, 2",
        "penalty l2",
        "seeds 0, 1",
    ):
        assert all(words in caption for caption in captions), words
    assert all("20 iterations, not finished: half is at 10 of 20" in caption for caption in captions)
    assert all(str(run) in page for run in runs) and "Not finished yet" in page


def test_names_from_runs_are_text(made: tuple) -> None:
    page = Path(made[0]["page"]).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    tex = Path(made[0]["tables"]["results"]["tex"]).read_text()
    assert r"\$x\_\{1\}\$" in tex


def test_one_run_without_evaluations(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", done=5)
    for file in (folder / "evals").iterdir():
        file.unlink()
    result = report.write_report([folder], tmp_path / "out")
    assert set(result["figures"]) == {"drift"} and len(result["absent"]) == 7
    assert "python -m es_jax.evaluate --kl measures it" in Path(result["page"]).read_text()


def test_runs_that_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs = [make_run(tmp_path / "a", done=0), make_run(tmp_path / "b", done=0, seed=1, max_new_tokens=9)]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["report", *map(str, runs), f"--out={out}"])
    with pytest.raises(
        SystemExit, match=r"cannot be compared \(.*b: decode\.max_new_tokens is 9, but 6 in .*a\): leave"
    ):
        report.main()
    assert not out.exists()
    monkeypatch.setattr(sys, "argv", ["report", *map(str, runs), f"--out={out}", "--mark", "--json"])
    report.main()
    result = json.loads(capsys.readouterr().out)
    assert list(result["marked"]) == [str(runs[1])]
    assert [label.endswith("[not comparable]") for label in result["series"]] == [False, True]
    assert "decode.max_new_tokens is 9, but 6 in" in Path(result["page"]).read_text()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run's directory"):
        report.write_report([tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="no runs are given"):
        report.write_report([], tmp_path / "out")


def test_the_docs_name_every_figure() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/report.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M)) == FIGURES


def test_the_views_of_an_evaluation(made: tuple) -> None:
    table = Path(made[0]["tables"]["views"]["md"]).read_text()
    assert "| Tiny-1B, ES, N = 8 | lab-countdown | 20 | 0.550 | – | 0.275 | – | – | 0.900 | 0.100 | 5.0 |" in table


def test_methods_without_a_closed_form(tmp_path: Path) -> None:
    """A run whose drift is not predicted has its measured drift drawn, and no ratio."""
    folder = make_run(tmp_path / "a", done=3)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"drift_theory": [0-9.]+', '"drift_theory": null', text))
    plot = figures.drift_against_theory(group([read_run(folder)]))
    assert plot is not None and [row["ratio"] for row in plot.data] == [None] * 3
    assert len(plot.figure.axes) == 1
    assert figures.kl_map(group([read_run(folder)])) is None


def test_a_drift_without_sigma_is_no_obstacle(tmp_path: Path) -> None:
    grpo = {"method": "grpo", "optim__learning_rate": 1e-4, "grpo__rollouts": 4}
    folder = make_run(tmp_path / "a", **grpo)
    rows = [{"step": s, "drift": 1.0 * s, "drift_theory": None, "kappa": None} for s in range(1, 21)]
    write(folder / "metrics.jsonl", rows)
    write(folder / "evals/drift.jsonl", [{"step": 20, "norm": 20.0, "predicted": None, "ratio": None, "kappa": None}])
    (row,) = report.write_report([folder], tmp_path / "out")["results"]
    assert row["‖θ − θ₀‖"] == "20" and row["measured / theory"] == "–"


def test_figures_can_be_told_apart_in_grey() -> None:
    """Neighbouring lines differ in marker and dash, bars in grey by more than a tenth or in hatch."""
    for i in range(6):
        one, other = figures.line(i), figures.line(i + 1)
        assert one["marker"] != other["marker"] and one["linestyle"] != other["linestyle"]
        assert figures.bar(i)["hatch"] != figures.bar(i + 1)["hatch"]
