"""A real server process among the variables of a pod."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from golden import GOLDEN

from nann.cli.reliability.environment import MISSPELT, measure_environment
from nann.service.settings import ENV_PREFIX, Settings


@pytest.mark.slow
def test_service_links_pass_and_a_misspelt_setting_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MISSPELT.removeprefix(ENV_PREFIX).lower() not in Settings.model_fields
    shutil.copytree(GOLDEN / "artifact", tmp_path / "nann" / "1")
    monkeypatch.setenv("NANN_MAX_BATCH_SIZE", "1")  # few shapes to compile
    monkeypatch.setenv("NANN_LANES", "1")
    result = measure_environment(tmp_path, "nann")
    assert result.kept, result.words()
