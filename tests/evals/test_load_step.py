"""A step of a run in memory is the step, and writes what an evaluation of it saw."""

import json
import shutil

import jax
import pytest

from es_jax import complete, load_step
from es_jax.core.mesh import make_mesh
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from tests.helpers import TWO_STEPS, edit_config, same

FIELDS = TWO_STEPS | {"train": {"steps": 2, "checkpoint_every": 2}}


@pytest.fixture(scope="module")
def workdir(tiny_model, tmp_path_factory):
    """A run from a dict, with a checkpoint of its last step alone."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(FIELDS | {"model": {"source": str(tiny_model)}}, folder).step == 2
    return folder


def test_a_run_from_a_dict_has_the_dicts_fields(workdir):
    config = json.loads((workdir / "config.json").read_text())["config"]
    for group, fields in FIELDS.items():
        assert {name: config[group][name] for name in fields} == fields
    assert config["method"] == "es" and config["optim"]["name"] == "sgd"  # what it leaves out has its default


@pytest.mark.parametrize("step", [0, 1, 2, None])
def test_any_step_is_loaded_as_it_was(step, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    model = load_step(workdir, step)
    ((_, params),) = replay(workdir, steps=[2 if step is None else step])
    assert same(model.params, params)
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(model.params))
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_weights_on_several_devices_write_the_same(workdir):
    spread = load_step(workdir, 2, mesh=make_mesh())
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread.params))
    assert same(spread.params, load_step(workdir, 2).params)
    found = complete(spread, "a prompt", max_new_tokens=4)
    assert found == complete(load_step(workdir, 2), "a prompt", max_new_tokens=4)


@pytest.mark.parametrize(("step", "message"), [(4, "step is 4, but .* holds steps 0 to 2"), (-1, "step is -1")])
def test_a_step_that_is_not_there_is_named(step, message, workdir):
    with pytest.raises(ValueError, match=message):
        load_step(workdir, step)


def test_another_base_model_is_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    edit_config(tmp_path / "run", digest="0" * 64)
    with pytest.raises(ValueError, match="digests differ"):
        load_step(tmp_path / "run", 1)
    with pytest.raises(FileNotFoundError):
        load_step(tmp_path)


def test_a_base_model_that_is_gone_is_named_with_its_places(workdir, tiny_model, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    edit_config(tmp_path / "run")
    facts = tmp_path / "run/config.json"
    facts.write_text(facts.read_text().replace(str(tiny_model), str(tmp_path / "model")))
    with pytest.raises(FileNotFoundError, match=r"model\.source of .* is not there any more; looked for .*model"):
        load_step(tmp_path / "run", 1)
