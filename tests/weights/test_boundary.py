"""Where a prompt ends and what follows begins, for tokenizers of all kinds: texts of completions, tokens of options."""

import random

import pytest
from test_model import tiny_metadata
from test_sentencepiece import metadata
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from es_jax.weights import boundary
from es_jax.weights.boundary import CONTEXT, PromptEnd, completion_texts, encode_options, prompt_end, silent_token_ids
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.tokenizer import encode_prompt

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "</think>", "<answer>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:#()[]/?'"]
WORDS = ["▁", "▁▁", "▁7", "▁72", "▁B", "▁(", "▁(B", "▁i", "▁is", "is", "▁t", "th", "the", "▁the", "(B", "s:", "is:"]
MERGES = [("▁", "▁"), ("▁", "7"), ("▁7", "2"), ("▁", "B"), ("▁", "("), ("▁(", "B"), ("▁", "i"), ("▁i", "s"), ("i", "s")]
MERGES += [("▁", "t"), ("t", "h"), ("th", "e"), ("▁", "the"), ("(", "B"), ("s", ":"), ("is", ":")]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *LETTERS, *WORDS])}
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content }}"
TEMPLATE += "{% endfor %}"


def _fast(tokenizer, **more):
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **NAMES, **more)


def llama2():
    """As in tokenizer.json of Llama 2, Mistral 7B and TinyLlama."""
    tokenizer = Tokenizer(models.BPE(VOCABULARY, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _fast(tokenizer)


def llama_class():
    return LlamaTokenizer(vocab=VOCABULARY, merges=MERGES, chat_template=TEMPLATE, **NAMES)


def metaspace(scheme):
    """Unigram, as in T5 and XLM-R; one that cleans up, and would take the blank of " ." away."""
    pieces = [(token, -float(len(VOCABULARY) - i) / 100) for token, i in VOCABULARY.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _fast(tokenizer, clean_up_tokenization_spaces=True)


def byte_level():
    fields = {**tiny_metadata(), "tokenizer.chat_template": TEMPLATE}
    return from_gguf_metadata(fields)


def gguf(name):
    return from_gguf_metadata({**metadata(name), "tokenizer.chat_template": TEMPLATE})


def word_ends():
    """Words that end in </w>, as in the first GPT: the last token decodes without its blank."""
    tokens = [*SPECIAL, *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    return _fast(tokenizer)


KINDS = {
    "llama2": llama2,
    "llama_class": llama_class,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_never": lambda: metaspace("never"),
    "byte_level": byte_level,
    "gguf_llama": lambda: gguf("llama"),
    "gguf_gemma": lambda: gguf("gemma"),
    "word_ends": word_ends,
}
BLANKS = ["llama2", "llama_class", "metaspace_always", "metaspace_first", "gguf_llama"]  # which lose the first blank


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
        whole, before, text = _whole(tokenizer, prompt + ids), _whole(tokenizer, prompt), text_after(tokenizer, prompt, ids)
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
    tokenizer = KINDS[kind]()
    for prompt in ([{"role": "user", "content": "the"}], [{"role": "user", "content": "is"}, {"role": "assistant", "content": "s:"}]):
        if kind == "gguf_llama":  # which has other special tokens
            prompt = prompt[-1]["content"]
        ids, rest = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, "is" + text)
        rest = rest[len(encode_prompt(tokenizer, "is")) :]
        assert tokenizer.decode(rest) == text[1:] and text_after(tokenizer, ids, rest) == text


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


def test_bytes_that_are_no_character_leave_the_prompt_alone():
    """After a line break, which is a single byte too: the decoder makes all bytes in a row unreadable together."""
    tokenizer = llama2()
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
