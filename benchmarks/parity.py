"""Question: are the logits of every family equal to those of transformers, in float32?

It compares small models with random sizes and random weights (including norms and biases) with the reference on PyTorch
with eager attention. It reports the largest absolute difference of the logits, without a cache and with one (fed in
pieces), and without padding, with left and with right padding. It also reports whether 64 greedy tokens of the engine
and of transformers' generate are the same.

Command:  python -m benchmarks.parity [--families=llama,…] [--cases=3] [--json]
Needs:    pip install -e '.[verify]'
Cost:     three minutes on 2 shared CPU cores.
Result:   docs/models.md
"""

import argparse
import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax import Engine, Transformer, TransformerConfig
from es_jax.models.cache import KVCache
from es_jax.models.families import FAMILIES
from es_jax.models.hf_config import from_hf
from es_jax.weights.convert import to_params

VOCAB, BATCH, LENGTH, PIECE, NEW = 97, 3, 40, 10, 64
PADDINGS = ("none", "left", "right")
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: its family, config.json's fields, and the position of the first token."""

    family: str
    index: int
    fields: dict[str, Any]
    start: int = 0

    @property
    def title(self) -> str:
        """A short description of what is special about the sizes."""
        f = self.fields
        words = [f"{f['num_hidden_layers']} layers", f"{f['num_attention_heads']}/{f['num_key_value_heads']} heads"]
        words += [f"of {f['head_dim']}" if "head_dim" in f else "", f"width {f['hidden_size']}"]
        words += ["tied" if f["tie_word_embeddings"] else "untied"]
        words += [f"window {f['sliding_window']}"] if f.get("sliding_window") else []
        rope = f["rope_parameters"].get("full_attention", f["rope_parameters"])
        words += [f"{rope['rope_type']} rope"] if rope["rope_type"] != "default" else []
        words += [f"positions from {self.start}"] if self.start else []
        return " ".join(word for word in words if word)


def cases(family: str, count: int) -> Iterator[Case]:
    """`count` random models of a family, the same every time."""
    for index in range(count):
        draw = np.random.RandomState(zlib.crc32(family.encode()) + index)
        heads, kv_heads = [(3, 1), (6, 2), (5, 5), (4, 2), (9, 3)][(index + draw.randint(2) * 2) % 5]
        fields: dict[str, Any] = {
            "vocab_size": VOCAB,
            "num_hidden_layers": 4 + index % 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": heads * int(draw.choice([6, 8, 10])),
            "intermediate_size": int(draw.choice([30, 52, 71])),
            "rms_norm_eps": float(draw.choice([1e-6, 1e-5, 1e-2])),
            "max_position_embeddings": 16384,
            "tie_word_embeddings": index % 2 == 1,
            "pad_token_id": 0,
            "attn_implementation": "eager",
        }
        if index != 1 or family not in ("llama", "smollm3"):  # those take width / heads
            fields["head_dim"] = int(draw.choice([12, 14, 16]))
        theta = float(draw.choice([100.0, 1e4, 5e5]))
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        yield _particulars(Case(family, index, fields), draw)


def _particulars(case: Case, draw: np.random.RandomState) -> Case:
    """Features of this family alone, small enough that 40 tokens exceed them."""
    fields, index, window = case.fields, case.index, int(draw.randint(3, 12))
    rope = fields["rope_parameters"]
    if case.family == "llama" and index == 0:
        rope |= {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16}
    if case.family == "llama" and index == 2:  # those of Llama 3.2
        rope |= {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
        return dataclasses.replace(case, start=8180)
    if case.family in ("qwen2", "mistral", "smollm3") and index == 1:
        rope |= {"rope_type": "linear", "factor": 4.0}
    if case.family == "mistral":
        fields["sliding_window"] = None if index == 2 else window
    if case.family.startswith("qwen") and index != 0:
        fields |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 2}
    if case.family.startswith("gemma"):
        fields |= {"sliding_window": window, "query_pre_attn_scalar": int(draw.choice([7, 24]))}
        fields["final_logit_softcapping"] = [3.0, None, 5.0][index % 3]
    if case.family == "gemma2":
        fields["attn_logit_softcapping"] = [2.0, 5.0, None][index % 3]
    if case.family == "gemma3_text":
        fields["sliding_window_pattern"] = [2, 3, 6][index % 3]
        scaling = {} if index == 1 else {"rope_type": "linear", "factor": 8.0}
        local = {"rope_type": "default", "rope_theta": 50.0}
        fields["rope_parameters"] = {"full_attention": rope | scaling, "sliding_attention": local}
    return case


def draw_weight(key: str, shape: tuple[int, ...], *, plus_one: bool) -> np.ndarray:
    """The random float32 tensor of that key, the same every time and with every version of numpy."""
    normal = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("norm.weight"):
        normal = 0.3 * normal + (0.0 if plus_one else 1.0)
    elif key.endswith("embed_tokens.weight"):
        normal = 0.3 * normal
    else:
        normal = normal / np.sqrt(shape[-1]) if len(shape) > 1 else 0.3 * normal
    return normal.astype(np.float32)


def reference_model(case: Case) -> Any:
    """The model in transformers, every weight drawn anew."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # small tensors: more threads would only wait
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.family, **case.fields)).eval()
    plus_one = case.family.startswith("gemma")
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(draw_weight(key, tuple(parameter.shape), plus_one=plus_one)))
    return reference


class TensorReader:
    """A state dict with the interface of files: `shapes` and `read(key)`."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.shapes = {key: tensor.shape for key, tensor in tensors.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._tensors[key][start:stop]


