from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_world import make_world
from tiny_models import attention, publish, publish_programs

from nann.engine import devices as module
from nann.engine.artifacts import Artifact
from nann.engine.devices import Device, DeviceMemory, choose_devices, parse_devices, parse_memory_limit
from nann.engine.errors import Unsupported
from nann.engine.scoring.pjrt_scorer import PjrtScorer
from nann.engine.scoring.tensorflow_scorer import TensorFlowScorer
from nann.engine.search_engine import SearchEngine

CPU = Device("cpu")


class CudaError(RuntimeError):
    """As `cupy.cuda.runtime.CUDARuntimeError`."""


def gpu(
    name: str = "NVIDIA H100 80GB HBM3", gib: int = 80, capability: tuple[int, int] = (9, 0)
) -> dict[str, Any]:
    major, minor = capability
    return {"name": name.encode(), "totalGlobalMem": gib << 30, "major": major, "minor": minor}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make CuPy find these GPUs (or fail as told), and JAX installed with or without its CUDA plugin."""

    def make(
        *gpus: dict[str, Any], error: str | None = None, driver: int = 12080, jax: str = "cuda12"
    ) -> None:
        def count() -> int:
            if error is not None:
                raise CudaError(error)
            return len(gpus)

        cupy = ModuleType("cupy")
        cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
            runtime=SimpleNamespace(
                CUDARuntimeError=CudaError,
                getDeviceCount=count,
                getDeviceProperties=lambda index: gpus[index],
                driverGetVersion=lambda: driver,
            )
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        there = {"jax", f"jax_plugins.xla_{jax}"} if jax else set()
        monkeypatch.setattr(module, "_installed", lambda name: name in there)

    return make


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cpu", (CPU,)),
        (" cpu ", (CPU,)),
        ("cuda", (Device("cuda", 0),)),
        ("cuda:3", (Device("cuda", 3),)),
        ("cuda:1,cuda:0", (Device("cuda", 1), Device("cuda", 0))),
        ("cuda:0, cuda:1", (Device("cuda", 0), Device("cuda", 1))),
    ],
)
def test_devices_as_they_are_written(text: str, devices: tuple[Device, ...]) -> None:
    assert parse_devices(text) == devices
    assert parse_devices(",".join(map(str, devices))) == devices


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu,cuda:0", "cuda:0,", "auto", "cuda:0,1"]
)
def test_anything_else_says_what_may_be_written(text: str) -> None:
    with pytest.raises(ValueError, match="write auto, cpu, cuda:0, or cuda:0,cuda:1"):
        parse_devices(text)


def test_a_device_counts_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_devices("cuda,cuda:0")


def test_auto_takes_a_gpu_and_says_which(machine: Any) -> None:
    machine(gpu())
    assert choose_devices("auto") == (
        (Device("cuda", 0),),
        "cuda:0: NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0",
    )


def test_auto_takes_one_gpu_of_several_and_says_how_to_use_all(machine: Any) -> None:
    machine(gpu(), gpu())
    devices, reason = choose_devices("auto")
    assert devices == (Device("cuda", 0),)
    assert reason.endswith("(the first of 2; name several to use them)")


def test_auto_passes_over_a_gpu_that_is_too_old(machine: Any) -> None:
    machine(gpu("Tesla P4", 8, (6, 1)), gpu("T4", 16, (7, 5)))
    assert choose_devices("auto")[0] == (Device("cuda", 1),)
    machine(gpu("Tesla P4", 8, (6, 1)))
    devices, reason = choose_devices("auto")
    assert devices == (CPU,)
    assert reason == (
        "cpu: cuda:0 (Tesla P4, 8 GiB, compute capability 6.1) is not used: "
        "its compute capability is below 7.5"
    )
    assert choose_devices("cuda:0")[0] == (Device("cuda", 0),)  # who names it may know better


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (
            {"error": "cudaErrorNoDevice: no CUDA-capable device is detected"},
            "no CUDA device (driver for CUDA 12.8",
        ),
        (
            {"error": "cudaErrorInsufficientDriver", "driver": 0},
            "no CUDA device (no driver: cudaErrorInsufficient",
        ),
        ({}, "no CUDA device (driver for CUDA 12.8)"),
    ],
)
def test_without_a_gpu_auto_takes_the_cpu_and_a_named_one_is_refused(
    machine: Any, situation: dict[str, Any], reason: str
) -> None:
    machine(**situation)
    devices, why = choose_devices("auto")
    assert devices == (CPU,)
    assert why.startswith(f"cpu: {reason}")
    with pytest.raises(Unsupported) as refused:
        choose_devices("cuda:0")
    assert str(refused.value).startswith(f"cuda:0: {reason}")
    assert choose_devices("cpu")[0] == (CPU,)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "cpu: cupy is not installed"),
        (
            ImportError("libcudart.so.12: cannot open\nTry this"),
            "cpu: cupy cannot be imported: libcudart.so.12: cannot",
        ),
        (
            ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
            "cpu: cupy cannot be imported: No mod",
        ),
        (OSError("a broken installation"), "cpu: a broken installation"),
    ],
)
def test_a_cupy_that_does_not_import_leaves_the_cpu(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "cupy":
            raise error
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    devices, why = choose_devices("auto")
    assert devices == (CPU,)
    assert why.startswith(reason)


@pytest.mark.parametrize(
    ("jax", "scorer", "reason"),
    [
        ("", "auto", "jax is not installed"),
        ("tpu", "pjrt", "jax is installed without its CUDA plugin"),
        ("cuda13", "tensorflow", "tensorflow is not installed"),
    ],
)
def test_auto_wants_a_scorer_that_runs_on_the_gpu(machine: Any, jax: str, scorer: Any, reason: str) -> None:
    machine(gpu(), jax=jax)
    devices, why = choose_devices("auto", scorer=scorer)
    assert (devices, why.endswith(f"is not used: {reason}")) == ((CPU,), True)
    machine(gpu(), jax="cuda13")
    assert choose_devices("auto")[0] == (Device("cuda", 0),)


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(machine: Any) -> None:
    machine(gpu(), gpu("NVIDIA L4", 22, (8, 9)))
    with pytest.raises(Unsupported) as refused:
        choose_devices("cuda:0,cuda:2")
    assert str(refused.value) == (
        "there is no cuda:2: cuda:0 is NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0; "
        "cuda:1 is NVIDIA L4, 22 GiB, compute capability 8.9"
    )
    devices, reason = choose_devices("cuda:1,cuda:0")
    assert devices == (Device("cuda", 1), Device("cuda", 0))
    assert reason.startswith("cuda:1: NVIDIA L4, 22 GiB")


@pytest.mark.parametrize(
    ("installed", "max_batch", "scorer"),
    [
        ({"jax", "tensorflow"}, 16, "pjrt"),
        ({"jax"}, 1, "pjrt"),
        ({"tensorflow"}, 16, "tensorflow"),
        ({"jax", "tensorflow"}, 17, "tensorflow"),  # the programs are for 16
    ],
)
def test_on_the_cpu_auto_takes_the_programs_where_it_can(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], max_batch: int, scorer: str
) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: name in installed)
    manifest: Any = SimpleNamespace(programs=SimpleNamespace(sets={"cpu": SimpleNamespace(max_batch=16)}))
    assert module.choose_scorer("auto", [CPU], manifest, max_batch) == scorer


def test_without_programs_or_tensorflow_the_refusal_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: name == "jax")
    for programs in (None, SimpleNamespace(sets={"gpu": None})):
        manifest: Any = SimpleNamespace(programs=programs)
        with pytest.raises(Unsupported, match=r"'nann\[tensorflow\]', or 'nann\[pjrt\]' and a version"):
            module.choose_scorer("auto", [CPU], manifest, 1)
        assert module.choose_scorer("auto", [Device("cuda", 0)], manifest, 1) == "pjrt"
        assert module.choose_scorer("pjrt", [CPU], manifest, 1) == "pjrt"  # and `open_programs` refuses


def test_lanes_of_the_cpu_have_one_name_and_share_what_may_be_shared(tmp_path: Path) -> None:
    model = attention(90)
    make_world(tmp_path, num_items=90)
    publish(model, tmp_path)
    publish_programs(tmp_path, max_batch=2, max_rows=256)
    artifact = Artifact.open(tmp_path)
    for scorer, kind, scorers in [("auto", PjrtScorer, 3), ("tensorflow", TensorFlowScorer, 1)]:
        opened = module.open_lanes(artifact, [CPU], lanes=3, max_batch=2, scorer=scorer)  # type: ignore[arg-type]
        assert opened.devices == ("cpu",) * 3
        assert len({id(backend) for backend, _ in opened.pairs}) == 3
        found = {id(scorer): scorer for _, scorer in opened.pairs}
        assert len(found) == scorers
        assert all(isinstance(each, kind) for each in found.values())
    engine = SearchEngine.load(tmp_path, lanes=2, max_batch=2)
    assert (engine.lane_devices, engine.placement) == (("cpu", "cpu"), "cpu: as told; scorer pjrt")


def test_a_module_is_looked_for_and_not_imported() -> None:
    assert module._installed("xml.dom.minidom")
    assert not module._installed("nobody_wrote_this.xla_cuda12")  # nor its parent


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("60%", 0.6),
        ("100 %", 1.0),
        ("20GiB", 20 << 30),
        ("1.5GiB", 3 << 29),
        ("512 MiB", 512 << 20),
        ("123", 123),
    ],
)
def test_amounts_of_memory(text: str, limit: float) -> None:
    assert parse_memory_limit(text) == limit
    assert type(parse_memory_limit(text)) is type(limit)


@pytest.mark.parametrize("text", ["", "0", "0%", "101%", "-1", "20GB", "half", "20 gib", "inf"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match=r"write bytes \(20GiB\) or a share \(60%\)"):
        parse_memory_limit(text)


def test_a_share_is_of_the_whole_device() -> None:
    assert DeviceMemory(0.5).limit_bytes(80 << 30) == 40 << 30
    assert DeviceMemory(7).limit_bytes(80 << 30) == 7
    assert DeviceMemory().limit_bytes(80 << 30) is None
