"""Which versions are there, and which of them should be served: directories read, policies applied.

A source gives the models that should be served now. Reading directories blocks, so the registry calls
it on a thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nann.engine.errors import ArtifactError
from nann.service.settings import Settings
from nann.service.types import ModelConfig, VersionPolicy, parse_policy
from nann.service.wire.tf_model_config import read_model_config_file

__all__ = [
    "Found",
    "ModelSource",
    "configured_source",
    "find_newest_versions",
    "find_versions",
    "fixed_source",
    "repository_source",
    "scan",
    "wanted_versions",
]

ModelSource = Callable[[], Sequence[ModelConfig]]

# No sign, no leading zero, and it fits 63 bits, which is what the protocols carry.
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")


def configured_source(settings: Settings) -> ModelSource:
    """What the settings say should be served; raises SettingsError for a model config file that is wrong."""
    if settings.model_config_file is not None:
        return fixed_source(read_model_config_file(settings.model_config_file), settings.repository)
    return repository_source(settings.repository, settings.model, parse_policy(settings.version_policy))


def repository_source(repository: Path, model: str | None, policy: VersionPolicy) -> ModelSource:
    """Every model of `repository`, or `model` alone; a model added later is found when asked again."""

    def models() -> list[ModelConfig]:
        if not repository.is_dir():
            raise ArtifactError(str(repository), expected="a model repository", found="no directory")
        if model is not None:
            return [ModelConfig(model, repository / model, policy)]
        found = [
            ModelConfig(path.name, path, policy)
            for path in sorted(repository.iterdir())
            if path.is_dir() and any(map(_is_version, path.iterdir()))
        ]
        if not found:
            raise ArtifactError(str(repository), expected="<model>/<version>/ directories", found="none")
        return found

    return models


def fixed_source(configs: Iterable[ModelConfig], root: Path) -> ModelSource:
    """The models of a configuration, whatever else is there; relative base paths are taken from `root`."""
    fixed = tuple(replace(config, base_path=root / config.base_path) for config in configs)
    return lambda: fixed


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of one model: all `versions`, the `wanted` ones, or why there is none of those."""

    config: ModelConfig
    versions: Mapping[int, Path] = field(default_factory=dict)
    wanted: frozenset[int] = frozenset()
    error: ArtifactError | None = None


def scan(source: ModelSource) -> list[Found]:
    """Look at the directories of every model; raises ArtifactError where the repository has none."""
    return [_look_at(config) for config in source()]


def _look_at(config: ModelConfig) -> Found:
    try:
        versions = find_versions(config.base_path)
    except ArtifactError as error:
        return Found(config, error=error)
    wanted = wanted_versions(versions, config.policy)
    return Found(config, versions, frozenset(wanted), None if wanted else _no_version(config))


def find_versions(base_path: Path) -> dict[int, Path]:
    """The version directories of a model, by number.

    A version under construction has a name that is no number (the contract's atomic publish).

    Raises:
        ArtifactError: the directory is not there, or cannot be read.
    """
    try:
        return {int(path.name): path for path in base_path.iterdir() if _is_version(path)}
    except OSError as error:
        found = "no directory" if isinstance(error, FileNotFoundError | NotADirectoryError) else str(error)
        raise ArtifactError(str(base_path), expected="a model directory", found=found) from error


def wanted_versions(there: Iterable[int], policy: VersionPolicy) -> set[int]:
    """Those of the versions that the policy asks for."""
    if policy.specific:
        return set(policy.specific) & set(there)
    newest_first = sorted(there, reverse=True)
    return set(newest_first[: policy.latest])


def find_newest_versions(repository: Path, model: str | None) -> dict[str, tuple[int, Path]]:
    """The newest version of `model`, or of every model, by name: number and directory.

    Raises:
        ArtifactError: the repository, the model in it, or a version of that is not there.
    """
    newest: dict[str, tuple[int, Path]] = {}
    for found in scan(repository_source(repository, model, VersionPolicy())):
        if found.error is not None:
            raise found.error
        newest[found.config.name] = max(found.versions.items())
    return newest


def _no_version(config: ModelConfig) -> ArtifactError:
    numbers = " or ".join(map(str, config.policy.specific)) or "1, 2, …"
    return ArtifactError(str(config.base_path), expected=f"a version directory named {numbers}", found="none")


def _is_version(path: Path) -> bool:
    return _VERSION.fullmatch(path.name) is not None and path.is_dir()
