"""Requests of lm-evaluation-harness, answered without it: batches, boundaries, windows, cuts and stops."""

import dataclasses
import functools
import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax import evaluate
from es_jax.core.extras import require
from es_jax.evals.harness import HarnessOptions, evaluate_harness, reference_warnings
from es_jax.evals.harness_model import Decoding, HarnessModel, before_stop, rolling_windows
from es_jax.generate.engine import Engine
from es_jax.generate.sampling import Greedy, Temperature, TopK, TopP
from es_jax.generate.score import score_continuations
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer
from es_jax.weights.model import load_model
from tests.tokenizer_kinds import KINDS

GREEDY = {"do_sample": False, "max_gen_toks": 20}


@pytest.fixture(scope="module")
def model(tiny_model):
    model = load_model(tiny_model)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, max_positions=96))


def whole(model, prompt, option):
    """log p(option | prompt) and whether it is greedy, by one pass over both."""
    ids = [*prompt, *option]
    row = jnp.zeros(97, jnp.int32).at[: len(ids)].set(jnp.array(ids, jnp.int32))[None]
    logprobs = np.asarray(_logprobs(model.config, model.params, row))[0, len(prompt) - 1 : len(ids) - 1]
    return float(logprobs[range(len(option)), list(option)].sum()), logprobs.argmax(1).tolist() == list(option)


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config, params, ids):
    states, _ = Transformer(config).hidden(params, ids, positions=jnp.arange(97, dtype=jnp.int32)[None])
    return jax.nn.log_softmax(Transformer(config).logits(params, states))


def test_continuations_are_scored_as_in_one_pass(model):
    """Of rows that differ in everything, in whatever batches; among them one that greedy decoding writes."""
    draw = np.random.default_rng(0)
    sizes = ((3, (1, 4, 2)), (40, (2, 2)), (32, (4,)), (1, (1, 1, 3, 1)), (70, (27,)))
    rows = [(draw.integers(2, 258, n).tolist(), [draw.integers(2, 258, k).tolist() for k in own]) for n, own in sizes]
    engine = Engine(model.config, slots=1, max_prompt_tokens=40, max_new_tokens=4, stop_token_ids=())
    rows[1][1].append(np.asarray(engine.generate(model.params, [rows[1][0]]).tokens)[0].tolist())
    answered = []
    found = score_continuations(model.config, model.params, rows, done=answered.append)
    assert sum(answered) == 12
    for (prompt, options), scores in zip(rows, found, strict=True):
        for option, logprob, greedy in zip(options, scores.logprob, scores.greedy, strict=True):
            expected = whole(model, prompt, option)
            assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert found[1].greedy.tolist() == [False, False, True]


def test_a_number_that_is_none_is_refused():
    config = TransformerConfig(
        family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8
    )
    params = jax.tree.map(lambda x: x * jnp.nan, Transformer(config).init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"are not finite in 1 of 1 rows: row 0 has \[nan\]"):
        score_continuations(config, params, [([1], [[2, 3]])])


@pytest.mark.parametrize(
    ("context", "continuation", "tokens"),
    [
        ("Q: 1", " 2", ("Q: 1", " 2")),
        ("Q: 1 ", "2", ("Q: 1", " 2")),
        ("Q: 1\n \n", "2", ("Q: 1", "\n \n2")),
        ("", "12", (None, "12")),
        (" ", "12", (None, " 12")),
        ("<|im_end|>Q", "1", ("<|im_end|>Q", "1")),
    ],
)
def test_blanks_before_a_continuation_are_its_own(model, context, continuation, tokens):
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    head, tail = tokens
    expected = [1] if head is None else encode(head)
    assert HarnessModel(model, {}).encode_pairs(context, [continuation]) == (expected, [encode(tail)])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_continuation_is_what_follows_the_context_whatever_the_tokenizer(model, kind):
    """Its tokens and the context's are those of both; BOS, where there is one, stands first and once."""
    subject = HarnessModel(dataclasses.replace(model, tokenizer=KINDS[kind]()), {})
    for context, texts in (("the", (" is", "re", " 72")), ("is:", ("72", " B")), ("é ", ("the", "🙂"))):
        prompt, options = subject.encode_pairs(context, texts)
        for text, ids in zip(texts, options, strict=True):
            joint = context.rstrip() + context[len(context.rstrip()) :] + text
            assert prompt + ids == subject.encode(joint), (kind, context, text)
        assert prompt == subject.encode(context.rstrip())[: len(prompt)]
    bos = subject.tokenizer.bos_token
    if bos is not None:
        assert subject.encode(bos + "the").count(subject.tokenizer.bos_token_id) == 1


