"""A compiler that ends without an answer is a sentence with its version, how it ended, and what to do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from es_jax.core.chips import chip
from es_jax.models.config import RopeScaling, TransformerConfig
from es_jax.planning import plan
from es_jax.planning.child import _model
from es_jax.planning.compiler import Compiler, CompilerEnded
from es_jax.planning.costs import Work
from es_jax.planning.topology import Topology
from es_jax.training.config import freeze

ROOT = Path(__file__).resolve().parents[2]
SHAPE = TransformerConfig(
    family="llama", vocab_size=64, width=16, layers=4, heads=2, kv_heads=1, head_dim=8, mlp_dim=24,
    rope_scaling=RopeScaling("llama3", 8.0), rope_layers=(True, False), local_layers=(False, True), sliding_window=8,
)  # fmt: skip
TPU = Topology("v5e:2x2", chip("v5e"), ())
GPU = Topology("h100:1x1x1", chip("h100"), ())
BEGIN = 'import os, sys; sys.stdin.readline(); print(\'{"compiling": "decode"}\', flush=True); '


def stub(code):
    return [sys.executable, "-c", code]


pytestmark = pytest.mark.unchecked  # stubs stand where arrays do


@pytest.mark.parametrize(("topology", "code", "says"), [
    (TPU, BEGIN + "sys.exit(3)", ["libtpu ", "for v5e:2x2", "status 3", "compiled decode", "pip install -U libtpu"]),
    (TPU, BEGIN + "os.abort()", ["signal SIGABRT", "without any output", "decode.slots"]),
    (TPU, BEGIN + "os.kill(os.getpid(), 9)", ["signal SIGKILL", "too little memory for the compiler"]),
    (GPU, BEGIN + "os.kill(os.getpid(), 11)", ["jax-cuda12-pjrt ", "h100:1x1x1", "SIGSEGV", "-U jax jax-cuda"]),
    (TPU, "import sys; sys.exit(5)", ["status 5", "while it started"]),  # before it reads
    (TPU, BEGIN + "sys.stdout.write('{\"plan\": {')", ["status 0", "without an answer"]),
])  # fmt: skip
def test_an_end_without_an_answer_is_a_sentence(topology, code, says):
    with pytest.raises(CompilerEnded) as end:
        plan.make_plan(freeze({}), SHAPE, topology, compiler=Compiler(stub(code)))
    assert not [words for words in says if words not in str(end.value)], end.value
    assert "\n" not in str(end.value)


def test_the_last_words_are_told_and_the_rest_is_a_note():
    code = BEGIN + "print('F1127 at.cc:7] Check failed: a > b\\n  @ 0x77 frame', file=sys.stderr); os.abort()"
    with pytest.raises(CompilerEnded, match=r"\(F1127 at\.cc:7\] Check failed: a > b\)") as end:
        plan.make_plan(freeze({}), SHAPE, TPU, compiler=Compiler(stub(code)))
    assert "frame" not in str(end.value) and "frame" in end.value.__notes__[0]


@pytest.mark.parametrize(("answer", "kind", "text"), [
    ('{"ValueError": "no such mesh"}', ValueError, "no such mesh"),
    ('{"OSError": "no such disk"}', OSError, "no such disk"),
    ('{"RuntimeError": "XlaRuntimeError: no such op"}', RuntimeError, "XlaRuntimeError: no such op"),
])  # fmt: skip
def test_what_the_child_raises_is_raised_here(answer, kind, text, capfd):
    code = f"import sys; sys.stdin.readline(); print('noise', file=sys.stderr); print('{answer}', flush=True)"
    with pytest.raises(kind, match=text), Compiler(stub(code)) as compiler:
        plan.make_plan(freeze({}), SHAPE, TPU, compiler=compiler)
    assert "noise" in capfd.readouterr().err  # what it said is not lost


def test_the_next_question_starts_another_child(tmp_path):
    """The first child ends; the second answers, and is asked what the first was asked."""
    code = f"""
