"""What the benchmarks compare does the same work on both sides."""

import dataclasses
import importlib
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks import fault_children, fault_inputs, faults
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


# Faults on purpose


def test_mutations_and_completions_are_functions_of_the_seed():
    content = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    one, two = ([fault_inputs.mutated(content, random.Random(seed)) for seed in range(300)] for _ in range(2))
    assert one == two and content not in one and len(set(one)) > 150
    texts = [fault_inputs.hostile_completion(random.Random(seed)) for seed in range(300)]
    assert len(set(texts)) > 200 and max(map(len, texts)) == fault_inputs.LONGEST


class Told:
    """In the place of a child: what an operation gives, as it is told; first without a fault."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def ask(self, name, *arguments, names=()):
        return self.outcomes.pop(0) if name != "limit_memory" else None

    def close(self):
        pass


@pytest.mark.parametrize(
    ("outcome", "way"),
    [
        (("value", "w"), "harmless"),
        (("value", "v"), "silent"),
        (("refused", "a sentence"), "refused"),
        (("otherwise", "KeyError"), "otherwise"),
    ],
)
def test_a_result_that_differs_counts_as_silent(outcome, way, tmp_path):
    campaign = faults.Campaign(tmp_path, seed=0)
    campaign._prepared, campaign.child = True, Told(("value", "w"), outcome)
    (tmp_path / "files/run").mkdir(parents=True)
    (tmp_path / "files/run/seedlog.jsonl").write_text("{}\n")
    counts = faults.damage(campaign, "seed log", 1)
    assert counts == {way: 1}
    assert (tmp_path / "files/run/seedlog.jsonl").read_text() == "{}\n"


def test_an_error_of_a_library_is_not_a_refusal():
    def fail(error):
        raise error

    names = ("config.json",)
    assert fault_children.attempt(lambda: fail(ValueError("config.json is damaged")), names)[0] == "refused"
    assert fault_children.attempt(lambda: fail(ValueError("something else")), names)[0] == "otherwise"
    assert fault_children.attempt(lambda: json.loads("config.json"), names)[0] == "otherwise"
    assert fault_children.attempt(lambda: fail(MemoryError("config.json")), names)[0] == "otherwise"


def test_an_unknown_kind_of_fault_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["faults", "--only=sed log"])
    with pytest.raises(SystemExit):
        faults.main()
    assert "--only has sed log: choose among killed while training" in capsys.readouterr().err


@pytest.mark.slow
def test_a_few_faults_of_some_kinds():
    kinds = ["seed log", "tokenizer of a run", "checkpoint", "rows as jsonl", "hostile completions"]
    rows = faults.run(kinds, trials=2, seed=3)
    assert [*rows] == kinds
    for kind, row in rows.items():
        assert row["tried"] >= 2 and row["refused"] + row["harmless"] == row["tried"], (kind, row)
