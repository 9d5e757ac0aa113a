"""Reading a version: every kind of damage is an `ArtifactError` that names file, expected and found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from damage import edit_manifest, flip_byte, reseal, rewrite, truncate
from engine_world import add_gate, make_world

from nann.engine.artifacts import Artifact, Manifest, hash_files, read_manifest, verify_files, write_manifest
from nann.engine.errors import ArtifactError
from nann.engine.string_ids import StringIds

N = 80
FILES = [
    "enter_points.npy",
    "history_ids.npy",
    "history_items.npy",
    "history_row_splits.npy",
    "item_embs.npy",
    "item_ids.npy",
    "item_state_item_vector.npy",
    "item_weights.npy",
    "items.parquet",
    "neighbors_level_0.npy",
    "neighbors_level_1.npy",
    "start_points.npy",
]
ARRAYS = [name for name in FILES if name not in ("item_embs.npy", "items.parquet")]


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return make_world(tmp_path / "1", num_items=N, degree=4).directory


@pytest.fixture
def string_version(tmp_path: Path) -> Path:
    return make_world(tmp_path / "1", num_items=N, degree=4, string_ids=True).directory


def refused(version: Path, file: str, *, verify: str = "full") -> ArtifactError:
    """Open the version; check that the error names the file and both sides of the disagreement."""
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(version, verify=verify)
    error = caught.value
    assert error.file.endswith(file)
    assert error.expected and error.found and error.expected != error.found
    assert str(error) == f"{error.file}: expected {error.expected}, found {error.found}"
    return error


# -- what is right is read --------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "fast"])
def test_an_intact_version_opens(version, verify) -> None:
    artifact = Artifact.open(version, verify=verify)
    assert artifact.num_items == len(artifact.item_ids) == N
    assert [table.shape for table in artifact.neighbors] == [(N, 4), (N, 4)]
    for points in (artifact.entry_points, artifact.walk_entry_points, artifact.start_points):
        assert points.dtype == np.int32
    assert artifact.items_parquet == version / "arrays" / "items.parquet"


def test_reading_changes_nothing_and_maps_are_read_only(version) -> None:
    before = hash_files(version)
    artifact = Artifact.open(version)
    with pytest.raises(ValueError, match="read-only"):
        artifact.neighbors[0][0, 0] = 1
    assert hash_files(version) == before
    assert {p.name for p in version.rglob("*")} == {"arrays", "manifest.json", *FILES}


def test_string_ids_are_read_in_byte_order(string_version) -> None:
    artifact = Artifact.open(string_version)
    assert isinstance(artifact.item_ids, StringIds)
    assert list(artifact.item_ids) == sorted(artifact.item_ids, key=str.encode)
    written = pl.read_parquet(string_version / "arrays" / "item_id_strings.parquet")["item_id"]
    assert list(artifact.item_ids) == written.to_list()


def test_a_version_without_attributes_has_no_table(version) -> None:
    (version / "arrays" / "items.parquet").unlink()
    reseal(version)
    assert Artifact.open(version).items_parquet is None


def test_walk_entry_points_default_to_nanns_own_set(version) -> None:
    artifact = Artifact.open(version)
    np.testing.assert_array_equal(artifact.walk_entry_points, artifact.entry_points)
    np.save(version / "arrays" / "walk_entry_points.npy", np.array([3, 1, 4], np.int64))
    reseal(version)
    assert Artifact.open(version).walk_entry_points.tolist() == [3, 1, 4]


@pytest.mark.parametrize("name", ["start_points.npy", "enter_points.npy"])
def test_empty_sets_of_points_are_allowed(version, name) -> None:
    rewrite(version / "arrays" / name, lambda a: a[:0])
    reseal(version)
    Artifact.open(version)


def test_a_manifest_survives_writing_and_reading(version) -> None:
    manifest = read_manifest(version)
    write_manifest(version, manifest)
    assert read_manifest(version) == manifest
    assert not list(version.glob("*.tmp"))


# -- damage on the disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "fast"])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(version, name, verify) -> None:
    (version / "arrays" / name).unlink()
    assert refused(version, name, verify=verify).found == "no file"


@pytest.mark.parametrize("verify", ["full", "fast"])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(version, name, verify) -> None:
    size = (version / "arrays" / name).stat().st_size
    truncate(version / "arrays" / name)
    error = refused(version, name, verify=verify)
    assert (error.expected, error.found) == (f"{size} bytes", f"{size - 1} bytes")


@pytest.mark.parametrize("position", [0, 40, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_by_full_verification(version, name, position) -> None:
    flip_byte(version / "arrays" / name, position)
    assert refused(version, name).expected.startswith("sha256 ")


def test_fast_verification_reads_no_content(version) -> None:
    flip_byte(version / "arrays" / "item_embs.npy")
    Artifact.open(version, verify="fast")


@pytest.mark.parametrize("name", ARRAYS)
def test_a_broken_header_is_found_by_fast_verification(version, name) -> None:
    flip_byte(version / "arrays" / name, 0)
    assert refused(version, name, verify="fast").expected == "a NumPy array file"


def test_a_directory_in_the_place_of_a_file_is_no_file(version) -> None:
    path = version / "arrays" / "item_embs.npy"
    path.unlink()
    path.mkdir()
    refused(version, "item_embs.npy")


def test_a_missing_version_names_its_manifest(tmp_path) -> None:
    assert refused(tmp_path / "9", "manifest.json").found == "no file"


# -- files that are whole but wrong (a faulty builder, sealed) ----------------------------------------


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_that_the_manifest_does_not_list_must_still_be_there(version, name) -> None:
    (version / "arrays" / name).unlink()
    reseal(version)
    assert refused(version, name).found == "no file"


@pytest.mark.parametrize("name", ARRAYS)
def test_a_cut_array_is_refused_even_when_sealed(version, name) -> None:
    truncate(version / "arrays" / name)
    reseal(version)
    refused(version, name)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_dtype_is_named(version, name) -> None:
    rewrite(version / "arrays" / name, lambda a: a.astype(np.complex64))
    reseal(version)
    assert "complex64" in refused(version, name).found


@pytest.mark.parametrize("name", ARRAYS)
def test_foreign_byte_order_is_refused(version, name) -> None:
    rewrite(version / "arrays" / name, lambda a: a.astype(a.dtype.newbyteorder(">")))
    reseal(version)
    assert "byte-swapped" in refused(version, name).found


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_number_of_axes_is_named(version, name) -> None:
    rewrite(version / "arrays" / name, lambda a: a[..., None])
    reseal(version)
    refused(version, name)


@pytest.mark.parametrize(
    "name", ["item_ids.npy", "item_weights.npy", "item_state_item_vector.npy", "neighbors_level_1.npy"]
)
def test_a_wrong_number_of_items_is_named(version, name) -> None:
    rewrite(version / "arrays" / name, lambda a: a[:-1])
    reseal(version)
    error = refused(version, name)
    assert f"{N}" in error.expected and f"{N - 1}" in error.found


@pytest.mark.parametrize("value", [-2, N, 2**31 - 1])
@pytest.mark.parametrize("name", ["neighbors_level_0.npy", "neighbors_level_1.npy"])
def test_an_out_of_range_neighbour_is_refused(version, name, value) -> None:
    def change(table: np.ndarray) -> np.ndarray:
        table[N // 2, 0] = value
        return table

    rewrite(version / "arrays" / name, change)
    reseal(version)
    error = refused(version, name)
    assert error.expected == f"item indices from -1 to {N - 1}"
    assert str(value) in error.found


@pytest.mark.parametrize("value", [-1, N])
@pytest.mark.parametrize(
    ("name", "verify"),
    [
        ("enter_points.npy", "full"),
        ("enter_points.npy", "fast"),
        ("start_points.npy", "full"),
        ("start_points.npy", "fast"),
        ("history_items.npy", "full"),  # with "fast" a history is checked when it is asked for: test_catalog
    ],
)
def test_an_out_of_range_index_is_refused(version, name, value, verify) -> None:
    rewrite(version / "arrays" / name, lambda a: np.append(a, np.array([value], a.dtype)))
    if name == "history_items.npy":
        rewrite(version / "arrays" / "history_row_splits.npy", lambda a: np.append(a[:-1], a[-1:] + 1))
    reseal(version)
    assert refused(version, name, verify=verify).expected == f"item indices from 0 to {N - 1}"


@pytest.mark.parametrize("name", ["item_ids.npy", "history_ids.npy"])
@pytest.mark.parametrize("change", [lambda a: a[::-1], lambda a: np.concatenate([a[:1], a[:1], a[2:]])])
def test_unordered_or_repeated_ids_are_refused(version, name, change) -> None:
    rewrite(version / "arrays" / name, change)
    reseal(version)
    assert "ascending" in refused(version, name).expected


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + 1,
        lambda s: np.append(s[:-1], s[-1] - 1),
        lambda s: np.append(s[:-1], s[-1] + 1),
        lambda s: np.concatenate([s[:2], s[1:2] - 1, s[3:]]),
    ],
    ids=["first is not 0", "last too small", "last too large", "decreasing"],
)
def test_bad_row_splits_are_refused(version, change) -> None:
    rewrite(version / "arrays" / "history_row_splits.npy", change)
    reseal(version)
    assert "non-decreasing offsets from 0 to 80" in refused(version, "history_row_splits.npy").expected


def test_row_splits_of_another_number_of_users_are_refused(version) -> None:
    rewrite(version / "arrays" / "history_row_splits.npy", lambda s: s[:-1])
    reseal(version)
    refused(version, "history_row_splits.npy")


@pytest.mark.parametrize(
    "frame",
    [
        pl.DataFrame({"item_id": [f"{i:03}" for i in range(N - 1)]}),
        pl.DataFrame({"item_id": [f"{N - i:03}" for i in range(N)]}),
        pl.DataFrame({"item_id": ["000", *[f"{i:03}" for i in range(N - 1)]]}),
        pl.DataFrame({"item_id": [None, *[f"{i:03}" for i in range(N - 1)]]}),
        pl.DataFrame({"item_id": list(range(N))}),
        pl.DataFrame({"name": [f"{i:03}" for i in range(N)]}),
    ],
    ids=["short", "descending", "repeated", "null", "integers", "column"],
)
def test_bad_string_ids_are_refused(string_version, frame) -> None:
    frame.write_parquet(string_version / "arrays" / "item_id_strings.parquet")
    reseal(string_version)
    refused(string_version, "item_id_strings.parquet")


def test_string_ids_that_are_no_parquet_file_are_refused(string_version) -> None:
    (string_version / "arrays" / "item_id_strings.parquet").write_bytes(b"PAR1 or not")
    reseal(string_version)
    refused(string_version, "item_id_strings.parquet")


def test_a_pickled_array_is_never_unpickled(version) -> None:
    np.save(version / "arrays" / "item_ids.npy", np.array([print] * N, dtype=object), allow_pickle=True)
    reseal(version)
    assert "Python objects" in refused(version, "item_ids.npy").found


# -- the manifest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "Expecting value"), ("{", "Expecting"), ("[]", "list"), ("null", "NoneType"), ("3", "int")],
)
def test_a_manifest_that_is_no_json_object_is_refused(version, text, found) -> None:
    (version / "manifest.json").write_text(text)
    assert found in refused(version, "manifest.json").found


def test_a_manifest_that_is_no_text_is_refused(version) -> None:
    (version / "manifest.json").write_bytes(b"\xff\xfe{}")
    refused(version, "manifest.json")


@pytest.mark.parametrize("found", [0, 2, "1", None])
def test_another_format_version_is_refused_by_number(version, found) -> None:
    edit_manifest(version, lambda raw: raw.update(format_version=found))
    error = refused(version, "manifest.json")
    assert (error.expected, error.found) == ("format_version 1", repr(found))


def test_a_manifest_without_format_version_is_refused(version) -> None:
    edit_manifest(version, lambda raw: raw.pop("format_version"))
    assert refused(version, "manifest.json").expected == "format_version 1"


REQUIRED = [name for name, field in Manifest.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("field", [name for name in REQUIRED if name != "format_version"])
def test_a_missing_field_is_named(version, field) -> None:
    edit_manifest(version, lambda raw: raw.pop(field))
    assert refused(version, "manifest.json").expected == f"a valid field {field}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("surprise", 1),
        ("num_items", -1),
        ("num_items", "many"),
        ("history_length", 0),
        ("input_dim", 0),
        ("item_id_type", "uuid"),
        ("item_tensors", {"item_vector": {"shape": [8], "dtype": "banana"}}),
        ("item_tensors", {"item_vector": {"shape": ["a"], "dtype": "float16"}}),
        ("files", {"arrays/item_ids.npy": {"sha256": "0"}}),
        ("profiles", {"fast": 3}),
    ],
)
def test_a_field_of_no_sense_is_named(version, field, value) -> None:
    edit_manifest(version, lambda raw: raw.update({field: value}))
    assert f"a valid field {field}" in refused(version, "manifest.json").expected


# -- the gate's tables --------------------------------------------------------------------------------

GATE_TABLES = ["gate_keys.npy", "gate_queries.npy"]


@pytest.fixture
def gated(version: Path) -> Path:
    add_gate(version)
    return version


def test_gate_tables_are_both_there_or_neither(version) -> None:
    plain = Artifact.open(version)
    assert plain.manifest.gate is plain.gate_keys is plain.gate_queries is None
    add_gate(version, dim=3, context_dim=2)
    artifact = Artifact.open(version)
    assert artifact.gate_keys.shape == artifact.gate_queries.shape == (N, 6)
    assert artifact.gate_keys.dtype == np.float16 and not artifact.gate_keys.flags.writeable


@pytest.mark.parametrize("name", GATE_TABLES)
def test_a_manifest_with_a_gate_needs_each_table(gated, name) -> None:
    (gated / "arrays" / name).unlink()
    reseal(gated)
    refused(gated, name)


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a[:, :-1], lambda a: a.astype(np.float32)])
@pytest.mark.parametrize("name", GATE_TABLES)
def test_gate_tables_are_of_the_shape_that_the_manifest_says(gated, name, change) -> None:
    rewrite(gated / "arrays" / name, change)
    reseal(gated)
    refused(gated, name, verify="fast")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", GATE_TABLES)
def test_gate_tables_hold_finite_numbers(gated, name, value) -> None:
    rewrite(gated / "arrays" / name, lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, value, a))
    rewrite(gated / "arrays" / name, lambda a: a.astype(np.float16))
    reseal(gated)
    assert refused(gated, name).found.startswith("1 ")
    Artifact.open(gated, verify="fast")


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"context_dim": -1}, {"residual_weight": -1.0}, {"rmse": -1.0}]
)
def test_a_gate_of_no_sense_is_refused(gated, wrong) -> None:
    edit_manifest(gated, lambda raw: raw["gate"].update(wrong))
    assert f"gate.{next(iter(wrong))}" in refused(gated, "manifest.json").expected


def test_a_profile_with_a_gate_needs_one(version) -> None:
    """Such profiles were tuned on another index; as a default they would refuse every query."""
    own = {"balanced": {"ef": 200, "gate_width": 128}}
    edit_manifest(version, lambda raw: raw.update(profiles=own))
    assert "profile balanced" in refused(version, "manifest.json").expected
    edit_manifest(version, lambda raw: raw.update(profiles={"balanced": {"ef": 200, "gate_width": 0}}))
    Artifact.open(version)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "arrays/../../secret"])
def test_a_path_that_leaves_the_version_is_refused_unread(version, name) -> None:
    (version.parent / "secret").write_text("x")
    edit_manifest(version, lambda raw: raw["files"].update({name: {"sha256": "0", "bytes": 1}}))
    assert refused(version, name).expected == "a path inside the version"


def test_a_link_that_leaves_the_version_is_refused(version) -> None:
    secret = version.parent / "secret.npy"
    target = version / "arrays" / "item_embs.npy"
    target.rename(secret)
    target.symlink_to(secret)
    assert refused(version, "item_embs.npy").expected == "a path inside the version"


def test_the_manifest_and_the_arrays_must_agree_on_tensors(version) -> None:
    edit_manifest(version, lambda raw: raw["item_tensors"].update(extra={"shape": [8], "dtype": "float16"}))
    assert refused(version, "item_state_extra.npy").found == "no file"
    edit_manifest(version, lambda raw: raw["item_tensors"].pop("extra"))
    edit_manifest(version, lambda raw: raw["item_tensors"]["item_vector"].update(shape=[9]))
    error = refused(version, "item_state_item_vector.npy")
    assert (error.expected, error.found) == (f"float16 [{N} × 9]", f"float16 [{N}, 8]")


def test_verify_files_reports_the_first_damage_only_to_the_file_at_fault(version) -> None:
    manifest = read_manifest(version)
    verify_files(version, manifest, "full")
    flip_byte(version / "arrays" / "items.parquet")
    with pytest.raises(ArtifactError, match=r"items\.parquet"):
        verify_files(version, manifest, "full")
    verify_files(version, manifest, "fast")


def test_every_file_is_hashed_as_what_it_holds(version) -> None:
    (version / "arrays" / "empty").write_bytes(b"")
    (version / "arrays" / "larger than a block").write_bytes(np.random.default_rng(0).bytes(5_000_001))
    for name, entry in hash_files(version).items():
        content = (version / name).read_bytes()
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_of_several_damaged_files_the_manifests_first_is_named(version) -> None:
    first, *_, last = read_manifest(version).files
    flip_byte(version / last)
    flip_byte(version / first)
    refused(version, first)


def test_hash_files_names_every_file_but_the_manifest(version) -> None:
    assert set(hash_files(version)) == {f"arrays/{name}" for name in FILES}
    assert json.loads((version / "manifest.json").read_text())["files"].keys() == hash_files(version).keys()
