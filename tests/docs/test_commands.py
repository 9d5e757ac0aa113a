"""The command line as the documents show it: commands, flags and defaults exist, none is left out."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer.main
from documents import (
    DOCS,
    ROOT,
    command_lines,
    field_defaults,
    inline_code,
    markdown_files,
    plain,
    section,
    table,
)

from nann.cli.main import app
from nann.cli.reliability.commands import app as reliability
from nann.offline.build_index import PRESETS, GraphOptions

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
OFFLINE = (DOCS / "offline.md").read_text(encoding="utf-8")
TABLED = ("prepare", "train", "extract", "index", "distill", "evaluate", "export")
HELP = {"--help", "-h"}
# Flags of other programs that a document names: XLA's.
OTHERS = {"--xla_cpu_experimental_ynn_fusion_type"}


def _flags(command: Any) -> set[str]:
    named = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return named | HELP


def _parse(words: list[str], directory: Path) -> None:
    """Fail as the command would on an unknown flag, a missing or a wrong value; runs nothing."""
    program, name, *arguments = words
    assert program == "nann"
    for value in arguments:
        # What a line names is there when a reader gets to it.
        if re.fullmatch(r"[a-z][\w/.-]*", value):
            path = directory / value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
    COMMANDS[name].make_context(name, list(arguments))


def _commands(program: str) -> list[Any]:
    return [
        pytest.param(words, id=f"{path.relative_to(ROOT)}-{n}")
        for path in markdown_files()
        for n, words in enumerate(command_lines(path.read_text(encoding="utf-8")))
        if words[0] == program
    ]


def test_every_command_is_listed() -> None:
    rows = table((DOCS / "README.md").read_text(encoding="utf-8"), "command", "what it does")
    assert {plain(row["command"]).removeprefix("nann ") for row in rows} == set(COMMANDS)


@pytest.mark.parametrize("words", _commands("nann"))
def test_a_command_line_is_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _parse(words, tmp_path)


@pytest.mark.parametrize(
    "line", ["train --data d", "serve --prot 1", "index --embeddings e --output o --m many", "evaluate x"]
)
def test_a_wrong_command_line_is_not(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    with pytest.raises(Exception, match=r"Missing|No such option|valid integer|unexpected"):
        _parse(["nann", *line.split()], tmp_path)


@pytest.mark.parametrize("words", _commands("make"))
def test_a_make_target_exists(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [word for word in words[1:] if "=" not in word]:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_readme_shows_commands() -> None:
    readme = list(command_lines((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"nann", "make"} <= {words[0] for words in readme}


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_flags_in_inline_code_exist(path: Path) -> None:
    commands = [*COMMANDS.values(), *typer.main.get_command(reliability).commands.values()]
    everything = set().union(*map(_flags, commands), _flags(GROUP), OTHERS)
    unknown = []
    for code in inline_code(path.read_text(encoding="utf-8")):
        words = code.split()
        if words[0] == "nann" and len(words) > 1 and words[1] in _flags(GROUP):
            continue
        own = words[0] == "nann" and len(words) > 1 and words[1].islower()
        if own and words[1] not in COMMANDS:
            unknown.append(code)
            continue
        known = _flags(COMMANDS[words[1]]) if own else everything
        if own or words[0].startswith("--"):
            unknown += [flag for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code) if flag not in known]
    assert not unknown


@pytest.mark.parametrize("name", TABLED)
def test_the_table_of_a_command_has_every_flag(name: str) -> None:
    rows = table(section(OFFLINE, f"nann {name}"), "flag", "default", "meaning")
    written = {plain(row["flag"]) for row in rows}
    assert written == {parameter.opts[0] for parameter in COMMANDS[name].params} - HELP


@pytest.mark.parametrize("name", TABLED)
def test_the_defaults_in_a_table_are_those_of_the_command(name: str) -> None:
    offline = ROOT / "nann" / "offline"
    graph = asdict(GraphOptions())
    defaults: dict[str, dict[str, Any]] = {
        "train": field_defaults(offline / "train.py", "TrainConfig"),
        "distill": field_defaults(offline / "distill.py", "DistillOptions"),
        "evaluate": field_defaults(offline / "evaluate.py", "EvaluateOptions"),
        "index": {**graph, "preset": "default", "graph_seed": graph["seed"]},
    }
    rows = table(section(OFFLINE, f"nann {name}"), "flag", "default", "meaning")
    written = {plain(row["flag"]): plain(row["default"]) for row in rows}
    for parameter in COMMANDS[name].params:
        if parameter.opts[0] in HELP:
            continue
        default = defaults.get(name, {}).get(parameter.name, parameter.default)
        expected = "required" if parameter.required else "–" if default is None else str(default)
        assert written[parameter.opts[0]].lower() == expected.lower(), parameter.opts[0]


def test_the_presets() -> None:
    rows = table(OFFLINE, "preset", "M", "efConstruction", "space", "nearest", "repaired")
    assert {
        plain(row["preset"]): (
            row["M"],
            row["efConstruction"],
            row["space"],
            row["nearest"].split()[0],
            row["repaired"],
        )
        for row in rows
    } == {
        name: (str(p.m), str(p.ef_construction), p.space, str(p.nearest), "yes" if p.repair else "no")
        for name, p in PRESETS.items()
    }
