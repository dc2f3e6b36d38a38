"""What the tests of several packages share: the config of a small run, and weights compared to the bit."""

import json

import jax
import numpy as np

from es_jax.rundir.metrics import read_jsonl
from es_jax.training.config import RunConfig, freeze
from es_jax.training.loop import run

STEPS = 6
SMALL_RUN = {
    "task": {"name": "conciseness", "train_size": 3},
    "es": {"population": 6, "sigma": 0.05},
    "optim": {"learning_rate": 0.02, "anchor": {"penalty": "l2", "kappa": 1.0}},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2},
    "train": {"steps": STEPS, "checkpoint_every": 4, "samples": 1},
    "evals": {"every": 3, "rows": 2},
}


def config_of(source, fields=SMALL_RUN, **groups) -> RunConfig:
    """The config of a run of `fields` on the model at `source`; `groups` has the fields that differ, by group."""
    groups["model"] = {"source": str(source)} | groups.get("model", {})
    return freeze(fields | {name: fields.get(name, {}) | group for name, group in groups.items()})


def host(params):
    """The same tree with every leaf on the host."""
    return jax.tree.map(np.asarray, params)


def same(a, b) -> bool:
    """Whether two trees are the same, to the bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, host(a), host(b)))


def edit_config(workdir, **facts):
    """Change what a run's config.json says on purpose: what it is, by name, or fields of its config, by group."""
    content = json.loads((workdir / "config.json").read_text())
    del content["sha256"]
    for name, value in facts.items():
        if isinstance(value, dict):
            content["config"][name] |= value
        else:
            content[name] = value
    (workdir / "config.json").write_text(json.dumps(content))


class Killed(BaseException):
    """What no code of ours may catch, as little as it could catch SIGKILL."""


def check_resumed(config, workdir, whole):
    """Go on with a run that was killed; in the end it must be the run that never was."""
    _, uninterrupted, final = whole
    result = run(config, workdir)
    assert same(result.params, final)
    assert (workdir / "seedlog.jsonl").read_bytes() == (uninterrupted / "seedlog.jsonl").read_bytes()
    exact = ("step", "reward_mean", "reward_std", "drift", "drift_theory", "tokens", "length", "truncated")
    for name in ("metrics.jsonl", "samples.jsonl", "evals/conciseness.jsonl"):
        ours, theirs = read_jsonl(workdir / name), read_jsonl(uninterrupted / name)
        keep = exact if name == "metrics.jsonl" else theirs[0]
        assert [{k: row[k] for k in keep} for row in ours] == [{k: row[k] for k in keep} for row in theirs]
    assert (workdir / "DONE").exists()
