"""The study on a real language model and its screen, at laboratory size: their rules, their numbers, a run of each."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from es_jax.es.population import Population
from es_jax.rundir.checkpoints import saved_steps
from es_jax.tasks import get_task
from experiments import devices, real_model, screen
from experiments.real_model import STEPS, Study, cases, verdict
from experiments.screen import NOTHING, Settings, prior, signal
from experiments.targets import CANDIDATES, ARCLabel, GSM8KAnswer, GSM8KFormat, PIQAText, ProofWriterLabel

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = Settings("lab", (0.01,), members=30, ratio=0.5, prompts=4, heldout=200)
STUDY = Study("lab", "lab-countdown", {"lab-add": "text"}, members=4, prompts=4, sigma=0.01, ratio=1.0, prior_rows=8)
OPTIONS = ["--members=4", "--prompts=4", "--sigma=0.01", "--ratio=1", "--prior-rows=8", "--priors", "lab-add:text"]


def child(module, *options):
    """A command with one device, where these tests have eight, for which more is compiled."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", f"experiments.{module}", *map(str, options)]
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]


def rewards_of(members, rows, *, between, noise, base=0.5, seed=0):
    draw = np.random.default_rng(seed)
    effect = draw.standard_normal((members, 1)) * between
    return base + effect + draw.standard_normal(rows) + draw.standard_normal((members, rows)) * noise


@pytest.mark.parametrize("between", [0.3, 0.5, 1.0])
def test_the_spread_beyond_rows_is_that_of_the_members(between):
    rewards, members = rewards_of(1000, 16, between=between, noise=1.0), Population(1000, seed=0).members(1)
    found = signal(rewards, rewards.mean(0), members, 0.01, SETTINGS)
    assert found["beyond_rows"] == pytest.approx(between, rel=0.12)
    assert found["spread"] == pytest.approx(np.hypot(between, 1 / 4), rel=0.05) and found["p"] == 0.001
    assert found["gain"] == pytest.approx(SETTINGS.ratio * found["spread"], rel=1e-3)
    assert found["real_gain"] == pytest.approx(SETTINGS.ratio * between**2 / np.hypot(between, 1 / 2), rel=0.2)


@pytest.mark.parametrize(
    ("between", "noise", "base", "said"),
    [
        (0.5, 0.5, 0.0, "signal"),
        (0.0, 0.5, 0.0, "no: members differ by no more than rows"),
        (0.5, 0.5, 3.0, "no: σ is too wide"),
        (0.004, 0.01, 0.0, "no: too small for N(σ/α)² steps"),
    ],
)
def test_the_screens_rule(between, noise, base, said):
    rewards = rewards_of(30, 32, between=between, noise=noise)
    rows = rewards.mean(0) + base if base else rewards.mean(0) + np.random.default_rng(1).standard_normal(32)
    members = Population(30, seed=0).members(1)
    assert signal(rewards, rows, members, 0.01, SETTINGS)["verdict"] == said


def test_equal_rewards_have_no_signal_and_no_gain():
    found = signal(np.ones((30, 8)), np.ones(8), Population(30, seed=0).members(1), 0.01, SETTINGS)
    assert found["equal"] == 1 and found["gain"] == found["real_gain"] == 0 and found["steps_to_3se"] is None
    assert found["p"] == 1 and found["verdict"] != "signal"


@pytest.mark.parametrize(
    ("right", "chance", "said"),
    [(75, 0.5, "counts"), (74, 0.5, "counts"), (70, 0.5, NOTHING), (100, 0.96, NOTHING), (0, 0.0, NOTHING)],
)
def test_a_prior_counts_from_five_errors_above_chance_on(right, chance, said):
    found = prior("loglik", np.arange(100) < right, chance)
    assert found["verdict"] == said and found["view"] == "likelihood" and found["base"] == right / 100
    assert found["base_se"] == pytest.approx(np.sqrt(right / 100 * (1 - right / 100) / 100))


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def call(monkeypatch, module, *options):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, options)])
    module.main()


