"""The recipes of docs/recipes.md, and how a test runs one."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))


def run(title: str, **given: Any) -> dict[str, Any]:
    """Runs a recipe and returns its variables."""
    variables = {"torch": torch, **given}
    exec(compile(RECIPES[title], f"docs/recipes.md, {title}", "exec"), variables)
    return variables


def batch(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Inputs (samples, *shape) and labels of 10 classes, the same in every call."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(samples, *shape, generator=generator)
    return x * 2 + 1, torch.randint(10, (samples,), generator=generator)
