from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from nann.engine.errors import InvalidQuery, Unsupported
from nann.service.settings import SettingsError
from nann.service.types import ModelConfig, VersionPolicy
from nann.service.wire.tf_messages import ModelServerConfig
from nann.service.wire.tf_model_config import configs_of_message, read_model_config_file

# As in TensorFlow Serving's guide, "Model Server Configuration".
FILE = """
model_config_list {
  # two models
  config {
    name: 'nann'
    base_path: '/models/nann/'
    model_platform: "tensorflow"
    model_version_policy { specific { versions: 43 versions: 42 } }
    version_labels { key: 'stable' value: 43 }
    version_labels { key: 'canary' value: 42 }
    logging_config { sampling_config { sampling_rate: 0.1 } }
  }
  config { name: "other", base_path: "relative/other" }
}
"""


def parse(text: str) -> list[ModelConfig]:
    return configs_of_message(text_format.Parse(text, ModelServerConfig()))


def one(fields: str) -> ModelConfig:
    (config,) = parse(f"model_config_list {{ config {{ {fields} }} }}")
    return config


def test_the_files_of_tensorflow_serving(tmp_path: Path) -> None:
    path = tmp_path / "models.config"
    path.write_text(FILE)
    nann, other = read_model_config_file(path)
    assert nann == ModelConfig(
        "nann", Path("/models/nann"), VersionPolicy(None, (42, 43)), {"stable": 43, "canary": 42}
    )
    assert other == ModelConfig("other", Path("relative/other"), VersionPolicy(latest=1), {})


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("latest {}", VersionPolicy(latest=1)),
        ("latest { num_versions: 0 }", VersionPolicy(latest=1)),
        ("latest { num_versions: 3 }", VersionPolicy(latest=3)),
        ("all {}", VersionPolicy(latest=None)),
        ("specific { versions: [2, 1, 2] }", VersionPolicy(None, (1, 2))),
    ],
)
def test_policies(policy: str, expected: VersionPolicy) -> None:
    assert one(f'name: "m" base_path: "m" model_version_policy {{ {policy} }}').policy == expected


GOOD = 'name: "m" base_path: "m"'


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", InvalidQuery, "Only ModelConfigList"),
        ("model_config_list {}", InvalidQuery, "is empty"),
        (f"model_config_list {{ config {{ {GOOD} }} config {{ {GOOD} }} }}", InvalidQuery, "more than once"),
        ('model_config_list { config { base_path: "x" } }', InvalidQuery, "name"),
        ('model_config_list { config { name: "a/b" base_path: "x" } }', InvalidQuery, "name"),
        ('model_config_list { config { name: "m" } }', InvalidQuery, "base_path"),
        ('model_config_list { config { name: "m" base_path: "a\\000b" } }', InvalidQuery, "base_path"),
        ('model_config_list { config { name: "m" base_path: "gs://m" } }', Unsupported, "directory"),
        (f'model_config_list {{ config {{ {GOOD} model_platform: "onnx" }} }}', Unsupported, "platform"),
        (f"model_config_list {{ config {{ {GOOD} model_type: OTHER }} }}", Unsupported, "platform"),
        (
            f'model_config_list {{ config {{ {GOOD} version_labels {{ key: "a" value: 0 }} }} }}',
            InvalidQuery,
            "version_labels",
        ),
        (
            f"model_config_list {{ config {{ {GOOD} model_version_policy {{ specific {{}} }} }} }}",
            InvalidQuery,
            "specific",
        ),
    ],
)
def test_what_cannot_be(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"model_config_list { config { nam: 1 } }", "nam"), (b"\xff", "utf-8"), (b"", "ModelConfigList")],
)
def test_a_file_that_is_wrong_is_a_wrong_setting(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "models.config"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=says):
        read_model_config_file(path)
    with pytest.raises(SettingsError, match="No such file"):
        read_model_config_file(tmp_path / "absent")


def test_a_reload_request_is_the_same_message() -> None:
    pytest.importorskip("tensorflow_serving")
    from tensorflow_serving.config import model_server_config_pb2

    theirs: Any = text_format.Parse(FILE, model_server_config_pb2.ModelServerConfig())
    ours = ModelServerConfig.FromString(theirs.SerializeToString())
    assert configs_of_message(ours) == parse(FILE)
