"""Where a prompt ends and what follows begins, for tokenizers of all kinds."""

import random

import pytest

from es_jax.weights import boundary
from es_jax.weights.boundary import CONTEXT, PromptEnd, completion_texts, encode_options, prompt_end, silent_token_ids
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.tokenizer import encode_prompt, render
from tests.tokenizer_kinds import BLANKS, BYTES, KINDS, SPECIAL, VOCABULARY, gguf_fields, metaspace


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request):
    return KINDS[request.param]()


def text_after(tokenizer, prompt, ids):
    return completion_texts(tokenizer, [prompt_end(tokenizer, prompt)], [ids])[0]


def _whole(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_text_is_the_wholes_minus_the_prompts(tokenizer):
    """Of tokens at random, after prompts of all lengths that come from a text."""
    draw, size, asserted = random.Random(0), len(tokenizer), 0
    letters = "the is: 72 (B)\n\t é你🙂 #  ."
    for _ in range(600):
        prompt = encode_prompt(tokenizer, "".join(draw.choices(letters, k=draw.randint(1, 40))))
        ids = [draw.randrange(len(SPECIAL), size) for _ in range(draw.randint(0, 6))]
        whole, before, text = (
            _whole(tokenizer, prompt + ids),
            _whole(tokenizer, prompt),
            text_after(tokenizer, prompt, ids),
        )
        if whole.startswith(before):  # not where single bytes spoil those before them
            assert text == whole[len(before) :], (prompt, ids)
            asserted += 1
        assert text == completion_texts(tokenizer, [PromptEnd(prompt, before)], [ids])[0], (prompt, ids)
    assert asserted > 400


def test_the_continuation_of_a_text_is_read_back(tokenizer):
    """Where its first token does not reach into the prompt, and the tokenizer can write both."""
    read = 0
    for prompt in ("the", "is:", "a\n", "é", "🙂🙂🙂🙂", "the ", "the  "):
        for text in (" 72", " (B)", "  the", "72", "", " ", "\nthe", "é 72 .", " 🙂", "你 is"):
            ids, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + text)
            if whole[: len(ids)] == ids and _whole(tokenizer, whole) == _whole(tokenizer, ids) + text:
                assert text_after(tokenizer, ids, whole[len(ids) :]) == text
                read += 1
    assert read > 10


@pytest.mark.parametrize("kind", BLANKS)
@pytest.mark.parametrize("text", [" 72", " the", "  is", " (B) is"])
def test_the_first_blank_stays(kind, text):
    """Also where the prompt ends in a special token."""
    tokenizer, user = KINDS[kind](), {"role": "user", "content": "the"}
    rest = tokenizer.encode("is" + text, add_special_tokens=False)[len(tokenizer.tokenize("is")) :]
    for prompt in ([user], [user, {"role": "assistant", "content": "s:"}], "the"):
        assert (
            tokenizer.decode(rest) == text[1:] and text_after(tokenizer, encode_prompt(tokenizer, prompt), rest) == text
        )


def test_only_the_end_of_a_prompt_is_decoded(tokenizer, monkeypatch):
    lengths, decode = [], boundary._decode
    monkeypatch.setattr(boundary, "_decode", lambda t, ids, **more: lengths.append(len(ids)) or decode(t, ids, **more))
    prompt = encode_prompt(tokenizer, "the is: 72 (B) " * 200)
    text_after(tokenizer, prompt, prompt[-3:])
    assert len(prompt) > 100 * CONTEXT // 2 and lengths == [CONTEXT, CONTEXT, CONTEXT + 3]


@pytest.mark.parametrize("kind", ["llama2", "byte_level", "gguf_gemma"])
def test_a_character_cut_at_the_boundary_is_the_completions(kind):
    tokenizer = KINDS[kind]()
    before, ids = encode_prompt(tokenizer, "the"), tokenizer.encode("é🙂", add_special_tokens=False)[-6:]
    for cut, wanted in [(0, "é🙂"), (1, "é🙂"), (2, "🙂"), (3, "🙂"), (5, "🙂")]:
        assert text_after(tokenizer, before + ids[:cut], ids[cut:]) == wanted
    assert text_after(tokenizer, before + ids[:1], encode_prompt(tokenizer, "tt")[-1:]) == "t"


@pytest.mark.parametrize("kind", ["llama2", "llama_class", "gguf_gemma"])
def test_a_row_of_single_bytes_is_read_from_its_beginning(kind):
    """Its last tokens alone would begin within a character, and be unreadable with all that follows."""
    tokenizer = KINDS[kind]()
    prompt, rest = encode_prompt(tokenizer, "the " + "你" * 9), tokenizer.encode("好", add_special_tokens=False)[-3:]
    assert len(prompt_end(tokenizer, prompt).tokens) > CONTEXT and text_after(tokenizer, prompt, rest) == "好"


