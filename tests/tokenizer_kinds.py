"""Small tokenizers of the kinds that models come with, over the same special tokens. Only some can write every text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from es_jax.weights.gguf_tokenizer import from_gguf_metadata

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "</think>", "<answer>", "</answer>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:#()[]/?'"]
WORDS = ["▁", "▁▁", "▁7", "▁72", "▁B", "▁(", "▁(B", "▁i", "▁is", "is", "▁t", "th", "the", "▁the", "(B", "s:", "is:"]
MERGES = [("▁", "▁"), ("▁", "7"), ("▁7", "2"), ("▁", "B"), ("▁", "("), ("▁(", "B"), ("▁", "i"), ("▁i", "s"), ("i", "s")]
MERGES += [("▁", "t"), ("t", "h"), ("th", "e"), ("▁", "the"), ("(", "B"), ("s", ":"), ("is", ":")]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *LETTERS, *WORDS])}
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content }}{% endfor %}"
)


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
    tokenizer = LlamaTokenizer(vocab=VOCABULARY, merges=MERGES, chat_template=TEMPLATE, **NAMES)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    return tokenizer


def metaspace(scheme):
    """Unigram, as in T5 and XLM-R; one that cleans up, and would take the blank of " ." away."""
    pieces = [(token, -float(len(VOCABULARY) - i) / 100) for token, i in VOCABULARY.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _fast(tokenizer, clean_up_tokenization_spaces=True)


def byte_level():
    """As in GPT-2, Qwen and Llama 3; without merges but one, whose token begins in one word and ends in the next."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"])}
    tokenizer = Tokenizer(models.BPE(ids, [("Ġ", "t")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _fast(tokenizer)


def gguf_fields(*, blank):
    """Metadata of a file's SentencePiece tokenizer: as Llama's with a blank before the text, or as Gemma's without."""
    return {
        "model": "llama",
        "tokens": list(VOCABULARY),
        "token_type": [3] * len(SPECIAL) + [6] * len(BYTES) + [1] * (len(LETTERS) + len(WORDS)),
        "scores": [0.0] * len(SPECIAL + BYTES) + [-1e3] * len(LETTERS) + [-float(i) for i in range(len(WORDS))],
        "padding_token_id": 3,
        "add_space_prefix": blank,
    }


def gguf(*, blank):
    fields = {f"tokenizer.ggml.{name}": value for name, value in gguf_fields(blank=blank).items()}
    return from_gguf_metadata({**fields, "tokenizer.chat_template": TEMPLATE})


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
    "gguf_llama": lambda: gguf(blank=True),
    "gguf_gemma": lambda: gguf(blank=False),
    "word_ends": word_ends,
}
BLANKS = ["llama2", "llama_class", "metaspace_always", "metaspace_first", "gguf_llama"]  # which lose the first blank
