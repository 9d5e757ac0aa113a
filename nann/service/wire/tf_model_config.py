"""TensorFlow Serving's ModelServerConfig, from its text file or a reload request, as `ModelConfig`s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from nann.engine.errors import InvalidQuery, RetrievalError, Unsupported
from nann.service.settings import SettingsError
from nann.service.types import ModelConfig, VersionPolicy
from nann.service.wire.tf_messages import ModelServerConfig

__all__ = ["configs_of_message", "read_model_config_file"]

# What a model may be called so that TensorFlow Serving's REST paths can name it (http_rest_api_handler.cc).
_NAME: Final = re.compile(r"[^/:\x00-\x1f]{1,256}")
_PLATFORMS: Final = ("", "tensorflow")
_OTHER_TYPE: Final = 2


def read_model_config_file(path: Path) -> list[ModelConfig]:
    """The models of a ``--model-config-file``; a relative `base_path` is left relative.

    Raises:
        SettingsError: it cannot be read, or says what this server does not do.
    """
    try:
        message = text_format.Parse(path.read_text(encoding="utf-8"), ModelServerConfig())
        return configs_of_message(message)
    except (OSError, UnicodeDecodeError, text_format.ParseError, RetrievalError) as error:
        raise SettingsError(f"--model-config-file {path}: {error}") from error


def configs_of_message(message: Any) -> list[ModelConfig]:
    """The models of a ModelServerConfig; a relative `base_path` is left relative.

    Raises:
        InvalidQuery: no model, two of one name, or a field with a value that cannot be.
        Unsupported: a platform, a file system or a custom config that this server does not have.
    """
    if message.WhichOneof("config") != "model_config_list":
        raise InvalidQuery(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. "
            "Only ModelConfigList is currently supported"
        )
    configs = [_config(config) for config in message.model_config_list.config]
    if not configs:
        raise InvalidQuery("the model config list is empty")
    names = [config.name for config in configs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidQuery(f"the model config list names {doubled[0]} more than once")
    return configs


def _config(message: Any) -> ModelConfig:
    name, base_path = message.name, message.base_path
    if not _NAME.fullmatch(name):
        raise InvalidQuery(f"a model's name must be 1 to 256 characters without '/' and ':', not {name!r}")
    if message.model_platform not in _PLATFORMS or message.model_type == _OTHER_TYPE:
        raise Unsupported(f"model {name}: the only model_platform is tensorflow")
    if not base_path or "\0" in base_path:
        raise InvalidQuery(f"model {name}: it needs a base_path")
    if "://" in base_path:
        raise Unsupported(f"model {name}: base_path must be a directory of this machine")
    labels = dict(message.version_labels)
    for label, version in labels.items():
        if not label or version < 1:
            raise InvalidQuery(f"model {name}: version_labels maps {label!r} to {version}")
    return ModelConfig(name, Path(base_path), _policy(name, message.model_version_policy), labels)


def _policy(name: str, message: Any) -> VersionPolicy:
    match message.WhichOneof("policy_choice"):
        case "all":
            return VersionPolicy(latest=None)
        case "specific":
            versions: Sequence[int] = message.specific.versions
            if not versions or min(versions) < 1:
                raise InvalidQuery(f"model {name}: a specific policy must name versions, from 1 up")
            return VersionPolicy(latest=None, specific=tuple(sorted(set(versions))))
        case _:
            # Zero is what an unset number reads as; TensorFlow Serving takes it for one.
            return VersionPolicy(latest=message.latest.num_versions or 1)
