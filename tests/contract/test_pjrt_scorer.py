"""What only the PJRT scorer can get wrong: exported files, argument order, JAX's version, the cache."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest
from damage import edit_manifest
from engine_world import make_world
from tiny_models import TinyModel, integer_dot, make_model_world, publish, publish_programs

from nann.engine.artifacts import read_manifest
from nann.engine.backend import Tiles
from nann.engine.errors import ArtifactError, BackendError, Unsupported
from nann.engine.scoring import pjrt_client, pjrt_scorer
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.pjrt_client import PJRT_JAX_VERSION, PjrtDevice
from nann.engine.scoring.pjrt_programs import Interface, PjrtPrograms, open_programs
from nann.engine.scoring.pjrt_scorer import HostHandover, PjrtScorer

N = 64
HISTORY = np.array([[3, 1, 4, 1, -1, -1], [9, -1, -1, -1, -1, -1]], np.int32)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, TinyModel]:
    directory = tmp_path_factory.mktemp("pjrt") / "1"
    model = make_model_world(directory, num_items=N)
    publish_programs(directory)
    return directory, model


@pytest.fixture
def version(published, tmp_path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "1"))


@pytest.fixture(autouse=True)
def _programs_of_its_own(monkeypatch) -> None:
    """What runs in this process for another test would neither be compiled nor looked for in a cache."""
    monkeypatch.setattr(pjrt_client, "_RUNNING", WeakValueDictionary())


def opened(directory: Path, **options) -> PjrtPrograms:
    options = {"platform": "cpu", "max_batch": 3, "intra_op_threads": 1} | options
    return open_programs(directory, read_manifest(directory), **options)


def load(directory: Path, **options) -> PjrtScorer:
    programs = opened(directory, **options)
    return PjrtScorer(programs, HostHandover(programs.device))


@pytest.fixture(scope="module")
def scorer(published) -> PjrtScorer:
    return load(published[0])


def tiles(model: TinyModel, query: int | None = 0, rows: int = 64) -> Tiles:
    items = {name: table[np.arange(rows) % N][None] for name, table in model.item_state().items()}
    return Tiles(Shape(1, rows), None if query is None else np.array([query], np.int32), items)


def test_scores_are_the_models_own(published, scorer) -> None:
    """Several weights have one shape, so a mixed-up order of arguments would run and score nonsense."""
    _, model = published
    users = scorer.encode_history(HISTORY)
    direct = model.module.encode_user(HISTORY)
    state = {name: table.astype(np.float32)[None] for name, table in model.item_state().items()}
    for b in range(2):
        wanted = model.module.score(**{n: t[b : b + 1] for n, t in direct.items()}, **state)["score"][0]
        found = scorer.score(users, tiles(model, b))[0]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-5, atol=1e-6)


def test_one_list_of_items_is_scored_for_every_user(published, scorer) -> None:
    _, model = published
    users = scorer.encode_history(HISTORY)
    rows = scorer.grid.crossed_rows
    assert rows == 32
    found = scorer.score(users, tiles(model, None, rows))
    assert found.shape == (4, rows)  # the batch of the exported programs, the last two rows without a user
    for b in range(2):
        wanted = scorer.score(users, tiles(model, b))[0, :rows]
        np.testing.assert_allclose(found[b], wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_user_tensors_are_padded_to_the_exported_batch_with_zeros(published, scorer, batch) -> None:
    _, model = published
    users = scorer.encode_history(np.full((batch, model.history_length), 5, np.int32))
    names = sorted(model.user_shapes)
    assert [tuple(t.shape) for t in users] == [(4, *model.user_shapes[name]) for name in names]
    for tensor in map(np.asarray, users):
        assert np.abs(tensor[:batch]).sum() > 0
        assert (tensor[batch:] == 0).all()


def test_only_what_batches_of_the_server_need_is_compiled(published) -> None:
    alone = load(published[0], max_batch=1)
    alone.warm_up()
    functions = [function for function, _ in alone._programs.all_programs()]
    assert functions.count("encode_user") == 1
    assert all(shape.tiles == 1 for shape in alone.grid.shapes())
    assert load(published[0], max_batch=3)._programs.batches == [1, 2, 4]


def test_lanes_that_share_programs_count_each_once(published) -> None:
    programs = opened(published[0])
    first, second = (PjrtScorer(programs, HostHandover(programs.device)) for _ in range(2))
    assert first.warm_up()
    assert second.warm_up()
    assert first.n_compilations == len(programs.all_programs())
    assert second.n_compilations == 0


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated"])
def test_a_damaged_file_of_programs_is_an_artifact_error(version, damage) -> None:
    path = version / "programs" / "cpu.zip"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"\xff" * 99, "truncated": content[: len(content) // 2]}[damage]
        )
    with pytest.raises(ArtifactError, match=r"cpu\.zip: expected a"):
        load(version)


def test_a_program_that_is_none_fails_the_warm_up(version) -> None:
    import zipfile

    path = version / "programs" / "cpu.zip"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"\xff\x00 no module")
    with pytest.raises(BackendError, match="the model failed"):
        load(version).warm_up()


def test_weights_that_are_cut_off_are_an_artifact_error(version) -> None:
    path = version / "variables" / "variables.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"variables\.data.*: expected float32 \["):
        load(version)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["user_tensors"].pop("user_keys"),
        lambda raw: raw["item_tensors"].update(item_extra={"shape": [4], "dtype": "float16"}),
    ],
    ids=["user-", "item+"],
)
def test_a_manifest_that_describes_another_model_is_an_artifact_error(version, change) -> None:
    edit_manifest(version, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected arguments of score to begin with"):
        load(version)


def test_tensors_of_another_width_than_the_programs_take_fail_the_warm_up(version) -> None:
    edit_manifest(version, lambda raw: raw["item_tensors"]["item_query"].update(shape=[7]))
    with pytest.raises(BackendError, match="the model failed"):
        load(version).warm_up()


# -- what a version or an installation lacks ---------------------------------------------------


def test_a_version_without_programs_says_how_to_get_them(published, tmp_path) -> None:
    manifest = read_manifest(published[0]).model_copy(update={"programs": None})
    with pytest.raises(Unsupported, match=r"carries no programs for cpu: .*nann export --programs cpu"):
        open_programs(published[0], manifest, platform="cpu", max_batch=1)
    with pytest.raises(Unsupported, match=r"carries no programs for cuda: .*nann export --programs gpu"):
        open_programs(published[0], read_manifest(published[0]), platform="cuda", max_batch=1)


def test_larger_batches_than_the_programs_take_are_refused(published) -> None:
    with pytest.raises(Unsupported, match=r"take up to 4 queries a batch, not 5: .*--programs-max-batch 5"):
        opened(published[0], max_batch=5)


def test_programs_of_other_shapes_are_refused_before_they_are_needed(version) -> None:
    edit_manifest(version, lambda raw: raw["programs"]["sets"]["cpu"].update(max_rows=128))
    with pytest.raises(Unsupported, match=r"no program score-1x96.*publish the version again"):
        load(version)


def test_another_version_of_jax_is_refused(published, monkeypatch) -> None:
    import jax

    monkeypatch.setattr(jax, "__version__", "99.0")
    with pytest.raises(Unsupported, match=r"needs jax and jaxlib 0\.10\.2, found jax 99\.0 .*nann\[pjrt\]"):
        load(published[0])


def test_without_jax_the_extra_is_named(published, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(Unsupported, match=r"pip install 'nann\[pjrt\]'"):
        load(published[0])


def test_the_pinned_jax_is_the_one_that_these_internals_were_written_for() -> None:
    """When this fails: read pjrt_client.py against the new release, then move the pins and the constant."""
    import jax
    import jaxlib

    pins = Path(__file__).parents[2] / "constraints.txt"
    assert f"jax=={PJRT_JAX_VERSION} " in pins.read_text()
    assert f"jaxlib=={PJRT_JAX_VERSION} " in pins.read_text()
    assert (jax.__version__, jaxlib.__version__) == (PJRT_JAX_VERSION, PJRT_JAX_VERSION)


def test_there_is_no_gpu_here_or_it_is_used() -> None:
    try:
        device = PjrtDevice.cuda(0, options={})
    except Unsupported as error:
        assert "CUDA" in str(error)
    else:
        assert device.platform == "cuda"


def test_a_model_without_comm_seq_says_so(version) -> None:
    def without(raw: dict) -> None:
        del raw["programs"]["sets"]["cpu"]["arguments"]["encode_user_comm_seq"]

    edit_manifest(version, without)
    scorer = load(version)
    assert not scorer.takes_comm_seq
    with pytest.raises(Unsupported, match="comm_seq"):
        scorer.encode_comm_seq(np.zeros((1, 48), np.float32))


# -- running -----------------------------------------------------------------------------------


def test_an_error_of_xla_becomes_a_backend_error(published, scorer) -> None:
    _, model = published
    users = scorer.encode_history(HISTORY)
    wrong = tiles(model)
    with pytest.raises(BackendError, match="the model failed"):
        scorer.score(users[:-1], wrong)
    assert np.isfinite(scorer.score(users, tiles(model))).all()


@pytest.mark.parametrize("known", [False, True], ids=["first", "after a sound one of the same programs"])
def test_a_non_finite_model_fails_its_warm_up(published, monkeypatch, known) -> None:
    monkeypatch.setattr(pjrt_scorer, "_BIT_EQUAL", {})
    if known:
        load(published[0]).warm_up()
    programs = opened(published[0])
    broken = [programs.device.put(np.full(w.shape, np.nan, w.dtype)) for w in programs.weights["score"]]
    programs.weights["score"] = broken
    with pytest.raises(BackendError, match="not finite in shape"):
        PjrtScorer(programs, HostHandover(programs.device)).warm_up()


def test_an_out_of_range_history_does_not_bring_the_process_down(published, scorer) -> None:
    """The engine resolves ids first, so this is its own bug; it must still not be a crash."""
    _, model = published
    scorer.encode_history(np.full((1, model.history_length), 10**6, np.int32))


@pytest.mark.parametrize("offset_bytes", [0, 2, 8, 16, 32])
def test_item_tensors_may_start_anywhere_in_memory(tmp_path, offset_bytes) -> None:
    world = make_world(tmp_path / "1", num_items=N)
    model = integer_dot(world.item_vectors, history_length=6)
    publish(model, world.directory)
    publish_programs(world.directory)
    scorer = load(world.directory)
    users = scorer.encode_history(np.array([[3, 1, 4, -1, -1, -1]], np.int32))
    table = model.item_state()["item_vector"]
    moved = aligned(table[None], offset_bytes)
    given = Tiles(Shape(1, moved.shape[1]), np.zeros(1, np.int32), {"item_vector": moved})
    vectors = world.item_vectors.astype(np.float32)
    for content in (table, table[::-1]):  # the same memory again, with other items in it
        moved[:] = content
        wanted = content.astype(np.float32) @ vectors[[3, 1, 4]].sum(axis=0)
        assert scorer.score(users, given)[0].tolist() == wanted.tolist()


def aligned(array: np.ndarray, offset_bytes: int = 0) -> np.ndarray:
    """A copy that starts so far behind a multiple of 64 bytes."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset_bytes
    moved = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def test_one_memory_is_lent_in_several_shapes(published, scorer) -> None:
    """As a lane does: the tiles of every shape begin where its scratch memory begins."""
    _, model = published
    state = {name: aligned(table) for name, table in model.item_state().items()}
    users = scorer.encode_history(HISTORY)
    wide = Tiles(Shape(1, 64), np.zeros(1, np.int32), {n: t.reshape(1, 64, -1) for n, t in state.items()})
    query = np.array([0, 1], np.int32)
    tiled = Tiles(Shape(2, 32), query, {n: t.reshape(2, 32, -1) for n, t in state.items()})
    other = Tiles(Shape(1, 64), np.ones(1, np.int32), wide.items)
    first, second = scorer.score(users, wide)[0], scorer.score(users, other)[0]
    found = scorer.score(users, tiled)
    assert np.array_equal(found, np.stack([first[:32], second[32:]]))
    part = Tiles(Shape(1, 32), None, {n: t[:32].reshape(1, 32, -1) for n, t in state.items()})
    np.testing.assert_allclose(scorer.score(users, part)[0], first[:32], rtol=2e-5, atol=1e-6)


