"""GGUF files: every kind of tensor against its formula, whole models with their tokenizers, damage noticed."""

import struct

import gguf
import jax
import numpy as np
import pytest
from gguf_models import (
    SPECIAL,
    TEXT,
    byte_level_metadata,
    random_params,
    reference_tokenizer,
    write_gguf,
    write_tensors,
)

from es_jax.models.config import TransformerConfig
from es_jax.weights.gguf import KINDS, GGUFReader
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.model import load_model

QWEN2 = TransformerConfig(
    family="qwen2", vocab_size=400, width=32, layers=2, heads=3, kv_heads=1, head_dim=10, mlp_dim=64,
    rope_theta=1e6, norm_eps=1e-6, qkv_bias=True,
)  # fmt: skip
LLAMA3 = TransformerConfig(
    family="llama", vocab_size=400, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64,
    rope_theta=5e5, tied_embeddings=False,
)  # fmt: skip


def half(data: bytes) -> float:
    return float(np.frombuffer(data, "<f2")[0])


def nibble(data: bytes, i: int) -> int:
    """Number i of a block of 32: the low halves of 16 bytes first, then the high ones."""
    return data[i % 16] >> (4 * (i // 16)) & 15


def scales(data: bytes) -> list[tuple[int, int]]:
    """The eight 6-bit (scale, minimum) pairs that twelve bytes hold."""
    low = [(data[j] & 63, data[j + 4] & 63) for j in range(4)]
    high = [(data[j + 8] & 15 | data[j] >> 6 << 4, data[j + 8] >> 4 | data[j + 4] >> 6 << 4) for j in range(4)]
    return low + high


def signed(byte: int) -> int:
    return byte - 256 * (byte > 127)


def q5(b: bytes, i: int) -> float:
    high = int.from_bytes(b[2:6], "little") >> i & 1
    return half(b[:2]) * ((nibble(b[6:], i) | high << 4) - 16)


def q4_k(b: bytes, i: int) -> float:
    scale, minimum = scales(b[4:16])[i // 32]
    return half(b[:2]) * scale * (b[16 + i // 64 * 32 + i % 32] >> (4 * (i // 32 % 2)) & 15) - half(b[2:4]) * minimum


def q5_k(b: bytes, i: int) -> float:
    scale, minimum = scales(b[4:16])[i // 32]
    low = b[48 + i // 64 * 32 + i % 32] >> (4 * (i // 32 % 2)) & 15
    return half(b[:2]) * scale * (low | (b[16 + i % 32] >> (i // 32) & 1) << 4) - half(b[2:4]) * minimum


def q6_k(b: bytes, i: int) -> float:
    part, rest = divmod(i, 128)  # 64 bytes of low halves, 32 of high pairs, 8 scales for each part
    low = b[part * 64 + rest % 64] >> (4 * (rest // 64)) & 15
    high = b[128 + part * 32 + rest % 32] >> (2 * (rest // 32)) & 3
    return half(b[208:]) * signed(b[192 + part * 8 + rest // 16]) * ((low | high << 4) - 32)


# kind → (numbers in a block, its bytes, where its float16 scales stand, number i of the block)
FORMULAS = {
    "F32": (1, 4, None, lambda b, i: struct.unpack("<f", b)[0]),
    "F16": (1, 2, None, lambda b, i: half(b)),
    "BF16": (1, 2, None, lambda b, i: struct.unpack("<f", b"\0\0" + b)[0]),
    "Q4_0": (32, 18, (0,), lambda b, i: half(b[:2]) * (nibble(b[2:], i) - 8)),
    "Q4_1": (32, 20, (0, 2), lambda b, i: half(b[:2]) * nibble(b[4:], i) + half(b[2:4])),
    "Q5_0": (32, 22, (0,), q5),
    "Q8_0": (32, 34, (0,), lambda b, i: half(b[:2]) * signed(b[2 + i])),
    "Q4_K": (256, 144, (0, 2), q4_k),
    "Q5_K": (256, 176, (0, 2), q5_k),
    "Q6_K": (256, 210, (208,), q6_k),
}


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks [rows, bytes of a row]; the scales, and plain floats, are ordinary numbers."""
    numbers, size, places, _ = FORMULAS[kind]
    draw = np.random.default_rng(len(kind) + size)
    if places is None:
        plain = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]
        values = draw.standard_normal((rows, columns)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(plain) if kind == "BF16" else values.astype(plain)
    out = draw.integers(0, 256, (rows, columns // numbers, size), np.uint8)
    for place in places:
        scale = draw.standard_normal((rows, columns // numbers, 1)).astype(np.float16)
        out[..., place : place + 2] = scale.view(np.uint8)
    return out.reshape(rows, -1)


def test_every_kind_has_a_formula():
    assert set(KINDS) == set(FORMULAS)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_numbers_are_those_of_the_formula(kind, tmp_path):
    rows, columns = 5, 512
    data = blocks(kind, rows, columns)
    raw = data.view(np.uint8).reshape(rows, -1)
    write_tensors(tmp_path / "x.gguf", {"before": np.ones(3, np.float32), "w": raw}, kinds={"w": kind})
    reader = GGUFReader(tmp_path / "x.gguf")
    assert reader.shapes == {"before": (3,), "w": (rows, columns)}
    numbers, size, _, formula = FORMULAS[kind]
    flat = raw.tobytes()
    expected = [
        formula(flat[i // numbers * size : (i // numbers + 1) * size], i % numbers) for i in range(rows * columns)
    ]
    expected = np.array(expected).reshape(rows, columns)
    np.testing.assert_allclose(reader.read("w").astype(np.float64), expected, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(reader.read("w", 1, 4), reader.read("w")[1:4])


def patterns():
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    known = {"qwen2": PRETOKENIZE_REGEX, "llama-bpe": TikTokenConverter().pattern}
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")  # transformers 5.24 on
    return known | {"tekken": mapping.GGUF_PRE_TOKENIZER_SPLITS["tekken"]}


MODELS = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "tekken": LLAMA3}
WHOLE_WORDS = ("llama-bpe", "tekken")


@pytest.fixture(scope="module", params=MODELS)
def model_file(request, tmp_path_factory):
    """Pre-tokenizer, config, weights, tokenizer and file of a model."""
    pre, config = request.param, MODELS[request.param]
    tokenizer = reference_tokenizer(patterns()[pre], nfc=pre == "qwen2", ignore_merges=pre in WHOLE_WORDS)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * np.random.default_rng(2).standard_normal(leaf.shape, "f4"), random_params(config)
    )
    path = tmp_path_factory.mktemp("gguf") / f"{pre}.gguf"
    write_gguf(path, config, params, byte_level_metadata(tokenizer, pre=pre))
    return pre, config, params, tokenizer, path


def test_a_whole_model(model_file):
    _, config, params, _, path = model_file
    model = load_model(path)
    assert model.config == config and model.stop_token_ids == (1, 3)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


TEXTS = (
    TEXT,
    "I'LL say 12345678 don't\r\n\r\n  indented\tx=1;\n \n",
    "cafe\u0301 ①②③ ½ 🙂👍🏽  漢字かな",
    "   leading, trailing   ",
    "<|im_start|>user\nhi there<|im_end|>\n",
)


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokens_are_the_reference_tokenizers(text, model_file):
    pre, _, _, tokenizer, path = model_file
    ours = from_gguf_metadata(GGUFReader(path).metadata)
    tokenizer.add_special_tokens(SPECIAL)
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.encode(text) == [0] * (pre in WHOLE_WORDS) + expected  # Qwen2 begins without BOS


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"])
def test_quantised_models_are_near_their_weights(kind, tmp_path):
    config, tokenizer = LLAMA3, reference_tokenizer(patterns()["llama-bpe"], nfc=False, ignore_merges=True)
    params = random_params(config)
    words = byte_level_metadata(tokenizer, pre="llama-bpe")
    write_gguf(tmp_path / "m.gguf", config, params, words, kind=kind)
    bound = {"F16": 1e-4, "BF16": 1e-3, "Q8_0": 1e-3, "Q5_0": 6e-3, "Q4_1": 6e-3, "Q4_0": 1.2e-2}[kind]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=bound), load_model(tmp_path / "m.gguf").params, params
    )


def header_of(path):
    """How many bytes stand before the first tensor."""
    return min(tensor.start for tensor in GGUFReader(path)._tensors.values())


def test_a_truncated_file_is_refused_before_anything_is_read(model_file, tmp_path):
    content, path = model_file[-1].read_bytes(), tmp_path / "cut.gguf"
    header = header_of(model_file[-1])
    cuts = [*range(0, 64), *np.linspace(64, header, 40, dtype=int), header + 1, len(content) // 2, len(content) - 33]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="truncated or corrupt GGUF"):
            GGUFReader(path)
    path.write_bytes(content + bytes(64))
    with pytest.raises(ValueError, match="its header describes"):
        GGUFReader(path)


def test_flipped_bits_of_the_header_never_change_a_number(model_file, tmp_path):
    """Every flip is refused, or leaves every tensor that the reader offers as it was."""
    content, path = bytearray(model_file[-1].read_bytes()), tmp_path / "flipped.gguf"
    whole = GGUFReader(model_file[-1])
    tensors = {key: whole.read(key) for key in whole.shapes}
    header, refused = header_of(model_file[-1]), 0
    draw = np.random.default_rng(0)
    places = [
        *range(24),
        *range(header - 120, header),
    ]  # counts; shapes, kinds and offsets of the last tensors
    flips = [(at, bit) for at in places for bit in range(8)]
    flips += [(int(draw.integers(header)), int(draw.integers(8))) for _ in range(300)]
    for at, bit in flips:
        content[at] ^= 1 << bit
        path.write_bytes(content)
        content[at] ^= 1 << bit
        try:
            reader = GGUFReader(path)
        except ValueError:
            refused += 1
            continue
        for key in reader.shapes.keys() & tensors.keys():
            if reader.shapes[key] == tensors[key].shape:
                np.testing.assert_array_equal(reader.read(key), tensors[key])
    assert refused > 500


def test_a_big_endian_file_is_refused(tmp_path):
    write_tensors(tmp_path / "big.gguf", {"w": np.ones(4, np.float32)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="it is big-endian, which is not read"):
        GGUFReader(tmp_path / "big.gguf")


@pytest.mark.parametrize("kind", ["Q5_1", "I32"])
def test_kinds_that_are_not_read_are_all_named(kind, tmp_path):
    values = np.ones((2, 32), np.int32)
    if kind == "Q5_1":
        values = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType.Q5_1)
    write_tensors(tmp_path / "x.gguf", {"a": values, "b": values}, kinds={"a": kind, "b": kind})
    with pytest.raises(ValueError, match=f"not read: a is {kind}, b is {kind}; use a file with kinds among F32, F16"):
        GGUFReader(tmp_path / "x.gguf")


def test_one_part_of_several_is_refused(tmp_path):
    write_tensors(tmp_path / "x.gguf", {"w": np.ones(4, np.float32)}, part_of=2)
    with pytest.raises(ValueError, match=r"one of 2 parts.*--merge"):
        GGUFReader(tmp_path / "x.gguf")