def test_a_screen_is_made_once_and_reported(tmp_path, monkeypatch, capsys):
    options = ["--model=lab", "--sigmas", "0.01", "0.03", "--members=4", "--rows=8", "--prior-rows=12"]
    options += ["--candidates", "lab-add", f"--out={tmp_path}"]
    child("screen", *options)
    monkeypatch.setattr(screen, "screen", None)
    call(monkeypatch, screen, *options)
    call(monkeypatch, screen, *options, "--list")
    assert capsys.readouterr().out.splitlines()[-1] == "done lab-add (both)"
    lines = rows_of(tmp_path / "screen.csv")
    assert [float(line["sigma"]) for line in lines] == [0.01, 0.03] and float(lines[0]["base"]) > 1
    assert float(lines[1]["members_mean"]) < float(lines[0]["members_mean"]) <= 1.1
    assert all(float(line["seconds_step"]) > 0 and "--members=4" in line["command"] for line in lines)
    (row,) = rows_of(tmp_path / "screen_priors.csv")
    assert (row["prior"], row["rows"], row["verdict"]) == ("lab-add", "12", "counts") and float(row["chance"]) < 0.3
    with pytest.raises(SystemExit, match=r"lab-add\.json was made with members = 4: use that"):
        call(monkeypatch, screen, *options, "--members=5")
    with pytest.raises(SystemExit, match="'lab-ad': the model lab has lab-countdown"):
        call(monkeypatch, screen, "--model=lab", "--candidates", "lab-ad")
    with pytest.raises(SystemExit, match="rows is 1: give at least"):
        call(monkeypatch, screen, "--model=lab", "--rows=1")


def write_rows(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows))


def test_variants_take_a_part_of_the_reward_an_opening_and_every_other_row(tmp_path):
    write_rows(tmp_path / "gsm8k", "train", [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)])
    task = GSM8KFormat(data_dir=tmp_path / "gsm8k")
    example = task.train(1)[0]
    assert [task.score(example, text).reward for text in ("#### 7", "1")] == [1, 0]
    assert [GSM8KAnswer().score(example, text).reward for text in ("#### 7", "1")] == [0, 1]
    assert task.choices is None
    theories = [{"theory": "Tom is red.", "question": f"Tom is {i}.", "answer": "Unknown"} for i in range(5)]
    write_rows(tmp_path / "proofwriter", "train", theories)
    task = CANDIDATES["smollm2"]["proofwriter"].make(str(tmp_path))
    assert isinstance(task, ProofWriterLabel) and len(task.train()) == 2 and len(task.test()) == 3
    assert not {example.id for example in task.train()} & {example.id for example in task.test()}
    example = task.test(1)[0]
    assert example.prompt[-1] == {"role": "assistant", "content": "Answer:"} and len(example.prompt) == 2
    assert task.score(example, " Unknown").parts["strict"] == 1 == task.score(example, "Unknown.").reward
    options = task.choices(example)
    assert options.options[options.right] == " Unknown" and options.prompt == example.prompt
    with pytest.raises(ValueError, match="every other train row of proofwriter has 2 examples"):
        task.train(3)
    with pytest.raises(ValueError, match="rows is 'both': it must be 'train' or 'test'"):
        PIQAText(rows="both")


def test_options_are_words_of_a_prior_and_letters_of_a_target(tmp_path):
    write_rows(
        tmp_path / "piqa", "validation", [{"goal": "Dry a cup.", "sol1": "Wipe it.", "sol2": "Wet it.", "label": 0}]
    )
    task = get_task("experiments.targets:PIQAText", data_dir=tmp_path / "piqa")
    assert task.choices(task.test(1)[0]).options == (" Wipe it.", " Wet it.")
    row = {"question": "Which is wet?", "options": ["sand", "rain"], "option_labels": ["A", "B"], "answer": "B"}
    write_rows(tmp_path / "arc_challenge", "test", [row] * 3)
    task = CANDIDATES["smollm2"]["arc-challenge"].make(str(tmp_path))
    example = task.test(1)[0]
    assert isinstance(task, ARCLabel) and task.choices(example).options == ("A)", "B)")
    assert [task.score(example, text).reward for text in ("B).", "A).", "")] == [1, 0, 0]


def test_every_run_of_the_study_is_valid_and_has_as_many_rollouts():
    grid = list(cases(STUDY, [0, 1]))
    assert [case.labels["run"] for case in grid[:6]] == ["es", "awd-1", "awd-0.5"] * 2 and len(grid) == 11
    assert len({case.folder(Path()) for case in grid}) == len(grid)
    configs = {case.labels["run"]: case.config for case in grid if case.labels["seed"] == 0}
    assert {config.train.steps for config in configs.values()} == {25}
    es, members, grpo = configs["es"], configs["members"], configs["grpo"]
    assert members.es.population * members.es.prompts_per_member == es.es.population * es.task.prompts_per_step == 16
    assert grpo.grpo.rollouts * grpo.task.prompts_per_step == 16 and configs["random"].es.rewards == "random"
    short, full = (dataclasses.asdict(configs[name]) for name in ("pair-rank-1", "pair-full-rank"))
    assert short.pop("es") | {"noise": "gaussian"} == full.pop("es") and short == full
    assert configs["awd-0.5"].optim.anchor.kappa == 0.5


