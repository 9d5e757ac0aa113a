"""Flags written down twice agree with what they set; those of the server cannot disagree."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import nann.offline.train as train_module
from nann.cli.artifact import GRAPH_FLAGS, graph_options
from nann.cli.distill import DISTILL_FLAGS
from nann.cli.evaluate import EVALUATE_FLAGS
from nann.cli.parameters import Flag, settings_flags, with_flags
from nann.cli.serve import serve_command
from nann.cli.train import TRAIN_FLAGS
from nann.offline.build_index import GraphOptions
from nann.offline.distill import DistillOptions
from nann.offline.evaluate import EvaluateOptions
from nann.service.settings import Settings


def _annotations(config: type) -> dict[str, str]:
    """Field -> its annotation as written, without ``| None``."""
    return {field.name: str(field.type).removesuffix(" | None") for field in fields(config)}


def test_train_has_a_flag_for_every_field() -> None:
    written = {flag.name: flag.type.__name__ for flag in TRAIN_FLAGS}
    assert written == _annotations(train_module.TrainConfig)


def test_index_has_a_flag_for_every_field() -> None:
    names = {"seed" if flag.name == "graph_seed" else flag.name for flag in GRAPH_FLAGS}
    assert names == {"preset", *_annotations(GraphOptions)}


def test_evaluate_has_a_flag_for_every_field() -> None:
    assert {flag.name for flag in EVALUATE_FLAGS} | {"seed"} == set(_annotations(EvaluateOptions))


def test_distill_has_a_flag_for_every_field() -> None:
    written = {flag.name: flag.type.__name__ for flag in DISTILL_FLAGS}
    assert written == _annotations(DistillOptions)


def test_serve_has_a_flag_for_every_setting_and_says_where_else_it_comes_from() -> None:
    flags = {flag.name: flag for flag in settings_flags()}
    assert list(flags) == list(Settings.model_fields)
    assert set(inspect.signature(serve_command).parameters) == set(flags)
    for name, flag in flags.items():
        assert f"env NANN_{name.upper()}" in flag.help
    assert "required" in flags["repository"].help
    assert "default 8501" in flags["rest_port"].help


def test_a_flag_that_is_given_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nann.cli.main import run

    seen: list[Settings] = []

    def serve(settings: Settings) -> int:
        seen.append(settings)
        return 3

    monkeypatch.setattr("nann.service.app.serve", serve)
    monkeypatch.setenv("NANN_LANES", "5")
    monkeypatch.setenv("NANN_GRPC_PORT", "7")
    arguments = [
        "--repository",
        str(tmp_path),
        "--grpc-port",
        "9",
        "--access-log",
        "--empty-history",
        "error",
    ]
    assert run(["serve", *arguments]) == 3
    (settings,) = seen
    assert settings.repository == tmp_path
    assert (settings.lanes, settings.grpc_port, settings.rest_port) == (5, 9, 8501)
    assert (settings.access_log, settings.empty_history) == (True, "error")


def test_a_preset_is_changed_by_the_flags_given_and_nothing_else() -> None:
    assert graph_options({}) == GraphOptions()
    nann = graph_options({"preset": "nann", "graph_seed": 3, "m": None})
    assert nann == GraphOptions(m=32, ef_construction=40, space="l2", nearest=0, repair=False, seed=3)


def test_flags_take_the_place_of_the_keyword_parameter() -> None:
    @with_flags([Flag("width", int, "w")])
    def command(name: str, **values: Any) -> None: ...

    assert list(inspect.signature(command).parameters) == ["name", "width"]


def test_the_commands_with_flags_are_written_without_defaults_of_their_own() -> None:
    """A default in the command line would hide the one that the library documents."""
    source = Path(inspect.getfile(with_flags)).read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    defaults = [kw.value for call in calls for kw in call.keywords if kw.arg == "default"]
    assert [ast.unparse(value) for value in defaults] == ["None"]
