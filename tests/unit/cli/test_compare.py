"""``nann compare``: which corpora it takes, and what it says of those it cannot have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nann.cli.compare import _earlier
from nann.cli.main import run
from nann.offline.benchmark.compare import recipes
from nann.offline.benchmark.compare.contender import Skipped
from nann.offline.benchmark.compare.recipes import RECIPES, made_run
from nann.offline.progress import Progress


def test_an_unknown_corpus_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "--corpus", "moon", "--work", str(tmp_path)]) == 2
    assert "brunch-small" in capsys.readouterr().err


def test_a_corpus_without_clicks_is_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--corpus", "ml-1m", "--work", str(tmp_path / "work"), "--data", str(tmp_path)]
    assert run(["compare", *arguments]) == 0
    out = capsys.readouterr()
    assert "ml-1m is left out: its clicks are not there" in out.err
    assert "nothing was compared" in out.out


def test_what_was_measured_before_stays_on_the_page(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name / "compare").mkdir(parents=True)
        report = {"name": name, "measured": "before"}
        (tmp_path / name / "compare" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert _earlier(tmp_path, [{"name": "a", "measured": "now"}]) == [{"name": "b", "measured": "before"}]


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.clicks is None])
def test_a_synthetic_catalogue_needs_no_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Made:
        version_dir = tmp_path / "version"

    def pipeline(clicks: Path, run_dir: Path, **options: Any) -> Made:
        asked.update(clicks=clicks, run_dir=run_dir, **options)
        return Made()

    monkeypatch.setattr(recipes, "run_pipeline", pipeline)
    made: dict[str, int] = {}

    def generate(path: Path, **sizes: int) -> Any:
        path.parent.mkdir(parents=True)
        path.touch()
        made.update(sizes)
        return SimpleNamespace(path=path)

    monkeypatch.setattr("nann.offline.data.synthetic.generate_user_behavior", generate)
    found = made_run(name, tmp_path / "none", tmp_path / "w" / "run", Progress(silent=True))
    assert found == Made.version_dir
    assert asked["clicks"] == tmp_path / "w" / "catalogue" / "UserBehavior.csv"
    assert asked["clicks"].is_file()
    assert made == RECIPES[name].catalogue
    assert asked["options"].train == RECIPES[name].training


def test_every_other_recipe_names_its_clicks(tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        if recipe.clicks is not None:
            found = made_run(name, tmp_path, tmp_path / "run", Progress(silent=True))
            assert isinstance(found, Skipped)
            assert recipe.clicks in found.reason
