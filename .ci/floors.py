"""Prints pip constraints: the oldest release of each dependency that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"]:
    name, floor = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
    print(f"{name}=={floor}" if floor.count(".") > 1 else f"{name}=={floor}.*")  # 2.11: any 2.11.x
