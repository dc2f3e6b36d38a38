"""SmolLM2-135M-Instruct from its GGUF file, against an independent reading of the same file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.generate.engine import Engine
from es_jax.models.transformer import Transformer
from es_jax.weights.model import config_only, load_model, save_model
from es_jax.weights.tokenizer import encode_prompt

TEXT = """The tide tables for 2024 were printed on 31 pages, and nobody in the harbour read them: the
fishermen knew the sea by its colour.

When the new keeper arrived he asked why, and an old woman, mending nets by the door, said that a number
tells you when the water comes but never what it brings. He wrote that down, in a notebook he had meant to
keep for measurements only, and the next morning he walked out to see. It was grey,
and the water, which had been expected at seven, came at a quarter past, without a word."""


@pytest.fixture(scope="module")
def model(smollm2):
    return load_model(smollm2)


@pytest.mark.slow
def test_logits_equal_transformers(smollm2, model):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    fields = load_gguf_checkpoint(str(smollm2))["config"]
    fields = {**fields, "tie_word_embeddings": True}
    reference = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    tensors = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=reference)["tensors"]
    left = reference.load_state_dict(tensors, strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys
    reference.tie_weights()
    ids = model.tokenizer.encode(TEXT)[:100]
    assert len(ids) == 100
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits.float().numpy()
    logits = jax.jit(Transformer(model.config).apply)(model.params, jnp.asarray([ids], jnp.int32))[0]
    np.testing.assert_allclose(logits, expected, atol=2e-3)


def test_greedy_answer(model):
    ids = encode_prompt(model.tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    forward = jax.jit(Transformer(model.config).apply)
    tokens, start = np.zeros((1, len(ids) + 12), np.int32), len(ids)
    tokens[0, :start] = ids
    for end in range(start, tokens.shape[1]):
        logits, _ = forward(model.params, jnp.asarray(tokens), logits_at=jnp.array([end - 1]))
        tokens[0, end] = int(logits.argmax())
        if tokens[0, end] in model.stop_token_ids:
            break
    answer = model.tokenizer.decode(tokens[0, start : end + 1])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_what_was_read(smollm2, model):
    config = config_only(smollm2)
    assert config == model.config and config.tied_embeddings and config.norm_eps == 1e-5
    assert model.stop_token_ids == (0, 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008


@pytest.mark.parametrize("text", [TEXT, "x=12345*6.78\n\n\tdef f():\n", "naïve 你好 🙂 Ωmega", "  two  spaces "])
def test_tokenizer_round_trip(model, text):
    ids = model.tokenizer.encode(text)
    assert model.tokenizer.decode(ids) == text
    assert not any(sum(c.isdigit() for c in model.tokenizer.decode([i])) > 1 for i in ids)


@pytest.mark.slow
def test_out_to_transformers_and_back(model, tmp_path):
    """GGUF → folder → transformers decodes the same tokens; folder → es_jax has the same bits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(tmp_path / "out", model, max_shard_bytes=2 * 10**8)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.encode(TEXT) == model.tokenizer.encode(TEXT) and words.chat_template == model.tokenizer.chat_template
    ids = encode_prompt(words, "The tide tables")
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
    engine = Engine(
        model.config, slots=1, max_prompt_tokens=len(ids), max_new_tokens=12, stop_token_ids=model.stop_token_ids
    )
    tokens = engine.generate(model.params, [ids]).tokens[0]
    assert expected == np.asarray(tokens).tolist() and len(expected) == 12
    del theirs
    back = load_model(tmp_path / "out")
    assert back.config == model.config and back.stop_token_ids == model.stop_token_ids
    forward, tokens = jax.jit(Transformer(model.config).apply), jnp.asarray([ids], jnp.int32)
    np.testing.assert_array_equal(forward(back.params, tokens)[0], forward(model.params, tokens)[0])