def test_views_of_arrays_that_come_once_do_not_pile_up(published) -> None:
    programs = opened(published[0])
    handover = HostHandover(programs.device)
    kept = [np.zeros(64 * (n + 1), np.uint8) for n in range(1100)]
    for array in kept:
        handover.lend(array[-array.ctypes.data % 64 :][:64])
    assert len(handover._views) <= 1024


def test_half_products_change_scores_a_little(published) -> None:
    _, model = published
    found = {}
    for half in (None, "float16", "bfloat16"):
        scorer = load(published[0], half_products=half)
        found[half] = scorer.score(scorer.encode_history(HISTORY), tiles(model))[0]
    for half, tolerance in (("float16", 4e-3), ("bfloat16", 4e-2)):
        assert (found[half] != found[None]).mean() > 0.5
        np.testing.assert_allclose(found[half], found[None], atol=tolerance * np.abs(found[None]).max())


# -- the cache of compiled programs ------------------------------------------------------------


def test_compiled_programs_are_kept_over_restarts(published, tmp_path, monkeypatch) -> None:
    _, model = published
    first = load(published[0], cache_dir=tmp_path / "cache")
    first.warm_up()
    wanted = first.score(first.encode_history(HISTORY), tiles(model))
    assert len(list((tmp_path / "cache").iterdir())) == first.n_compilations

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(PjrtDevice, "_compile", refuse)
    monkeypatch.setattr(pjrt_client, "_RUNNING", WeakValueDictionary())  # as after a restart
    again = load(published[0], cache_dir=tmp_path / "cache")
    again.warm_up()
    assert again.n_compilations == first.n_compilations
    assert np.array_equal(again.score(again.encode_history(HISTORY), tiles(model)), wanted)


