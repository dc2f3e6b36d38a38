"""The laboratory shows the science: what ES forgets, what AWD keeps, and that drift obeys the closed forms."""

import json
import math
from importlib.resources import files

import jax
import numpy as np
import pytest

from configs.lab import get_config
from es_jax.es import theory
from es_jax.plotting import accuracies, prior_accuracy, target_against_prior
from es_jax.rundir.metrics import read_jsonl
from es_jax.tasks.lab import PRIOR
from es_jax.training.loop import run
from es_jax.weights.model import load_model
from experiments.lab_demo import sentence
from experiments.pretrain_lab import CONFIG, RECORD, accuracy, digest, make_tokenizer, pretrain

TARGET, STEPS, EVERY, DIM = "lab-countdown", 100, 25, 90_432
RUNS = {"none": "", "l2": "anchor=l2", "random": "rewards=random,steps=50", "antithetic": "antithetic=true,steps=25",
        "large": "population=32,steps=25"}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs at one seed, made when they are first asked for."""
    root = tmp_path_factory.mktemp("lab")

    def get(name):
        if not (root / name / "DONE").exists():
            config = get_config(f"steps={STEPS},{RUNS[name]}".removesuffix(","))
            config.evals.every = EVERY
            config.mesh.groups = 1  # the bits are the same on eight fake devices, which two cores run half as fast
            run(config, root / name)
        return root / name

    return get


def prior_at(folder, step):
    return prior_accuracy(folder, PRIOR)[accuracies(folder, TARGET)[0].tolist().index(step)]


def test_the_shipped_model_is_of_the_script_and_knows_the_prior_tasks():
    model, made = load_model("lab"), make_tokenizer()
    assert model.config == CONFIG and model.tokenizer.get_vocab() == made.get_vocab()
    assert sum(leaf.size for leaf in _leaves(model.params)) == DIM
    scores = accuracy(model.params, model.tokenizer)
    assert 0.03 <= scores.pop(TARGET) <= 0.10
    assert set(scores) == set(PRIOR) and min(scores.values()) >= 0.95, scores


def test_the_shipped_weights_are_what_the_script_makes():
    """The script's own record beside them names their digest, and its first hundred steps come out again."""
    folder = files("es_jax.weights") / "lab"
    record = json.loads((folder / RECORD).read_text())
    assert record["sha256"] == digest(folder)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        losses = pretrain(**record["recipe"], until=100)[1]
    assert losses == pytest.approx(record["losses"][:2], rel=1e-3)


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_awd_keeps_what_es_forgets_and_costs_little_of_the_target(runs):
    none, l2 = runs("none"), runs("l2")
    assert prior_at(l2, STEPS) >= prior_at(none, STEPS) + 0.15
    assert accuracies(l2, TARGET)[1][-1] >= accuracies(none, TARGET)[1][-1] - 0.05
    assert accuracies(none, TARGET)[1][-1] >= accuracies(none, TARGET)[1][0] + 0.2  # ES learns it


def test_random_rewards_forget_like_real_ones_and_teach_nothing(runs):
    none, random = runs("none"), runs("random")
    assert prior_at(random, 50) <= prior_at(none, 0) - 0.5 * (prior_at(none, 0) - prior_at(none, 50))
    assert accuracies(random, TARGET)[1][2] <= accuracies(none, TARGET)[1][2] - 0.2  # at step 50


def test_a_larger_population_forgets_less(runs):
    assert prior_at(runs("large"), EVERY) > prior_at(runs("none"), EVERY)


@pytest.mark.parametrize("name", ["none", "l2", "random", "antithetic"])
def test_drift_obeys_the_closed_form(runs, name):
    row = read_jsonl(runs(name) / "metrics.jsonl")[-1]
    walk = {"learning_rate": 0.005, "dim": DIM, "steps": row["step"], "population": 8}
    if name == "l2":
        expected = theory.anchored_norm(**walk, strength=2.0, penalty="l2")
    else:
        expected = theory.random_walk_norm(**walk)
    if name == "antithetic":  # √(1 − ρ): ρ as the rewards of the pairs had it
        log = [np.array(entry["rewards"]) for entry in read_jsonl(runs(name) / "seedlog.jsonl")]
        z = [(r - r.mean()) / (r.std() + 1e-8) for r in log]
        expected *= math.sqrt(1 - np.mean([np.mean(x[::2] * x[1::2]) for x in z]))
    assert row["drift"] == pytest.approx(expected, rel=0.02)


def test_the_same_seed_is_the_same_run(tmp_path):
    logs = []
    for name in ("a", "b"):
        config = get_config("steps=5")
        config.evals.every, config.mesh.groups = 0, 1
        run(config, tmp_path / name)
        logs.append((tmp_path / name / "seedlog.jsonl").read_text())
    assert logs[0] == logs[1]


def test_the_figure_and_its_errors(runs, tmp_path):
    path = target_against_prior({"ES": runs("none")}, tmp_path / "a.png", prior=PRIOR)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="lab-nothing"):
        accuracies(runs("none"), "lab-nothing")


def test_the_sentence_follows_the_numbers():
    labels = ("ES", "ES + AWD", "ES, random rewards")
    good = sentence(dict(zip(labels, (0.4, 0.5, 0.1), strict=True)), dict(zip(labels, (0.3, 0.9, 0.3), strict=True)), 1)
    bad = sentence(dict(zip(labels, (0.5, 0.4, 0.1), strict=True)), dict(zip(labels, (0.9, 0.3, 1.0), strict=True)), 1)
    assert "AWD kept 0.60 more" in good and "0.10 more accuracy" in good and "random walk causes forgetting" in good
    assert "AWD lost 0.60 more" in bad and "0.10 less accuracy" in bad and "the task matters" in bad
