from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fake_engine import FakeEngine

from nann.engine.errors import ArtifactError
from nann.service.recorded_requests import REQUESTS_FILE, replay_recorded
from nann.service.settings import Settings
from nann.service.wire.tensors import encode_tensor
from nann.service.wire.tf_messages import PredictionLog


def predict_log(rows: int = 1, width: int = 3200, **spec: str) -> bytes:
    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = "nann"
    request.model_spec.signature_name = spec.get("signature", "serving_default")
    encode_tensor(np.zeros((rows, width), np.float16), request.inputs["comm_seq"])
    encode_tensor(np.array([9, 9, 9, 9, 9, 5], np.int32), request.inputs["level_topn"])
    return cast(bytes, log.SerializeToString())


def write_records(version_dir: Path, *records: bytes) -> Path:
    path = version_dir / REQUESTS_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records))
    return path


def replay(version_dir: Path, engine: Any = None) -> int:
    return replay_recorded(engine or FakeEngine(), version_dir, Settings(repository=version_dir))


def test_a_version_without_records_has_none(tmp_path: Path) -> None:
    assert replay(tmp_path) == 0


def test_every_row_of_every_record_is_searched(tmp_path: Path) -> None:
    write_records(tmp_path, predict_log(), predict_log(rows=3))
    engine = FakeEngine(lanes=2)
    assert replay(tmp_path, engine) == 4
    searched = [batch[0].query for batch in engine.batches]
    assert [(query.k, query.params.policy) for query in searched] == [(5, "level")] * 4


@pytest.mark.parametrize(
    ("records", "found"),
    [
        ([b"\xff\xff"], "other bytes in record 0"),
        ([predict_log(), b""], "another in record 1"),
        ([predict_log(width=7)], "record 0: input 'comm_seq'"),
        ([predict_log(signature="score")], "record 0: Serving signature key"),
        ([predict_log()] * 1001, "found more"),
    ],
    ids=range(5),
)
def test_a_record_that_cannot_be_answered_fails_the_load(
    tmp_path: Path, records: list[bytes], found: str
) -> None:
    write_records(tmp_path, *records)
    with pytest.raises(ArtifactError, match=found) as error:
        replay(tmp_path)
    assert error.value.file.endswith(REQUESTS_FILE)


@pytest.mark.parametrize("cut", [1, 5, 11, 20])
def test_a_truncated_file_fails_the_load(tmp_path: Path, cut: int) -> None:
    path = write_records(tmp_path, predict_log())
    path.write_bytes(path.read_bytes()[:-cut] if cut < 20 else path.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match="truncated"):
        replay(tmp_path)


def test_a_length_that_cannot_be_reads_nothing(tmp_path: Path) -> None:
    path = write_records(tmp_path, predict_log())
    path.write_bytes(b"\xff" * 12 + b"x")
    with pytest.raises(ArtifactError, match="whole TFRecords"):
        replay(tmp_path)


def test_the_file_that_tensorflow_writes(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    (tmp_path / REQUESTS_FILE).parent.mkdir()
    with tf.io.TFRecordWriter(str(tmp_path / REQUESTS_FILE)) as writer:
        writer.write(predict_log())
        writer.write(predict_log())
    assert replay(tmp_path) == 2
