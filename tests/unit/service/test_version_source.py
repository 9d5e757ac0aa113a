from __future__ import annotations

from pathlib import Path

import pytest

from nann.engine.errors import ArtifactError
from nann.service.settings import Settings, SettingsError
from nann.service.types import ModelConfig, VersionPolicy, parse_policy
from nann.service.version_source import (
    configured_source,
    find_newest_versions,
    fixed_source,
    repository_source,
    scan,
    wanted_versions,
)


def make_repository(root: Path, **versions: list[str]) -> Path:
    for model, names in versions.items():
        for name in names:
            (root / model / name).mkdir(parents=True)
    return root


def test_versions_are_numbers_and_the_newest_is_not_the_last_by_name(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["9", "10", ".tmp-11", "12.partial", "007", "0"], other=["1"], empty=[])
    (tmp_path / "nann" / "99").write_text("a file")
    (tmp_path / "users.sqlite3").write_text("a file")
    assert find_newest_versions(tmp_path, None) == {
        "nann": (10, tmp_path / "nann" / "10"),
        "other": (1, tmp_path / "other" / "1"),
    }
    assert set(find_newest_versions(tmp_path, "other")) == {"other"}


def test_an_empty_repository_names_what_was_expected_and_found(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=[".tmp-1"])
    for repository, model in [
        (tmp_path / "absent", None),
        (tmp_path, None),
        (tmp_path, "nann"),
        (tmp_path, "other"),
    ]:
        with pytest.raises(ArtifactError) as error:
            find_newest_versions(repository, model)
        assert error.value.file.startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "policy", "wanted"),
    [
        ("latest", VersionPolicy(), {9}),
        ("latest:2", VersionPolicy(latest=2), {3, 9}),
        ("latest:100", VersionPolicy(latest=100), {1, 3, 9}),
        ("all", VersionPolicy(latest=None), {1, 3, 9}),
        ("specific:9,1,1,4", VersionPolicy(latest=None, specific=(1, 4, 9)), {1, 9}),
        ("specific:4", VersionPolicy(latest=None, specific=(4,)), set()),
    ],
)
def test_policies(text: str, policy: VersionPolicy, wanted: set[int]) -> None:
    assert parse_policy(text) == policy
    assert wanted_versions([1, 3, 9], policy) == wanted


@pytest.mark.parametrize("text", ["", "newest", "latest:0", "latest:-1", "specific:", "specific:1,", "all:1"])
def test_what_is_no_policy(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="version policy"):
        parse_policy(text)
    with pytest.raises(ValueError, match="version policy"):
        Settings(repository=tmp_path, version_policy=text)


def test_a_model_that_is_not_there_harms_no_other(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1", "2"])
    configs = [
        ModelConfig("gone", tmp_path / "gone"),
        ModelConfig("nann", Path("nann")),
        ModelConfig("picky", tmp_path / "nann", VersionPolicy(latest=None, specific=(7, 8))),
    ]
    gone, nann, picky = scan(fixed_source(configs, tmp_path))
    assert isinstance(gone.error, ArtifactError) and "no directory" in str(gone.error)
    assert (nann.error, nann.wanted, set(nann.versions)) == (None, {2}, {1, 2})
    assert "named 7 or 8" in str(picky.error)


def test_a_repository_is_read_again_each_time(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1"])
    source = repository_source(tmp_path, None, VersionPolicy())
    assert [found.config.name for found in scan(source)] == ["nann"]
    make_repository(tmp_path, other=["1"], unfinished=[".tmp-1"])
    assert [found.config.name for found in scan(source)] == ["nann", "other"]


def test_a_configuration_file_wins_over_the_repository(tmp_path: Path) -> None:
    make_repository(tmp_path, nann=["1"], other=["1"])
    file = tmp_path / "models.config"
    file.write_text('model_config_list { config { name: "renamed" base_path: "nann" } }')
    settings = Settings(model_config_file=file)
    assert settings.repository == tmp_path
    (found,) = scan(configured_source(settings))
    assert (found.config.name, found.wanted) == ("renamed", {1})
    file.write_text("model_config_list { config { naem: 1 } }")
    with pytest.raises(SettingsError, match="naem"):
        configured_source(settings)
    with pytest.raises(ValueError, match="not both"):
        Settings(model_config_file=file, model="nann")
