"""`evaluate_run`: on runs with and without checkpoints, resumed, on models, and what it refuses."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from configs.lab import get_config
from es_jax.core.flags import parser
from es_jax.evals import runner
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import Options, evaluate_run
from es_jax.evaluate import RENAMED, report, whole_numbers
from es_jax.scoring.heldout import likeliest
from es_jax.scoring.row_results import read_evals
from es_jax.tasks.lab import Lab
from es_jax.tasks.task import Choices
from es_jax.training.es import Evaluator
from es_jax.training.loop import run
from es_jax.weights.model import load_model
from tests.helpers import edit_config

TASKS = ("lab-countdown", "lab-add")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps that evaluated at 0, 2 and 4 and has checkpoints of 2 and 4."""
    workdir = tmp_path_factory.mktemp("run")
    config = get_config("anchor=l2,steps=4")
    config.es.schedule = "linear:0.5"
    config.task.prompts_per_step, config.train.checkpoint_every = 16, 2
    config.evals.every, config.evals.rows, config.evals.tasks = 2, 24, ("lab-add",)
    run(config, workdir)
    return workdir


def bare(whole, folder):
    """The run without checkpoints and evaluations."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "seedlog.jsonl"):
        shutil.copy(whole / name, folder / name)
    return folder


def test_replay_gives_the_rows_that_training_wrote(whole, tmp_path):
    result = evaluate_run(bare(whole, tmp_path / "bare"), drift=True)
    for task in TASKS:
        assert result["tasks"][task] == read_evals(whole / "evals" / f"{task}.jsonl")
        assert [row["step"] for row in result["tasks"][task]] == [0, 2, 4]
    assert result["drift"][1]["ratio"] == pytest.approx(1, abs=0.02) and result["warnings"] == []
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert result["drift"][1]["norm"] == pytest.approx(metrics[3]["drift"], rel=1e-5)
    assert result["drift"][1]["predicted"] == pytest.approx(metrics[3]["drift_theory"])
    for row in result["drift"]:
        assert row["kappa"] == pytest.approx(metrics[row["step"] - 1]["kappa"], rel=1e-5)


@pytest.mark.parametrize("rows", [5, 10, 24])
def test_lanes_share_the_rows_and_decode_little_padding(whole, tmp_path, monkeypatch, rows):
    """Not a batch of decode.slots in each of the lanes, of which there are as many as members at once."""
    shapes, to_rows = [], Evaluator._rows

    def watched(self, tokens, *rest):
        shapes.append(tokens.shape)
        return to_rows(self, tokens, *rest)

    monkeypatch.setattr(Evaluator, "_rows", watched)
    evaluate_run(bare(whole, tmp_path / "bare"), tasks=["lab-add"], steps=[1], options=Options(rows=rows))
    assert shapes and all(rows <= lanes * each < rows + lanes for lanes, each, _ in shapes)


def test_a_finished_task_and_step_is_not_done_again(whole, tmp_path, monkeypatch):
    workdir = bare(whole, tmp_path / "bare")
    ask = dict(tasks=["lab-add"], steps=[1], kl=True, drift=True, options=Options(rows=8, kl_tokens=4))
    first = evaluate_run(workdir, **ask)
    files = {path: path.read_bytes() for path in sorted((workdir / "evals").rglob("*.json*"))}
    assert {path.name for path in files} >= {"lab-add.jsonl", "kl.jsonl", "drift.jsonl", "lab-add.json"}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", None)
        patch.setattr(runner, "sample", None)
        patch.setattr(runner, "kl", None)
        assert evaluate_run(workdir, **ask) == first
    assert {path: path.read_bytes() for path in files} == files
    more = evaluate_run(workdir, **(ask | {"tasks": list(TASKS), "steps": [1, 3]}))
    assert [row["step"] for row in more["tasks"]["lab-countdown"]] == [0, 1, 3]
    assert {(row["step"], row["task"]) for row in more["kl"]} == {(s, t) for s in (1, 3) for t in TASKS}
    assert more["kl"][0]["kl_exact"] > 0 and more["kl"][0]["kl_exact_se"] > 0


def test_an_evaluation_that_died_goes_on(whole, tmp_path, monkeypatch):
    workdir, calls = bare(whole, tmp_path / "bare"), []
    ask = dict(tasks=list(TASKS), steps=[2], options=Options(rows=8))
    original = runner.EvalsFile.add

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner.EvalsFile, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(workdir, **ask)
    result = evaluate_run(workdir, **ask)
    assert result["tasks"] == evaluate_run(bare(whole, tmp_path / "other"), **ask)["tasks"]


def test_an_exported_step_is_evaluated_beside_its_base(whole, tmp_path):
    export_run(whole, tmp_path / "out", step=4)
    options = Options(rows=24, max_prompt_tokens=16, max_new_tokens=6)
    result = evaluate_run(
        tmp_path / "out", base="lab", tasks=TASKS, drift=True, out=tmp_path / "evals", options=options
    )
    of_run = {task: read_evals(whole / "evals" / f"{task}.jsonl") for task in TASKS}
    for task in TASKS:
        base, now = result["tasks"][task]
        assert now | {"step": 4} == of_run[task][-1] and base == of_run[task][0]
    assert result["drift"][0]["norm"] > 0
    assert result["drift"][0]["predicted"] is None and result["drift"][0]["kappa"] is None
    assert "–" in report(result)
    alone = evaluate_run(tmp_path / "out", tasks=["lab-add"], out=tmp_path / "alone", options=options)
    assert alone["tasks"]["lab-add"][0]["accuracy"] == of_run["lab-add"][-1]["accuracy"]
    with pytest.raises(ValueError, match=r"rows of the model \S+, but .* base model lab, .*use another --out"):
        evaluate_run(tmp_path / "out", base="lab", tasks=["lab-add"], out=tmp_path / "alone", options=options)


def test_rows_of_two_runs_are_not_mixed(whole, tmp_path):
    """Neither of other fields nor of another log; rows of step 0 are the base model's, and go with any run of it."""
    ask = dict(tasks=["lab-add"], options=Options(rows=8))
    one, two = bare(whole, tmp_path / "one"), bare(whole, tmp_path / "two")
    edit_config(two, train={"seed": 5})
    evaluate_run(one, steps=[0], **ask)
    shutil.copytree(one / "evals", two / "evals")
    evaluate_run(two, steps=[0], **ask)
    (two / "evals" / "subject.json").unlink()  # as training leaves it
    evaluate_run(two, steps=[1], **ask)
    before = {path: path.read_bytes() for path in (two / "evals").rglob("*.json*")}
    with pytest.raises(ValueError, match=r"run \S+two, but .* run \S+one, .*train.seed 5 there and 0 here"):
        evaluate_run(one, steps=[1], out=two / "evals", **ask)
    lines = (two / "seedlog.jsonl").read_bytes().splitlines(keepends=True)
    changed = json.loads(lines[1]) | {"sigma": 0.1}
    del changed["sum"]
    (two / "seedlog.jsonl").write_bytes(lines[0] + json.dumps(changed).encode() + b"\n" + lines[2])
    with pytest.raises(ValueError, match="steps 4 there and 3 here; seedlog"):
        evaluate_run(two, steps=[1], **ask)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_went_on_keeps_its_rows(whole, tmp_path):
    ask, workdir = dict(tasks=["lab-add"], options=Options(rows=8)), bare(whole, tmp_path / "bare")
    lines = (whole / "seedlog.jsonl").read_bytes().splitlines(keepends=True)
    edit_config(workdir, train={"steps": 2})
    (workdir / "seedlog.jsonl").write_bytes(b"".join(lines[:2]))
    first = evaluate_run(workdir, steps=[2], **ask)["tasks"]["lab-add"]
    bare(whole, workdir)
    assert evaluate_run(workdir, steps=[2, 4], **ask)["tasks"]["lab-add"][:2] == first


