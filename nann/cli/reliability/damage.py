"""Ways to damage a version of which a reader must notice each: of a faulty disk, copy, or builder."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from nann.engine.artifacts import hash_files, read_manifest, write_manifest

__all__ = ["damage", "link_version"]

_MANIFEST: Final = "manifest.json"
_REQUIRED: Final = (
    *("format_version", "model_name", "model_type", "num_items", "embedding_dim", "history_length"),
    *("input_dim", "item_id_type", "user_id_type", "user_tensors", "item_tensors"),
)


def link_version(source: Path, target: Path) -> None:
    """A copy of a version whose files are links to the source's: replace them, never write into them."""
    shutil.copytree(source, target, copy_function=os.link)


def damage(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Damage a linked version in one way, and say of which kind it is and what was done."""
    ways = {
        "files": _damage_file,
        "manifests": _damage_manifest,
        "listings": _damage_listing,
        "builders": _build_wrongly,
    }
    kind = rng.choice(("files", "files", "manifests", "listings", "builders"))
    return kind, ways[kind](directory, rng)


# A faulty disk or copy: a file is not what the manifest says


def _damage_file(directory: Path, rng: random.Random) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice([path for path in files if path.name != _MANIFEST])
    ways: dict[str, Callable[[bytes], bytes]] = {
        "a bit flipped": lambda content: _flipped(content, rng),
        "cut off": lambda content: content[: rng.randrange(len(content))],
        "grown": lambda content: content + rng.randbytes(rng.randrange(1, 64)),
        "empty": lambda _content: b"",
        "of other bytes": lambda content: rng.randbytes(len(content)),
    }
    name = path.relative_to(directory)
    if rng.random() < 0.2:
        return f"{name}: " + _replace_by_something_else(path, rng)
    how = rng.choice(sorted(ways))
    _rewrite(path, ways[how](path.read_bytes()))
    return f"{name}: {how}"


def _replace_by_something_else(path: Path, rng: random.Random) -> str:
    path.unlink()
    ways: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "a directory": path.mkdir,
        "a link to itself": lambda: path.symlink_to(path.name),
        "a pipe": lambda: os.mkfifo(path),  # whoever opened it would wait for ever
    }
    how = rng.choice(sorted(ways))
    ways[how]()
    return how


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# A manifest that is none


def _damage_manifest(directory: Path, rng: random.Random) -> str:
    path = directory / _MANIFEST
    content = path.read_bytes()
    raw = json.loads(content)
    field = rng.choice(_REQUIRED)
    ways: dict[str, Callable[[], bytes | None]] = {
        "missing": lambda: None,
        "cut off": lambda: content.rstrip()[: rng.randrange(len(content) - 2)],
        "not UTF-8": lambda: content.replace(b"{", b"{\xff", 1),
        "not an object": lambda: b"[1, 2]",
        "nested deeply": lambda: b"[" * 100_000,
        f"without {field}": lambda: _json({key: value for key, value in raw.items() if key != field}),
        f"{field} of another type": lambda: _json({**raw, field: [None]}),
        "of another format": lambda: _json({**raw, "format_version": rng.choice((0, 99, -1, "1"))}),
        "of other items": lambda: _json({**raw, "num_items": raw["num_items"] + rng.choice((-1, 1, 2**40))}),
    }
    how = rng.choice(sorted(ways))
    made = ways[how]()
    path.unlink()
    if made is not None:
        path.write_bytes(made)
    return f"{_MANIFEST}: {how}"


def _damage_listing(directory: Path, rng: random.Random) -> str:
    path = directory / _MANIFEST
    raw = json.loads(path.read_bytes())
    name = rng.choice(sorted(raw["files"]))
    entry = raw["files"][name]
    ways: dict[str, Callable[[], Any]] = {
        "another size": lambda: entry.update(bytes=entry["bytes"] + rng.choice((-1, 1))),
        "another hash": lambda: entry.update(sha256=rng.randbytes(32).hex()),
        "no hash": lambda: entry.update(sha256=None),
        "a file that is not there": lambda: raw["files"].update({name + "x": entry}),
        "a file outside": lambda: raw["files"].update({f"../{directory.name}/{name}/../..": entry}),
    }
    how = rng.choice(sorted(ways))
    ways[how]()
    _rewrite(path, _json(raw))
    return f"{_MANIFEST}, {name}: {how}"


# A faulty builder: the manifest says what is there, and what is there cannot be served


def _build_wrongly(directory: Path, rng: random.Random) -> str:
    arrays = directory / "arrays"
    outside = {
        "neighbors_level_0.npy": np.iinfo(np.int32).max,
        "neighbors_level_1.npy": -2,
        "enter_points.npy": np.iinfo(np.int32).max,
        "start_points.npy": -1,
        "history_items.npy": np.iinfo(np.int32).max,
    }
    shaped = ("item_weights.npy", "neighbors_level_0.npy", "item_embs.npy", "history_row_splits.npy")
    kind = rng.choice(("out of range", "short", "of another type", "pickled"))
    name = rng.choice(sorted(outside) if kind == "out of range" else sorted(shaped))
    array = np.load(arrays / name).copy()
    match kind:
        case "out of range":
            array.flat[rng.randrange(array.size)] = outside[name]
        case "short":
            array = array[:-1]
        case "of another type":
            array = array.astype(np.complex64)
        case _:
            array = array.astype(object)
    (arrays / name).unlink()
    np.save(arrays / name, array, allow_pickle=True)
    manifest = read_manifest(directory)
    (directory / _MANIFEST).unlink()
    write_manifest(directory, manifest.model_copy(update={"files": hash_files(directory)}))
    return f"{name}: {kind}, and listed so"


def _rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
