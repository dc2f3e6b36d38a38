"""The launch scripts, as far as they can be checked without their platforms."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
REQUIRED = {  # of jobset.x-k8s.io/v1alpha2 and batch/v1, with the kinds that their schemas give them
    ("apiVersion",): str,
    ("kind",): str,
    ("metadata", "name"): str,
    ("spec", "failurePolicy", "maxRestarts"): int,
    ("spec", "replicatedJobs", 0, "name"): str,
    ("spec", "replicatedJobs", 0, "replicas"): int,
    ("spec", "replicatedJobs", 0, "template", "spec", "parallelism"): int,
    ("spec", "replicatedJobs", 0, "template", "spec", "completions"): int,
    ("spec", "replicatedJobs", 0, "template", "spec", "backoffLimit"): int,
}
POD = ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())


def flags_of(text):
    return set(re.findall(r"--([a-z_]+)", text)) & {"distributed", "config", "workdir", "json", "coordinator_address"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_what_they_assume(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "# Assumes: " in text and "# Usage: " in text
    assert "set -euo pipefail" in text and "es_jax.train" in text
    assert ("--distributed" in text) == (script.name in ("slurm.sh", "tpu_slice.sh"))
    assert script.stat().st_mode & 0o111


def test_the_flags_of_the_scripts_are_those_of_the_command(jobset):
    out = subprocess.run([sys.executable, "-m", "es_jax.train", "--help"], capture_output=True, text=True)
    args = at(jobset, POD)["containers"][0]["args"][0]
    for text in [*(script.read_text() for script in SCRIPTS), args]:
        assert flags_of(text) >= {"config", "workdir"}
        assert all(f"--{flag}" in out.stdout or f"--[no]{flag}" in out.stdout for flag in flags_of(text))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_make_knows_what_the_scripts_ask_it_for(script):
    for extras, target in re.findall(r"make (EXTRAS=\S+) (\.venv/[\w.-]+)", script.read_text()):
        subprocess.run(["make", "-n", extras, target], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["tpu_slice.sh", "gpu_node.sh", "slurm.sh"])
def test_arguments_reach_the_command_as_they_are(name, tmp_path):
    """The script run with programs that only print what they are given."""
    for program in ("gcloud", "make", "srun", "scontrol"):
        path = tmp_path / program
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{program}" "$@"\n')
        path.chmod(0o755)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    given = ["configs/lab.py:steps=2", "/runs/a b", "--config.es.sigma=2e-3"]
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "TPU": "t",
        "ZONE": "z",
        "PROJECT": "p",
        "REPO": "r",
        "SLURM_JOB_ID": "7",
    }
    command = ["bash", ROOT / "launch" / name, *given]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True).stdout
    if name == "tpu_slice.sh":
        out = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {out.split('es_jax.train')[1]}"], capture_output=True, text=True
        ).stdout
    lines = out.splitlines()
    assert {"--config=configs/lab.py:steps=2", "--workdir=/runs/a b", "--config.es.sigma=2e-3"} <= set(lines)
    assert (name == "slurm.sh") == ("requeue" in lines)


def test_the_jobset_has_what_its_schema_requires(jobset):
    for path, kind in REQUIRED.items():
        assert isinstance(at(jobset, path), kind), path
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    pod = at(jobset, POD)
    (container,) = pod["containers"]
    assert pod["restartPolicy"] in ("Never", "OnFailure") and pod["terminationGracePeriodSeconds"] > 30
    assert {"name", "image", "command", "args"} <= set(container)
    assert all(set(item) == {"name", "value"} for item in container["env"])
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    hosts = at(jobset, (*POD[:5], "parallelism"))
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert hosts * container["resources"]["limits"]["google.com/tpu"] == x * y
    subprocess.run(["bash", "-n"], input=container["args"][0], text=True, check=True)


@pytest.fixture(scope="module")
def container():
    """The instructions of the Containerfile: (word, the rest) of each line that is not a comment."""
    lines = (ROOT / "launch/Containerfile").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if not line.startswith("#")]


def test_the_containerfile_copies_what_there_is_and_starts_the_command(container):
    assert {word for word, _ in container} == {"FROM", "COPY", "RUN", "WORKDIR", "ENV", "ENTRYPOINT"}
    assert container[0][0] == "FROM" and re.search(r"/python:3\.\d+\.\d+-\w+-\w+$", container[0][1])
    for word, rest in container:
        if word == "COPY":
            assert (ROOT / rest.split()[0]).exists(), rest
        if word == "RUN":
            subprocess.run(["bash", "-n"], input=rest, text=True, check=True)
    assert json.loads(container[-1][1]) == ["python", "-m", "es_jax.train"]


def pins(text):
    rows = (Requirement(line) for line in text.splitlines() if not line.startswith("#"))
    return {canonicalize_name(row.name): [*row.specifier] for row in rows}


def needed_by_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in [*project["dependencies"], *extras["llm"], *extras["cuda12"]]]


def test_every_version_of_the_container_is_pinned():
    pinned = pins((ROOT / "launch/cuda12.txt").read_text())
    for name, versions in pinned.items():
        assert [one.operator for one in versions] == ["=="] and "*" not in versions[0].version, name
    assert {"jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cublas-cu12", "nvidia-cudnn-cu12"} <= pinned.keys()
    assert len({pinned[name][0].version for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt")}) == 1


@pytest.mark.parametrize("requirement", needed_by_the_package(), ids=str)
def test_the_container_has_what_the_package_needs(requirement):
    (pin,) = pins((ROOT / "launch/cuda12.txt").read_text())[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin.version)