import json, os, pathlib, sys
request, began = json.loads(sys.stdin.readline()), pathlib.Path({str(tmp_path / "began")!r})
if not began.exists():
    began.touch()
    os.abort()
print(json.dumps({{"said": request["topology"]}}))
print(json.dumps({{"plan": {{"config": request["config"], "mesh": {{"groups": 4, "model": 1}}, "slots": 3,
    "members_at_once": 1, "programs": []}}}}), flush=True)
sys.stdin.readline()
"""
    config, said = freeze({"train": {"profile": (2, 3)}, "optim": {"anchor": {"penalty": "l2", "kappa": 0.3}}}), []
    with Compiler(stub(code)) as compiler:
        with pytest.raises(CompilerEnded):
            plan.make_plan(config, SHAPE, TPU, compiler=compiler)
        answer = plan.make_plan(config, SHAPE, TPU, compiler=compiler, say=said.append)
    assert (answer.config, answer.topology, answer.slots, answer.programs) == (config, TPU, 3, ())
    assert said == ["v5e:2x2"]


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, rope_scaling=None, sliding_window=None)])
def test_a_shape_is_the_same_after_json(shape):
    assert _model(json.loads(json.dumps(dataclasses.asdict(shape)))) == shape


def test_an_outcome_is_the_same_after_json():
    moved = {"step": plan.Moved(plan.Traffic(5.5, 3.0, frozenset({"b", "a"})), 2e9), "prefill": plan.Moved(None, 3e9)}
    kinds = [plan.Collective("all-gather", 8, 2, ("groups", "model"), 2, 4)]
    for error in (None, "RESOURCE_EXHAUSTED"):
        outcome = plan.Outcome("decode", 9, 8, 1, {"rest": 9}, kinds, 0.25, 2, Work(1.5, 2.0, 0.0), error, moved)
        assert plan._outcome(json.loads(json.dumps(outcome, default=sorted))) == outcome


SMALL = {"model": {"source": "small"}, "task": {"train_size": 4}, "decode": {"max_prompt_tokens": 8, "slots": 4}}


def found(monkeypatch, ends):
    """The search over 4, 2 and 1 slots; the compiler ends at those of `ends`."""

    def make_plan(config, model, topology, **_):
        if config.decode.slots in ends:
            raise CompilerEnded(f"ended at {config.decode.slots} slots")
        outcome = plan.Outcome("load", 1, 1, 0, {}, [], 0.0, 1, Work(1.0), None, {})
        return plan.Plan(config, topology, {"groups": 1, "model": 1}, config.decode.slots, 1, (outcome,))

    monkeypatch.setattr(plan, "make_plan", make_plan)
    said: list[str] = []
    devices = Topology("cpu:1", chip("v5e"), tuple(jax.devices()[:1]))
    return plan.search(freeze(SMALL), SHAPE, devices, say=said.append), said


def test_the_search_goes_on_where_the_compiler_ends(monkeypatch):
    best, said = found(monkeypatch, {4})
    assert best.slots == 2 and "groups 1 × model 1, 4 slots: ended at 4 slots" in said


def test_the_search_says_so_where_the_compiler_has_no_answer_at_all(monkeypatch):
    with pytest.raises(CompilerEnded, match="ended at 1 slots"):
        found(monkeypatch, {1, 2, 4})


def test_the_command_ends_with_the_sentence():
    """Also without a compiler: the devices are stubs."""
    code = f"""
import sys
from es_jax.core.chips import chip
from es_jax.planning import compiler, topology
compiler.COMMAND = (sys.executable, "-c", {BEGIN + "os.abort()"!r})
topology.topology = lambda name, slices: topology.Topology(name, chip("v5e"), ())
import es_jax.plan
sys.argv = ["es_jax.plan", "--config=configs/countdown.py:qwen2.5-0.5b", "--topology=v5e:2x2"]
es_jax.plan.entry()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("es_jax.plan: libtpu ") and done.stderr.count("\n") == 1, done.stderr
    assert "signal SIGABRT and without an answer while it compiled decode" in done.stderr
