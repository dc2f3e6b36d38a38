"""Runs read from their directories: what is averaged, what it is called, and what must not be compared."""

import re
from pathlib import Path

import pytest
from fake_runs import make_run, write

from es_jax.plotting import accuracies, prior_accuracy, tables, target_against_prior
from es_jax.plotting.figures import drift_against_theory, drop_parts, kl_map, reward_over_iterations, strength_sweep
from es_jax.plotting.runs import caption, group, incomparable, prior_tasks, read_run
from es_jax.plotting.tables import Table, results
from es_jax.rundir.metrics import read_jsonl


def test_a_run_as_it_stands(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", done=10)
    run = read_run(folder)
    assert (run.step, run.finished, run.target, run.model, run.family, run.size) == (
        10, False, "lab-countdown", "Tiny-1B", "Tiny", 1000,
    )  # fmt: skip
    assert run.accuracy(["lab-countdown"]) == {0: (0.0, 0.0), 10: (0.25, pytest.approx(0.0612, abs=1e-4))}
    value, error = run.accuracy(["lab-add", "lab-sort"])[10]
    assert value == 0.75 and error == pytest.approx(0.0612 / 2**0.5, abs=1e-4)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "dri')  # a crash
    assert read_run(folder).step == 10


def test_a_run_that_started_from_another(tmp_path: Path) -> None:
    """It has that one's base model, and says from where it started wherever it stands beside others."""
    parent = {"run": "a@10", "path": "/there/a", "step": 10, "digest": "d", "model": "models/Tiny-1B", "seeds": [0]}
    make_run(tmp_path / "a")
    for name, step in (("b", 10), ("c", 20)):
        source = {"model__source": f"a@{step}"}
        make_run(tmp_path / name, seed=1, digest=name, parent=parent | {"step": step}, **source)
    runs = [read_run(tmp_path / name) for name in "abc"]
    assert [run.parent for run in runs] == [None, "a@10", "a@20"]
    assert {(run.model, run.base_digest) for run in runs} == {("Tiny-1B", "d")} and not incomparable(runs)
    series = group(runs)
    assert [one.label for one in series] == ["ES", "from a@10, ES", "from a@20, ES"]
    assert [one.label for one in group(runs[1:2])] == ["ES"] and "b started from a@10" in caption(runs)
    drift = drift_against_theory(series)
    assert drift and "from a@10, ES began at a@10." in drift.caption
    assert {(row["series"], row["from"]) for row in drift.data} == {
        ("ES", "the base model"), ("from a@10, ES", "a@10"), ("from a@20, ES", "a@20"),
    }  # fmt: skip
    rows = tables.accuracies(series, ["lab-add"]).rows
    assert [row[0] for row in rows][:3] == ["Tiny-1B, step 0", "Tiny-1B, step 0 (a@10)", "Tiny-1B, step 0 (a@20)"]


def test_an_empty_run_and_no_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", done=0)
    (folder / "metrics.jsonl").unlink()
    for file in (folder / "evals").iterdir():
        file.unlink()
    run = read_run(folder)
    assert run.step == 0 and not run.evals and prior_tasks([run]) == []
    with pytest.raises(FileNotFoundError, match="is not a run's directory"):
        read_run(tmp_path)


def test_rows_out_of_order_and_twice(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    row = {"n": 50, "accuracy_se": 0.0}
    found = [row | {"step": s, "accuracy": a} for s, a in ((20, 0.2), (0, 0.0), (20, 0.3), (10, 0.1))]
    write(folder / "evals/lab-add.jsonl", found)
    assert read_run(folder).accuracy(["lab-add"]) == {0: (0.0, 0.0), 10: (0.1, 0.0), 20: (0.3, 0.0)}


def test_seeds_are_averaged_with_the_error_over_them(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / str(s), seed=s, accuracy=a)) for s, a in enumerate((0.4, 0.6))]
    (one,) = group(runs)
    end = one.last(["lab-countdown"])
    assert end is not None and (end.step, end.runs) == (20, 2)
    assert end.mean == pytest.approx(0.5) and end.error == pytest.approx(0.1)  # |0.6 − 0.4| / 2
    change = one.change(["lab-add"])
    assert change is not None and change.mean == pytest.approx(-0.5) and change.error == pytest.approx(0.1)


