"""The law of kills: a run that is killed at any point and resumed is the run that never was killed."""

import pytest

from es_jax.rundir.checkpoints import Checkpoints
from es_jax.rundir.seed_log import SeedLog
from es_jax.scoring.row_results import EvalsFile
from es_jax.training.loop import run
from es_jax.training.recorder import Recorder
from es_jax.training.state import State
from tests.helpers import check_resumed, killed

POINTS = {
    "before the update": (State, "apply", "before"),
    "after the update": (State, "apply", "after"),
    "before the metrics": (Recorder, "step", "before"),
    "before the seed log": (SeedLog, "append", "before"),
    "after the seed log": (SeedLog, "append", "after"),
    "before a checkpoint": (Checkpoints, "save", "before"),
    "after a checkpoint": (Checkpoints, "save", "after"),
    "before an evaluation is written": (EvalsFile, "add", "before"),
    "after an evaluation is written": (EvalsFile, "add", "after"),
}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_and_resumed_equals_uninterrupted(point, call, whole, tmp_path):
    owner, name, when = POINTS[point]
    config = whole[0]
    with killed(owner, name, call=call, when=when):
        run(config, tmp_path)
    check_resumed(config, tmp_path, whole)