@pytest.mark.slow
def test_a_grpo_run_is_evaluated_at_its_checkpoints_alone(tmp_path):
    config = get_config("grpo,steps=2")
    config.update_from_flattened_dict({
        "task.prompts_per_step": 4, "grpo.rollouts": 2, "grpo.mini_batch": 4, "grpo.micro_batch": 8,
        "train.checkpoint_every": 2, "evals.every": 0, "evals.rows": 8,
    })  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # optax's adam needs it
        run(config, tmp_path)
    result = evaluate_run(tmp_path, tasks=["lab-add"], steps=[2], drift=True)
    assert [row["step"] for row in result["tasks"]["lab-add"]] == [0, 2]
    assert result["drift"][0]["norm"] > 0
    assert result["drift"][0]["predicted"] is None and result["drift"][0]["kappa"] is None
    with pytest.raises(ValueError, match=r"step 1 of .* cannot be rebuilt: .* steps with a checkpoint are: 2"):
        evaluate_run(tmp_path, tasks=["lab-add"], steps=[1])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"steps": [5]}, "--steps has 5, but there are only steps 0 to 4"),
        ({"options": Options(rows=8)}, r"from 24 rows .* has 8 .*--rows and --data_dir, or another --out"),
        ({"options": Options(max_new_tokens=5)}, "max_new_tokens = 6, and this evaluation has 5"),
        ({"tasks": ["lab-ad"]}, "did you mean 'lab-add'"),
        ({"base": "lab"}, "leave base out"),
        ({"options": Options(max_new_tokens=2000)}, "set max_new_tokens to at most"),
        ({"options": Options(max_prompt_tokens=3)}, "raise decode.max_prompt_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(whole, ask, message, monkeypatch):
    monkeypatch.setattr(runner, "evaluate", None)
    with pytest.raises(ValueError, match=message):
        evaluate_run(whole, **ask)


def test_a_model_alone_has_no_kl_and_no_tasks_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="kl and drift need base"):
        evaluate_run("lab", tasks=["lab-add"], kl=True, out=tmp_path)
    with pytest.raises(ValueError, match="name them"):
        evaluate_run("lab", out=tmp_path)
    with pytest.raises(ValueError, match="rows is 0"):
        Options(rows=0)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"workdir": "owner/name"}, "--workdir is 'owner/name', which is not a folder.*set --out"),
        ({"workdir": "lab"}, "--workdir is 'lab', which is not a folder.*set --out"),
        (
            {"workdir": "nofolder", "out": "o"},
            "--workdir is 'nofolder', which is neither a run's directory nor a model",
        ),
        (
            {"workdir": "lab", "out": "o", "base": "nofolder"},
            "--base is 'nofolder': .*is not a folder, a .gguf file or a hub",
        ),
    ],
)
def test_what_is_no_model_and_what_has_no_folder_is_named(ask, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate_run(tasks=["lab-add"], **ask)
    assert not list(tmp_path.iterdir())


def test_steps_must_be_numbers():
    assert whole_numbers(["0", "50"]) == [0, 50] and whole_numbers(None) is None
    with pytest.raises(ValueError, match="--steps is '0,a': give whole numbers"):
        whole_numbers(["0", "a"])


@pytest.mark.parametrize(
    ("flag", "now"),
    [
        ("size=8", "rows"),
        ("max_new=8", "max_new_tokens"),
        ("max_prompt=8", "max_prompt_tokens"),
        ("kl_size=8", "kl_rows"),
    ],
)
def test_a_flag_of_an_earlier_version_is_refused_with_its_new_name(flag, now):
    parse = parser("es_jax.evaluate", renamed=RENAMED)
    with pytest.raises(SystemExit, match=f"es_jax.evaluate: --{flag[:-2]} was renamed to --{now}: use the new name"):
        parse(["evaluate.py", f"--{flag}"])


def test_the_likeliest_option_is_found():
    """By a model that knows the answers: reversed digits, and which of two numbers is smaller."""
    model = load_model("lab")
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    asked = [("R12345=", ("12345", "54321"), 1), ("C34<57=", ("n", "y"), 1), ("C34<57=", ("n", "y"), 0)]
    rows = [(encode(prompt), [encode(option) for option in options], right) for prompt, options, right in asked]
    assert likeliest(model.config, model.params, rows, dtype=jnp.float32).tolist() == [1, 1, 0]


def test_a_task_with_options_is_scored_without_generation_too(whole, tmp_path, monkeypatch):
    """The third view reaches the rows: here of a task whose right option is the answer that the model would write."""

    def choices(self, example):
        wrong = "0" if example.answer != "0" else "1"
        return Choices(example.prompt, (wrong, example.answer), 1)

    monkeypatch.setattr(Lab, "choices", choices, raising=False)
    result = evaluate_run(bare(whole, tmp_path / "bare"), tasks=["lab-maximum"], steps=[4], options=Options(rows=16))
    row = result["tasks"]["lab-maximum"][-1]
    assert row["loglik"] >= 0.9 and row["loglik_change_se"] is not None
