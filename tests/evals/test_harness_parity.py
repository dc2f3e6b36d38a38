"""The answers to requests of lm-evaluation-harness against transformers' own numbers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM  # noqa: E402

from es_jax.evals.harness_model import HarnessModel  # noqa: E402
from es_jax.weights.model import load_model  # noqa: E402

LONGEST = 40
CONTEXTS = ("Q: 3+4=", "the quick brown fox", "", "a ", "é🙂\n", "x" * 60)
TEXTS = ("", "one", "the sum of 3 and 4 is 7. " * 5, "y" * LONGEST, "z" * (LONGEST + 1))


@pytest.fixture(scope="module")
def subject(tiny_model):
    model = load_model(tiny_model)
    return HarnessModel(model, model.params, slots=3, max_length=LONGEST)


@pytest.fixture(scope="module")
def reference(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def expected(reference, context, tokens):
    """log p(tokens | context), each token's own, and whether all are the likeliest; float64 sums."""
    ids = torch.tensor([[*context, *tokens][-(LONGEST + 1) :]])
    with torch.no_grad():
        logits = reference(ids[:, :-1]).logits[0, -len(tokens) :].double()
    target = ids[0, -len(tokens) :]
    logprob = torch.log_softmax(logits, -1).gather(1, target[:, None])
    return float(logprob.sum()), bool((logits.argmax(-1) == target).all())


def written(reference, ids, limit):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = reference.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=1)
    return [i for i in out[0, ids.shape[1] :].tolist() if i != 1]


def test_likelihoods_and_what_is_greedy(subject, reference):
    encode = lambda text: subject.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    likeliest = []
    rows = [(context, [" 7", "\nno", " the longest of them"]) for context in CONTEXTS]
    next_texts = {c: subject.tokenizer.decode(written(reference, encode(c), 1)) for c in "abcdefghijklmnopqrstuvw"}
    rows += [(c, [text]) for c, text in next_texts.items() if text.isascii() and text.strip()]  # not a part of a letter
    for (context, options), scores in zip(rows, subject.loglikelihoods(rows), strict=True):
        own = []
        for option, (logprob, greedy) in zip(options, scores, strict=True):
            ids = encode(context + option)
            tokens = ids[len(encode(context.rstrip())) :]
            own.append(expected(reference, ids[: -len(tokens)] or [1], tokens))
            assert (logprob, greedy) == (pytest.approx(own[-1][0], abs=1e-4), own[-1][1]), (context, option)
        assert np.argmax([logprob for logprob, _ in scores]) == np.argmax([logprob for logprob, _ in own])
        likeliest += [greedy for _, greedy in own]
    assert any(likeliest) and not all(likeliest)


def test_rolling_likelihoods(subject, reference):
    for text, found in zip(TEXTS, subject.rolling(TEXTS), strict=True):
        tokens, total = subject.tokenizer.encode(text), 0.0
        for begin in range(0, len(tokens), LONGEST):  # what is before a window is cut by `expected`
            total += expected(reference, [1, *tokens[:begin]], tokens[begin : begin + LONGEST])[0]
        assert found == pytest.approx(total, abs=1e-4, rel=1e-6)


def test_greedy_texts(subject, reference):
    contexts = [context or "b" for context in CONTEXTS]
    plain = [
        subject.tokenizer.decode(written(reference, subject.tokenizer.encode(context)[-(LONGEST - 12) :], 12))
        for context in contexts
    ]
    stop = plain[0][3:5]
    settings = {"max_gen_toks": 12, "until": [stop], "do_sample": False, "temperature": 0.0}
    found = subject.generate([(context, settings) for context in contexts])
    assert found == [text.split(stop)[0] for text in plain] and found[0] != plain[0]
