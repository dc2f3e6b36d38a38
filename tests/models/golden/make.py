"""Write golden.npz: what transformers computes for two small models of every family, checked where PyTorch is not.

Command:  python -m tests.models.golden.make
Needs:    pip install -e '.[verify]'

Only config.json, tokens, positions and logits are stored: the weights come from `benchmarks.parity.draw_weight`, which
draws them from a tensor's key.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.parity import batch, cases, reference_logits, reference_model
from es_jax.models.families import FAMILIES

FILE = Path(__file__).with_name("golden.npz")
MODELS = 2


def main() -> None:
    """Compute and write; two runs give the same file up to float32 rounding."""
    arrays = {}
    for family in FAMILIES:
        for case in cases(family, MODELS):
            reference = reference_model(case)
            tokens, positions = batch("left", start=case.start)
            name = f"{family}-{case.index}"
            arrays[f"{name}/config"] = np.array(reference.config.to_json_string())
            arrays[f"{name}/tokens"], arrays[f"{name}/positions"] = tokens, positions
            logits = reference_logits(reference, tokens, positions, cached=False)
            arrays[f"{name}/logits"] = np.where(positions[..., None] >= 0, logits, 0)[1:, -12:]
            print(name, json.loads(str(arrays[f"{name}/config"]))["model_type"], arrays[f"{name}/logits"].shape)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
