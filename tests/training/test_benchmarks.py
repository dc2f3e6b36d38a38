"""What the benchmarks compare does the same work on both sides."""

import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks.iteration import EndedEngine, drawn
from es_jax.generate.engine import Engine
from es_jax.tasks import get_task
from es_jax.weights.model import load_model, save_model
from es_jax.weights.tokenizer import encode_prompt


@pytest.fixture(scope="module")
def lab():
    model = load_model("lab")
    prompts = [encode_prompt(model.tokenizer, e.prompt) for e in get_task("lab-add").train(8)]
    return (
        model,
        prompts,
        Engine(model.config, slots=8, max_prompt_tokens=16, max_new_tokens=6, stop_token_ids=model.stop_token_ids),
    )


def test_rows_end_at_their_lengths_and_say_no_stop_token(lab):
    model, prompts, engine = lab
    lengths = (1, 3, 6, 2, 6, 5, 1, 4)
    fields = {field.name: getattr(engine, field.name) for field in dataclasses.fields(Engine) if field.name != "_"}
    made = EndedEngine(**{**fields, "slots": 3}, lengths=lengths).generate(model.params, prompts)
    assert tuple(made.length.tolist()) == lengths
    assert not np.isin(made.tokens[np.arange(6) < made.length[:, None]], model.stop_token_ids).any()


def test_the_peer_generates_the_same_tokens_with_generate_and_by_hand(lab):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from benchmarks import peer_torch

    model, prompts, engine = lab
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = engine.generate(model.params, prompts)
    for generate in (peer_torch.generate, peer_torch.by_hand):
        tokens = generate(net, prompts, 6, stop=model.stop_token_ids[0])
        for ours, length, theirs in zip(made.tokens, made.length, tokens, strict=True):
            assert ours[:length].tolist() == theirs[:length].tolist()
    ended = peer_torch.generate(net, prompts, 6, stop=model.stop_token_ids[0], lengths=[1, 3, 6, 2, 6, 5, 1, 4])
    assert (ended == model.stop_token_ids[0]).sum(1).tolist() == [6, 4, 1, 5, 1, 2, 6, 3]


def test_the_laboratorys_benchmark_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from benchmarks import lab

    monkeypatch.setattr(sys, "argv", ["lab", "--repeats=1", "--members=2", f"--json={tmp_path / 'found.json'}"])
    lab.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0 <= found["mean_reward"] < 0.5 and min(found["members_a_second"].values()) > 0


@pytest.mark.parametrize("path", sorted(Path(benchmarks.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import(path):
    if path.stem in ("lab", "peer_torch", "noise", "estimate"):
        pytest.importorskip("torch")
    importlib.import_module(f"benchmarks.{path.stem}")


def test_even_lengths_are_as_many_as_prompts():
    assert drawn("even")[0] == 8 and drawn("even")[-1] == 256 and len(drawn("even")) == 32
