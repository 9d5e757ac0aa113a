"""docs/threat-model.md: what holds a defence exists, and what may be written is named rightly."""

from __future__ import annotations

from documents import DOCS, ROOT, inline_code, plain, table

from nann.service.access import Role
from nann.service.grpc_api.access import ROLES
from nann.service.settings import ENV_PREFIX, Settings

TEXT = (DOCS / "threat-model.md").read_text(encoding="utf-8")


def test_every_defence_is_held_by_a_test_that_exists() -> None:
    rows = table(TEXT, "threat", "defence", "held by")
    assert len(rows) > 15
    for row in rows:
        holders = [code for code in inline_code(row["held by"]) if not code.startswith("python -m")]
        assert holders, row["threat"]
        for holder in holders:
            assert (ROOT / holder).is_file(), holder


def test_settings_that_are_named_exist() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    named = {code for code in inline_code(TEXT) if code.startswith(ENV_PREFIX)}
    assert named
    assert named <= known


def test_every_role_is_in_the_table_of_the_settings() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    rows = {
        plain(row["role"]): row for row in table(text, "role", "allows, besides what those above it allow")
    }
    assert list(rows) == [role.name.lower() for role in Role]
    admin = {path.rpartition("/")[2] for path, role in ROLES.items() if role is Role.ADMIN}
    assert admin <= set(inline_code(rows["admin"]["allows, besides what those above it allow"]))