def test_a_single_run_has_the_error_over_rows(tmp_path: Path) -> None:
    (one,) = group([read_run(make_run(tmp_path / "a"))])
    end = one.last(["lab-countdown"])
    assert end is not None and end.error == pytest.approx((0.5 * 0.5 / 50) ** 0.5)


def test_the_last_step_is_one_that_all_runs_have(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / str(s), seed=s, done=20 - 10 * s)) for s in (0, 1)]
    (one,) = group(runs)
    assert [(p.step, p.runs) for p in one.curve(["lab-add"]).values()] == [(0, 2), (10, 2), (20, 1)]
    end = one.last(["lab-add"])
    assert end is not None and end.step == 10


def test_labels_say_what_differs(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a")),
        read_run(make_run(tmp_path / "b", penalty="l2", strength=2.0)),
        read_run(make_run(tmp_path / "c", es__population=16)),
        read_run(make_run(tmp_path / "d", task__train_size=100)),
    ]
    assert [one.label for one in group(runs)] == [
        "ES, task.train_size = 200, N = 8",
        "ES + AWD l2, λ = 2, task.train_size = 200, N = 8",
        "ES, task.train_size = 200, N = 16",
        "ES, task.train_size = 100, N = 8",
    ]
    assert [one.label for one in group(runs[:2])] == ["ES", "ES + AWD l2, λ = 2"]


def test_drift_and_strength_that_mean_the_same_are_one_series(tmp_path: Path) -> None:
    kappa = read_run(make_run(tmp_path / "a", penalty="l2", optim__anchor={"penalty": "l2", "kappa": 1.0}))
    same = read_run(make_run(tmp_path / "b", seed=1, penalty="l2", strength=kappa.config.anchor_strength))
    assert len(group([kappa, same])) == 1


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name)) for name in "ab"]
    with pytest.raises(ValueError, match=r"a and .*b are the same run \(seed 0\): leave one out"):
        group(runs)


def test_the_caption_says_everything(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "a")),
        read_run(make_run(tmp_path / "b", penalty="l2", strength=2.0, seed=1, done=10)),
        read_run(make_run(tmp_path / "c", penalty="l2", strength=0.5, es__population=16)),
    ]
    assert caption(runs) == (
        "Model: Tiny-1B (1,000 weights); trained on: lab-countdown; ES with N = 8, 16, σ = 0.01, α = 0.005; "
        "no penalty (λ = 0); penalty l2 with λ = 0.5, 2; seeds 0, 1; 20 iterations, not finished: b is at 10 of 20; "
        "evaluated on 50 rows a task, grader paper, max_new_tokens 6."
    )


def test_the_caption_has_the_limit_of_the_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", max_new_tokens=6)
    for path in (run / "evals").glob("*.jsonl"):
        write(path, [row | {"max_new_tokens": 128} for row in read_jsonl(path)])
    assert caption([read_run(run)]).endswith("grader paper, max_new_tokens 128.")


def test_a_change_has_the_error_of_paired_rows_where_they_are_paired(tmp_path: Path) -> None:
    run, tasks = make_run(tmp_path / "a"), ["lab-add", "lab-sort"]
    apart = group([read_run(run)])[0].change(tasks)
    for path in (run / "evals").glob("*.jsonl"):
        write(path, [row | {"accuracy_change_se": 0.03} for row in read_jsonl(path)])
    paired = group([read_run(run)])[0].change(tasks)
    assert apart is not None and paired is not None and apart.mean == paired.mean == -0.5
    assert paired.error == pytest.approx(0.03 / 2**0.5) and apart.error == pytest.approx(0.05)


