"""The plan of a GRPO run: its own programs, compiled for eight devices."""

import jax
import pytest

from es_jax.core.chips import chip
from es_jax.models.config import TransformerConfig
from es_jax.planning.describe import fields
from es_jax.planning.plan import make_plan
from es_jax.planning.programs import Programs
from es_jax.planning.topology import Topology
from es_jax.training.config import freeze

SMALL = TransformerConfig(
    family="qwen2", vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_dim=256, qkv_bias=True
)
CONFIG = {
    "method": "grpo",
    "model": {"source": "small"},
    "task": {"train_size": 16},
    "grpo": {"rollouts": 4, "mini_batch": 6, "micro_batch": 1},
    "decode": {"max_prompt": 32, "max_new": 8, "slots": 8},
    "optim": {"name": "adamw", "learning_rate": 1e-6, "anchor": {"penalty": "l2", "strength": 10.0}},
}


def test_a_grpo_run_is_planned_by_its_own_programs():
    cpu = Topology("cpu:8", chip("v5e"), tuple(jax.devices()))
    with jax.numpy_dtype_promotion("standard"):  # optax's adamw needs it
        plan = make_plan(freeze(CONFIG), SMALL, cpu)
    programs = fields(plan)["programs"]
    assert {name: program["runs"] for name, program in programs.items()} == {
        "load": 0,
        "rollout": 1,  # 64 rows in 8 groups of 8 slots
        "logprobs": 2,
        "update": 3,  # 16 prompts in mini-batches of 6
    }
    assert plan.fits and all(program["error"] is None for program in programs.values())
    weights = 2 * 128 * (2 * 128 + 2 * 2 * 32 + 3 * 256) + 512 * 128
    update = programs["update"]["parts"]
    assert update["moments"] == pytest.approx(2 * update["parameters"], rel=0.01)
    assert update["parameters"] == pytest.approx(4 * weights / 8, rel=0.1)
    assert programs["rollout"]["parts"]["compute copy"] >= 2 * weights


def test_a_plan_of_the_other_method_is_refused():
    cpu = Topology("cpu:8", chip("v5e"), tuple(jax.devices()))
    with pytest.raises(ValueError, match="method is 'grpo'"):
        Programs.of(freeze(CONFIG), SMALL, cpu)
