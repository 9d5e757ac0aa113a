"""Where the GPU tests run: on a real GPU, or rehearsed on the stand-in for CuPy, at sizes that suit it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

__all__ = ["Place", "real_place", "shim_place", "xla_on_the_cpu"]


@dataclass(frozen=True)
class Place:
    """Whether this is a GPU, and how much work is reasonable there."""

    on_gpu: bool
    num_items: int
    sequences: int
    users: int


def real_place() -> Place | str:
    """The first GPU; or why there is none to be used."""
    from nann.engine.cuda.inventory import cuda_devices
    from nann.engine.errors import Unsupported

    try:
        cuda_devices()
    except Unsupported as error:
        return f"no GPU: {error}"
    return Place(True, num_items=20_000, sequences=200, users=128)


@contextmanager
def shim_place() -> Iterator[Place]:
    """The stand-in, with XLA's programs on the CPU."""
    from cuda_shim.fixtures import installed

    with installed(seed=3), xla_on_the_cpu():
        yield Place(False, num_items=1_000, sequences=6, users=6)


@contextmanager
def xla_on_the_cpu() -> Iterator[None]:
    """Inside the block, on the stand-in: XLA's GPU is the CPU, and arrays go there through the host."""
    from nann.engine.cuda import handover
    from nann.engine.scoring.pjrt_client import PjrtDevice

    devices: list[PjrtDevice] = []

    def cuda(_index: int, **_: Any) -> PjrtDevice:
        devices.append(PjrtDevice.cpu(threads=1, options={}))
        return devices[-1]

    # A lane is opened after its programs.
    with (
        patch.object(PjrtDevice, "cuda", cuda),
        patch.object(handover, "JaxHandover", lambda stream: ThroughTheHost(devices[-1], stream)),
    ):
        yield


class ThroughTheHost:
    """Carries arrays between the stand-in and XLA on the CPU, waiting for everything."""

    def __init__(self, device: Any, stream: Any) -> None:
        self._device = device
        self._stream = stream
        self._taken: list[Any] = []

    def lend(self, *arrays: Any) -> list[Any]:
        on_host = [array.get(stream=self._stream) for array in arrays]
        self._stream.synchronize()
        return [self._device.put(array) for array in on_host]

    def take(self, scores: Any) -> Any:
        import cupy

        on_host = np.array(scores)
        with self._stream:
            taken = cupy.empty(on_host.shape, dtype=np.float32)
        taken.set(on_host, stream=self._stream)
        self._taken = [*self._taken[-8:], taken]
        return taken