@pytest.mark.parametrize(
    "other",
    [{"half_products": "float16"}, {"intra_op_threads": 2}, {"options": {"xla_cpu_enable_fast_math": True}}],
    ids=["precision", "threads", "options"],
)
def test_the_cache_tells_programs_apart(published, tmp_path, other) -> None:
    for options in ({}, other):
        programs = opened(published[0], cache_dir=tmp_path, **options)
        programs.compile("score", (1, 64))
    assert len(list(tmp_path.iterdir())) == 2


def test_versions_of_one_architecture_share_their_programs(published, tmp_path, monkeypatch) -> None:
    first = load(published[0])
    assert first.warm_up()

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(PjrtDevice, "_compile", refuse)
    monkeypatch.setattr(pjrt_client, "stablehlo_of", refuse)
    assert load(published[0]).warm_up()
    with pytest.raises(AssertionError, match="compiled again"):
        load(published[0], half_products="float16").warm_up()


@pytest.mark.parametrize("content", [b"", b"\xff" * 99], ids=["empty", "garbage"])
def test_a_damaged_cache_entry_is_made_anew(published, tmp_path, content) -> None:
    opened(published[0], cache_dir=tmp_path).compile("score", (1, 64))
    (entry,) = tmp_path.iterdir()
    size = entry.stat().st_size
    entry.write_bytes(content)
    opened(published[0], cache_dir=tmp_path).compile("score", (1, 64))
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [size]


