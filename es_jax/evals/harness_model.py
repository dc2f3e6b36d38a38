"""A model as lm-evaluation-harness asks it: likelihoods of continuations and of whole texts, and texts up to a stop.

Nothing here needs that library (`es_jax.evals.harness` does). The rules are those of its own models, where
docs/evaluate.md does not say otherwise: what a tokenizer writes first, where a long context is cut, the windows of a
long text.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from es_jax.core import rng
from es_jax.generate.engine import engine_for
from es_jax.generate.sampling import Greedy, Sampler, TopK, sampler_of
from es_jax.generate.score import score_continuations
from es_jax.weights.boundary import completion_texts, encode_options, prompt_end, silent_token_ids
from es_jax.weights.model import Model
from es_jax.weights.tokenizer import encode_texts

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 256  # of a generation whose task names no limit
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "min_p": 0, "use_cache": True}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a text is generated.

    Attributes:
      until: the texts that end it; they are no part of it.
      max_new_tokens: tokens after which it is cut.
      sampler: how a token is chosen.

    >>> Decoding.of({"until": "Q:", "max_gen_toks": 8, "do_sample": False})
    Decoding(until=('Q:',), max_new_tokens=8, sampler=Greedy())
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = DEFAULT_TOKENS
    sampler: Sampler = Greedy()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Decoding":
        """Those of a task's generation_kwargs. Raises ValueError for what there is no counterpart of here."""
        rest = {name: value for name, value in settings.items() if value is not None}
        until = rest.pop("until", [])
        until = tuple([until] if isinstance(until, str) else until)
        limits = [rest.pop(name) for name in LIMITS if name in rest]
        sampler = _sampler(*(rest.pop(name, None) for name in ("do_sample", "temperature", "top_k", "top_p")))
        for name, value in rest.items():
            if NEUTRAL.get(name) != value:
                raise ValueError(
                    f"generation_kwargs has {name} = {value!r}, which is not known here: there are until, "
                    f"{', '.join(LIMITS)}, do_sample, temperature, and top_k or top_p; take it out"
                )
        if not all(isinstance(text, str) for text in until):
            raise ValueError(f"generation_kwargs has until = {until!r}: it must be a text or a list of texts")
        limit = int(limits[0]) if limits else DEFAULT_TOKENS
        if limit < 1:
            raise ValueError(f"generation_kwargs has {limit} as its limit in tokens: it must be at least 1")
        return cls(tuple(text for text in until if text), limit, sampler)