def test_es_and_grpo_side_by_side(tmp_path: Path) -> None:
    grpo = {"method": "grpo", "optim__learning_rate": 1e-4, "grpo__rollouts": 4, "es__sigma": 1.0}
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", **grpo))]
    assert [one.label for one in group(runs)] == ["ES", "GRPO"] and not incomparable(runs)
    assert "ES with N = 8, σ = 0.01, α = 0.005; GRPO with rollouts = 4, α = 0.0001; no penalty" in caption(runs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 7}, "decode.max_new_tokens is 7, but 6 in "),
        ({"task__grader": "strict"}, "task.grader is 'strict', but 'paper' in "),
        ({"task__data_dir": "rows"}, r"the training data \(data_dir, seed, train_size\) is \('rows', None, 200\), but"),
        ({"rows": "s"}, "digest of the rows is 's', but 'r' in "),
        ({"digest": "e", "rows": "s"}, None),  # another model: other tokens
        ({"evals__rows": 60, "rows": "s"}, None),  # another test size: the digest says nothing
        ({"train__steps": 30}, None),
        ({"target": "lab-add", "rows": "s"}, None),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, options: dict, says: str | None) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", seed=1, **options))]
    found = incomparable(runs)
    if says is None:
        assert not found
    else:
        assert re.search(says, found[tmp_path / "b"]), found


@pytest.mark.parametrize(("name", "value"), [("n", 60), ("max_new", 9), ("rows", "x")])
def test_evaluations_that_cannot_be_compared(tmp_path: Path, name: str, value: object) -> None:
    runs = []
    for folder, mine in (
        ("a", {"n": 50, "max_new_tokens": 6, "rows": "y"}),
        ("b", {"n": 50, "max_new_tokens": 6, "rows": "y", name: value}),
    ):
        made = make_run(tmp_path / folder, seed=len(runs))
        write(made / "evals/lab-sort.jsonl", [{"step": 0, "accuracy": 0.5, "accuracy_se": 0.1, **mine}])
        runs.append(read_run(made))
    assert "lab-sort" in incomparable(runs)[tmp_path / "b"]


