"""Run directories from before fields were renamed are read as they are; elsewhere an old name is refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_dict

from configs import countdown
from es_jax.core.names import RENAMED
from es_jax.evals.export_step import export_run
from es_jax.evals.runner import evaluate_run
from es_jax.plotting import read_run
from es_jax.training.config import RunConfig, freeze, read_config
from es_jax.training.loop import run
from es_jax.training.weights_at import replay

FIELDS = {old: new for old, new in RENAMED.items() if "." in old}


def with_old_names(flat):
    old = {new: old for old, new in FIELDS.items()}
    return {old.get(name, name): value for name, value in flat.items()}


def test_a_directory_with_the_old_names_is_replayed_evaluated_exported_and_resumed(tiny_model, tmp_path):
    fields = {
        "model": {"source": str(tiny_model)},
        "task": {"name": "conciseness", "train_size": 2},
        "es": {"population": 2, "sigma": 0.05},
        "optim": {"anchor": {"penalty": "l2", "kappa": 0.5}},
        "decode": {"max_prompt_tokens": 160, "max_new_tokens": 2, "slots": 2, "members_at_once": 1},
        "train": {"steps": 2, "checkpoint_every": 2, "keep_checkpoints": 1},
        "evals": {"every": 1, "rows": 3},
        "mesh": {"groups": 1},
        "grpo": {"kl_coef": 0.5},
    }
    config, workdir = freeze(fields), tmp_path / "run"
    run(config, workdir)
    weights = {step: jax.tree.map(np.asarray, params) for step, params in replay(workdir)}
    evaluate_run(workdir, steps=[2])
    files = [workdir / "config.json", workdir / "evals/subject.json"]
    facts, subject = (json.loads(path.read_text()) for path in files)
    del facts["sha256"], facts["files"]  # which earlier versions did not write
    facts["config"] = unflatten_dict(with_old_names(flatten_dict(facts["config"], sep=".")), sep=".")
    subject["marks"] = with_old_names(subject["marks"])
    for path, content in zip(files, (facts, subject), strict=True):
        path.write_text(json.dumps(content))
    texts = [path.read_text() for path in files]
    assert '"pop": 1' in texts[0] and '"decode.max_new": 2' in texts[1]

    date = read_config(workdir).model.template_date
    assert read_config(workdir) == config.with_date(date) == read_run(workdir).config
    for step, params in replay(workdir):
        jax.tree.map(np.testing.assert_array_equal, params, weights[step])
    assert [row["step"] for row in evaluate_run(workdir, steps=[1, 2])["tasks"]["conciseness"]] == [0, 1, 2]
    assert export_run(workdir, tmp_path / "exported")["source"] == "checkpoint"
    assert '"keep_checkpoints": 1' in (tmp_path / "exported/README.md").read_text()
    assert files[0].read_text() == texts[0]

    with pytest.raises(ValueError, match=r"optim\.anchor\.kappa was 0\.5 and is 0\.25"):
        run(freeze(fields | {"optim": {"anchor": {"penalty": "l2", "kappa": 0.25}}}), workdir)
    assert run(freeze(fields | {"train": fields["train"] | {"steps": 3}}), workdir).step == 3
    assert json.loads(files[0].read_text())["config"]["mesh"] == {"groups": 1, "model": None}
    assert read_config(workdir).optim == config.optim


@pytest.mark.parametrize("old", FIELDS)
def test_an_old_field_is_refused_with_its_new_name(old):
    fields = unflatten_dict({old: 1}, sep=".")
    for config in (fields, config_dict.ConfigDict(fields)):
        with pytest.raises(
            ValueError, match=f"^config field '{old}' was renamed to '{FIELDS[old]}': use the new name$"
        ):
            freeze(config)
    assert FIELDS[old] in flatten_dict(json.loads(json.dumps(vars(RunConfig()), default=vars)), sep=".")


@pytest.mark.parametrize("old", sorted(RENAMED.keys() - FIELDS.keys()))
def test_an_old_argument_is_refused_with_its_new_name(old):
    with pytest.raises(ValueError, match=f"^argument '{old}' was renamed to '{RENAMED[old]}': use the new name$"):
        countdown.get_config(f"{old}=4")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=configs/lab.py", "--config.mesh.pop=4"], "--config.mesh.pop was renamed to --config.mesh.groups"),
        (
            ["--config=configs/lab.py", "--config.evals.size", "4"],
            "--config.evals.size was renamed to --config.evals.rows",
        ),
        (["--config=configs/lab.py:pop=4"], "argument 'pop' was renamed to 'population'"),
    ],
)
def test_an_old_name_on_the_command_line_ends_it_with_one_sentence(flags, says, tmp_path):
    command = [sys.executable, "-m", "es_jax.train", f"--workdir={tmp_path / 'run'}", *flags]
    out = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert out.returncode == 1 and not out.stdout and not (tmp_path / "run").exists()
    assert out.stderr.startswith("es_jax.train: ") and says in out.stderr and out.stderr.count("\n") == 1
