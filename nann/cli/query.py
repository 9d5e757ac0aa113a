"""``nann query``: ask a running server for one user and print what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from nann.cli.answers import ask, parse_id
from nann.cli.credentials import CREDENTIAL_FLAGS, credentials_of
from nann.cli.output import JsonOption, console, emit, table
from nann.cli.parameters import Flag, given, with_flags

__all__ = ["answer_table", "query_command", "timing_line"]

_PARAM_FLAGS = (
    Flag(
        "policy",
        Literal["best_first", "level", "level_pruned", "inner_product", "exhaustive"],
        "How to search.",
    ),
    Flag("ef", int, "best_first: best items kept while searching."),
    Flag("beam_width", int, "best_first: items whose neighbours are scored in one step."),
    Flag("max_steps", int, "best_first: at most so many steps."),
    Flag("gate_width", int, "best_first: at most so many items scored a step; 0: without the gate."),
    Flag("gate_margin", float, "best_first: how far below the answer an estimate may lie, in its errors."),
    Flag("level_topn", str, "level: NANN's six widths t0,…,t5."),
)


@with_flags((*_PARAM_FLAGS, *CREDENTIAL_FLAGS))
def query_command(
    url: Annotated[
        str, typer.Option(help="http(s)://HOST:PORT or grpc(s)://HOST:PORT.")
    ] = "http://127.0.0.1:8501",
    user: Annotated[str | None, typer.Option(help="A user the server knows.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first, with commas.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Items wanted.")] = 10,
    model: Annotated[str | None, typer.Option(help="By default the only one served.")] = None,
    profile: Annotated[str | None, typer.Option(help="fast, balanced or exact.")] = None,
    text_ids: Annotated[bool, typer.Option("--text-ids", help="Ids are strings even if all digits.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print how the search went.")] = False,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Ask a running server for the best items of one user."""
    if (user is None) == (history is None):
        raise typer.BadParameter("give exactly one of --user and --history")
    subject: dict[str, Any] = {}
    if user is not None:
        subject["user_id"] = parse_id(user, as_text=text_ids)
    if history is not None:
        names = [name.strip() for name in history.split(",") if name.strip()]
        subject["history"] = [parse_id(name, as_text=text_ids) for name in names]
    credentials = credentials_of(flags, url)
    params = {flag.name: flags[flag.name] for flag in _PARAM_FLAGS}
    if params["level_topn"] is not None:
        params["level_topn"] = _widths(params["level_topn"])
    chosen = {"params": given(params) or None, "profile": profile, "model": model}
    body = {**subject, "k": k, "with_attributes": True, "explain": explain, **given(chosen)}
    answer = ask(url, body, credentials=credentials)
    emit(answer, as_json=as_json, words=answer_table(answer))
    if not as_json:
        typer.echo(timing_line(answer))
        for note in answer.get("notes", []):
            typer.echo(f"note: {note['message']}")
        if explain:
            console().print(answer.get("explain", {}))


def answer_table(answer: Mapping[str, Any], title: str | None = None) -> Table:
    """The items of an answer, with their titles where the model knows any."""
    items = answer["items"]
    shown = [name for name in ("title", "category") if any(_attribute(item, name) for item in items)]
    rows = [
        [rank, item["item_id"], *(_attribute(item, name) for name in shown), f"{item['score']:.4f}"]
        for rank, item in enumerate(items, start=1)
    ]
    made = table(
        title or f"{answer['model']}, version {answer['version']}", ["", "item", *shown, "score"], rows
    )
    made.columns[0].justify = "right"
    return made


def timing_line(answer: Mapping[str, Any]) -> str:
    """What the answer cost, in one line."""
    parts = [f"{name} {value:.1f} ms" for name, value in answer.get("timings_ms", {}).items()]
    return ", ".join([f"{answer['n_scored']:,} items scored", *parts])


def _attribute(item: Mapping[str, Any], name: str) -> str:
    value = (item.get("attributes") or {}).get(name)
    return "" if value is None else str(value)


def _widths(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--level-topn should be six numbers with commas, not {text!r}") from None
