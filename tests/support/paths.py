"""Paths in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES, TOOLS = ROOT / "recipes", ROOT / "tools"
WORKERS = ROOT / "tests" / "support" / "workers"
DATA = ROOT / "tests" / "data"
