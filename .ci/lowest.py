"""Prints pip's constraints that hold every dependency of pyproject.toml at its lower bound."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    if bound := re.match(r"([\w.-]+)>=([\d.]+)$", line):
        print(f"{bound[1]}=={bound[2]}")