def test_bytes_that_are_no_character_leave_the_prompt_alone():
    """After a line break, which is a single byte too: the decoder makes all bytes in a row unreadable together."""
    tokenizer = KINDS["llama2"]()
    for prompt in ("the\n", "the\n\n", "é", "🙂" * 9):
        ids = encode_prompt(tokenizer, prompt)
        for bad in ([0xFF], [0xE4, 0xBD], [0xA9]):
            rest = [VOCABULARY[BYTES[byte]] for byte in bad] + [VOCABULARY["▁72"]]
            assert text_after(tokenizer, ids, rest) == "\ufffd" * len(bad) + " 72"


def test_a_replacement_character_in_the_prompt_stays_there():
    for kind in ("llama2", "byte_level"):
        tokenizer = KINDS[kind]()
        ids, rest = encode_prompt(tokenizer, "the \ufffd\ufffd"), encode_prompt(tokenizer, "is 72")[-2:]
        assert text_after(tokenizer, ids, rest) == _whole(tokenizer, ids + rest)[len(_whole(tokenizer, ids)) :]


def test_an_empty_prompt_has_no_blank_before_what_follows():
    for kind in BLANKS:
        tokenizer = KINDS[kind]()
        ids = tokenizer.encode("the", add_special_tokens=False)
        assert text_after(tokenizer, [tokenizer.bos_token_id], ids) == "the", kind


def test_an_empty_completion_has_no_text(tokenizer):
    for prompt in ("the", "the ", "a\n", "🙂"):
        assert text_after(tokenizer, encode_prompt(tokenizer, prompt), []) == ""


@pytest.mark.parametrize("kind", ["llama2", "metaspace_always", "llama_class"])
def test_special_tokens_that_are_read_stay(kind):
    tokenizer = KINDS[kind]()
    assert silent_token_ids(tokenizer, (2, 5)) == [1, 2, 3, 5]
    prompt = encode_prompt(tokenizer, "is")
    rest = [VOCABULARY[token] for token in ("</think>", "▁72", "<answer>", "is")]
    text = text_after(tokenizer, prompt, rest)
    assert text == "</think> 72<answer>is"


def test_clean_up_takes_no_blank_away():
    tokenizer = metaspace("always")
    prompt, rest = encode_prompt(tokenizer, "the"), [VOCABULARY[token] for token in ("▁", ".", "▁", "?")]
    assert tokenizer.decode(prompt + rest) != "<s> the . ?" and text_after(tokenizer, prompt, rest) == " . ?"


def test_an_options_tokens_are_those_of_the_whole(tokenizer):
    options = (" the", " is", "the", ":", " the is", " 72", "72", "é", "\n")
    for prompt in ("Way:", "the ", "ais", "a\n", "é", "🙂", [{"role": "user", "content": "is"}]):
        text, plain, alone = render(tokenizer, prompt), isinstance(prompt, str), encode_prompt(tokenizer, prompt)
        ids, parts = encode_options(tokenizer, prompt, options)
        assert alone[: len(ids)] == ids and len(alone) - len(ids) <= 2
        assert [ids + part for part in parts] == [tokenizer.encode(text + o, add_special_tokens=plain) for o in options]


@pytest.mark.parametrize(
    ("kind", "prompt", "options", "last", "tokens"),
    [
        ("llama2", "Way:", (" is", " is:"), ":", [["▁is"], ["▁is", ":"]]),
        ("llama2", "Way: ", ("is", "72"), ":", [["▁is"], ["▁72"]]),  # a prompt that ends in a blank
        ("gguf_llama", "Way:", (" 72", " (B)"), ":", [["▁72"], ["▁(B", ")"]]),
        ("llama_class", "Way:", ("72", "the"), ":", [["7", "2"], ["the"]]),  # no blank of its own
        ("llama2", "ais", (":", " 72"), "a", [["is:"], ["is", "▁72"]]),  # one of them is one token with the last one
        ("llama2", "ais", ("72", " 72"), "is", [["7", "2"], ["▁72"]]),
        ("byte_level", "is: ", ("the", "B"), ":", [["Ġt", "h", "e"], ["Ġ", "B"]]),
        ("byte_level", "is:", (" the", " B"), ":", [["Ġt", "h", "e"], ["Ġ", "B"]]),
    ],
)
def test_options_part_from_the_prompt_together(kind, prompt, options, last, tokens):
    tokenizer = KINDS[kind]()
    ids, parts = encode_options(tokenizer, prompt, options)
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == last
    assert [tokenizer.convert_ids_to_tokens(part) for part in parts] == tokens


def test_an_end_of_text_that_a_tokenizer_adds_is_no_part_of_an_option():
    fields = {f"tokenizer.ggml.{name}": value for name, value in gguf_fields(blank=True).items()}
    tokenizer = from_gguf_metadata({**fields, "tokenizer.ggml.add_eos_token": True})
    assert tokenizer.encode("Way: is")[-1] == tokenizer.eos_token_id
    ids, parts = encode_options(tokenizer, "Way:", (" is", " 72"))
    assert ids == encode_prompt(tokenizer, "Way:") and parts == [[VOCABULARY["▁is"]], [VOCABULARY["▁72"]]]
