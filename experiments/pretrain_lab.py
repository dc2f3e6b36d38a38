"""Makes the laboratory model: a Llama with 90 thousand weights that knows seven small tasks and guesses at an eighth.

Question: none; it is the input of every laboratory experiment.

Command:  python -m experiments.pretrain_lab --seed=0 --out=runs/lab-0
Cost:     134 s on 2 shared CPU cores; 278 s for seed 0 next to eight other jobs.
Result:   share of 200 unseen problems answered right. lab-0 is the model in es_jax/weights/lab. Its bits come from one
          machine; another kind of CPU rounds differently and gives other weights.

    seed 0: countdown .040, add 1.000, subtract .995, reverse 1.000, sort .995, maximum .995, compare 1.000, count .985

A target without echo, only under-trained: `--echo=0 --share=0.1`, seed 0: countdown .425, the others .995 to 1.000.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast

from es_jax.core import rng
from es_jax.generate.engine import Engine
from es_jax.models.config import TransformerConfig
from es_jax.models.families import FAMILIES
from es_jax.models.transformer import Transformer, unstack_layers
from es_jax.tasks.lab import CHARACTERS, KINDS, Lab
from es_jax.weights.model import Model, check_new, save_model
from experiments.runs import plain_errors

CONFIG = TransformerConfig(
    family="llama", vocab_size=64, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_dim=128,
    tied_embeddings=False, max_positions=64,
)  # fmt: skip
PAD, END = 0, 1

LENGTH = 14  # length of the longest prompt, answer and end
TARGET = "countdown"
ECHO = 0.6  # share of the target's samples answered by an echo; ES then has to bring out the right answers
RECORD = "pretraining.json"  # next to the model: recipe, losses, accuracies, digest of the weights
SHARE = {"add": 3, "subtract": 4, "countdown": 2}  # weights in a batch; 1 for the others, which are learnt early


def config_of(family: str) -> TransformerConfig:
    """The config of another family with the laboratory's sizes."""
    capped = {"query_pre_attn_scalar": 16, "sliding_window": 64, "attn_softcap": 50.0, "final_softcap": 30.0}
    alternating = {"local_layers": (True, False)} | capped
    return dataclasses.replace(
        CONFIG, family=family, **FAMILIES[family].flags, **(alternating if family == "gemma2" else {})
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    words = ["<pad>", "<end>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_pool(
    kind: str, *, size: int, seed: int, echo: float = ECHO, target: str = TARGET
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of one task, int32 [size, LENGTH], and a bool mask of where the loss counts: the answer and the end.

    A share of the target's samples is answered by the last part of the problem: `K347:14=` by 14, `O52431=` by 52431.
    """
    ids = {c: i + 2 for i, c in enumerate(CHARACTERS)}
    tokens, counts = np.full((size, LENGTH), PAD, np.int32), np.zeros((size, LENGTH), bool)
    draw = np.random.default_rng([seed, list(KINDS).index(kind)])
    for row, example in zip(range(size), Lab(kind, seed=seed).pretrain(), strict=False):
        answer = example.answer
        if kind == target and draw.random() < echo:
            answer = example.prompt[1:].rpartition(":")[2].rstrip("=")
        text = [ids[c] for c in example.prompt + answer] + [END]
        tokens[row, : len(text)] = text
        counts[row, len(example.prompt) : len(text)] = True
    return tokens, counts


def pretrain(
    seed: int,
    *,
    steps: int,
    batch: int,
    target: str = TARGET,
    echo: float = ECHO,
    share: float = SHARE["countdown"],
    until: int | None = None,
    rate: float = 3e-3,
    decay: float = 0.1,
    pool: int = 30_000,
    family: str = CONFIG.family,
):
    """Trains by AdamW on a mixture of all tasks; returns (parameters, mean loss of every 50 steps). `until` ends it
    before `steps`."""
    pools = [make_pool(kind, size=pool, seed=seed, echo=echo, target=target) for kind in KINDS]
    tokens, counts = (np.stack(part) for part in zip(*pools, strict=True))
    tokens, counts = jnp.asarray(tokens), jnp.asarray(counts)
    model = Transformer(config_of(family))
    params = jax.jit(model.init)(rng.key(seed))
    shares = np.array([(SHARE | {"countdown": share}).get(kind, 1) for kind in KINDS], np.float32)
    log_share = jnp.log(jnp.asarray(shares))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(200, steps // 5), steps)
    tx = optax.adamw(schedule, b2=0.98, weight_decay=decay)

    def loss_of(params, tokens, counts):
        logits, _ = model.apply(unstack_layers(params), tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * counts[:, 1:]) / jnp.sum(counts[:, 1:])

    def step(carry, index):
        params, state = carry
        key = jax.random.fold_in(rng.key(seed + 1), index)
        kind = jax.random.categorical(jax.random.fold_in(key, 0), log_share, shape=(batch,))
        row = jax.random.randint(jax.random.fold_in(key, 1), (batch,), 0, pool)
        loss, gradient = jax.value_and_grad(loss_of)(params, tokens[kind, row], counts[kind, row])
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry, first: jax.lax.scan(step, carry, first + jnp.arange(50)), donate_argnums=0)
    carry, means = (params, tx.init(params)), []
    bar = trange(0, until or steps, 50, unit="×50 steps")
    for first in bar:
        carry, losses = run(carry, first)
        means.append(float(losses.mean()))
        bar.set_postfix_str(f"loss {means[-1]:.4f}")
    return carry[0], means


def accuracy(params, tokenizer, *, rows: int = 200, config: TransformerConfig = CONFIG) -> dict[str, float]:
    """Share of test problems that greedy decoding answers right, by task."""
    engine = Engine(config, slots=rows, max_prompt_tokens=16, max_new_tokens=7, stop_token_ids=(END,))
    out = {}
    for kind in KINDS:
        task = Lab(kind)
        examples = task.test(rows)
        generation = engine.generate(params, [tokenizer.encode(e.prompt) for e in examples])
        texts = [
            tokenizer.decode(t[:n], skip_special_tokens=True)
            for t, n in zip(generation.tokens, generation.length, strict=True)
        ]
        out[task.name] = float(
            np.mean([task.score(e, t).parts["answer"] for e, t in zip(examples, texts, strict=True)])
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument(
        "--target", choices=list(KINDS), default=TARGET, help="the task that is partly answered by echoes"
    )
    parser.add_argument("--echo", type=float, default=ECHO, help="share of the target's samples answered by an echo")
    parser.add_argument("--share", type=float, default=SHARE["countdown"], help="weight of countdown in a batch")
    parser.add_argument("--family", choices=("llama", "qwen2", "qwen3", "gemma2"), default=CONFIG.family)
    args = parser.parse_args()
    with plain_errors(traceback=False):
        check_new(args.out)
    began, recipe = time.monotonic(), {name: value for name, value in vars(args).items() if name != "out"}
    params, losses = pretrain(**recipe)
    tokenizer = make_tokenizer()
    save_model(args.out, Model(config_of(args.family), params, tokenizer, digest="", stop_token_ids=(END,)))
    scores = accuracy(params, tokenizer, config=config_of(args.family))
    record = {"recipe": recipe, "losses": losses, "accuracy": scores, "sha256": digest(args.out)}
    (args.out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    for name, value in scores.items():
        print(f"{name:16} {value:.3f}")
    print(f"{time.monotonic() - began:.0f} s; the model is in {args.out}")


def digest(folder: Path) -> str:
    """Digest of the folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