def test_kl_on_other_continuations_cannot_be_compared(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        made = make_run(tmp_path / str(seed), seed=seed)
        write(made / "evals/kl.jsonl", [{"step": 10, "task": "lab-add", "kl_exact": 0.1, "rows": "y", "seed": seed}])
        runs.append(read_run(made))
    assert "what KL was measured on" in incomparable(runs)[tmp_path / "1"]


def test_prior_tasks_are_common_and_never_a_target(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", target="lab-add"))]
    assert prior_tasks(runs[:1]) == ["lab-add", "lab-sort"]
    assert prior_tasks(runs) == ["lab-sort"]


def test_tables_are_text_whatever_they_hold() -> None:
    table = Table("t", "T", ("a|b", "x_%"), (("<b>", "0.5 ± 0.1"), ("$\\input{x}$", "`")))
    markdown, latex = table.markdown(), table.latex()
    assert markdown.splitlines()[0] == "| a\\|b | x\\_% |" and "&lt;b&gt;" in markdown and "<b>" not in markdown
    assert "\\input" not in latex and r"\$\textbackslash{}input\{x\}\$" in latex and r"0.5 $\pm$ 0.1" in latex
    assert r"x\_\%" in latex and len(latex.splitlines()) == 8


def test_results_of_half_finished_runs(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a", done=10)), read_run(make_run(tmp_path / "b", es__sigma=0.02, done=0))]
    (tmp_path / "b/metrics.jsonl").unlink()
    table = results(group([runs[0], read_run(tmp_path / "b")]), ["lab-add"])
    assert table.rows[0][1:5] == ("1", "10", "0.250 ± 0.061", "0.250 ± 0.061")
    assert table.rows[0][6] == "−0.250 ± 0.061" and table.rows[0][8] == "1.000"
    assert table.rows[1][2:] == ("0", "0.000 ± 0.000", "0.000 ± 0.000", "1.000 ± 0.000", "0.000 ± 0.000", "–", "–")


def test_rewards_are_shown_where_they_say_more_than_the_accuracy(tmp_path: Path) -> None:
    plain, graded = read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", graded=True, es__sigma=0.02))
    assert not plain.graded and graded.graded and reward_over_iterations(group([plain])) is None
    table, plot = results(group([plain, graded]), ["lab-add"]), reward_over_iterations(group([plain, graded]))
    assert table.columns[3:9] == ("target", "Δ target", "target's reward", "Δ target's reward", "prior", "Δ prior")
    assert table.rows[0][5:7] == ("–", "–") and table.rows[1][5:7] == ("0.550 ± 0.020", "0.250 ± 0.010")
    assert plot is not None and [row["reward"] for row in plot.data] == pytest.approx([0.3, 0.425, 0.55])
    assert results(group([plain]), ["lab-add"]).columns[5] == "prior"


def test_results_are_all_of_one_step(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / str(s), seed=s, done=20 - 10 * s)) for s in (0, 1)]
    (row,) = results(group(runs), ["lab-add"]).rows
    assert row[2] == "10" and row[7:] == (f"{2 * 10**0.5:.4g}", "1.000")  # the drift at step 10, not of each run's last


def test_short_cuts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    assert accuracies(folder, "lab-countdown")[1].tolist() == [0.0, 0.25, 0.5]
    assert prior_accuracy(folder, ["lab-add", "lab-sort"]).tolist() == [1.0, 0.75, 0.5]
    with pytest.raises(FileNotFoundError, match="no step at which all of lab-max were evaluated"):
        accuracies(folder, "lab-max")
    with pytest.raises(ValueError, match="so nothing can be drawn"):
        target_against_prior({"a": folder}, tmp_path / "a.png", prior=["lab-max"])


def test_tasks_are_paired_by_their_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    path = folder / "evals/lab-add.jsonl"
    write(path, [*read_jsonl(path)[:2], {"step": 3, "n": 50, "accuracy": 0.9}])
    assert prior_accuracy(folder, ["lab-add", "lab-sort"]).tolist() == [1.0, 0.75]
    assert [values.tolist() for values in accuracies(folder, "lab-add", "lab-sort")] == [[0, 10], [1.0, 0.75]]
    assert {step: len(rows) for step, rows in read_run(folder).rows(["lab-sort", "lab-add"]).items()} == {0: 2, 10: 2}


def test_kl_and_drop_are_averaged_at_a_step_that_all_seeds_have(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(s), seed=s, done=20 - 10 * s, kl=True, split=True) for s in (0, 1)]
    runs.append(make_run(tmp_path / "never", seed=2))
    series, prior = group([read_run(run) for run in runs]), ["lab-add", "lab-sort"]
    kl, drop = kl_map(series), drop_parts(series, prior)
    assert kl is not None and {(row["step"], row["kl"], row["runs"]) for row in kl.data} == {(10, 0.1, 2)}
    assert drop is not None and {(row["step"], row["runs"]) for row in drop.data} == {(10, 2)}
    assert sum(row["lost"] for row in drop.data) == pytest.approx(0.25)


def test_the_number_of_steps_counts_where_a_schedule_depends_on_it(tmp_path: Path) -> None:
    made = [
        make_run(tmp_path / f"{name}-{steps}", steps=steps, seed=seed, es__schedule=schedule, accuracy=0.2)
        for name, schedule, steps, seed in (
            ("linear", "linear:0.1", 20, 0), ("linear", "linear:0.1", 40, 1),
            ("warm", "constant::5", 20, 0), ("warm", "constant::5", 40, 1), ("warm", "constant::5", 60, 0),
        )
    ]  # fmt: skip
    runs = [read_run(folder) for folder in made]
    assert [(one.label, len(one.runs)) for one in group(runs[:4])] == [
        ("ES, es.schedule = linear:0.1, iterations = 20", 1),
        ("ES, es.schedule = linear:0.1, iterations = 40", 1),
        ("ES, es.schedule = constant::5", 2),
    ]
    with pytest.raises(
        ValueError, match=r"warm-20 and .*warm-60 differ only in train\.steps \(20 and 60, both with se"
    ):
        group(runs)


