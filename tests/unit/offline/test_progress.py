from __future__ import annotations

import io

import pytest
from rich.console import Console

from nann.offline import progress as progress_module
from nann.offline.progress import Progress


def _console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120), out


def test_plain_lines_without_a_terminal() -> None:
    console, out = _console(terminal=False)
    with Progress(console=console) as progress, progress.stage("read", 10, "rows") as stage:
        stage.advance(4)
        stage.note("[bold] is kept")
        stage.move_to(10)
    line = out.getvalue()
    assert line.startswith("read: 100 % (10 of 10 rows)")
    assert line.rstrip().endswith("[bold] is kept done")
    assert "\x1b" not in line


def test_a_long_stage_reports_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_INTERVAL_S", 0.0)
    console, out = _console(terminal=False)
    with Progress(console=console) as progress, progress.stage("train", 2) as stage:
        stage.advance()
        stage.advance()
    assert [line.split("(")[0] for line in out.getvalue().splitlines()] == [
        "train: 50 % ",
        "train: 100 % ",
        "train: 100 % ",
    ]


def test_bars_on_a_terminal_nest_and_give_it_back() -> None:
    console, out = _console(terminal=True)
    with (
        Progress(console=console) as progress,
        progress.stage("outer", 2) as outer,
        progress.stage("inner") as inner,
    ):
        outer.advance()
        inner.note("loss 0.5")
    text = out.getvalue()
    assert "outer" in text
    assert "loss 0.5" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_passes_and_no_stage_claims_to_be_done(terminal: bool) -> None:
    console, out = _console(terminal=terminal)
    with pytest.raises(KeyError), Progress(console=console) as progress, progress.stage("read", 10):
        raise KeyError("x")
    assert "done" not in out.getvalue()


def test_silent_is_silent() -> None:
    console, out = _console(terminal=True)
    with Progress(console=console, silent=True) as progress, progress.stage("read") as stage:
        stage.advance()
        progress.line("words")
    assert out.getvalue() == ""
