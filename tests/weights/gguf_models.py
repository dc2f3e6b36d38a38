"""Small GGUF files for tests: random weights in the layout of a family, a byte-level BPE trained on a few sentences."""

import functools
import json
from typing import Any

import gguf
import jax
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from es_jax.models.config import TransformerConfig
from es_jax.models.families import FAMILIES, weights_of
from es_jax.models.transformer import Transformer
from es_jax.weights.convert import hf_tensors

SPECIAL = ["<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "The keeper's notebook said that on 31 October 2024 the tide wouldn't come: it did. She'd counted 1234567 waves,\n"
    "    they'll count more.\n\n\nNaïve façade, 你好世界, Ωmega; x = y**2 + 10_000 --- DON'T shout! I'M here, "
    "we've been there.\t\tEnd. "
)


def reference_tokenizer(pattern: str, *, nfc: bool, ignore_merges: bool) -> Tokenizer:
    """A byte-level BPE of 400 tokens that splits text by `pattern`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    pieces = {piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)}
    whole = next(merge for merge in reversed(state["model"]["merges"]) if "".join(merge) in pieces)
    state["model"]["merges"].remove(whole)  # a word that no merge makes: one token only with ignore_merges
    return Tokenizer.from_str(json.dumps(state))


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of q's and k's rows in the llama architecture: 0, hd/2, 1, hd/2 + 1, … within each head."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def byte_level_metadata(tokenizer: Tokenizer, *, pre: str) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    fields = {
        **{"model": "gpt2", "pre": pre, "tokens": vocabulary, "bos_token_id": 0, "eos_token_id": 3},
        "token_type": [3 if token in SPECIAL else 1 for token in vocabulary],
        "merges": [" ".join(merge) for merge in merges],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def add_metadata(writer: gguf.GGUFWriter, config: TransformerConfig, words: dict[str, Any]) -> None:
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in words.items():
        kinds[type(value)](key, value)


def write_gguf(path, config, params, words, *, kind="F32") -> None:
    """`params` as a GGUF file; matrices as `kind`; `words`: the tokenizer's metadata."""
    family = FAMILIES[config.family]
    names = {weight.hf: weight for weight in weights_of(config)}
    writer = gguf.GGUFWriter(path, family.gguf_architecture)
    add_metadata(writer, config, words)
    shapes, tensor = hf_tensors(params, config=config)
    for key in shapes:
        layer = next((part for part in key.split(".") if part.isdigit()), "")
        weight = names[key.replace(f".{layer}.", ".{}.") if layer else key]
        values = np.array(tensor(key))
        if family.gguf_permuted and weight.rotary:
            values = interleaved(values, getattr(config, weight.rotary))
        if config.norm_plus_one and weight.path.endswith("norm/scale"):
            values = values + np.float32(1)
        if values.ndim == 2 and kind != "F32":
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(weight.gguf.format(layer), gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(weight.gguf.format(layer), values)
    finish(writer)


def write_tensors(path, tensors, *, kinds=None, part_of=1, endianess=gguf.GGUFEndian.LITTLE) -> None:
    """A file of tensors alone; `kinds`: those that are given as bytes of blocks."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    if part_of > 1:
        writer.add_uint16("split.count", part_of)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, values, raw_dtype=kind and gguf.GGMLQuantizationType[kind])
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def random_params(config: TransformerConfig):
    return jax.jit(Transformer(config).init)(jax.random.key(1))
