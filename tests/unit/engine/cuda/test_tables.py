"""The tables of a GPU: what is planned before anything is taken, and what arrives there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_kernels import SMALL
from cuda_shim.fixtures import FakeCupy

from nann.engine.errors import BackendError

KIB = 1024


def load(**options: Any) -> Any:
    from nann.engine.cuda.tables import DeviceTables

    rng = np.random.default_rng(0)
    tables = {
        "neighbors": [rng.integers(-1, 64, (64, degree)).astype(np.int32) for degree in (16, 4)],
        "item_state": {
            "vector": rng.normal(size=(64, 8)).astype(np.float16),
            "bias": rng.normal(size=64).astype(np.float32),
        },
    }
    return tables, DeviceTables.load(**{**tables, **options}, sizes=SMALL)


def on_host(fake_cupy: FakeCupy, array: Any) -> np.ndarray:
    stream = fake_cupy.cupy.cuda.Stream(non_blocking=True)
    return array.get(stream=stream)


@pytest.mark.parametrize("fake_cupy", range(3), indirect=True)
@pytest.mark.parametrize("piece", [1, 100, 2**20])
def test_tables_arrive_as_they_are_padded_with_zeros(
    fake_cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    from nann.engine.cuda import tables as module

    monkeypatch.setattr(module, "_UPLOAD_BYTES", piece)
    vectors = np.random.default_rng(1).normal(size=(64, 3)).astype(np.float16)
    vectors[5] = 0
    gate = np.random.default_rng(2).normal(size=(64, 7)).astype(np.float16)
    given, tables = load(padding_rows=5, item_vectors=vectors, gate_queries=gate)
    for found, table in zip(tables.neighbors, given["neighbors"], strict=True):
        np.testing.assert_array_equal(on_host(fake_cupy, found), table)
    for name, table in given["item_state"].items():
        found = on_host(fake_cupy, tables.item_state[name])
        assert found.dtype == table.dtype
        np.testing.assert_array_equal(found[:64], table)
        assert found.shape == (69, *table.shape[1:])
        assert not found[64:].any()
    np.testing.assert_array_equal(on_host(fake_cupy, tables.item_vectors), vectors.astype(np.float32))
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    np.testing.assert_array_equal(on_host(fake_cupy, tables.norms), norms)
    np.testing.assert_array_equal(on_host(fake_cupy, tables.gate_queries), gate)
    assert tables.nbytes == 4 * 64 * 20 + 69 * 20 + 4 * 64 * 4 + 2 * 64 * 7


def test_tables_that_are_mapped_read_only_are_read(fake_cupy: FakeCupy, tmp_path: Any) -> None:
    np.save(tmp_path / "table.npy", np.arange(64, dtype=np.float32)[:, None])
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    _, tables = load(item_state={"mapped": mapped})
    np.testing.assert_array_equal(on_host(fake_cupy, tables.item_state["mapped"]), mapped)


PARTS = (
    r"graph level 0 4\.00 KiB, graph level 1 1\.00 KiB, item tensor vector 1\.00 KiB, "
    r"item tensor bias 256 bytes, gate 1\.00 KiB, 2 x tiles 2\.00 KiB, reserved for XLA 3\.00 KiB"
)


def test_what_does_not_fit_is_named_part_by_part_before_anything_is_taken(fake_cupy: FakeCupy) -> None:
    total = fake_cupy.machine.devices[0].budget.total
    gate = np.zeros((64, 8), np.float16)
    options = {"lanes": 2, "lane_bytes": {"tiles": KIB}, "reserve_bytes": 3 * KIB, "gate_queries": gate}
    needed = 4 * KIB + KIB + KIB + 256 + KIB + 2 * KIB + 3 * KIB
    fake_cupy.occupy(total - needed + 1)
    allocations = fake_cupy.count("allocations")
    with pytest.raises(
        BackendError, match=rf"^12\.25 KiB are needed \({PARTS}\) on cuda:0, where 12\.25 KiB are free"
    ):
        load(**options)
    assert fake_cupy.count("allocations") == allocations
    fake_cupy.occupy(0)
    load(**options)


def test_a_limit_bounds_tables_and_lanes_but_not_what_is_reserved(fake_cupy: FakeCupy) -> None:
    options = {"lanes": 2, "lane_bytes": {"tiles": KIB}, "reserve_bytes": 3 * KIB}
    ours = 4 * KIB + KIB + KIB + 256 + 2 * KIB
    load(**options, limit_bytes=ours)
    with pytest.raises(BackendError, match=r"on cuda:0, over the limit of 8\.25 KiB"):
        load(**options, limit_bytes=ours - 1)


@pytest.mark.parametrize("fake_cupy", [{"n_devices": 2}], indirect=True)
def test_tables_go_to_the_device_they_are_for(fake_cupy: FakeCupy) -> None:
    _, tables = load(device=1)
    assert {array.device.id for array in (*tables.neighbors, *tables.item_state.values())} == {1}
    assert fake_cupy.machine.devices[0].budget.used == 0
    assert fake_cupy.cupy.cuda.Device().id == 0


def test_a_device_that_fails_while_loading_is_a_backend_error(fake_cupy: FakeCupy) -> None:
    fake_cupy.refuse_allocations_over(2 * KIB)
    with pytest.raises(BackendError, match=r"loading the tables onto cuda:0: Out of memory allocating 4,096"):
        load()
    fake_cupy.lose_device()
    with pytest.raises(BackendError, match="loading the tables onto cuda:0: device lost"):
        load()
