"""Write tests/golden/v1: a tiny published artifact of format version 1, and its answers to a few queries.

    .venv/bin/python tests/golden/make_golden.py

Run it only for a new format version (into a new directory): a released format is read as it was
written. Scores are sums of products of small integers, so they are exact on every machine.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT.parent / "support"), str(ROOT.parents[1])]

import numpy as np  # noqa: E402
from engine_world import World, make_world  # noqa: E402
from golden import GOLDEN, load_engine, query_of  # noqa: E402
from tiny_models import integer_dot, publish  # noqa: E402

from nann.engine.artifacts import hash_files, read_manifest, write_manifest  # noqa: E402
from nann.engine.types import Hits  # noqa: E402

NUM_ITEMS = 120


def queries(world: World) -> dict[str, dict[str, Any]]:
    """By name, each as the fields of a `Query` in JSON's terms; `params` as those of `SearchParams`."""
    ids = world.item_ids.tolist()
    history = [ids[i] for i in (3, 50, 7, 99)]
    narrow = {"policy": "best_first", "ef": 8, "beam_width": 3}
    wide = {"policy": "best_first", "ef": 64, "beam_width": 16}
    level = {"policy": "level", "level_topn": [4, 6, 8, 8, 8, 10]}
    exhaustive = {"policy": "exhaustive"}
    embedded = world.item_vectors[[3, 50, 7, 99]].astype(int).ravel().tolist() + [0] * 16
    some = {"category": [1, 3], "year": {"gte": 1990}}
    half = {"genres": {"contains": "b"}}
    return {
        "best_first narrow": {"k": 5, "params": narrow, "history": history},
        "best_first wide": {"k": 20, "params": wide, "history": history},
        "best_first one step": {"k": 5, "params": {**narrow, "max_steps": 1}, "history": history},
        "best_first long history": {"k": 8, "params": narrow, "history": ids[:9]},
        "best_first comm_seq": {"k": 5, "params": narrow, "comm_seq": embedded},
        "best_first empty history": {"k": 5, "params": narrow, "history": []},
        "level": {"k": 10, "params": level, "history": history},
        "level short": {"k": 3, "params": level, "history": ids[60:62]},
        "level excluded": {"k": 10, "params": level, "history": history, "exclude": ids[:40]},
        "exhaustive": {"k": 20, "params": exhaustive, "history": history},
        "exhaustive all": {"k": 500, "params": exhaustive, "history": ids[5:7]},
        "exhaustive comm_seq": {"k": 20, "params": exhaustive, "comm_seq": embedded},
        "filter": {"k": 6, "params": exhaustive, "history": history, "filter": some},
        "filter of a list": {"k": 6, "params": narrow, "history": history, "filter": half},
        "include, exclude, seen": {
            "k": 30, "params": narrow, "history": [*history, -1], "include": ids[:50],
            "exclude": ids[:5], "seen": history, "with_attributes": True,
        },
    }  # fmt: skip


def described(hits: Hits) -> dict[str, Any]:
    return {
        "item_ids": list(hits.item_ids),
        "scores": list(hits.scores),
        "n_scored": hits.n_scored,
        "steps": hits.steps,
        "notes": {note.code: note.count for note in hits.notes},
        "attributes": None if hits.attributes is None else [dict(row) for row in hits.attributes],
    }


def check_exhaustive(world: World, fields: dict[str, Any], hits: Hits) -> None:
    """The golden answers must be right before they are golden."""
    row = {item: i for i, item in enumerate(world.item_ids.tolist())}
    user = world.item_vectors[[row[i] for i in fields["history"]]].astype(np.float64).sum(axis=0)
    scores = world.item_vectors.astype(np.float64) @ user
    order = np.lexsort((np.arange(scores.size), -scores))[: fields["k"]]
    if hits.item_ids != world.item_ids[order].tolist() or hits.scores != scores[order].tolist():
        raise SystemExit("the exhaustive answer is not the true one; nothing was written")


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    world = make_world(GOLDEN / "artifact", num_items=NUM_ITEMS, seed=20)
    publish(integer_dot(world.item_vectors, history_length=6), world.directory)
    (world.directory / "assets").rmdir()
    manifest = read_manifest(world.directory)
    write_manifest(
        world.directory,
        manifest.model_copy(update={"model_name": "golden", "files": hash_files(world.directory)}),
    )
    asked = queries(world)
    engine = load_engine(world.directory)
    answers = {}
    for name, fields in asked.items():
        (hits,) = engine.search([engine.check(query_of(fields))], 0)
        if name in ("exhaustive", "exhaustive all"):
            check_exhaustive(world, fields, hits)
        answers[name] = {"query": fields, "hits": described(hits)}
    text = json.dumps(answers, indent=1, sort_keys=True)
    (GOLDEN / "hits.json").write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
    print(f"{GOLDEN}: {len(answers)} queries, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
