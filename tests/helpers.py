"""What the tests of several packages share: a tiny model, the config of a small run, weights compared to the bit."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer
from es_jax.rundir.metrics import read_jsonl
from es_jax.training.config import RunConfig, freeze
from es_jax.training.loop import run
from es_jax.weights.model import Model, save_model

STEPS = 6
SMALL_RUN = {
    "task": {"name": "conciseness", "train_size": 3},
    "es": {"population": 6, "sigma": 0.05},
    "optim": {"learning_rate": 0.02, "anchor": {"penalty": "l2", "kappa": 1.0}},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 4, "slots": 2},
    "train": {"steps": STEPS, "checkpoint_every": 4, "samples": 1},
    "evals": {"every": 3, "rows": 2},
}
TWO_STEPS = {  # as short as a run can be that has a step to resume from
    "task": {"name": "conciseness", "train_size": 2},
    "es": {"population": 2, "sigma": 0.05},
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 2, "slots": 2},
    "train": {"steps": 2, "checkpoint_every": 1},
    "evals": {"every": 0},
}


def tiny_model(folder: Path) -> Path:
    """A model folder of about 6 thousand random weights: two layers, a tokenizer of bytes, a chat template."""
    words = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token=words[1], pad_token=words[1])
    tokenizer.add_special_tokens({"additional_special_tokens": words[:2]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = TransformerConfig(
        family="llama", vocab_size=258, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24,
        tied_embeddings=True,
    )  # fmt: skip
    params = jax.jit(Transformer(config).init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x, params)
    save_model(folder, Model(config, params, tokenizer, digest="", stop_token_ids=(1,)))
    return folder


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
        elif value is None:
            del content[name]
        else:
            content[name] = value
    (workdir / "config.json").write_text(json.dumps(content))


class Killed(BaseException):
    """What no code of ours may catch, as little as it could catch SIGKILL."""


@contextlib.contextmanager
def killed(owner, name, *, call, when="after"):
    """The block ends in Killed: at that call of a function, before or after it did its work."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and when == "before":
            raise Killed
        out = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return out

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dying)
        yield


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
