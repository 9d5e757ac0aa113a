"""The TensorFlow scorer on a GPU, as far as a CPU shows it: devices, weights, types; not the streams."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nann.engine.errors import Unsupported
from nann.engine.scoring.tensorflow_memory import GpuMemory, split_gpus

ROOT = Path(__file__).parents[4]

# TensorFlow divides its devices before it uses them, so this runs in a process of its own. Logical CPUs
# behave as logical GPUs do where it matters here: each has its own copy of the weights, and a program that
# runs on another device than its weights fails.
_TWO_LANES = """
import tempfile
from pathlib import Path

import numpy as np
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer, configure_tensorflow

tf = configure_tensorflow(xla_cache_dir=None, intra_op_threads=None)
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)

from tiny_models import make_model_world
from nann.engine.artifacts import read_manifest
from nann.engine.backend import Tiles
from nann.engine.scoring.buckets import BucketGrid, Shape
from nann.engine.scoring.tensorflow_memory import GpuMemory

class DeviceArray:  # what a backend's array offers, and no more
    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype

    def view(self, dtype):
        return DeviceArray(self.array.view(dtype))

class Handover:
    def __init__(self):
        self.log = []

    def lend(self, *arrays):
        self.log.append(("lend", [str(array.dtype) for array in arrays]))
        return tuple(tf.constant(array.array) for array in arrays)

    def take(self, tensor):
        self.log.append(("take", tensor.device[-5:]))
        return DeviceArray(tensor.numpy())

directory = Path(tempfile.mkdtemp()) / "1"
model = make_model_world(directory, num_items=64)
grid = BucketGrid(max_batch=3, max_rows=64, wide=False)
kinds = dict(max_batch=3, grid=grid)
manifest = read_manifest(directory)
host = TensorFlowScorer(directory, manifest, **kinds)
handovers = [Handover(), Handover()]
lanes = [
    TensorFlowScorer(directory, manifest, memory=GpuMemory(tf, handover, device=f"CPU:{n}"), **kinds)
    for n, handover in enumerate(handovers, start=1)
]
assert all(lane.warm_up() for lane in lanes)
assert not any(handover.log for handover in handovers), "warm-up has arrays of the host only"
n_programs = [lane.n_compilations for lane in lanes]

history = np.array([[3, 1, 4, 1, -1, -1], [9, -1, -1, -1, -1, -1]], np.int32)
rows = {name: np.resize(table, (2, 32, *table.shape[1:])) for name, table in model.item_state().items()}
tile_query = np.array([1, 0], np.int32)
wanted = host.score(host.encode_history(history), Tiles(Shape(2, 32), tile_query, rows))
on_device = {name: DeviceArray(array) for name, array in rows.items()}
for number, (lane, handover) in enumerate(zip(lanes, handovers), start=1):
    users = lane.encode_history(history)
    assert {user.device[-5:] for user in users} == {f"CPU:{number}"}
    weights = {weight.device[-5:] for weight in lane._model.signatures["score"].captured_inputs}
    assert weights == {f"CPU:{number}"}, weights
    found = lane.score(users, Tiles(Shape(2, 32), DeviceArray(tile_query), on_device))
    np.testing.assert_array_equal(found.array, wanted)
    dtypes = [str(on_device[name].dtype) for name in sorted(on_device)]
    assert handover.log == [("lend", ["uint32", *dtypes]), ("take", f"CPU:{number}")], handover.log
assert [lane.n_compilations for lane in lanes] == n_programs
print("both lanes scored")
"""


def test_each_lane_keeps_and_runs_the_model_on_its_own_device() -> None:
    paths = [str(ROOT), str(ROOT / "tests" / "support")]
    program = f"import sys; sys.path[:0] = {paths!r}\n{_TWO_LANES}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "both lanes scored", done.stderr[-2000:]


class RecordingHandover:
    def lend(self, *arrays: Any) -> tuple[Any, ...]:
        return ("lent", *arrays)

    def take(self, scores: Any) -> Any:
        return ("taken", scores)


@dataclass(frozen=True)
class DeviceArray:
    dtype: np.dtype

    def view(self, dtype: str) -> DeviceArray:
        return DeviceArray(np.dtype(dtype))


def test_int32_arrays_are_lent_as_uint32_and_others_as_they_are() -> None:
    memory = GpuMemory(SimpleNamespace(), RecordingHandover(), device="GPU:3")
    half, tile_query = DeviceArray(np.dtype("float16")), DeviceArray(np.dtype("int32"))
    assert memory.lend(tile_query, half) == ("lent", DeviceArray(np.dtype("uint32")), half)
    assert memory.take("scores") == ("taken", "scores")


@dataclass
class FakeConfig:
    """The part of ``tf.config`` that divides GPUs; refuses once they are in use, as TensorFlow does."""

    n_gpus: int
    in_use: bool = False
    visible: list[str] = field(default_factory=list)
    shares: dict[str, list[Any]] = field(default_factory=dict)

    def list_physical_devices(self, kind: str) -> list[str]:
        assert kind == "GPU"
        return [f"physical {n}" for n in range(self.n_gpus)]

    def set_visible_devices(self, devices: list[str], kind: str) -> None:
        assert kind == "GPU"
        if self.in_use:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.visible = devices

    def set_logical_device_configuration(self, device: str, shares: list[Any]) -> None:
        self.shares[device] = [share.memory_limit for share in shares]

    LogicalDeviceConfiguration = SimpleNamespace


def test_a_gpu_is_divided_between_its_lanes() -> None:
    config = FakeConfig(n_gpus=2)
    tf = SimpleNamespace(config=config)
    assert split_gpus(tf, [1], lanes=3, memory_limit_bytes=3 * 2**30) == [[0, 1, 2]]
    assert config.visible == ["physical 1"]
    assert config.shares == {"physical 1": [1024, 1024, 1024]}


def test_logical_devices_are_counted_through_the_gpus_in_order_of_their_numbers() -> None:
    config = FakeConfig(n_gpus=4)
    tf = SimpleNamespace(config=config)
    assert split_gpus(tf, [3, 1], lanes=2, memory_limit_bytes=2**30) == [[2, 3], [0, 1]]
    assert config.visible == ["physical 3", "physical 1"]
    assert config.shares == {"physical 1": [512, 512], "physical 3": [512, 512]}


@pytest.mark.parametrize(
    ("config", "gpus", "limit", "message"),
    [
        (FakeConfig(n_gpus=0), [0], 2**30, "TensorFlow sees 0 GPUs, so there is no GPU 0"),
        (FakeConfig(n_gpus=2), [1, 2], 2**30, "TensorFlow sees 2 GPUs, so there is no GPU 2"),
        (FakeConfig(n_gpus=1), [0], 2**20, "1048576 bytes of memory are too few for 2 lanes"),
        (FakeConfig(n_gpus=1, in_use=True), [0], 2**30, "cannot be divided: Visible devices cannot be"),
    ],
    ids=["no GPU", "not that GPU", "no memory", "in use"],
)
def test_what_cannot_be_divided_is_refused(config, gpus, limit, message) -> None:
    with pytest.raises(Unsupported, match=message):
        split_gpus(SimpleNamespace(config=config), gpus, lanes=2, memory_limit_bytes=limit)
