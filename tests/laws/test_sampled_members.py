"""decode.temperature: members that are scored on sampled completions, and what their keys do not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core import rng
from es_jax.core.mesh import make_mesh
from es_jax.es.population import Population, unperturbed_members
from es_jax.generate.engine import engine_for
from es_jax.generate.sampling import sampler_of
from es_jax.models.transformer import Transformer, TransformerConfig
from es_jax.rundir.seed_log import SeedLog, read_entries
from es_jax.tasks import SimpleTask
from es_jax.training.config import freeze
from es_jax.training.es import Evaluator
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from tests.helpers import TWO_STEPS, config_of, killed, same

CONFIG = TransformerConfig(
    family="llama", vocab_size=24, width=16, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=16
)
PROMPTS = [[1, 2, 3], [4], [5, 6], [1, 2, 3]]
KEYS = rng.row_keys(3, 1, len(PROMPTS))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, jax.jit(Transformer(CONFIG).init)(jax.random.key(1)))


def completions(params, *, noise="gaussian", mesh=(1, 1), slots=4, at_once=1, seen=None, in_place=None, members=None):
    """Tokens of all members, {member: [Q, L]}."""
    fields = {"population": 3, "sigma": 0.02, "noise": noise}
    config = freeze({"es": fields, "decode": {"members_at_once": at_once}})
    engine = engine_for(CONFIG, PROMPTS, slots=slots, max_new_tokens=5, stop_token_ids=(0,), in_place=in_place)
    evaluator = Evaluator.of(config, engine, make_mesh(*mesh)).sampling(0.9)
    members = Population(3, seed=0).members(1) if members is None else members
    packed = engine.packing(PROMPTS).pack(PROMPTS, rows=len(PROMPTS))
    return {n: tokens for n, tokens, _ in evaluator.members(params, members, packed, seen, KEYS)}


def test_members_draw_with_the_keys_of_the_rows(params):
    """As one prompt after the other by the engine alone, with `fold_in(key, token)` of the row's key."""
    tokens = completions(params, members=unperturbed_members(2))  # both are θ itself
    assert (tokens[0] == tokens[1]).all(), "all members of a step share a row's key"
    assert (tokens[0][0] != tokens[0][3]).any(), "two rows of one prompt do not"
    spec = {"max_new_tokens": 5, "stop_token_ids": (0,), "sampler": sampler_of(0.9)}
    engine = engine_for(CONFIG, PROMPTS, slots=1, **spec)
    for row, prompt in enumerate(PROMPTS):
        alone, position = map(jnp.asarray, engine.packing(PROMPTS).pack([prompt], rows=1)[:2])
        out = engine.decode(engine.layout(params), alone, position, rng.wrapped(jnp.asarray(KEYS[row : row + 1])))
        assert (np.asarray(out.tokens[0]) == tokens[0][row]).all()


VARIANTS = [
    {"mesh": (2, 1), "at_once": 2, "slots": 1},
    {"in_place": True, "slots": 2},
    {"noise": "low_rank", "mesh": (2, 1), "at_once": 2, "slots": 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_neither_mesh_nor_slots_nor_members_at_once_change_them(params, variant):
    noise = variant.get("noise", "gaussian")
    one_by_one = completions(params, noise=noise)
    tokens = completions(params, **variant)
    assert sorted(tokens) == [0, 1, 2] and all((tokens[n] == one_by_one[n]).all() for n in tokens)
    assert any((tokens[0] != tokens[n]).any() for n in (1, 2))


def test_a_member_that_sees_some_prompts_draws_with_their_keys(params):
    whole, seen = completions(params), np.array([[3, 0], [1, 2], [0, 1]])
    part = completions(params, seen=seen)
    for member, rows in enumerate(seen):
        assert (part[member] == whole[member][rows]).all()


def test_keys_follow_from_seed_step_and_row():
    assert (rng.row_keys(3, 1, 2) == KEYS[:2]).all()
    others = [
        rng.row_keys(3, 2, 4),
        rng.row_keys(4, 1, 4),
        rng.evaluation_keys(3, 4, 1)[0],
        rng.evaluation_keys(1, 4, 1)[0],
    ]
    words = {tuple(key) for keys in [KEYS, *others] for key in keys.tolist()}
    assert len(words) == 20
    many = rng.evaluation_keys(7, 5, 4)
    assert (rng.evaluation_keys(7, 3, 2) == many[:2, :3]).all() and len({tuple(k) for k in many.reshape(-1, 2)}) == 20


class Letters(SimpleTask):
    """A reward that nearly every other completion changes."""

    def rows(self, split):
        return [("Say a word.", "a"), ("Say two words.", "b")]

    def score(self, example, completion):
        return sum(map(ord, completion)) % 7 / 7


def test_a_sampled_run_that_was_killed_goes_on_as_if_it_never_was(tiny_model, tmp_path):
    train = {"steps": 3, "checkpoint_every": 9}
    config = config_of(tiny_model, TWO_STEPS, decode={"temperature": 1.0}, train=train)
    whole = run(config, tmp_path / "whole", task=Letters())
    assert len({reward for entry in read_entries(tmp_path / "whole") for reward in entry.rewards}) > 2
    with killed(SeedLog, "append", call=2):
        run(config, tmp_path / "killed", task=Letters())
    assert same(run(config, tmp_path / "killed", task=Letters()).params, whole.params)
    ((_, params),) = replay(tmp_path / "whole", steps=[3])
    assert same(params, whole.params)
    logs = [(tmp_path / name / "seedlog.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode": {"temperature": -0.5}}, r"decode.temperature is -0\.5: it must be finite and at least 0"),
        ({"decode": {"temperature": float("inf")}}, "decode.temperature is inf: it must be finite"),
        (
            {"method": "grpo", "decode": {"temperature": 0.7}},
            r"decode.temperature is 0\.7 with method 'grpo': .*set grpo.temperature",
        ),
    ],
)
def test_a_temperature_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        freeze(fields)
