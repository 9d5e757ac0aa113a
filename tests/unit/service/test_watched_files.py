from __future__ import annotations

import os
from pathlib import Path

from fake_engine import ManualTime
from structlog.testing import capture_logs

from nann.service.metrics import Metrics
from nann.service.settings import SettingsError
from nann.service.watched_files import WatchedFiles


class Number:
    """A file that holds a number, and how often it was read."""

    def __init__(self, path: Path) -> None:
        self.path, self.time, self.metrics = path, ManualTime(), Metrics()
        self.n_reads = 0
        self.path.write_text("1", encoding="utf-8")

    def watched(self, pause_s: float = 0.0) -> WatchedFiles[int]:
        clock = lambda: self.time.now_s  # noqa: E731
        return WatchedFiles("api_keys", [self.path], self.read, self.metrics, pause_s=pause_s, clock=clock)

    def read(self) -> int:
        self.n_reads += 1
        try:
            return int(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise SettingsError("no number") from None

    @property
    def refused(self) -> float | None:
        return self.metrics.registry.get_sample_value("nann_file_refused", {"file": "api_keys"})


def test_what_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    number = Number(tmp_path / "number")
    watched = number.watched()
    assert [watched.refresh() for _ in range(3)] == [1, 1, 1]
    assert number.n_reads == 1
    number.path.write_text("12", encoding="utf-8")
    assert [watched.refresh() for _ in range(3)] == [12, 12, 12]
    assert number.n_reads == 2


def test_another_file_under_the_name_is_a_change_of_equal_size_and_time(tmp_path: Path) -> None:
    number = Number(tmp_path / "number")
    watched = number.watched()
    other = tmp_path / "other"
    other.write_text("2", encoding="utf-8")
    status = number.path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(number.path)
    assert watched.refresh() == 2


def test_what_cannot_be_used_is_told_once_and_what_was_there_holds(tmp_path: Path) -> None:
    number = Number(tmp_path / "number")
    watched = number.watched()
    assert number.refused == 0
    number.path.write_text("words", encoding="utf-8")
    with capture_logs() as lines:
        assert [watched.refresh() for _ in range(3)] == [1, 1, 1]
    assert [(line["log_level"], line["file"], line["error"]) for line in lines] == [
        ("error", "api_keys", "no number")
    ]
    assert number.refused == 1
    number.path.unlink()
    assert watched.refresh() == 1
    number.path.write_text("3", encoding="utf-8")
    assert watched.refresh() == 3
    assert number.refused == 0


def test_it_is_looked_at_no_more_often_than_the_pause_says(tmp_path: Path) -> None:
    number = Number(tmp_path / "number")
    watched = number.watched(pause_s=1.0)
    number.path.write_text("22", encoding="utf-8")
    number.time.advance(0.5)
    assert watched.refresh() == 1
    number.time.advance(0.5)
    assert watched.refresh() == 22