@pytest.mark.parametrize(("members", "ratio", "steps"), [(30, 0.5, 125), (25, 1.0, 25), (26, 1.0, 50)])
def test_the_free_walk_reaches_kappa_one(members, ratio, steps):
    study = Study("lab", "lab-countdown", {}, members=members, ratio=ratio)
    config = next(cases(study, [0])).config
    assert config.train.steps == steps >= members / ratio**2 and steps % 25 == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3}, r"steps is 3: the walk to κ = 1 takes 25, N\(σ/α\)² in steps of 25"),
        ({"prompts": 6}, "prompts is 6: it must be a multiple of 4"),
        ({"target": "lab-ad"}, "'lab-ad' is no candidate of lab: choose of lab-countdown"),
        ({"priors": {"lab-add": "loglik"}}, "prior lab-add has the view 'loglik': it must be text or likelihood"),
        ({"priors": {"lab-countdown": "text"}}, "lab-countdown is the target and a prior"),
    ],
)
def test_a_study_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STUDY, **fields)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study whose first run is done."""
    out = tmp_path_factory.mktemp("study")
    child("real_model", f"--out={out}", "--index=0", *OPTIONS)
    return out


def test_a_run_is_measured_and_reported_with_the_command_that_makes_it_again(study, monkeypatch, capsys):
    zero, last = rows_of(study / "real_model.csv")
    assert (zero["step"], last["step"], last["steps"], last["N"], last["alpha"]) == ("0", "25", "25", "4", "0.01")
    assert float(last["ratio"]) == pytest.approx(1, abs=0.05) and float(last["kl"]) > 0 == float(zero["drift"])
    assert float(last["lab-add_accuracy"]) - float(zero["lab-add_accuracy"]) == float(last["prior_change"])
    assert {row["lab-add_rows"] for row in (zero, last)} == {"8"} and float(last["perplexity"]) > 1
    assert float(last["reward"]) == pytest.approx(float(zero["reward"]) + float(last["reward_change"]))
    for words in ("--index=0", "--seeds 0 1", "--target=lab-countdown", "--sigma=0.01", "--priors lab-add:text"):
        assert words in last["command"]
    folder = next(cases(STUDY, [0])).folder(study)
    assert saved_steps(folder) == [25] and (study / "real_model.png").exists()
    before = (study / "real_model.csv").read_bytes()
    call(monkeypatch, real_model, f"--out={study}", "--only-report", *OPTIONS)
    assert (study / "real_model.csv").read_bytes() == before
    assert "| ES | 1 | 4 × 4 | 25 |" in capsys.readouterr().out
    call(monkeypatch, real_model, f"--out={study}", "--list", "--screen=there", *OPTIONS)
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 11 and "min of measuring" in listed[0]
    assert listed[1].endswith("step 0 of 25: not known: run the screen")


def test_the_base_is_evaluated_once_for_all_runs(study, tmp_path):
    folder, name = next(cases(STUDY, [0])).folder(study), "lab-add"
    (tmp_path / "evals/verdicts").mkdir(parents=True)
    real_model.share_base(tmp_path, [tmp_path / "none", folder], name)
    for part in (f"{name}.jsonl", f"verdicts/{name}.jsonl"):
        (line,) = (tmp_path / "evals" / part).read_text().splitlines()
        assert line == (folder / "evals" / part).read_text().splitlines()[0] and json.loads(line)["step"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([0.30, 0.30], "Signal: "),
        ([0.10, 0.21], "Signal: "),
        ([0.14, 0.14], "No signal: "),
        ([-0.5, -0.5], "No signal: "),
    ],
)
def test_the_rule_about_signal(changes, said):
    lines = [
        {"run": "es", "seed": seed, "rows": 9, "reward_change": moved, "reward_change_se": 0.05}
        for seed, moved in enumerate(changes)
    ]
    text = verdict(lines)
    assert text.startswith(said) and ("No conclusion" in text) == (said == "No signal: ")
    assert verdict([lines[0] | {"run": "awd-1"}]) == "No run of ES is finished: no conclusion."


def test_a_study_takes_what_the_screen_found(tmp_path):
    parse = lambda *options: real_model.study_of(real_model.parser().parse_args([*options, f"--screen={tmp_path}"]))  # noqa: E731
    with pytest.raises(FileNotFoundError, match=r"run python -m experiments\.screen --docs="):
        parse("--size=full")
    head = "target,sigma,steps_to_3se,verdict\n"
    (tmp_path / "screen.csv").write_text(head + "json-facts,0.002,90,no: σ is too wide\n")
    with pytest.raises(ValueError, match="found no signal: a study would show nothing"):
        parse("--size=full")
    rows = "json-facts,0.002,9,signal\nconciseness,0.004,5,signal\njson-facts,0.001,7,signal\n"
    (tmp_path / "screen.csv").write_text(head + rows)
    (tmp_path / "screen_priors.csv").write_text(
        "prior,view,verdict\npiqa-text,text,nothing to forget\npiqa-text,likelihood,counts\njson-facts,text,counts\n"
    )
    found = parse("--size=full")
    assert (found.target, found.sigma) == ("conciseness", 0.004)
    assert found.priors == {"piqa-text": "likelihood", "json-facts": "text"}
    found = parse("--size=full", "--target=json-facts", "--members=10")
    assert (found.sigma, found.members, found.priors) == (0.001, 10, {"piqa-text": "likelihood"})
    assert found.steps == STEPS >= found.fewest(4 * found.members)


def test_a_curve_on_several_devices_is_compared_to_the_bit(study, tmp_path, monkeypatch, capsys):
    folder = next(cases(STUDY, [0])).folder(study)
    calls = []

    def trained(words, *, env, check):
        calls.append((" ".join(words[1:]), env["XLA_FLAGS"]))
        place = Path(next(word for word in words if word.startswith("--workdir=")).partition("=")[2])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(devices.subprocess, "run", trained)
    options = [f"--out={tmp_path}", "--counts", "1", "2", "--config=configs/lab.py:steps=4"]
    for _ in range(2):
        call(monkeypatch, devices, *options)
    assert [flags.rpartition("=")[2] for _, flags in calls] == ["1", "2"]
    assert all("--config=configs/lab.py:steps=4" in words and "members_at_once=1" in words for words, _ in calls)
    assert "Equal to the bit on all." in capsys.readouterr().out
    lines = rows_of(tmp_path / "devices.csv")
    assert len(lines) == 4 and len({line["weights"] for line in lines}) == 2 and (tmp_path / "devices.png").exists()
    assert lines[0]["command"].startswith("JAX_PLATFORMS=cpu XLA_FLAGS=")
    last = [{**lines[1], "devices": n, "weights": str(n)} for n in (1, 2)]
    assert "Not equal" in devices.table(last)
    monkeypatch.setattr(devices.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 3))
    with pytest.raises(SystemExit, match="the run on 4 devices ended with status 3"):
        call(monkeypatch, devices, f"--out={tmp_path}", "--counts", "4")


def test_the_kit_gives_all_runs_the_steps_that_the_first_made(tmp_path):
    """With a program in the place of Python that makes three steps and says what it was given."""
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$LOG"\n'
        'for word in "$@"; do if [[ $word == --workdir=* ]]; then d=${word#*=}; mkdir -p "$d"\n'
        '  printf \'{"seeds": 0}\\n{"changed": 0}\\n{"seeds": 1}\\n{"seeds": 2}\\n\' > "$d/seedlog.jsonl"; fi; done\n'
    )
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "LOG": str(tmp_path / "log"), "DATA": "rows"}
    command = ["bash", ROOT / "launch/one_gpu.sh", tmp_path / "out", "40"]
    subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True)
    *trained, results = (tmp_path / "log").read_text().splitlines()
    configs = [next(word for word in line.split() if word.startswith("--config=")) for line in trained]
    assert [config.partition("steps=")[2] for config in configs] == [
        "100000",
        "3",
        "3,anchor=l2,kappa=1",
        "3,anchor=l2,kappa=0.5",
    ]
    assert all("population=30" in config for config in configs)
    assert "--priors piqa-text:likelihood --json" in results and (tmp_path / "out/results.json").exists()
