"""The law of replay: the config, the base weights and the seed log give every step's weights back, to the bit."""

import os
import shutil

import jax
import pytest

from es_jax.core.mesh import make_mesh
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from tests.helpers import STEPS, config_of, host, same

VARIANTS = {
    "plain": {"optim": {"anchor": {"penalty": "none"}}},
    "l1, antithetic": {"optim": {"anchor": {"penalty": "l1", "strength": 0.1}}, "es": {"antithetic": True}},
    "adam": {"optim": {"name": "adam", "anchor": {"penalty": "l2", "strength": 1.0}}},
    "shared_seed in float16": {
        "es": {"noise": "shared_seed"},
        "model": {"param_dtype": "float16"},
        "optim": {"anchor": {"penalty": "l2", "strength": 1.0}},
    },
    "lanes": {"decode": {"members_at_once": 2, "max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2}},
    "a few prompts a step": {"task": {"prompts_per_step": 2, "train_size": 3}},
    "schedules": {
        "es": {"schedule": "linear:0.5:1"},
        "optim": {"schedule": "cosine:0.1:2", "anchor": {"penalty": "l2", "strength": 5.0, "schedule": "constant::2"}},
    },
    "an averaged anchor": {"optim": {"anchor": {"penalty": "l2", "strength": 5.0, "ema_decay": 0.5}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_equals_the_live_weights_bit_for_bit(variant, tiny_model, tmp_path):
    groups = VARIANTS[variant] | {"train": {"steps": 3, "checkpoint_every": 50}, "evals": {"every": 0}}
    groups["model"] = {"source": str(tiny_model)} | VARIANTS[variant].get("model", {})
    standard = jax.numpy_dtype_promotion("standard" if variant == "adam" else "strict")  # optax's adam needs it
    with standard:
        result = run(config_of(tiny_model, **groups), tmp_path)
        rebuilt = dict((step, host(params)) for step, params in replay(tmp_path))
    assert sorted(rebuilt) == [0, 1, 2, 3]
    assert same(rebuilt[3], result.params)
    assert not same(rebuilt[2], result.params)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_replay_has_the_same_bits_on_any_mesh(devices, whole):
    _, workdir, final = whole
    mesh = make_mesh(devices=jax.devices()[:devices])
    ((step, params),) = replay(workdir, steps=[STEPS], mesh=mesh)
    assert step == STEPS and same(params, final)


def test_replay_needs_only_config_and_seed_log(whole, tmp_path):
    _, workdir, final = whole
    for name in ("config.json", "seedlog.jsonl"):
        shutil.copy(workdir / name, tmp_path / name)
    rebuilt = {step: host(params) for step, params in replay(tmp_path, steps=[STEPS, 0])}
    assert same(rebuilt[STEPS], final) and sorted(os.listdir(tmp_path)) == ["config.json", "seedlog.jsonl"]
