"""The command as a user meets it: help, exit codes, one line that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nann.cli.main import run

COMMANDS = [
    "prepare",
    "train",
    "extract",
    "index",
    "evaluate",
    "export",
    "serve",
    "query",
    "benchmark",
    "compare",
    "pipeline",
    "demo",
]


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_names_what_it_helps_with(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "Usage" in out
    assert all(name in out for name in (COMMANDS if arguments == ["--help"] else arguments[:1]))


def test_help_loads_no_heavy_library() -> None:
    program = (
        "import sys; from nann.cli.main import run; code = run(['--help'])\n"
        "heavy = {'tensorflow', 'keras', 'polars', 'numba', 'numpy', 'fastapi', 'grpc', 'faiss', 'httpx'}\n"
        "print('LOADED', code, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED 0 []"


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "--input", "/nowhere/at/all.csv", "--output", "out"],
        ["prepare", "--output", "out"],
        ["train", "--batch-size", "many", "--data", ".", "--output", "out"],
        ["nonsense"],
        ["query"],
        ["query", "--user", "1", "--history", "2"],
        ["query", "--user", "1", "--policy", "level", "--level-topn", "1,a"],
        ["serve"],
        ["serve", "--repository", ".", "--rest-port", "70000"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err


def test_an_unknown_setting_of_the_environment_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANN_RESTPORT", "1")
    assert run(["serve", "--repository", "."]) == 2
    assert "NANN_RESTPORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "--embeddings", ".", "--output", "index"], "nann extract"),
        (["export", "--run", ".", "--repository", "repository"], "nann index"),
        (["query", "--url", "http://127.0.0.1:9", "--user", "1"], "nann serve"),
        (["query", "--url", "grpc://127.0.0.1:9", "--history", "1,2"], "unavailable"),
        (["query", "--url", "localhost:8501", "--user", "1"], "grpc(s)://HOST:PORT"),
    ],
)
def test_a_failure_is_1_and_one_line_that_says_what_to_do(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("nann: ")
    assert words in line


def test_debug_adds_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["--debug", "index", "--embeddings", ".", "--output", "index"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_failure_nobody_foresaw_says_how_to_see_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost\nkey")

    monkeypatch.setattr("nann.offline.export.export", broken)
    assert run(["export", "--run", str(tmp_path), "--repository", "r"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected KeyError" in line
    assert f"nann --debug export --run {tmp_path}" in line


def test_json_is_the_only_thing_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    embeddings = np.random.default_rng(0).standard_normal((120, 4)).astype(np.float32)
    np.save(tmp_path / "item_embs.npy", embeddings)
    output = tmp_path / "index"
    arguments = ["index", "--embeddings", str(tmp_path), "--output", str(output), "--preset", "nann"]
    assert run([*arguments, "--m", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_items"], report["complete"]) == (120, False)
    assert report["graph"]["degree"] == [8, 4], "a flag wins over the preset"
    assert report["graph"]["space"] == "l2", "the preset decides the rest"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import metadata

    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == metadata.version("nann")
