"""`nann export`: a run's artifact to the next version of a model repository."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nann.engine.artifacts import Artifact, Manifest, Programs, hash_files, read_manifest, write_manifest
from nann.offline.progress import Progress
from nann.offline.staging import copy_file

__all__ = ["ALL_PROGRAM_SETS", "ExportFormat", "ProgramSetName", "export", "published_versions"]

ExportFormat = Literal["nann", "tf-serving"]
ProgramSetName = Literal["cpu", "gpu"]
# A set takes 2 to 4 seconds and a quarter of a megabyte for any number of items: weights are not copied.
ALL_PROGRAM_SETS: tuple[ProgramSetName, ...] = ("cpu", "gpu")

# What a version brings for servers and not for the model: requests to be replayed at load (docs/artifact.md).
_EXTRA = "assets.extra"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def export(
    run_dir: Path,
    repository: Path,
    name: str = "nann",
    version: int | None = None,
    *,
    format: ExportFormat = "nann",
    programs: Sequence[ProgramSetName] = ALL_PROGRAM_SETS,
    max_batch: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Publish ``run_dir/index`` as ``repository/name/version`` and return that path.

    The default version is one above the highest published. ``quality.json`` and ``profiles.json`` of
    the run, where present, go into the manifest. The files are copied (a link would let a later run
    change a published version), read back and checked against the hashes taken when the index was
    built, and appear under their final name whole or not at all.

    `programs` are the sets of XLA programs to be written beside the SavedModel, so that the version can be
    served without TensorFlow: for batches of up to `max_batch` queries, by default 16 (cpu) and 64 (gpu).

    The format ``tf-serving`` adds the search itself to the SavedModel, as `serving_default` and `retrieve`,
    so that TensorFlow Serving can serve the version too (`export_tf_serving.py`).

    A folder ``index/assets.extra``, where there is one, is published too.

    Raises:
        FileNotFoundError: the run has no index.
        FileExistsError: that version is published already.
        ArtifactError: the run's artifact is damaged or incomplete.
        ValueError: the name or the version is not usable, XLA cannot compile the model, or the format
            is ``tf-serving`` and the model cannot be queried by comm_seq.
    """
    index = run_dir / "index"
    if not (index / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{index} holds no artifact; make it with: "
            f"nann index --embeddings {run_dir / 'embeddings'} --output {index}"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(f"a model's name may hold letters, digits, '.', '_' and '-': not {name!r}")
    model_dir = repository / name
    version = max(published_versions(model_dir), default=0) + 1 if version is None else version
    if version < 1:
        raise ValueError(f"a version is a positive integer, not {version}")
    target = model_dir / str(version)
    if target.exists():
        raise FileExistsError(f"{target} is published already and never changes; leave --version out")
    manifest = read_manifest(index).model_copy(
        update={
            "model_name": name,
            "version": version,
            "quality": _read_object(run_dir / "quality.json"),
            "profiles": _read_object(run_dir / "profiles.json"),
        }
    )
    model_dir.mkdir(parents=True, exist_ok=True)
    staging = model_dir / f".tmp-{version}-{os.getpid()}"
    staging.mkdir()
    try:
        for relative in manifest.files:
            if not (index / relative).is_file():
                continue  # the check below names it
            copy_file(index / relative, staging / relative)
        if (index / _EXTRA).is_dir():
            shutil.copytree(index / _EXTRA, staging / _EXTRA)
            manifest = manifest.model_copy(
                update={"files": manifest.files | hash_files(staging, under=_EXTRA)}
            )
        if format == "tf-serving":
            manifest = _add_search(staging, manifest, progress)
        if programs:
            written = _write_programs(staging, manifest, programs, max_batch, progress)
            files = manifest.files | hash_files(staging, under="programs")
            manifest = manifest.model_copy(update={"programs": written, "files": files})
        write_manifest(staging, manifest)
        Artifact.open(staging, verify="full")
        for directory in {path.parent for path in staging.rglob("*")}:
            _sync_directory(directory)
        # Fails on a version that appeared meanwhile: a rename does not replace a directory with content.
        staging.rename(target)
        _sync_directory(model_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _add_search(staging: Path, manifest: Manifest, progress: Progress | None) -> Manifest:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from nann.offline.export_tf_serving import add_search_signatures

    write_manifest(staging, manifest)  # what the copied files are checked against before they are read
    with progress if progress is not None else Progress() as shown, shown.stage("add the search"):
        return add_search_signatures(staging, manifest)


def _write_programs(
    staging: Path,
    manifest: Manifest,
    names: Sequence[ProgramSetName],
    max_batch: int | None,
    progress: Progress | None,
) -> Programs:
    from nann.offline.export_programs import PROGRAM_SETS, export_programs

    sets = {name: PROGRAM_SETS[name] for name in names}
    if max_batch is not None:
        sets = {name: replace(options, max_batch=max_batch) for name, options in sets.items()}
    return export_programs(staging, manifest, sets, progress=progress)


def published_versions(model_dir: Path) -> list[int]:
    """The versions in a model's directory, ascending; anything not named by a number is passed over."""
    if not model_dir.is_dir():
        return []
    return sorted(int(path.name) for path in model_dir.iterdir() if path.is_dir() and path.name.isdecimal())


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def _sync_directory(directory: Path) -> None:
    """Without this a crash could lose the names of files whose content is safe."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