def our_model(reference: Any) -> tuple[TransformerConfig, Any]:
    """The same model in es_jax, through the config.json and the keys that transformers would write."""
    config = from_hf(json.loads(reference.config.to_json_string()))
    tensors = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    return config, to_params(TensorReader(tensors), config, naming="hf")


def batch(padding: str, *, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their positions, int32 [BATCH, LENGTH]; -1 at padding, which every row but one has."""
    tokens = np.random.RandomState(7).randint(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    positions = np.full((BATCH, LENGTH), -1, np.int32)
    for row, short in enumerate((0, 0, 0) if padding == "none" else (0, 13, 22)):
        real = slice(short, None) if padding == "left" else slice(0, LENGTH - short)
        positions[row, real] = start + np.arange(LENGTH - short)
    return tokens, positions


def reference_logits(reference: Any, tokens: np.ndarray, positions: np.ndarray, *, cached: bool) -> np.ndarray:
    """Logits of transformers, float32 [BATCH, LENGTH, VOCAB]."""
    import torch
    from transformers import DynamicCache

    ids, where = torch.tensor(tokens).long(), torch.tensor(np.maximum(positions, 0)).long()
    mask = torch.tensor(positions >= 0).long()
    with torch.no_grad():
        if not cached:
            return reference(ids, attention_mask=mask, position_ids=where, use_cache=False).logits.numpy()
        cache, pieces = DynamicCache(config=reference.config), []
        for begin in range(0, LENGTH, PIECE):
            end = begin + PIECE
            inputs = {"attention_mask": mask[:, :end], "position_ids": where[:, begin:end]}
            pieces.append(reference(ids[:, begin:end], past_key_values=cache, use_cache=True, **inputs).logits)
    return torch.cat(pieces, dim=1).numpy()


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: TransformerConfig, params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
    return Transformer(config).apply(params, tokens, positions=positions, cache=cache)


def our_logits(config: TransformerConfig, params: Any, tokens: Any, positions: Any, *, cached: bool) -> np.ndarray:
    """Logits of es_jax, float32 [BATCH, LENGTH, VOCAB]."""
    if not cached:
        return np.asarray(_apply(config, params, tokens, positions, None)[0])
    cache, pieces = KVCache.empty(config, BATCH, length=LENGTH, dtype=jnp.float32), []
    for begin in range(0, LENGTH, PIECE):
        piece = slice(begin, begin + PIECE)
        logits, cache = _apply(config, params, tokens[:, piece], positions[:, piece], cache)
        pieces.append(np.asarray(logits))
    return np.concatenate(pieces, axis=1)


def differences(case: Case, reference: Any, model: tuple[TransformerConfig, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the table for one case: cache, padding, largest |difference| and largest |logit|."""
    for padding in PADDINGS:
        tokens, positions = batch(padding, start=case.start)
        for cached in (False, True):
            theirs = reference_logits(reference, tokens, positions, cached=cached)
            ours = our_logits(*model, tokens, positions, cached=cached)
            real = positions >= 0
            yield {
                "family": case.family,
                "config": case.title,
                "cache": cached,
                "padding": padding,
                "difference": float(np.abs(ours - theirs)[real].max()),
                "largest_logit": float(np.abs(theirs)[real].max()),
            }


def greedy(reference: Any, model: tuple[TransformerConfig, Any]) -> tuple[np.ndarray, np.ndarray]:
    """64 greedy tokens for prompts of three lengths, ours and theirs, int32 [BATCH, NEW]."""
    import torch

    config, params = model
    tokens, positions = batch("left")
    prompts = [row[where >= 0].tolist() for row, where in zip(tokens, positions, strict=True)]
    engine = Engine(config, slots=BATCH, max_prompt_tokens=LENGTH, max_new_tokens=NEW, stop_token_ids=())
    ours = np.asarray(engine.generate(params, prompts).tokens)
    options = {"attention_mask": torch.tensor(positions >= 0).long(), "max_new_tokens": NEW, "min_new_tokens": NEW}
    options |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        theirs = reference.generate(torch.tensor(tokens).long(), **options)
    return ours, theirs[:, LENGTH:].numpy()


def markdown(rows: list[dict[str, Any]], same: dict[str, bool]) -> str:
    """The table in docs/models.md: a line for each case and cache, a column for each padding."""
    lines = ["| family | config | cache | no padding | left | right |", "|---|---|---|---|---|---|"]
    cells: dict[tuple[str, str, bool], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row["family"], row["config"], row["cache"]), {})[row["padding"]] = row["difference"]
    for (family, config, cached), numbers in cells.items():
        columns = " | ".join(f"{numbers[padding]:.1e}" for padding in PADDINGS)
        lines.append(f"| {family} | {config} | {'yes' if cached else 'no'} | {columns} |")
    equal = ", ".join(name for name, yes in same.items() if yes)
    wrong = ", ".join(name for name, yes in same.items() if not yes) or "none"
    return "\n".join([*lines, "", f"{NEW} greedy tokens equal: {equal}; not equal: {wrong}."])


def main() -> None:
    """Print the table; with --json one object with `rows` and `greedy`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, separated by commas")
    parser.add_argument("--cases", type=int, default=3, help="random models of each family")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    rows, same = [], {}
    for family in args.families.split(","):
        for case in cases(family, args.cases):
            reference = reference_model(case)
            model = our_model(reference)
            rows += differences(case, reference, model)
            same[family] = same.get(family, True) and bool(np.array_equal(*greedy(reference, model)))
    print(json.dumps({"rows": rows, "greedy": same}) if args.json else markdown(rows, same))


if __name__ == "__main__":
    main()
