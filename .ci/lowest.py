"""Prints pip's constraints that hold every dependency of pyproject.toml at its lower bound."""

import itertools
import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.fullmatch(r"([\w.-]+)>=([\d.]+)", line):
        print(f"{bound[1]}=={bound[2]}")