def test_the_environment_is_as_it_was_after_a_client_was_made(monkeypatch) -> None:
    # A client is made once for each number of threads: these nobody else asks for.
    monkeypatch.setenv("NPROC", "7")
    PjrtDevice.cpu(threads=5, options={})
    assert os.environ["NPROC"] == "7"
    monkeypatch.delenv("NPROC")
    PjrtDevice.cpu(threads=6, options={})
    assert "NPROC" not in os.environ


def test_versions_that_come_and_go_leave_no_threads_behind(published) -> None:
    def threads_after_a_load() -> int:
        programs = opened(published[0])
        programs.device.put(np.ones(3, np.float32))  # JAX remembers the device for good
        programs.compile("score", (1, 64))
        del programs
        gc.collect()
        return len(list(Path("/proc/self/task").iterdir()))

    assert threads_after_a_load() == threads_after_a_load() == threads_after_a_load()


# -- programs of JAX functions -----------------------------------------------------------------


def test_programs_of_jax_functions_need_no_file() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-3, 4, (50, 8)).astype(np.float32)

    def encode_user(weights, history):
        rows = weights["vectors"][history] * (history >= 0)[..., None]
        return {"user": rows.sum(axis=1).astype("float16")}

    def score(weights, users, items):
        return (items["item"].astype("float32") * users["user"][:, None].astype("float32")).sum(-1)

    device = PjrtDevice.cpu(threads=1, options={})
    programs = PjrtPrograms.from_functions(
        device,
        encode_user=encode_user,
        score=score,
        weights={"vectors": vectors, "unused": np.ones(3, np.float32)},
        interface=Interface({"user": ((8,), "float16")}, {"item": ((8,), "float16")}, 50, 4, None),
        grid=BucketGrid(max_batch=3, max_rows=128, crossed_rows=32),
    )
    scorer = PjrtScorer(programs, HostHandover(device))
    assert scorer.warm_up()
    assert scorer.n_compilations == len(programs.all_programs())
    histories = np.array([[1, 2, -1, -1], [7, -1, -1, -1]], np.int32)
    users = scorer.encode_history(histories)
    truth = np.stack([vectors[[1, 2]].sum(0), vectors[7]]) @ vectors.T
    items = vectors[:32].astype(np.float16)
    tiled = Tiles(Shape(2, 32), np.array([1, 0], np.int32), {"item": np.stack([items, items])})
    assert np.array_equal(scorer.score(users, tiled), truth[[1, 0], :32])
    crossed = Tiles(Shape(1, 32), None, {"item": items[None]})
    assert np.array_equal(scorer.score(users, crossed)[:2], truth[:, :32])
    assert not scorer.takes_comm_seq


