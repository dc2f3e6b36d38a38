"""The first run of the README with a tiny model: its config trains, its control too, and both are reported."""

import json

import pytest
from helpers import tiny_model

from configs import json_facts
from es_jax.rundir.metrics import read_jsonl
from es_jax.training.config import freeze
from es_jax.training.loop import run
from experiments import first_run

TINY = {
    "task.train_size": 4,
    "task.prompts_per_step": 2,
    "es.population": 8,
    "es.sigma": 0.05,
    "optim.learning_rate": 0.05,
    "decode.max_prompt_tokens": 160,
    "decode.max_new_tokens": 4,
    "train.steps": 2,
    "evals.rows": 3,
    "evals.every": 2,
    "mesh.groups": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two finished runs, as experiments.first_run leaves them."""
    root = tmp_path_factory.mktemp("first")
    model = tiny_model(root / "model")
    for labels, command, folder in first_run.commands([0], root):
        config = json_facts.get_config(command.partition("json_facts.py:")[2].partition(" ")[0])
        config.update_from_flattened_dict(TINY | {"model.source": str(model)})
        assert freeze(config).es.rewards == labels["rewards"] and freeze(config).train.seed == 0
        run(config, folder)
        folder.with_suffix(".cost.json").write_text('{"cpu_seconds": 120, "wall_seconds": 99, "starts": 1}\n')
    return root


def test_both_runs_finish_and_compare_rows_with_step_0(runs):
    for name in ("task-0", "random-0"):
        first, last = read_jsonl(runs / name / "evals/json-facts.jsonl")
        assert (first["step"], last["step"], last["n"]) == (0, 2, 3) and first["reward_change"] == 0
        assert last["reward_change"] == pytest.approx(last["reward"] - first["reward"])
    assert read_jsonl(runs / "random-0/metrics.jsonl")[-1]["drift"] > 0


def test_the_table(runs):
    rows = first_run.lines([0, 1], runs)  # seed 1 is not there yet
    assert [(row["rewards"], row["step"]) for row in rows] == [("task", 0), ("task", 2), ("random", 0), ("random", 2)]
    assert rows[-1]["drift"] > 0 and rows[-1]["command"].endswith(
        f"json_facts.py:seed=0,rewards=random --workdir={runs}/random-0"
    )
    text = first_run.table(rows).splitlines()
    assert len(text) == 4 and text[2].startswith("| task | 0 | 2 | 0.000 ± 0.000 |") and text[3].endswith(" | 1.0 |")
    assert {line.count("|") for line in text} == {11}
    more = [row | {"seed": 1, "reward": 0.5, "reward_change": 0.5} for row in rows]
    assert "| task | mean | | | 0.250 ± 0.250 | 0.250 ± 0.250 |" in first_run.table([*rows, *more])


def test_a_command_is_timed_over_its_starts_and_its_failure_ends_the_script(tmp_path):
    for _ in range(2):
        first_run.execute("python -c pass", tmp_path / "x")
    assert json.loads((tmp_path / "x.cost.json").read_text())["starts"] == 2
    with pytest.raises(SystemExit, match="ended with status 3: start the same command again"):
        first_run.execute("python -c exit(3)", tmp_path / "x")
