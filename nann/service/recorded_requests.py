"""A version's own recorded requests, replayed before it takes queries.

``<version>/assets.extra/tf_serving_warmup_requests`` is TensorFlow Serving's file: a TFRecord of
PredictionLog messages, of which the ``predict_log`` ones count here. The engine's own warm-up compiles
every shape; real requests bring what only they touch into memory: the pages of the items they reach.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from nann.engine.errors import ArtifactError, RetrievalError
from nann.engine.types import Query, SearchParams
from nann.service.params import result_size, search_params
from nann.service.served_version import profiles_of
from nann.service.settings import Settings
from nann.service.types import ModelMetadata
from nann.service.wire.tf_messages import PredictionLog
from nann.service.wire.tf_predict import predict_call

if TYPE_CHECKING:
    from nann.engine.search_engine import SearchEngine

__all__ = ["REQUESTS_FILE", "replay_recorded"]

REQUESTS_FILE: Final = "assets.extra/tf_serving_warmup_requests"
# TensorFlow Serving's own limit (saved_model_warmup_util.h).
_MAX_RECORDS: Final = 1000
# A TFRecord is: length (uint64), CRC of it (uint32), the bytes, CRC of them (uint32). The CRCs are not
# looked at: the manifest holds a stronger hash of the file.
_HEADER: Final = struct.Struct("<QI")
_CRC_BYTES: Final = 4


def replay_recorded(engine: SearchEngine, version_dir: Path, settings: Settings) -> int:
    """Search for every recorded request on every lane in turn; how many there were.

    Raises:
        ArtifactError: the file is damaged, too long, or holds a request that this version cannot answer.
    """
    path = version_dir / REQUESTS_FILE
    if not path.is_file():
        return 0
    metadata = _metadata(engine)
    profiles = profiles_of(engine)
    count = 0
    for number, record in enumerate(_records(path)):
        if number == _MAX_RECORDS:
            raise _damaged(path, f"at most {_MAX_RECORDS} records", "more")
        try:
            log = PredictionLog.FromString(record)
            if log.WhichOneof("log_type") != "predict_log":
                raise _damaged(
                    path, "PredictionLog records with a predict_log", f"another in record {number}"
                )
            requests = predict_call(log.predict_log.request, metadata).requests
            for request in requests:
                params = search_params(
                    request.params, None, profiles=profiles, default=SearchParams(), settings=settings
                )
                k = result_size(request.k, params, max_k=settings.max_k)
                prepared = engine.check(Query(k=k, params=params, comm_seq=request.comm_seq))
                engine.search([prepared], count % engine.n_lanes)
                count += 1
        except DecodeError:
            raise _damaged(path, "PredictionLog records", f"other bytes in record {number}") from None
        except RetrievalError as error:
            if isinstance(error, ArtifactError):
                raise
            raise _damaged(path, "requests this version answers", f"record {number}: {error}") from error
    return count


def _records(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        size = path.stat().st_size
        while header := file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                raise _damaged(path, "whole TFRecords", "a truncated one")
            length, _ = _HEADER.unpack(header)
            if length > size:
                raise _damaged(path, "whole TFRecords", f"one of {length} bytes")
            record = file.read(length)
            if len(record) < length or len(file.read(_CRC_BYTES)) < _CRC_BYTES:
                raise _damaged(path, "whole TFRecords", "a truncated one")
            yield record


def _metadata(engine: SearchEngine) -> ModelMetadata:
    manifest = engine.manifest
    return ModelMetadata(
        model=manifest.model_name,
        version=manifest.version,
        num_items=manifest.num_items,
        history_length=manifest.history_length,
        input_dim=manifest.input_dim,
        item_id_type=manifest.item_id_type,
        user_id_type=manifest.user_id_type,
        profiles=(),
    )


def _damaged(path: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(str(path), expected=expected, found=found)