# -- a process of its own ----------------------------------------------------------------------

_PROGRAM = """
import json, sys
sys.modules["tensorflow"] = None
from pathlib import Path
from nann.engine.artifacts import read_manifest
from nann.engine.scoring.pjrt_programs import open_programs
from nann.engine.scoring.pjrt_scorer import HostHandover, PjrtScorer
programs = open_programs(Path(sys.argv[1]), read_manifest(Path(sys.argv[1])), platform="cpu", max_batch=4,
                         intra_op_threads=1, options=json.loads(sys.argv[2]))
bit_equal = PjrtScorer(programs, HostHandover(programs.device)).warm_up()
from jax._src import xla_bridge
print(json.dumps({"bit_equal": bit_equal, "backends": list(xla_bridge._backends),
                  "heavy": sorted({"keras", "polars"} & set(sys.modules))}))
"""


@pytest.mark.slow
def test_bit_equality_needs_no_flag_of_the_process_and_no_tensorflow(tmp_path) -> None:
    """The option is given program by program; the served widths show what happens without it."""
    from tiny_models import real_model

    model = real_model("attention_dnn", 90)
    make_world(tmp_path / "1", num_items=90)
    publish(model, tmp_path / "1")
    publish_programs(tmp_path / "1", max_rows=4096, crossed=False)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def run(options: dict) -> dict:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", _PROGRAM, str(tmp_path / "1"), json.dumps(options)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    assert run({}) == {"bit_equal": True, "backends": [], "heavy": []}
    # Some matrix products by YNN, others by Eigen: what the option is for, and what warming up must notice.
    assert not run({"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"})["bit_equal"]


_CROWD = """
import gc, sys, threading, time
from jax._src.lib import _jax
from nann.engine.scoring.pjrt_client import PjrtDevice
devices = _jax.DeviceList((PjrtDevice.cpu(threads=1, options={}).jax_device,))
started = threading.Barrier(4)
def first_use():
    started.wait()
    done.append(len(tuple(devices)))
def let_others_run(*_):
    if sys._getframe(1).f_code is first_use.__code__:
        time.sleep(0.02)
done = []
gc.callbacks.append(let_others_run)
gc.set_threshold(1)
threads = [threading.Thread(target=first_use) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(done)
"""


def test_threads_that_compile_first_find_no_type_half_registered() -> None:
    """Compiling iterates over the device's list; here the collector lets the others run in the midst of it.

    JAX alone crashes of this, once in some forty starts without the help of this collector.
    """
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _CROWD], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[1, 1, 1, 1]\n"), done.stderr


def test_every_use_of_jaxs_internals_is_in_one_file() -> None:
    package = Path(pjrt_client.__file__).parents[2]
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"jax\._src|(import|from) jaxlib", path.read_text())
    }
    assert users == {"engine/scoring/pjrt_client.py"}


def test_the_manifest_is_checked_with_the_version(version) -> None:
    from nann.engine.artifacts import verify_files

    manifest = read_manifest(version)
    verify_files(version, manifest, "full")
    assert manifest.programs is not None
    name, spec = next(iter(manifest.programs.weights.items()))
    for update, match in (
        ({"offset": 10**9}, f"weight {name} inside a file"),
        ({"file": "elsewhere.bin"}, "which is not listed"),
        ({"dtype": "float7"}, "a dtype of NumPy's"),
    ):
        weights = {**manifest.programs.weights, name: spec.model_copy(update=update)}
        wrong = manifest.model_copy(
            update={"programs": manifest.programs.model_copy(update={"weights": weights})}
        )
        with pytest.raises(ArtifactError, match=match):
            verify_files(version, wrong, "fast")
    less = {key: value for key, value in manifest.programs.weights.items() if key != name}
    wrong = manifest.model_copy(update={"programs": manifest.programs.model_copy(update={"weights": less})})
    with pytest.raises(ArtifactError, match=f"none for {name}"):
        verify_files(version, wrong, "fast")
    files = {key: value for key, value in manifest.files.items() if key != "programs/cpu.zip"}
    with pytest.raises(ArtifactError, match=r"programs\.sets\.cpu in a listed file"):
        verify_files(version, manifest.model_copy(update={"files": files}), "fast")
