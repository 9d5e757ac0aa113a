"""The corpora of the published benchmark: where their clicks are and how their models are trained.

The trainings are those of docs/results.md; a run is made once, by the pipeline, and used again after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nann.offline.benchmark.compare.contender import Skipped
from nann.offline.pipeline import PipelineOptions, run_pipeline
from nann.offline.progress import Progress

__all__ = ["RECIPES", "Recipe", "made_run"]

_BRUNCH = {"batch_size": 256, "max_steps": 2500, "eval_every": 500, "eval_users": 300, "seed": 1}
# What the comparison measures itself, on more users.
_EVALUATION = {"n_tune": 50, "n_report": 50, "baselines": False}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`clicks` is a path below the data directory, None for made-up ones of the sizes `catalogue`."""

    clicks: str | None
    training: Mapping[str, Any]
    catalogue: Mapping[str, int] = field(default_factory=dict)


RECIPES: Mapping[str, Recipe] = {
    "synthetic": Recipe(None, {"batch_size": 256, "epochs": 50, "max_steps": 900, "eval_every": 300}),
    "ml-1m": Recipe(
        "ml-1m",
        {
            "batch_size": 256,
            "max_steps": 1500,
            "eval_every": 500,
            "eval_users": 300,
            "learning_rate": 0.01,
            "seed": 1,
        },
    ),
    "brunch-small": Recipe("brunch/UserBehavior-brunch-small.csv.zst", _BRUNCH),
    "brunch-small-fgsm": Recipe(
        "brunch/UserBehavior-brunch-small.csv.zst", {**_BRUNCH, "eval_every": 1000, "adv_eps": 3e-4}
    ),
    "brunch": Recipe("brunch/UserBehavior-brunch.csv.zst", _BRUNCH),
    # As many items a category as in `synthetic`, and 1.3 million that were clicked.
    "synthetic-1.3m": Recipe(
        None,
        {"batch_size": 256, "max_steps": 1500, "eval_every": 1500, "eval_users": 300},
        {"num_items": 1_350_000, "num_categories": 18_000, "num_users": 300_000},
    ),
}


def made_run(name: str, data_dir: Path, run_dir: Path, progress: Progress) -> Path | Skipped:
    """The published version of a recipe's run in `run_dir`, made where it is not there yet.

    Raises:
        PipelineError: a step failed.
    """
    recipe = RECIPES[name]
    if recipe.clicks is None:
        clicks = _synthetic(run_dir.parent / "catalogue", recipe.catalogue, progress)
    else:
        clicks = data_dir / recipe.clicks
        if not clicks.exists():
            return Skipped(name, f"its clicks are not there: {recipe.clicks} of the data directory")
    options = PipelineOptions(train=recipe.training, evaluate=_EVALUATION)
    return run_pipeline(clicks, run_dir, options=options, progress=progress).version_dir


def _synthetic(directory: Path, sizes: Mapping[str, int], progress: Progress) -> Path:
    from nann.offline.data.synthetic import generate_user_behavior

    path = directory / "UserBehavior.csv"
    if not path.is_file():
        # The log appears under its name last, so that an interrupted run does not leave half of one.
        with progress.stage("make a synthetic catalogue"):
            generate_user_behavior(directory / "UserBehavior.partial.csv", **sizes).path.rename(path)
    return path