def test_contexts_that_do_not_fit_lose_their_first_tokens(model, caplog):
    subject = HarnessModel(model, model.params, max_length=24)
    text = "abcdefghijklmnopqrstuvwxyz"
    ((long, short),) = subject.loglikelihoods([(text, ["0123456789", "01"])])
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert long[0] == pytest.approx(whole(model, encode(text[-15:]), encode("0123456789"))[0], abs=1e-4)
    assert short[0] == pytest.approx(whole(model, encode(text[-23:]), encode("01"))[0], abs=1e-4)
    assert subject.warnings == [record.getMessage() for record in caplog.records]
    assert "2 of 2 requests have a context that lost its first tokens, up to 11 of them" in subject.warnings[0]
    assert subject.generate([(text, {"max_gen_toks": 4})]) == subject.generate([(text[-20:], {"max_gen_toks": 4})])
    assert "up to 6 of them, because it and 4 new tokens must fit into 24" in subject.warnings[1]
    with pytest.raises(ValueError, match="has 25 tokens, more than the context of 24"):
        subject.loglikelihoods([("a", ["x" * 25])])
    with pytest.raises(ValueError, match="up to 24 tokens are generated, but the context has 24: set max_gen_toks"):
        subject.generate([("a", {"max_gen_toks": 24})])
    with pytest.raises(ValueError, match="the continuation '' of the context 'a' has no tokens"):
        subject.loglikelihoods([("a", [""])])


@pytest.mark.parametrize(("length", "longest"), [(0, 4), (3, 4), (4, 4), (5, 4), (10, 4), (23, 7), (21, 7), (9, 2)])
def test_every_token_of_a_text_is_scored_once_with_as_much_before_it_as_fits(length, longest):
    tokens = list(range(100, 100 + length))
    windows = [*rolling_windows(tokens, 9, longest)]
    assert [token for _, scored in windows for token in scored] == tokens
    for context, scored in windows:
        fed = [*context, *scored[:-1]]
        assert len(fed) <= longest and context
        if scored[0] != 100:
            assert len(fed) == longest and tokens[scored[0] - 100 - len(context) :][: len(context)] == context
    assert not windows or windows[0][0] == [9]


def test_a_long_text_is_the_sum_of_its_windows(model):
    subject, text = HarnessModel(model, model.params, max_length=16), "the quick brown fox jumps over it"
    found = subject.rolling([text, "", "abc"])
    windows = rolling_windows(model.tokenizer.encode(text), 1, 16)
    assert found[0] == pytest.approx(sum(whole(model, *window)[0] for window in windows), abs=2e-4)
    assert found[1] == 0 and found[2] == pytest.approx(whole(model, [1], model.tokenizer.encode("abc"))[0], abs=1e-4)


def test_texts_end_at_their_stops(model):
    subject = HarnessModel(model, model.params, slots=2)
    contexts = ["a", "the quick", "b" * 30, "a"]
    plain = subject.generate([(context, GREEDY) for context in contexts])
    assert plain[0] == plain[3] and len(max(plain, key=len)) > 8
    until = [plain[0][2:4], plain[1][5], ""]
    cut = subject.generate([(context, GREEDY | {"until": until}) for context in contexts])
    assert cut == [text.split(until[0])[0].split(until[1])[0] for text in plain] and cut != plain


def test_a_token_that_holds_a_stop_ends_a_text_on_the_device(model):
    subject = HarnessModel(model, {})
    ids = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert subject.stop_token_ids(Decoding()) == (1,)
    assert subject.stop_token_ids(Decoding(("\n", "ab"))) == tuple(sorted([1, *ids("\n")]))
    assert subject.stop_token_ids(Decoding(("<|im_start|>",))) == (0, 1)


