"""verify_model: equal models pass, a wrong layer is named, the command says the same in JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("torch")

from es_jax.weights import verify
from es_jax.weights.model import load_model
from es_jax.weights.verify import VerificationError, verify_model


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def test_a_model_equals_itself(model, tiny_model):
    report = verify_model(model, tiny_model, max_kl=1e-8)
    assert report.passed and report.parted is None and report.logit_difference < 1e-4
    assert len(report.kl) == report.tokens == len(model.tokenizer.encode(verify.TEXT))
    assert [name for name, _ in report.layers] == ["embedding", "layer 0", "layer 1", "final norm", "logits"]
    assert 0 <= report.mean_kl <= report.max_kl


def test_the_first_layer_that_differs_is_named(model, tiny_model):
    kernel = model.params["layers"]["mlp"]["down"]["kernel"]
    layers = {
        **model.params["layers"],
        "mlp": {**model.params["layers"]["mlp"], "down": {"kernel": kernel.at[1].mul(2)}},
    }
    wrong = dataclasses.replace(model, params={**model.params, "layers": layers})
    with pytest.raises(VerificationError, match="they diverge at layer 1") as error:
        verify_model(wrong, tiny_model, max_kl=1e-6, text="a b c")
    assert error.value.report.max_kl > 1e-6 and not error.value.report.passed
    assert verify_model(wrong, tiny_model, max_kl=1e3, text="a b c").parted == "layer 1"


def test_a_wrong_config_is_noticed(model, tiny_model):
    wrong = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_theta=3.0))
    with pytest.raises(VerificationError, match="they diverge at layer 0"):
        verify_model(wrong, tiny_model, max_kl=1e-6, text="a b c")


def test_bfloat16_is_near(model, tiny_model):
    half = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    report = verify_model(half, tiny_model, max_kl=0.05, text="a b c")
    assert report.max_kl > 1e-8 and report.parted is not None


def test_other_tokens_fail(model, tiny_model):
    class Shifted:
        def encode(self, text):
            return [i + 1 for i in model.tokenizer.encode(text)]

    with pytest.raises(VerificationError, match="the tokenizers encode the text differently"):
        verify_model(dataclasses.replace(model, tokenizer=Shifted()), tiny_model, max_kl=1e-6, text="a b c")


@pytest.mark.parametrize("text", ["", "x", "x" * 5000])
def test_the_text_must_fit(model, tiny_model, text):
    with pytest.raises(ValueError, match=r"text has \d+ tokens: it must have 2 to 2048"):
        verify_model(model, tiny_model, max_kl=1.0, text=text)


def test_the_reference_must_be_a_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        verify_model(model, tmp_path, max_kl=1.0)


def test_the_command(tiny_model, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("some words")
    assert verify.main([str(tiny_model), str(tiny_model), f"--text-file={tmp_path / 'words.txt'}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] and printed["tokens"] == len("some words") and len(printed["kl"]) == 10
    assert set(printed) >= {"same_tokens", "logit_difference", "mean_kl", "max_kl", "limit", "layers", "parted"}
    assert verify.main([str(tiny_model), str(tiny_model), "--max-kl=-1", "--text=some words"]) == 1
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"es_jax\.weights\.verify: .*is not a folder, a .gguf file or a hub name"):
        verify.main(["nothing here", str(tiny_model)])
