"""docs/settings.md has a row for every setting, with its own words, and none for anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main
from documents import DOCS, plain, table

from nann.cli.main import app
from nann.service.settings import ENV_PREFIX, Settings

TEXT = (DOCS / "settings.md").read_text(encoding="utf-8")
ROWS = {plain(row["variable"]): row for row in table(TEXT, "variable", "flag", "default", "meaning")}
FIELDS = {ENV_PREFIX + name.upper(): field for name, field in Settings.model_fields.items()}


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    assert set(ROWS) == set(FIELDS)


def test_every_flag_of_nann_serve_is_in_the_table() -> None:
    command = typer.main.get_command(app)
    serve = command.commands["serve"]  # type: ignore[attr-defined]
    flags = {option for parameter in serve.params for option in parameter.opts} - {"--help", "-h"}
    assert {plain(row["flag"]) for row in ROWS.values()} == flags


@pytest.mark.parametrize("variable", FIELDS)
def test_a_row_says_what_the_setting_says(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    row, field = ROWS[variable], FIELDS[variable]
    assert plain(row["flag"]) == "--" + variable.removeprefix(ENV_PREFIX).lower().replace("_", "-")
    assert plain(row["meaning"]).startswith(field.description or "no description")
    default = plain(row["default"])
    if field.is_required():
        assert default == "required"
    elif field.default_factory is not None:
        assert Path(default).expanduser() == field.get_default(call_default_factory=True)
    elif field.default is None:
        assert default == "–"
    elif isinstance(field.default, bool):
        assert default == str(field.default).lower()
    else:
        assert default == str(field.default)
