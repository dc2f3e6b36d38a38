"""Tokenizers from the metadata of GGUF files: byte-level BPE (model "gpt2") and SentencePiece BPE (model "llama").

Where the format does not say, this follows llama.cpp, which defined the format. Only SentencePiece's dummy space
follows transformers: it comes before the text, not after every special token, since chat templates write their own
spaces.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from es_jax.core.extras import without_advice
from es_jax.core.names import unknown

Metadata = Mapping[str, Any]
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # GGUF's token types; control and user-defined are matched first
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_FOLDER = "load the model's safetensors folder instead"
_PARTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")


class PreTokenizer(NamedTuple):
    """How text is split before byte-level BPE. `pattern` None is the default pattern of byte-level BPE."""

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False  # a piece in the vocabulary is taken whole, even without merges
    add_bos: bool = False  # when the file does not say


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(single_digits=True),
    "qwen2": PreTokenizer(pattern=_LETTERS + r"|\p{N}" + _REST, nfc=True),
    "llama-bpe": PreTokenizer(pattern=_LETTERS + r"|\p{N}{1,3}" + _REST, whole_words=True, add_bos=True),
    "tekken": PreTokenizer(
        pattern=_CASED + r"|\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1), whole_words=True, add_bos=True
    ),
}


def from_gguf_metadata(metadata: Metadata) -> Any:
    """The tokenizer that a GGUF file's metadata describes, as a transformers fast tokenizer."""
    with without_advice():
        from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise ValueError(
            f"tokenizer.ggml.model = {kind!r} is not implemented (only 'gpt2', byte-level BPE, and 'llama', "
            f"SentencePiece's, are); {_FOLDER}"
        )
    part, build, default_ids = _BUILDERS[kind]
    missing = [name for name in (*_PARTS, part) if name not in metadata]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: the file's tokenizer is incomplete; {_FOLDER}")
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", default_ids.get(name)) for name, key in _NAMES.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    for name, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
            field = f"tokenizer.ggml.{_NAMES[name]}_token_id"
            raise ValueError(f"{field} is {i!r}: it must be a token id, 0 to {len(tokens) - 1}; {_FOLDER}")
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    try:
        tokenizer = build(metadata, special)
    except Exception as error:  # the library raises many types for damaged files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"its tokenizer is damaged ({reason}); fetch it again, or {_FOLDER}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Metadata, special: Mapping[str, str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"{unknown('tokenizer.ggml.pre', name, PRE_TOKENIZERS)}; {_FOLDER}")
    pre = PRE_TOKENIZERS[name]
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, metadata, special, add_bos=pre.add_bos)


def _sentencepiece(metadata: Metadata, special: Mapping[str, str]) -> Any:
    """SentencePiece's BPE: the neighbouring pair whose union has the highest score is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for field in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if metadata.get(field):
            raise ValueError(f"{field} is not implemented for tokenizers of model 'llama'; {_FOLDER}")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(tokens, kinds, metadata["tokenizer.ggml.scores"]),
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        # No space is left to replace: this step only puts one ▁ before the text, even before another ▁.
        first = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
        marked = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, marked])
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return _finished(tokenizer, metadata, special, add_bos=True)


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of normal pieces whose union is a piece, ordered by its score; equal scores in the vocabulary's
    order."""
    ranked = sorted(zip(tokens, kinds, scores, strict=True), key=lambda entry: -entry[2])
    pieces = [token for token, kind, _ in ranked if kind == _NORMAL]
    normal = set(pieces)
    halves = ((piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece)))
    return [(left, right) for left, right in halves if left in normal and right in normal]


def _finished(tokenizer: Any, metadata: Metadata, special: Mapping[str, str], *, add_bos: bool) -> Any:
    """The tokenizer with the tokens that are matched first, and the tokens that it puts around a text."""
    from tokenizers import AddedToken, processors

    typed = zip(*(metadata[part] for part in _PARTS), strict=True)
    added = [(token, kind == _CONTROL) for token, kind in typed if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=control, normalized=False) for token, control in added])
    bos, eos = special.get("bos_token"), special.get("eos_token")
    before = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", add_bos) else []
    after = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)],
        )
    return tokenizer


# tokenizer.ggml.model → the part it needs besides `_PARTS`, its builder, and special ids that a file may omit
_BUILDERS: dict[Any, tuple[str, Callable[..., Any], dict[str, int]]] = {
    "gpt2": ("tokenizer.ggml.merges", _byte_level, {}),
    "llama": ("tokenizer.ggml.scores", _sentencepiece, {"bos_token": 1, "eos_token": 2, "unk_token": 0}),
}