def _sampler(do_sample: bool | None, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampler:
    t = float(temperature or 0)
    if do_sample is False or (do_sample is None and t == 0):
        return Greedy()
    if t <= 0:
        raise ValueError(
            f"generation_kwargs has do_sample = {do_sample} and temperature = {temperature}: give a temperature above "
            "0, or do_sample = False for the likeliest token"
        )
    top_k, top_p = top_k if top_k and top_k > 0 else None, top_p if top_p and top_p < 1 else None
    if top_k and top_p:
        raise ValueError(f"generation_kwargs has top_k = {top_k} and top_p = {top_p}: give one of them")
    return TopK(top_k, t) if top_k else sampler_of(t, top_p or 1.0)


@dataclasses.dataclass
class HarnessModel:
    """Answers requests, each kind in batches.

    Attributes:
      model: its config, tokenizer and stop tokens; its weights are not used.
      params: the weights, in the dtype that they compute in.
      slots: texts generated at once.
      max_length: tokens of context that are used; the model's own by default.
      seed: of what is sampled.
      warnings: what a reader of the figures must know, such as contexts that were cut.
      done: called with how many more requests are answered.
      token_texts: of each token alone, once they are needed.
    """

    model: Model
    params: Any
    slots: int = 64
    max_length: int | None = None
    seed: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)
    done: Callable[[int], None] = lambda requests: None
    token_texts: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        longest = self.model.config.max_positions
        if not 2 <= (self.max_length or longest) <= longest:
            raise ValueError(f"max_length is {self.max_length}: it must be 2 to the model's context of {longest}")
        self.longest = self.max_length or longest

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def prefix(self) -> int:
        """The token before a text that has no context: BOS, or else EOS. ValueError where there is neither."""
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((one for one in tokens if one is not None), None)
        if token is None:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token to stand before a text without context")
        return token

    def encode(self, text: str) -> list[int]:
        """Its tokens, with those that the tokenizer adds, unless the text itself begins with BOS."""
        return encode_texts(self.tokenizer, [text], plain=self._plain(text))[0]

    def _plain(self, text: str) -> bool:
        token = next((t for t in (self.tokenizer.bos_token, self.tokenizer.eos_token) if t is not None), None)
        return token is None or not text.startswith(token)

    def encode_pairs(self, context: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """A context and what may follow it, as tokens. Blanks at the context's end belong to the continuations. A token
        that reaches over the boundary is scored, for all of them. ValueError for a continuation without tokens."""
        head = context.rstrip()
        if context:
            texts = [context[len(head) :] + text for text in continuations]
            prompt, options = encode_options(self.tokenizer, head, texts, plain=self._plain(head))
            prompt = prompt or [self.prefix]
        else:
            prompt = [self.prefix]
            options = self.tokenizer(list(continuations), add_special_tokens=False)["input_ids"]
            options = [ids[1:] if ids[:1] == prompt else ids for ids in options]
        for ids, text in zip(options, continuations, strict=True):
            if not ids:
                raise ValueError(
                    f"the continuation {text!r} of the context {context[-60:]!r} has no tokens: take its row out"
                )
            if len(ids) > self.longest:
                raise ValueError(
                    f"the continuation {text[:60]!r} has {len(ids)} tokens, more than the context of {self.longest}: "
                    "take its row out"
                )
        return prompt, options

    def loglikelihoods(self, rows: Sequence[tuple[str, Sequence[str]]]) -> list[list[tuple[float, bool]]]:
        """Of each (context, continuations): log p(continuation | context), and whether it is what greedy decoding
        would write. A context that does not fit loses its first tokens, with a warning."""
        parts: list[tuple[list[int], list[list[int]]]] = []
        places: list[list[tuple[int, int]]] = []  # of each continuation: the part, and where in it
        for context, continuations in rows:
            prompt, options = self.encode_pairs(context, continuations)
            if len(prompt) + max(map(len, options)) <= self.longest + 1:
                places.append([(len(parts), k) for k in range(len(options))])
                parts.append((prompt, options))
            else:  # each continuation keeps as much of the context as fits beside it
                places.append([(len(parts) + k, 0) for k in range(len(options))])
                parts += [(self._cut(prompt, self.longest + 1 - len(ids)), [ids]) for ids in options]
        self._tell_cut([prompt for prompt, _ in parts], "its continuation")
        scores = score_continuations(self.model.config, self.params, parts, done=self.done) if parts else []
        return [[(float(scores[i].logprob[k]), bool(scores[i].greedy[k])) for i, k in own] for own in places]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) of each, after BOS or EOS, in windows of the model's context (`rolling_windows`)."""
        rows, owner = [], []
        for i, text in enumerate(texts):
            for context, tokens in rolling_windows(self.encode(text), self.prefix, self.longest):
                rows.append((context, [tokens]))
                owner.append(i)
        totals = [0.0] * len(texts)
        scores = score_continuations(self.model.config, self.params, rows) if rows else []
        for i, own in zip(owner, scores, strict=True):
            totals[i] += float(own.logprob[0])
        self.done(len(texts))
        return totals

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text that follows each context, by its generation_kwargs (`Decoding`), without special tokens and without
        what ends it. A context that leaves no room loses its first tokens, with a warning."""
        groups = defaultdict(list)
        for i, (_, settings) in enumerate(requests):
            groups[Decoding.of(settings)].append(i)
        texts: dict[int, str] = {}
        for decoding, members in groups.items():
            room = self.room(decoding)
            prompts = [self._cut(self.encode(requests[i][0]) or [self.prefix], room) for i in members]
            self._tell_cut(prompts, f"{decoding.max_new_tokens} new tokens")
            texts |= zip(members, self._generate(prompts, decoding), strict=True)
        return [texts[i] for i in range(len(requests))]

    def room(self, decoding: Decoding) -> int:
        """Tokens that a context may have. ValueError where there is no room for any."""
        room = self.longest - decoding.max_new_tokens
        if room < 1:
            raise ValueError(
                f"up to {decoding.max_new_tokens} tokens are generated, and the context has {self.longest}: set "
                "max_gen_toks lower in its generation_kwargs"
            )
        return room

    def _generate(self, prompts: list[list[int]], decoding: Decoding) -> list[str]:
        tokenizer, greedy = self.tokenizer, isinstance(decoding.sampler, Greedy)
        rows: Sequence[Sequence[int]] = prompts
        if greedy:  # what is asked twice is written once
            rows = [*dict.fromkeys(map(tuple, prompts))]
        engine = engine_for(
            self.model.config, rows, slots=self.slots, max_new_tokens=decoding.max_new_tokens,
            stop_token_ids=self.stop_token_ids(decoding), sampler=decoding.sampler,
        )  # fmt: skip
        key = None if greedy else rng.sampling_key(self.seed, 0)
        tokens, lengths, _ = map(np.asarray, engine.generate(self.params, rows, key=key))
        silent = {*silent_token_ids(tokenizer, self.model.stop_token_ids), *tokenizer.all_special_ids}
        written = [[t for t in new[:n].tolist() if t not in silent] for new, n in zip(tokens, lengths, strict=True)]
        texts = completion_texts(tokenizer, [prompt_end(tokenizer, row) for row in rows], written)
        texts = [before_stop(text, decoding.until) for text in texts]
        self.done(len(prompts))
        found = dict(zip(rows, texts, strict=True)) if greedy else {}
        return [found[tuple(prompt)] for prompt in prompts] if greedy else texts

    def stop_token_ids(self, decoding: Decoding) -> tuple[int, ...]:
        """The tokens after which a text is known to have ended: the model's own, and those in which a whole stop is. A
        stop of several tokens ends nothing on the device; what follows it is cut afterwards."""
        if decoding.until and not self.token_texts:
            ids = [[token] for token in range(min(len(self.tokenizer), self.model.config.vocab_size))]
            self.token_texts += self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        own = (i for i, text in enumerate(self.token_texts) if any(stop in text for stop in decoding.until))
        return tuple(sorted({*self.model.stop_token_ids, *own}))

    def _cut(self, prompt: list[int], room: int) -> list[int]:
        """The prompt's last `room` tokens."""
        if len(prompt) <= room:
            return prompt
        return _Cut(prompt[-room:], len(prompt) - room)

    def _tell_cut(self, prompts: Sequence[list[int]], beside: str) -> None:
        cut = [prompt.lost for prompt in prompts if isinstance(prompt, _Cut)]
        if cut:
            self.warn(
                f"{len(cut)} of {len(prompts)} requests have a context that lost its first tokens, up to {max(cut)} of "
                f"them: it and {beside} must fit into {self.longest}"
            )

    def warn(self, text: str) -> None:
        """Say it once, and keep it."""
        if text not in self.warnings:
            self.warnings.append(text)
            logger.warning(text)


class _Cut(list[int]):
    """The last tokens of a prompt that lost others."""

    def __init__(self, tokens: Sequence[int], lost: int):
        super().__init__(tokens)
        self.lost = lost


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to where the first of the stops begins; all of it where there is none.

    >>> before_stop("4\\nQ: 2", ["Q:", "\\n"])
    '4'
    """
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def rolling_windows(tokens: Sequence[int], prefix: int, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to score) of each window: every token is scored once. The first window begins after `prefix`;
    the others have the token before them, and the last one as many as fit: `longest` tokens are fed, the last scored
    one not among them.

    >>> [*rolling_windows([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 99, 4)]
    [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    """
    for begin in range(0, len(tokens), longest):
        end = min(begin + longest, len(tokens))
        context = [*tokens[end - longest - 1 : begin]] if begin else [prefix]
        yield context, [*tokens[begin:end]]
