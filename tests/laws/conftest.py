"""What the laws of runs are compared with."""

import pytest

from es_jax.training.loop import run
from tests.helpers import config_of, host


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """An uninterrupted run: its config, directory and final weights."""
    workdir = tmp_path_factory.mktemp("whole")
    config = config_of(tiny_model)
    return config, workdir, host(run(config, workdir).params)