def test_samples_replay_and_differ_from_each_other(model):
    subject, sampled = HarnessModel(model, model.params), {"temperature": 1.0, "max_gen_toks": 12}
    rows = [("a", sampled)] * 4
    first = subject.generate(rows)
    assert first == subject.generate(rows) and len(set(first)) > 1
    assert first != dataclasses.replace(subject, seed=1).generate(rows)


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [
        ({}, Greedy()),
        ({"temperature": 0.0, "top_p": 0.9}, Greedy()),
        ({"do_sample": False, "temperature": 0.7}, Greedy()),
        ({"temperature": 0.7}, Temperature(0.7)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}, Temperature(0.7)),
        ({"do_sample": True, "temperature": 2, "top_p": 0.9}, TopP(0.9, 2.0)),
        ({"temperature": 1, "top_k": 5, "num_beams": 1}, TopK(5, 1.0)),
    ],
)
def test_settings_of_sampling(settings, sampler):
    assert Decoding.of(settings).sampler == sampler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "has num_beams = 4, which is not supported"),
        ({"max_length": 40}, "has max_length = 40, which is not supported"),
        ({"do_sample": True}, "do_sample = True and temperature = None: give a temperature above 0"),
        ({"temperature": 1, "top_k": 5, "top_p": 0.5}, "top_k = 5 and top_p = 0.5: give only one of them"),
        ({"max_gen_toks": 0}, "has a limit of 0 tokens: it must be at least 1"),
        ({"until": [3]}, r"has until = \(3,\): it must be a text or a list of texts"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding.of(settings)


def test_limits_and_stops_of_a_task():
    assert Decoding.of({"max_new_tokens": 5, "max_gen_toks": 7, "until": ["", "\n"]}) == Decoding(("\n",), 7)
    assert Decoding.of({"max_completion_tokens": 5, "until": None}) == Decoding((), 5)
    assert Decoding.of({}).max_new_tokens == 256
    assert before_stop("a\nb", ["c"]) == "a\nb" and before_stop("abab", ["ba", "bab"]) == "a"


@pytest.mark.parametrize(
    ("answers", "targets", "messages"),
    [
        (["1", "2"], ["1", "2"], []),
        ([["a"], ["b", "c"]], [["a"], ["b", "c"]], []),
        (["[1, 2]", "[3]"], [[1, 2], [3]], [r"of 2 of 2 rows as a list, .*\(row 0: \[1, 2\]\)"]),
        (["x", "[3]"], ["x", [3]], [r"of 1 of 2 rows as a list, .*\(row 1", r"row is not a list.* In 1 of 2 rows"]),
        (["[3]", "abc"], [[3], "abc"], ["of 1 of 2 rows as a list", r"row is a list.*\(row 1: abc\).* characters"]),
        ([[], ["b"]], [[], ["b"]], ["first row is not a list"]),
    ],
)  # fmt: skip
def test_references_that_look_like_lists_are_told(answers, targets, messages):
    config = SimpleNamespace(doc_to_target="{{answer}}")
    task = SimpleNamespace(config=config, multiple_target=len(targets[0]) if isinstance(targets[0], list) else 0)
    found = reference_warnings("mine", task, [{"answer": answer} for answer in answers], targets)
    assert len(found) == len(messages)
    for text, message in zip(found, messages, strict=True):
        assert re.search(message, text), text


@pytest.mark.parametrize("template", ["[{{answer}}]", "{{[a, b]}}", len])
def test_lists_that_a_task_makes_on_purpose_are_not_told(template):
    task = SimpleNamespace(config=SimpleNamespace(doc_to_target=template), multiple_target=2)
    assert reference_warnings("mine", task, [{"answer": "1, 2"}], [[1, 2]]) == []
    nested = SimpleNamespace(config=SimpleNamespace(doc_to_target="{{answer.names}}"), multiple_target=2)
    assert reference_warnings("mine", nested, [{"answer": {"names": ["a"]}}], [["a"]]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": 0}, "limit is 0: it must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot is -1: it must be at least 0"),
        ({"include": "nofolder"}, "include is 'nofolder': it must be a folder with .yaml task files"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        HarnessOptions(**fields)


def test_the_missing_extra_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    require.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"lm_eval is not installed: .* pip install 'es_jax\[lm_eval\]'"):
            evaluate_harness("lab", ["arc_easy"], out=tmp_path)
    finally:
        require.cache_clear()


class Flags(dict):
    """As much of absl's flags as is read: those that were given."""

    def __getattr__(self, name):
        return self.get(name)

    def __getitem__(self, name):
        return SimpleNamespace(present=name in self, value=self.get(name))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lm_eval_limit": 8}, "--lm_eval_limit needs --lm_eval, which is not given"),
        ({"tasks": ["gsm8k"], "num_fewshot": 1}, "--num_fewshot needs --lm_eval, which is not given"),
        (
            {"lm_eval": ["piqa"], "rows": 8},
            "--rows does not apply to --lm_eval: leave it out; --lm_eval takes --lm_eval_include, --lm_eval_limit",
        ),
        (
            {"lm_eval": ["piqa"], "temperature": 0.7},
            "--temperature does not apply to --lm_eval: leave it out; --lm_eval takes --lm_eval_include",
        ),
        (
            {"lm_eval": ["piqa"], "kl_rows": 8},
            "--kl_rows does not apply to --lm_eval: leave it out; --lm_eval takes --lm_eval_include",
        ),
    ],
)
def test_flags_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate.harness_options(Flags(given))


def test_flags_of_the_command(monkeypatch):
    monkeypatch.setattr(evaluate, "require", lambda extra: None)
    assert evaluate.harness_options(Flags(tasks=["gsm8k"], rows=8)) == {}
    given = Flags(lm_eval=["piqa"], lm_eval_limit=4, apply_chat_template=True, tasks=["gsm8k"], rows=8, slots=2)
    assert HarnessOptions(**evaluate.harness_options(given)) == HarnessOptions(
        limit=4, apply_chat_template=True, slots=2
    )
    assert evaluate.own_tasks(given) and not evaluate.own_tasks(Flags(lm_eval=["piqa"]))
