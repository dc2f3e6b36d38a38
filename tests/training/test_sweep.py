"""Sweeps: which points a grid has, that all are checked before one begins, and what is left at the end."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from es_jax import sweep
from es_jax.training import grid
from es_jax.training.config import freeze
from es_jax.training.loop import run
from tests.helpers import TWO_STEPS, edit_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.seed=0,1,2", [0, 1, 2]),
        ("train.seed = 0, 4294967295", [0, 4294967295]),
        ("optim.anchor.kappa=.5,1,None", [0.5, 1.0, None]),
        ("es.antithetic=true,False", [True, False]),
        ("evals.tasks=(gsm8k,piqa),[boolq],()", [("gsm8k", "piqa"), ("boolq",), ()]),
        ("train.profile=(1,3),None", [(1, 3), ()]),
        ("task.options.size=3,[4, 5],word", [3, [4, 5], "word"]),
        ('task.options={"a": 1, "b": [2, 3]},{}', [{"a": 1, "b": [2, 3]}, {}]),
        ("task.prompt=\"one, {x}\",it's {x},''", ["one, {x}", "it's {x}", ""]),
        ("es.schedule=linear:0.1,cosine:0:20", ["linear:0.1", "cosine:0:20"]),
        ("task.options.text='one, {x}',\"two, 'x'\",'3',3", ["one, {x}", "two, 'x'", "3", 3]),
        ("task.options.x=1,true,0,false", [1, True, 0, False]),
    ],
)
def test_values_are_read_as_those_of_a_command_line(text, values):
    assert grid.read_axis(text) == (text.partition("=")[0].strip(), values)


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([], "give --over FIELD=VALUE,VALUE,"),
        (["train.seed"], "'train.seed' is not FIELD=VALUE,VALUE,"),
        (["seed=0,1"], "unknown config field 'seed': did you mean 'train.seed' or 'task.seed'?"),
        (["train=1"], "train is a group of fields: set train.steps or "),
        (["train.seed=0,one"], "train.seed is 'one': it must be int"),
        (["train.seed=0,,1"], "'train.seed=0,,1' has an empty value"),
        (["train.seed="], "'train.seed=' has an empty value"),
        (["optim.learning_rate=0.5,5e-1"], "optim.learning_rate has 5e-1 twice"),
        (["evals.tasks=gsm8k,piqa"], "evals.tasks is 'gsm8k': it holds a tuple, so put each value in brackets"),
        (["evals.tasks=(gsm8k,piqa"], ") is missing; close the quote or bracket"),
        (["task.prompt='a, b"], "' is missing; close the quote or bracket"),
        (["train.seed=0", "es.sigma=1", "train.seed=1"], "train.seed is given twice"),
        (["train.seed=0,-1"], "point 1 (seed=-1): train.seed is -1"),
        (["es.sigma=0.1,0", "train.seed=0,1"], "point 2 (sigma=0,seed=0): es.sigma is 0.0"),
        (["optim.anchor.kappa=1"], "point 0 (kappa=1): optim.anchor.kappa is set but optim.anchor.penalty is 'none'"),
        (["evals.tasks=(gsm8j)"], "point 0 (evals.tasks=gsm8j): evals.tasks: unknown task 'gsm8j'"),
        (["task.name=gsm8k,countdwon"], "point 1 (target=countdwon): unknown task 'countdwon'"),
        (["task.name=reasoning_gym:n_queens"], "task 'reasoning_gym:n_queens' is not taken"),
        (["task.options.x=1,'1'"], "two points would have the folder 'task.options.x=1'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_begins(axes, says, tmp_path):
    with pytest.raises(ValueError) as error:
        grid.make_points({}, axes, tmp_path / "out")
    assert says in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        (["train.seed=0,1", "task.seed=7"], ["seed=0,task.seed=7", "seed=1,task.seed=7"]),
        (["es.rank=1"], ["rank=1"]),
        (["optim.schedule=linear:0.1"], ["optim.schedule=linear-0.1-37ce8f9e"]),
        (
            ["optim.anchor.penalty=none", "decode.slots=None,8"],
            ["anchor=none,decode.slots=None", "anchor=none,decode.slots=8"],
        ),
        (["evals.tasks=(gsm8k,piqa),()"], ["evals.tasks=gsm8k+piqa", "evals.tasks=none"]),
        (["optim.learning_rate=5e-4,1,1.25"], ["lr=0.0005", "lr=1", "lr=1.25"]),
    ],
)
def test_names_are_made_of_the_fields(axes, names):
    assert [point.name for point in grid.make_points({}, axes, "out")] == names


@pytest.mark.parametrize("values", [("a/b", "a-b", "a:b", "a b", "../a"), ("ä" * 300, "ä" * 299 + "a", "x" * 300)])
def test_texts_that_no_folder_may_be_called_have_folders_of_their_own(values, tmp_path):
    points = grid.make_points({}, [f"model.source={','.join(values)}"], tmp_path)
    assert len({point.name for point in points}) == len(values)
    for point in points:
        point.folder.mkdir()
        assert point.folder.parent == tmp_path and point.folder.resolve() == tmp_path / point.name


def test_a_point_is_the_config_with_its_values():
    points = grid.make_points({"es": {"sigma": 0.5}, "train": {"steps": 3}}, ["train.seed=0,1", "es.population=4"], "o")
    assert points[1].config == freeze({"es": {"sigma": 0.5, "population": 4}, "train": {"steps": 3, "seed": 1}})
    assert points[1].values == {"train.seed": 1, "es.population": 4} and points[1].folder == Path(
        "o/seed=1,population=4"
    )


def points_of(model: Path, out: Path, *axes: str, **train: object) -> list[grid.Point]:
    fields = TWO_STEPS | {"model": {"source": str(model)}, "evals": {"every": 2, "rows": 2}}
    fields["train"] = fields["train"] | train
    return grid.make_points(fields, axes, out)


@pytest.fixture(scope="module")
def swept(tiny_model, tmp_path_factory):
    """A sweep of two seeds, and how many programs each point compiled."""
    import jax

    out, counts = tmp_path_factory.mktemp("sweep"), [0]

    def listener(event: str, duration: float, **kwargs: object) -> None:
        counts[-1] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listener)
    points = points_of(tiny_model, out, "train.seed=0,1")
    for point in points:
        counts.append(0)
        assert sweep.run_points([point], out) == {}
    return points, out, counts[1:]


def test_a_point_is_the_run_that_it_would_be_alone(swept, tmp_path):
    points, *_ = swept
    run(points[1].config, tmp_path / "alone")
    assert (tmp_path / "alone/seedlog.jsonl").read_bytes() == (points[1].folder / "seedlog.jsonl").read_bytes()


def test_later_points_use_the_programs_of_the_first(swept):
    assert swept[2][0] > 5 * swept[2][1]


def test_what_is_done_is_not_done_again(swept, monkeypatch):
    points, out, _ = swept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    monkeypatch.setattr("es_jax.training.loop.run", None)
    assert sweep.run_points(points, out) == {} and [grid.state(point) for point in points] == [grid.DONE] * 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}


def test_more_values_and_more_steps_go_on_from_what_is_there(swept, tiny_model):
    _, out, _ = swept
    more = points_of(tiny_model, out, "train.seed=0,1,2", steps=3)
    assert [grid.state(point) for point in more] == ["step 2 of 3", "step 2 of 3", grid.NOT_BEGUN]


def test_a_folder_with_a_run_of_another_config_is_refused_before_anything_begins(swept, tiny_model, monkeypatch):
    _, out, _ = swept
    monkeypatch.setattr("es_jax.training.loop.run", None)
    other = points_of(tiny_model, out, "train.seed=2,1", steps=2)
    changed = freeze(TWO_STEPS | {"es": {"population": 2, "sigma": 0.25}})
    other = [dataclasses.replace(point, config=changed) for point in other]
    with pytest.raises(ValueError, match=r"seed=1 holds a run of another config: .*es\.sigma was 0\.05 and is 0\.25"):
        sweep.run_points(other, out)
    assert not other[0].folder.exists()


def test_the_table_and_the_report(swept, tmp_path):
    points, out, _ = swept
    result = sweep.summary(points, out, {})
    metrics = [json.loads(line) for line in (points[1].folder / "metrics.jsonl").read_text().splitlines()]
    heldout = json.loads((points[1].folder / "evals/conciseness.jsonl").read_text().splitlines()[-1])
    row = result["points"][1]
    assert row["point"] == "seed=1" and row["train.seed"] == 1 and row["state"] == grid.DONE and row["step"] == 2
    assert row["reward"] == metrics[-1]["reward_mean"] and row["drift"] == metrics[-1]["drift"]
    assert row["accuracy"] == heldout["accuracy"] and row["error"] is None
    assert json.loads((out / "sweep.json").read_text()) == result
    with open(out / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert table[1] == {name: "" if value is None else str(value) for name, value in row.items()}
    assert result["report"] == str(out / "report/report.html") and "seed=1" in Path(result["report"]).read_text()


def test_without_matplotlib_the_table_comes_with_a_sentence(swept, monkeypatch):
    points, out, _ = swept
    monkeypatch.setattr(sweep, "missing", lambda extra: f"matplotlib is not here: the extra [{extra}]")
    result = sweep.summary(points, out, {"seed=0": "why"})
    assert (result["report"], result["absent"]) == (None, "matplotlib is not here: the extra [report]")
    assert [row["state"] for row in result["points"]] == ["failed", grid.DONE]
    assert "there is no report: matplotlib is not here" in sweep._words(result, str(out))


def test_a_path_may_be_written_otherwise_and_sizes_are_for_the_run_to_judge(swept, tiny_model, monkeypatch):
    _, out, _ = swept
    monkeypatch.chdir(tiny_model.parent)
    for axes in (["train.seed=0"], ["train.seed=1"]):
        point = points_of(Path(tiny_model.name), out, *axes)[0]
        assert grid.state(point) == grid.DONE
        fields = dataclasses.asdict(point.config)
        fields["decode"]["slots"] = 1
        assert grid.state(dataclasses.replace(point, config=freeze(fields))) == grid.DONE
        fields["model"]["template_date"] = "2020-02-20"
        assert "template_date was '20" in grid.state(dataclasses.replace(point, config=freeze(fields)))


def test_a_run_that_was_changed_is_another_one(swept, tmp_path, tiny_model):
    points, _, _ = swept
    (tmp_path / "seed=0").mkdir()
    for name in ("config.json", "seedlog.jsonl"):
        (tmp_path / "seed=0" / name).write_bytes((points[0].folder / name).read_bytes())
    edit_config(tmp_path / "seed=0", es={"sigma": 0.125})
    mine = points_of(tiny_model, tmp_path, "train.seed=0")
    assert grid.state(mine[0]) == "holds a run of another config: es.sigma was 0.125 and is 0.05"


def test_a_point_that_fails_is_told_and_the_others_go_on(swept, tmp_path, tiny_model):
    points = points_of(tiny_model, tmp_path, f"model.source={tmp_path}/nowhere,{tiny_model}")
    failed = sweep.run_points(points, tmp_path)
    assert list(failed) == [points[0].name] and "nowhere' is not a folder" in failed[points[0].name]
    rows = sweep.summary(points, tmp_path, failed)["points"]
    assert [row["state"] for row in rows] == ["failed", grid.DONE] and rows[0]["error"] == failed[points[0].name]


def es_jax(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "es_jax", "sweep", "--config=lab:steps=2", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_command_lists_the_points(tmp_path):
    out = es_jax("--over", "train.seed=0,1", "es.sigma=0.01,0.02", "--out=runs", "--list", "--json", folder=tmp_path)
    names = ["seed=0,sigma=0.01", "seed=0,sigma=0.02", "seed=1,sigma=0.01", "seed=1,sigma=0.02"]
    expected = [{"index": i, "point": name, "state": "not begun"} for i, name in enumerate(names)]
    assert json.loads(out.stdout) == expected and not (tmp_path / "runs").exists()


def test_an_index_runs_one_point_and_its_failure_is_the_status(tmp_path):
    over = ("--over=model.source=nowhere,lab", "--out=runs")
    out = es_jax(*over, "--index=0", folder=tmp_path)
    assert out.returncode == 1 and not list(tmp_path.glob("runs/model.source=lab"))
    last = out.stderr.splitlines()[-1]
    assert (
        last.startswith("es_jax.sweep: 1 of 1 points failed: model.source=nowhere: ") and "Traceback" not in out.stderr
    )
    out = es_jax(*over, "--index=2", folder=tmp_path)
    assert out.stderr == "es_jax.sweep: --index is 2, but the 2 points have 0 to 1: see --list\n"


def test_what_the_page_shows_can_be_run(tmp_path, monkeypatch):
    """The values of its table as axes, and its Python block."""
    page = (ROOT / "docs/sweep.md").read_text()
    axes = [axis.strip("'") for axis in re.findall(r"^\| `([^`]+=[^`]+)` \|", page, flags=re.MULTILINE)]
    assert len(axes) == 6 and all(len(grid.read_axis(axis)[1]) > 1 for axis in axes)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], "docs/sweep.md", "exec"), names)
    assert [row["state"] for row in names["rows"]] == [grid.DONE] * 2
