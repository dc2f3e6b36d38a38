"""What a user gets wrong ends the run with one sentence, before any step or at the one it hits; nothing is lost."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from es_jax.rundir.seed_log import SeedLog, read_entries
from es_jax.tasks.conciseness import Conciseness
from es_jax.tasks.task import Score
from es_jax.training import loop
from es_jax.training.loop import run
from tests.helpers import TWO_STEPS, config_of

ROOT = Path(__file__).resolve().parents[2]


def copy_of(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


def refuse(config, workdir, says):
    with pytest.raises((ValueError, OSError), match=says):
        run(config, workdir)
    assert not (workdir / "seedlog.jsonl").exists() or not SeedLog(workdir).entries


def test_no_source_and_missing_weights(tiny_model, tmp_path):
    refuse(config_of("", TWO_STEPS), tmp_path / "run", "model.source is empty")
    refuse(config_of(tmp_path / "nowhere", TWO_STEPS), tmp_path / "run", "nowhere")
    model = copy_of(tiny_model, tmp_path)
    (model / "model.safetensors").unlink()
    refuse(config_of(model, TWO_STEPS), tmp_path / "run", "model.safetensors")


@pytest.mark.parametrize("cut", [5, 100, -7])
def test_corrupt_weights(cut, tiny_model, tmp_path):
    model = copy_of(tiny_model, tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refuse(config_of(model, TWO_STEPS), tmp_path / "run", "truncated or corrupt")


def test_weights_that_are_not_finite(tiny_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = copy_of(tiny_model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    broken = dict(tensors)
    broken["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(broken, model / "model.safetensors", metadata={"format": "pt"})
    refuse(
        config_of(model, TWO_STEPS),
        tmp_path / "run",
        "NaN, infinite or impossibly .*: model.norm.weight; the file is",
    )


def test_a_tokenizer_without_a_chat_template(tiny_model, tmp_path):
    model = copy_of(tiny_model, tmp_path)
    (model / "chat_template.jinja").unlink()
    fields = json.loads((model / "tokenizer_config.json").read_text())
    fields.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    refuse(config_of(model, TWO_STEPS), tmp_path / "run", "this tokenizer has no chat template")


def test_a_prompt_that_is_too_long(tiny_model, tmp_path):
    refuse(
        config_of(tiny_model, TWO_STEPS, decode={"max_prompt_tokens": 20}),
        tmp_path / "run",
        "decode.max_prompt_tokens = 20; raise",
    )


def test_an_empty_or_too_small_data_set(tiny_model, tmp_path):
    refuse(
        config_of(tiny_model, TWO_STEPS, task={"train_size": 1000}),
        tmp_path / "run",
        "n is 1000, but .* ask for at most",
    )
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text("")
    rows = {"data_dir": str(tmp_path / "rows")}
    refuse(
        config_of(tiny_model, TWO_STEPS, task=rows), tmp_path / "run", "train.jsonl has no rows: it needs at least one"
    )
    nowhere = {"data_dir": str(tmp_path / "no")}
    refuse(config_of(tiny_model, TWO_STEPS, task=nowhere), tmp_path / "run", "which does not exist: looked there")


def test_a_workdir_that_cannot_be_made(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --workdir"):
        run(config_of(tiny_model, TWO_STEPS), tmp_path / "file" / "run")


def test_rewards_that_are_not_finite_end_the_run_at_their_step(tiny_model, tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Bad(Conciseness):
        def score(self, example, completion):
            calls.append(1)
            return Score(float("nan") if len(calls) == 7 else float(len(calls)), {"answer": 0.0})

    monkeypatch.setattr(loop, "make_task", lambda config: Bad())
    calls = []
    with pytest.raises(ValueError, match=r"member 1 \(nan\) of 2"):
        run(config_of(tiny_model, TWO_STEPS), tmp_path / "run")
    assert len(read_entries(tmp_path / "run")) == 1
    calls = []
    result = run(config_of(tiny_model, TWO_STEPS, es={"nan_rewards": "worst"}), tmp_path / "other")
    assert result.step == 2


@pytest.mark.parametrize(
    ("limit", "says"), [(6000, "the checkpoint of step 1 could not"), (700, "could not be written")]
)
def test_a_disk_that_is_full(limit, says, tiny_model, tmp_path):
    """Files may not grow past 6 kB here, so that logs can be written and checkpoints cannot; or hardly at all."""
    script = (
        "import resource, sys, json\n"
        "from es_jax.training.config import freeze\nfrom es_jax.training.loop import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))\n"
        "try:\n    run(freeze(json.loads(sys.argv[1])), sys.argv[2])\n"
        "except OSError as error:\n    print(error)\n"
    )
    config = config_of(tiny_model, TWO_STEPS)
    command = [sys.executable, "-c", script, json.dumps(dataclasses.asdict(config)), str(tmp_path / "run")]
    own = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}  # cut programs would stay in the one that tests share
    out = subprocess.run([*command, str(limit)], capture_output=True, text=True, timeout=120, env=own)
    assert says in out.stdout and "free some space" in out.stdout, out.stderr[-2000:]
    assert len(read_entries(tmp_path / "run")) == (limit == 6000)
    assert run(config, tmp_path / "run").step == 2  # with space, the same command goes on


def test_no_space_for_even_one_checkpoint(tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuse(config_of(tiny_model, TWO_STEPS), tmp_path / "run", "one checkpoint needs")


def command(*arguments):
    line = [sys.executable, "-m", "es_jax.train", *arguments]
    env = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)


def test_the_command_trains_resumes_and_ends_mistakes_with_one_sentence(tiny_model, tmp_path):
    fields = {
        "model.source": tiny_model, "task.train_size": 2, "es.population": 2, "decode.max_prompt_tokens": 160,
        "decode.max_new_tokens": 2, "train.steps": 1, "evals.rows": 2,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    where = ["--config=configs/conciseness.py", f"--workdir={tmp_path / 'run'}"]
    out = command(*where, *flags, "--json")
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["step"] == 1 and result["heldout"]["n"] == 2

    out = command(*where, *flags, "--config.es.sigma=-1")
    assert out.returncode == 1
    assert out.stderr.strip().splitlines()[-1].startswith("es_jax.train: es.sigma is -1.0: the noise scale must be")
    assert "Traceback" not in out.stderr

    out = command(*where, *flags, "--config.es.sigma=0.5")
    assert "es.sigma was 0.001 and is 0.5" in out.stderr

    mistakes = {
        "--config.es.sgima=0.5": "did you mean 'es.sigma'?",
        "--config=configs/conciseness.py:populatio=3": "did you mean 'population'",
        "--config=README.md": "es_jax.train: ",
        "--config.es.population=many": "population",
    }
    for flag, says in mistakes.items():
        out = command(*where, flag)
        assert out.returncode == 1 and "Traceback" not in out.stderr, out.stderr[-2000:]
        assert out.stderr.startswith("es_jax.train: ") and says in out.stderr
