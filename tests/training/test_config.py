import dataclasses
import json

import pytest
from ml_collections import config_dict

from configs import conciseness, countdown, gsm8k, json_facts, lab, proofwriter
from es_jax.es.theory import anchored_norm
from es_jax.optim.chains import OPTIMIZERS
from es_jax.training.config import RunConfig, default_config, freeze, read_config
from es_jax.training.state import optimizer_sentence


def test_the_door_and_the_inside_have_the_same_fields_and_defaults():
    assert freeze(default_config()) == RunConfig()
    assert freeze(dataclasses.asdict(RunConfig())) == RunConfig()
    with pytest.raises(AttributeError, match=r"populaton.*population"):
        default_config().es.populaton = 3


def test_the_defaults_are_the_papers():
    c = RunConfig()
    assert (c.es.sigma, c.optim.learning_rate, c.es.population, c.train.steps) == (1e-3, 5e-4, 30, 500)
    assert (c.task.train_size, c.decode.max_new_tokens, c.evals.every) == (200, 1024, 25)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"es": {"sgima": 1.0}}, "unknown config field 'es.sgima': did you mean 'es.sigma'"),
        ({"ess": {}}, "unknown config field 'ess': did you mean 'es'"),
        ({"es": {"population": "8"}, "task": {"nmae": "x"}}, "es.population is '8': it must be int; unknown"),
        ({"es": {"population": True}}, "es.population is True"),
        ({"es": 3}, "es is 3: it must be a group"),
        ({"es": {"population": 1}}, "size is 1"),
        ({"es": {"population": 5, "antithetic": True}}, "must be even"),
        ({"es": {"sigma": 0.0}}, "es.sigma is 0.0"),
        ({"es": {"sigma": -1}}, "es.sigma is -1"),
        ({"es": {"sigma": float("nan")}}, "es.sigma is nan"),
        ({"es": {"noise": "gausian"}}, "unknown es.noise 'gausian': did you mean 'gaussian'"),
        ({"optim": {"learning_rate": 0.0}}, "optim.learning_rate is 0.0"),
        ({"optim": {"name": "sdg"}}, "did you mean 'sgd'"),
        ({"optim": {"anchor": {"penalty": "l2"}}}, "with no strength"),
        ({"optim": {"anchor": {"penalty": "l2", "strength": 1.0, "kappa": 1.0}}}, "with strength and kappa"),
        ({"optim": {"anchor": {"strength": 1.0}}}, "penalty is 'none'"),
        ({"optim": {"anchor": {"penalty": "l2", "strength": 2000.0}}}, "αλ is 0.0005 × 2000 = 1"),
        ({"optim": {"name": "adam", "anchor": {"penalty": "l2", "kappa": 1.0}}}, "closed form for 'sgd' alone"),
        ({"optim": {"schedule": "liner"}}, "optim.schedule: unknown schedule 'liner': did you mean 'linear'"),
        ({"optim": {"schedule": "linear:0:500"}}, "optim.schedule: schedule 'linear:0:500' warms up for 500 of 500"),
        ({"es": {"schedule": "cosine"}}, "σ must stay above 0"),
        (
            {"optim": {"schedule": "linear:5", "anchor": {"penalty": "l2", "strength": 500.0}}},
            "times 5 by its schedules",
        ),
        ({"optim": {"anchor": {"ema_decay": 0.9}}}, "optim.anchor.ema_decay is set but optim.anchor.penalty is 'none'"),
        ({"optim": {"anchor": {"penalty": "l2", "strength": 1.0, "ema_decay": 1.0}}}, "optim.anchor.ema_decay is 1.0"),
        ({"optim": {"anchor": {"penalty": "l2", "kappa": 1.0, "ema_decay": 0.9}}}, "have no finite long-run drift"),
        ({"method": "grpo", "optim": {"schedule": "linear"}}, "schedules are for ES"),
        ({"task": {"train_size": 4, "prompts_per_step": 5}}, "prompts_per_step is 5 with task.train_size 4"),
        ({"decode": {"max_new_tokens": 0}}, "decode.max_new_tokens is 0"),
        ({"train": {"seed": -1}}, "train.seed is -1"),
        ({"mesh": {"groups": 0}}, "mesh.groups is 0"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, says):
    with pytest.raises(ValueError) as error:
        freeze(fields)
    assert says in str(error.value)


@pytest.mark.parametrize("file", [countdown, gsm8k, proofwriter, conciseness, json_facts, lab])
def test_every_config_file_is_valid_and_says_what_it_reached(file):
    assert freeze(file.get_config()).model.source
    assert "Command:" in file.__doc__ and "Reached:" in file.__doc__


def test_arguments():
    c = countdown.get_config("qwen2.5-7b,population=128,anchor=l2,antithetic=true,sigma=2e-3,data=rows")
    assert c.model.source == "Qwen/Qwen2.5-7B-Instruct" and c.es.population == 128 and c.es.antithetic
    assert c.es.sigma == 2e-3 and c.optim.anchor.strength == 10.0 and c.task.data_dir == "rows"
    assert countdown.get_config("anchor=l1").optim.anchor.strength == 0.01
    c = countdown.get_config("smollm2,small,anchor=l2,kappa=1.0")
    assert c.optim.anchor.strength is None and freeze(c).anchor_kappa == 1.0 and c.es.population == 4
    for argument, says in (
        ("qwen2.5-33b", "did you mean 'qwen2.5-3b'"),
        ("populatio=3", "did you mean 'population'"),
        ("population=three", "it must be int"),
        ("antithetic=yes", "true or false"),
    ):
        with pytest.raises(ValueError, match=says):
            countdown.get_config(argument)


def test_a_locked_config_is_what_the_flags_override():
    config = countdown.get_config()
    assert isinstance(config, config_dict.ConfigDict) and config.is_locked
    config.update_from_flattened_dict({"es.sigma": 2e-3, "optim.anchor.kappa": 0.5, "optim.anchor.penalty": "l2"})
    assert freeze(config).anchor_kappa == 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_sentence_says_what_the_chain_is(name):
    anchor = {"penalty": "l2", "strength": 10.0}
    sentence = optimizer_sentence(freeze({"optim": {"name": name, "anchor": anchor}}))
    assert sentence.startswith(f"{name} with learning rate 0.0005, then l2 anchored weight decay with strength λ = 10")
    assert ("κ = 0.91 σ" in sentence) == (name == "sgd")


def test_the_sentence_says_where_a_strong_anchor_ends_the_walk():
    config = freeze({"es": {"population": 2}, "optim": {"anchor": {"penalty": "l2", "kappa": 0.5}}})
    rate, strength = config.optim.learning_rate, config.anchor_strength
    assert rate * strength == pytest.approx(0.25)  # not small
    norm = anchored_norm(dim=1, steps=1000, population=2, learning_rate=rate, strength=strength)
    assert f"κ = {norm / config.es.sigma:.2f} σ" in optimizer_sentence(config)


def test_runs_from_before_the_generator_was_a_field_keep_theirs(tmp_path):
    content = {"digest": "0", "config": {"es": {"sigma": 0.01}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).es.generator == "threefry"
    content["config"]["es"]["generator"] = "threefry13"
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).es.generator == "threefry13"
