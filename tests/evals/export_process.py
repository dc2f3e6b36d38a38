"""One of two processes of a test: loads a model onto the devices of both, writes it, and exports a run's steps.

    python -m tests.evals.export_process RANK PORT MODEL WORKDIR OUT

prints a line of JSON: what it holds of each leaf, and what the exports gave.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from es_jax.core.mesh import make_mesh
from es_jax.core.tree import named_leaves
from es_jax.evals.export_step import export_run
from es_jax.weights.model import load_model, save_model


def main(rank: int, port: str, model: str, workdir: str, out: Path) -> None:
    """Everything, in the order in which the other process does it too."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    mesh = make_mesh(2, 2)

    def where(path: str, shape: tuple[int, ...]) -> NamedSharding:
        cut = len(shape) > 1 and shape[-1] % 4 == 0
        return NamedSharding(
            mesh, PartitionSpec(*[None] * (len(shape) - 1), ("groups", "model")) if cut else PartitionSpec()
        )

    loaded = load_model(model, shardings=where)
    held = {}
    for path, leaf in named_leaves(loaded.params):
        shards = leaf.addressable_shards[: 1 if leaf.sharding.is_fully_replicated else None]
        held[path] = [np.asarray(shard.data).tobytes().hex() for shard in shards]
    save_model(out / "saved", loaded, max_shard_bytes=9000)
    there = sorted(path.name for path in (out / "saved").iterdir())
    results = [export_run(workdir, out / f"step{step}", step=step) for step in (1, 3)]
    try:
        export_run(workdir, out / "saved")
    except OSError as error:
        refused = str(error)
    print(json.dumps({"held": held, "there": there, "results": results, "refused": refused}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5], Path(sys.argv[5]))
