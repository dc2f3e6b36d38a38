"""Text in, text out: completions are the engine's, perplexity is the definition, mistakes are named."""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax import complete, perplexity
from es_jax.core import rng
from es_jax.generate.engine import Engine
from es_jax.generate.sampling import Temperature
from es_jax.models.transformer import Transformer
from es_jax.weights.model import load_model

HELLO = [{"role": "user", "content": "hello"}]
OPEN = [*HELLO, {"role": "assistant", "content": "Well, "}]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def lab():
    return load_model("lab")


def naive(model, prompt, n):
    """Greedy decoding by whole forward passes."""
    ids, forward = list(prompt), jax.jit(Transformer(model.config).apply)
    for length in range(len(ids), len(ids) + n):
        padded = jnp.array([ids + [0] * (128 - length)], jnp.int32)
        ids.append(int(forward(model.params, padded)[0][0, length - 1].argmax()))
        if ids[-1] in model.stop_token_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", ["plain text, ", HELLO, OPEN], ids=["text", "messages", "open answer"])
def test_a_completion_is_what_whole_forward_passes_write(prompt, model):
    ids = model.encode(prompt)
    found = complete(model, prompt, max_new_tokens=5)
    assert found == model.decode(ids, naive(model, ids, 5)) and isinstance(found, str)


def test_several_prompts_of_both_kinds_come_back_in_their_order(model):
    prompts = ["b", HELLO, "a longer one", OPEN, tuple(HELLO)]
    alone = [complete(model, prompt, max_new_tokens=5) for prompt in prompts]
    assert complete(model, prompts, max_new_tokens=5, slots=2) == alone
    assert alone[1] == alone[4] and len(set(alone)) > 1


def test_what_is_drawn_is_the_engines_and_depends_on_the_seed(model):
    prompts = ["abc", "abc", "x"]
    first, again, other = (complete(model, prompts, max_new_tokens=5, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first == again != other and first[0] != first[1]
    engine = Engine(
        model.config, slots=3, max_prompt_tokens=32, max_new_tokens=5, stop_token_ids=model.stop_token_ids,
        sampler=Temperature(1.0),
    )  # fmt: skip
    tokens = [model.encode(prompt) for prompt in prompts]
    out = engine.generate(model.params, tokens, key=rng.sampling_key(3, 0))
    rows = zip(tokens, out.tokens, out.length, strict=True)
    assert first == [model.decode(ids, row[:n].tolist()) for ids, row, n in rows]


def test_prompts_of_one_width_share_a_program(model, caplog):
    complete(model, "a" * 33, max_new_tokens=5)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        for length in (34, 50, 64):
            complete(model, "b" * length, max_new_tokens=5)
    assert not [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]


def test_a_completion_may_be_as_long_as_the_context_leaves(lab):
    assert complete(lab, "A37+48=") == "85"  # 256 tokens are more than its context


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("1", {"temperature": -0.5}, r"temperature is -0\.5: it must be at least 0"),
        ("1", {"temperature": math.nan}, "temperature is nan"),
        ("1", {"temperature": 1.0, "seed": -1}, "seed is -1: it must be a whole number from 0"),
        ("1", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("1", {"max_new_tokens": 99}, "set max_new_tokens to at most 63"),
        ("1", {"slots": 0}, "slots is 0"),
        ([], {}, "there are no prompts"),
        (["1", ""], {}, "prompt 1 has 0 tokens"),
        (["1" * 64], {}, "prompt 0 has 64 tokens: .* context of 64"),
        ([b"1"], {}, "prompt 0 is b'1': give text, or messages"),
        (["1", ["2"]], {}, r"prompt 1 is \['2'\]: give text, or messages"),
        (HELLO, {}, "prompt 0: the prompt is a list of messages, but this tokenizer has no chat template"),
    ],
)
def test_mistakes_are_named(prompts, options, message, lab):
    with pytest.raises(ValueError, match=message):
        complete(lab, prompts, **options)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"content": "x"}], r"prompt 0: prompt\[0\]\.role is None: it must be text"),
        ([{"role": "user", "content": None}], r"prompt 0: prompt\[0\]\.content is None: it must be text"),
        ([{"role": 3, "content": "x"}], r"prompt 0: prompt\[0\]\.role is 3: it must be text"),
    ],
)
def test_messages_without_their_fields_are_named(messages, message, model):
    with pytest.raises(ValueError, match=message):
        complete(model, messages)


def by_definition(model, text, window, stride):
    """In float64, a forward pass of NumPy's log-softmax for every window."""
    ids, total, done = model.encode(text), 0.0, 1
    forward = jax.jit(Transformer(model.config).apply)
    for start in range(0, len(ids), stride):
        piece = ids[start : start + window]
        padded = jnp.array([piece + [0] * (window - len(piece))], jnp.int32)
        logits = np.asarray(forward(model.params, padded)[0][0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place in range(max(done, start + 1), start + len(piece)):
            total += logprobs[place - start - 1, ids[place]]
        done = start + len(piece)
        if done == len(ids):
            break
    return math.exp(-total / (len(ids) - 1))


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 16, 8), (16, 16, 8), (17, 16, 8), (61, 16, 3), (50, 9, 8)]
)
def test_perplexity_is_its_definition(length, window, stride, model):
    text = ("It rains, and the sea is grey. " * 3)[:length]
    found = perplexity(model, text, window=window, stride=stride)
    assert found == pytest.approx(by_definition(model, text, window, stride), rel=1e-4) and found > 1


def test_texts_together_are_as_alone_and_a_window_changes_what_is_known(model):
    texts = ["abc", "a longer text " * 9, "xy", "and another one"]
    together = perplexity(model, texts, window=64)
    assert together == pytest.approx([perplexity(model, text, window=64) for text in texts], rel=1e-5)
    assert perplexity(model, texts[1]) != pytest.approx(together[1], rel=1e-3) and perplexity(model, []) == []


def test_flat_logits_have_the_perplexity_of_a_die(lab):
    flat = dataclasses.replace(lab, params=jax.tree.map(jnp.zeros_like, lab.params))
    assert perplexity(flat, "A37+48=85" * 20) == pytest.approx(lab.config.vocab_size, rel=1e-6)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["12", "1"], {}, "text 1 has 1 tokens: it needs at least 2"),
        ("", {}, "text 0 has 0 tokens"),
        ("12", {"window": 65}, "window is 65: it must be 2 to the model's context of 64"),
        ("12", {"window": 1}, "window is 1"),
        ("12", {"window": 8, "stride": 8}, "stride is 8: it must be 1 to window - 1 = 7"),
        ("12", {"stride": 0}, "stride is 0"),
    ],
)
def test_texts_and_sizes_that_cannot_be_are_named(texts, options, message, lab):
    with pytest.raises(ValueError, match=message):
        perplexity(lab, texts, **options)


def test_weights_that_are_not_finite_are_named(lab):
    broken = dataclasses.replace(lab, params=jax.tree.map(lambda x: x * jnp.nan, lab.params))
    with pytest.raises(ValueError, match="log-probability of text 0 is nan"):
        perplexity(broken, ["12", "345"])
