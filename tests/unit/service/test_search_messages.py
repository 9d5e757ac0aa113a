"""What crosses to the search process arrives as it was sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nann.engine.backend import Admission
from nann.engine.errors import ArtifactError, BackendError, InvalidQuery
from nann.engine.gate import GateTables
from nann.engine.retrievers.retriever import Answer, PreparedQuery
from nann.engine.types import SearchParams
from nann.service.errors import InternalError
from nann.service.search_process.messages import (
    SearchProcessError,
    dump,
    failure,
    load,
    pack_answers,
    pack_batch,
    raise_failure,
    unpack_answers,
    unpack_batch,
)

N_ITEMS = 1003  # no multiple of eight
TABLES = GateTables(
    keys=np.zeros((N_ITEMS, 4), np.float16),
    queries=np.zeros((N_ITEMS, 4), np.float16),
    dim=2,
    residual_weight=0.5,
    rmse=0.25,
)


def _rows(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _query(**fields: Any) -> PreparedQuery:
    usual: dict[str, Any] = {
        "k": 5,
        "params": SearchParams(ef=7),
        "retriever": "hnsw",
        "history": _rows(4, 2, -1),
        "comm_seq": None,
        "known_history": 2,
        "starts": _rows(9, 4, 2),
        "admission": None,
        "gate": None,
        "cost": 63,
        "notes": (),
        "with_attributes": True,
    }
    return PreparedQuery(**{**usual, **fields})


def _sent(batch: list[PreparedQuery], tables: GateTables | None = TABLES) -> list[PreparedQuery]:
    return unpack_batch(load(dump(pack_batch(batch))), tables)


def _same(sent: PreparedQuery, query: PreparedQuery) -> None:
    assert (sent.k, sent.params, sent.retriever, sent.compat) == (
        query.k,
        query.params,
        query.retriever,
        query.compat,
    )
    for name in ("history", "comm_seq", "starts"):
        there, here = getattr(sent, name), getattr(query, name)
        assert (there is None) == (here is None)
        if here is not None:
            assert there.dtype == here.dtype
            np.testing.assert_array_equal(there, here)
    assert (sent.admission is None) == (query.admission is None)
    if query.admission is not None:
        assert sent.admission is not None
        assert sent.admission.count == query.admission.count
        np.testing.assert_array_equal(sent.admission.excluded, query.admission.excluded)
        assert (sent.admission.mask is None) == (query.admission.mask is None)
        if query.admission.mask is not None:
            assert sent.admission.mask is not None
            assert sent.admission.mask.dtype == np.bool_
            np.testing.assert_array_equal(sent.admission.mask, query.admission.mask)
    assert (sent.gate is None) == (query.gate is None)
    if query.gate is not None:
        assert sent.gate is not None
        assert (sent.gate.rank, sent.gate.margin) == (query.gate.rank, query.gate.margin)
        np.testing.assert_array_equal(sent.gate.history, query.gate.history)


def test_a_batch_of_every_kind_of_query() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.random(N_ITEMS) < share for share in (0.1, 0.9))
    batch = [
        _query(),
        _query(k=1, starts=_rows(), history=_rows(-1, -1, -1)),
        _query(admission=Admission(one, _rows(), int(one.sum()))),
        _query(admission=Admission(None, _rows(3, 8, 700), N_ITEMS - 3)),
        _query(admission=Admission(other, _rows(5), 1), gate=TABLES.request(_rows(4, 2), rank=9, margin=1.5)),
        _query(admission=Admission(one, _rows(1), 0), gate=TABLES.request(_rows(7), rank=1, margin=np.inf)),
    ]
    for sent, query in zip(_sent(batch), batch, strict=True):
        _same(sent, query)
    sent = _sent(batch)
    assert sent[4].gate is not None
    assert sent[4].gate.tables is TABLES, "the tables are the other side's own"


def test_a_filter_of_several_queries_is_sent_once() -> None:
    mask = np.random.default_rng(0).random(4_000_000) < 0.5
    alone = len(dump(pack_batch([_query(admission=Admission(mask, _rows(), 1))])))
    four = [_query(admission=Admission(mask, _rows(n), 1)) for n in range(4)]
    assert len(dump(pack_batch(four))) < alone + 1000
    assert alone < mask.size / 7
    for sent, query in zip(_sent(four), four, strict=True):
        _same(sent, query)


def test_embedded_histories() -> None:
    rng = np.random.default_rng(0)
    batch = [_query(history=None, comm_seq=rng.normal(size=12).astype(np.float32)) for _ in range(3)]
    for sent, query in zip(_sent(batch), batch, strict=True):
        _same(sent, query)


def test_answers() -> None:
    answers = [
        Answer(_rows(3, 1), np.array([2.5, -1.0], np.float32), (4, 2), 0, 1, 17),
        Answer(_rows(), np.empty(0, np.float32), (), 0, 0),
        Answer(_rows(8), np.array([np.inf], np.float32), (1,), 3, 0),
    ]
    for sent, answer in zip(unpack_answers(load(dump(pack_answers(answers)))), answers, strict=True):
        np.testing.assert_array_equal(sent.item_index, answer.item_index)
        np.testing.assert_array_equal(sent.score, answer.score)
        assert sent.score.dtype == np.float32
        for name in ("scored_per_step", "remainder_scored", "nonfinite", "estimated"):
            assert getattr(sent, name) == getattr(answer, name)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BackendError("it broke"), BackendError),
        (InvalidQuery("k"), InvalidQuery),
        (ValueError("a batch holds"), ValueError),
        (ZeroDivisionError("division by zero"), InternalError),
    ],
)
def test_failures(error: Exception, kind: type[Exception]) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        fails()
    with pytest.raises(kind) as raised:
        raise_failure(*load(dump(failure(caught.value))))
    assert type(raised.value) is kind
    assert str(error) in str(raised.value) or kind is InternalError
    assert isinstance(raised.value.__cause__, SearchProcessError)
    assert "in fails" in str(raised.value.__cause__), "the traceback of the other side"


def test_a_damaged_version_is_named_by_its_file() -> None:
    error = ArtifactError("a/b.npy", expected="8 rows", found="7")
    with pytest.raises(ArtifactError) as raised:
        raise_failure(*load(dump(failure(error))))
    assert (raised.value.file, raised.value.expected, raised.value.found) == ("a/b.npy", "8 rows", "7")
