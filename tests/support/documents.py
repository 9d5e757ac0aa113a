"""Reading the documentation as a machine: its files, tables, code blocks, headings and links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DOCS",
    "ROOT",
    "CodeBlock",
    "anchors",
    "code_blocks",
    "command_lines",
    "field_defaults",
    "inline_code",
    "links",
    "markdown_files",
    "plain",
    "section",
    "table",
    "tables",
]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_PRODUCED = {"demo", "runs", "build", "dist"}  # by make targets, not written by people
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_HEADING = re.compile(r"^(#+) (.+)$", re.M)

Row = dict[str, str]


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block, or (with language "") an indented one."""

    language: str
    text: str


def markdown_files() -> list[Path]:
    """Every Markdown file that people write."""
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in _PRODUCED and path.name[0] not in "._"
    ]
    nested = (path for folder in folders for path in folder.rglob("*.md"))
    return sorted([*ROOT.glob("*.md"), *nested])


def plain(cell: str) -> str:
    """A cell's text without the marks of inline code, and a link's words without its target."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("`", "")


def tables(text: str) -> list[list[Row]]:
    """Every table, as rows by column name."""
    found: list[list[Row]] = []
    header: list[str] | None = None
    for line in without_fences(text).splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
            found.append([])
        elif not set(line) <= set("|-: "):
            assert len(cells) == len(header), (
                f"{len(cells)} cells in a table of {len(header)} columns: {line}"
            )
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


def table(text: str, *columns: str) -> list[Row]:
    """The rows of all tables that have exactly these columns; fails when there is none."""
    rows = [row for rows in tables(text) for row in rows if tuple(row) == columns]
    assert rows, f"no table with the columns {columns}"
    return rows


def section(text: str, heading: str) -> str:
    """What stands under `heading` up to the next heading of its level or above; fails when there is none."""
    headings = list(_HEADING.finditer(without_fences(text)))
    text = without_fences(text)
    for position, match in enumerate(headings):
        if plain(match[2]) == heading:
            rest = (h for h in headings[position + 1 :] if len(h[1]) <= len(match[1]))
            following = next(rest, None)
            return text[match.end() : following.start() if following else None]
    raise AssertionError(f"no heading {heading!r}")


def without_fences(text: str) -> str:
    """The text with every fenced block emptied, so that what is in one is no heading and no table."""
    return _FENCE.sub("", text)


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """Fenced and indented blocks."""
    for match in _FENCE.finditer(text):
        yield CodeBlock(match[1], match[2])
    for match in re.finditer(r"(?:^    .*\n?)+", without_fences(text), re.M):
        yield CodeBlock("", re.sub(r"^    ", "", match[0], flags=re.M))


def inline_code(text: str) -> list[str]:
    """The text of every `inline code`."""
    return re.findall(r"`([^`\n]+)`", without_fences(text))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every command in the code blocks of shells; continued lines are joined."""
    for block in code_blocks(text):
        if block.language not in ("", "console", "sh", "bash", "shell"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ")
            if re.match(r"(nann|make|curl)\b", words):
                yield shlex.split(words, comments=True)


def links(text: str) -> list[str]:
    """The targets of every link and picture."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", without_fences(text)))


def anchors(text: str) -> set[str]:
    """What GitHub lets a link point to: the headings in lower case, without punctuation, with dashes."""
    headings = (plain(match[2]).lower() for match in _HEADING.finditer(without_fences(text)))
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}


def field_defaults(path: Path, class_name: str) -> dict[str, object]:
    """Field -> default of a dataclass, read without importing its module (which may load TensorFlow)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields: Sequence[ast.AnnAssign] = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {
        field.target.id: ast.literal_eval(field.value)
        for field in fields
        if isinstance(field.target, ast.Name) and field.value is not None
    }