def test_a_sweep_is_beside_the_same_step_without_a_penalty(tmp_path: Path) -> None:
    swept = [make_run(tmp_path / str(x), penalty="l2", strength=x) for x in (0.2, 2.0)]
    for name, steps, wanted in (("long", 40, 20), ("short", 10, 10)):
        free = make_run(tmp_path / name, steps=steps)
        plot = strength_sweep(group([read_run(run) for run in (*swept, free)]), ["lab-add"])
        assert plot is not None and {row["step"] for row in plot.data if row["penalty"] == "none"} == {wanted}
        assert ["step 10" in (t.get_text() for t in plot.figure.axes[0].texts)] == [name == "short"]


def test_rows_of_other_seeds_are_of_the_seed(tmp_path: Path) -> None:
    """A task that makes its own rows makes others for each task.seed, and a series may be over both seeds."""
    runs = []
    for seed in (0, 1, 2):
        made = make_run(tmp_path / str(seed), seed=min(seed, 1), task__seed=seed, rows=f"r{seed}")
        path = made / "evals/lab-countdown.jsonl"
        write(path, [row | {"rows": f"t{seed}"} for row in read_jsonl(path)])
        write(made / "evals/kl.jsonl", [{"step": 10, "task": "lab-countdown", "kl_exact": 0.1, "rows": f"t{seed}"}])
        runs.append(read_run(made))
    assert not incomparable(runs) and [len(one.runs) for one in group(runs)] == [3]
    assert "; seeds 0, 1, 1 (task.seed = 2); " in caption(runs)
    given = [
        read_run(make_run(tmp_path / f"d{s}", seed=s, task__seed=s, task__data_dir="rows", rows="r")) for s in (0, 1)
    ]
    assert "training data" in incomparable(given)[tmp_path / "d1"] and len(group(given)) == 2


@pytest.mark.parametrize(
    ("name", "row", "lacks"),
    [
        ("notes", {"text": "mine"}, "step"),
        ("lab-add", {"step": 3, "n": 50}, "accuracy"),
        ("kl", {"step": 3, "task": "lab-add"}, "kl_exact"),
    ],
)
def test_a_file_that_is_not_of_the_run_is_named(tmp_path: Path, name: str, row: dict, lacks: str) -> None:
    path = make_run(tmp_path / "a", kl=True) / f"evals/{name}.jsonl"
    lines = read_jsonl(path)
    write(path, [*lines, row])
    with pytest.raises(ValueError, match=rf"evals/{name}\.jsonl line {len(lines) + 1} has no '{lacks}': restore"):
        read_run(tmp_path / "a")


def test_evaluations_that_are_half_done_say_their_steps_and_are_not_mixed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", split=True)
    rows = read_jsonl(folder / "evals/lab-sort.jsonl")
    write(folder / "evals/lab-sort.jsonl", rows[:2])  # of steps 0, 10 and 20
    series = group([read_run(folder)])
    assert results(series, ["lab-add", "lab-sort"]).rows[0][5:7] == (
        "0.750 ± 0.043 (step 10)", "−0.250 ± 0.043 (step 10)",
    )  # fmt: skip
    assert tables.accuracies(series, ["lab-countdown", "lab-sort"]).rows[1][2].endswith("(step 10)")
    parts = drop_parts(series, ["lab-add", "lab-sort"])
    assert parts is not None and {row["step"] for row in parts.data} == {10}
    assert sum(row["lost"] for row in parts.data) == pytest.approx(0.25)
