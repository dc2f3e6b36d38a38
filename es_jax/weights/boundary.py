"""Where a prompt ends and what follows it begins: the text of completions, and the tokens of options.

Tokens mean less alone than after a prompt: tokenizers of SentencePiece's kind drop the blank of the first token that
they decode and put one before the first word that they encode, and a character may be several tokens. So a completion's
text is that of prompt and completion minus the prompt's, and an option's tokens are those of prompt and option, from
where the prompt's own end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from es_jax.weights.tokenizer import Prompt, encode_texts, render

CONTEXT = 8  # tokens: a character has at most 4
_BROKEN = "\ufffd"  # what bytes that are no character decode to


class PromptEnd(NamedTuple):
    """The last tokens of a prompt, as many as completions need before them, and their text."""

    tokens: list[int]
    text: str


def prompt_end(tokenizer: Any, prompt: Sequence[int]) -> PromptEnd:
    """The end of a prompt of token ids. What follows decodes after it as it does after the whole prompt.

    It holds text besides special tokens, since decoders treat the first text apart, and does not begin within the
    character, or the row of single bytes, that it ends in. `CONTEXT` tokens nearly always do; if not, twice as many,
    and so on. After special tokens alone nothing is needed: what follows is the first text.
    """
    length = CONTEXT
    while length < len(prompt):
        tokens = list(prompt[-length:])
        text = _decode(tokenizer, tokens)
        if _decode(tokenizer, tokens, special=False) and not text.endswith(_BROKEN):
            return PromptEnd(tokens, text)
        length *= 2
    tokens = list(prompt)
    if not _decode(tokenizer, tokens, special=False):
        tokens = [i for i in tokens if _decode(tokenizer, [i]) == _decode(tokenizer, [i], special=False)]
    return PromptEnd(tokens, _decode(tokenizer, tokens))


def silent_token_ids(tokenizer: Any, stop_token_ids: Sequence[int]) -> list[int]:
    """The tokens that are no part of a completion's text: those that stop it, and EOS, BOS and padding. Other special
    tokens (`</think>` and `<answer>` may be such) are: a grader reads them."""
    ids = {*stop_token_ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return sorted(ids - {None})


def completion_texts(tokenizer: Any, ends: Sequence[PromptEnd], completions: Sequence[Sequence[int]]) -> list[str]:
    """The text of each completion (token ids), which follows the prompt of that end.

    A character that the prompt begins and the completion ends belongs to the completion.
    """
    return [_text(tokenizer, end, list(ids)) for end, ids in zip(ends, completions, strict=True)]


def _text(tokenizer: Any, end: PromptEnd, ids: list[int]) -> str:
    whole, cut = _decode(tokenizer, [*end.tokens, *ids]), end.text.endswith(_BROKEN)
    if whole.startswith(end.text):
        return whole[len(end.text) :]
    # The completion's first bytes go on with a character that the prompt begins; or they are no character, and make the
    # bytes just before them unreadable too. So it is read as more than there is, or after less than there is.
    for length in reversed(range(len(end.tokens))):
        before = _decode(tokenizer, end.tokens[:length])
        whole = whole if cut else _decode(tokenizer, [*end.tokens[:length], *ids])
        if whole.startswith(before):
            break
    return whole[len(before) :]


def encode_options(
    tokenizer: Any, prompt: Prompt, options: Sequence[str], *, plain: bool | None = None
) -> tuple[list[int], list[list[int]]]:
    """A prompt and its continuations as token ids: those of prompt + option, parted where the prompt's own tokens end.

    Where the beginning of an option is one token with the prompt's last characters, the prompt ends before that token,
    for all its options: so each is scored on all that differs. `plain`: as `encode_texts` has it; by default whether
    the prompt is text.
    """
    text = render(tokenizer, prompt)
    texts = [text, *(text + option for option in options)]
    plain = isinstance(prompt, str) if plain is None else plain
    alone, *wholes = encode_texts(tokenizer, texts, plain=plain)
    shared = min(_shared(alone, whole) for whole in wholes)
    return alone[:shared], [whole[shared:] for whole in wholes]


def _decode(tokenizer: Any, ids: list[int], *, special: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def _shared(a: list[int], b: list[int]) -> int:
    """How many elements two lists begin with alike."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
