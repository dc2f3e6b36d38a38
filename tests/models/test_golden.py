"""Logits equal those that transformers computed once; needs no PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.parity import TensorReader, draw_weight, our_logits
from es_jax.models.families import FAMILIES, weights_of
from es_jax.models.hf_config import from_hf
from es_jax.models.transformer import param_shapes
from es_jax.weights.convert import to_params

GOLDEN = np.load(Path(__file__).with_name("golden") / "golden.npz", allow_pickle=False)
NAMES = sorted({key.partition("/")[0] for key in GOLDEN.files})


def _tensors(config):
    """What the checkpoint holds, key by key, in the file's layout."""
    shapes = param_shapes(config)
    for row in weights_of(config):
        stacked = row.path.startswith("layers/")
        shape = shapes[row.path][1:] if stacked else shapes[row.path]
        for layer in range(config.layers) if stacked else (None,):
            key = row.hf.format(layer)
            yield key, draw_weight(key, shape[::-1] if row.transpose else shape, plus_one=config.norm_plus_one)


def test_every_family_is_there():
    assert {name.partition("-")[0] for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_golden_ones(name):
    config = from_hf(json.loads(str(GOLDEN[f"{name}/config"])))
    params = to_params(TensorReader(dict(_tensors(config))), config, naming="hf")
    tokens, positions, expected = (GOLDEN[f"{name}/{part}"] for part in ("tokens", "positions", "logits"))
    logits = our_logits(config, params, tokens, positions, cached=False)
    np.testing.assert_allclose(logits[1:, -12:], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.5
