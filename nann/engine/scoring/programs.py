"""The exported form of a model: XLA programs and the weights that are their arguments.

A version may carry ``programs/<set>.zip``, one entry a program (a serialised HLO module), named
``<function>-<sizes>.hlo``. Functions, with b, T, R, C the sizes in their names:

    encode_user-b            history int32 [b, L]               -> user tensors [max_batch, …]
    encode_user_comm_seq-b   comm_seq float32 [b, L·input_dim]  -> the same
    score-TxR                user tensors [max_batch, …], tile_query int32 [T], item tensors [T, R, …]
                                                                -> float32 [T, R]
    score_crossed-C          user tensors [max_batch, …], item tensors [1, C, …] -> float32 [max_batch, C]

followed by the weights that the function reads. Tensors of a kind come in the order of their names.
Rows of user tensors past the encoded ones are zero. Reading needs NumPy alone.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nann.engine.errors import ArtifactError

if TYPE_CHECKING:
    from nann.engine.artifacts import WeightSpec

__all__ = [
    "ENCODE_COMM_SEQ",
    "ENCODE_HISTORY",
    "SCORE",
    "SCORE_CROSSED",
    "ProgramFile",
    "encoder_batches",
    "program_name",
    "read_weights",
    "write_program_file",
]

ENCODE_HISTORY = "encode_user"
ENCODE_COMM_SEQ = "encode_user_comm_seq"
SCORE = "score"
SCORE_CROSSED = "score_crossed"
# ZIP keeps a time for each entry; a fixed one makes equal programs equal files.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def program_name(function: str, *sizes: int) -> str:
    """The entry's name without its suffix: ``score-16x32``."""
    return f"{function}-{'x'.join(map(str, sizes))}"


def encoder_batches(max_batch: int) -> list[int]:
    """Powers of two up to the largest batch: the users of one call of an encoder, padded up."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], max_batch))
    return sizes


def write_program_file(path: Path, programs: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, serialised HLO module) pairs; they shrink to a seventh."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, module in programs:
            entry = zipfile.ZipInfo(f"{name}.hlo", date_time=_ZIP_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, module)


class ProgramFile:
    """An opened set of programs."""

    def __init__(self, path: Path) -> None:
        """Raises `ArtifactError` when the file is not a set of programs."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                # Read whole: the file holds some hundred kilobytes, and threads compile from it.
                self._modules = {Path(name).stem: archive.read(name) for name in archive.namelist()}
        except FileNotFoundError:
            raise ArtifactError(str(path), expected="a file of programs", found="no file") from None
        except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ArtifactError(str(path), expected="a ZIP file of programs", found=str(error)) from error

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def module(self, name: str) -> bytes:
        """The serialised HLO module. Raises `ArtifactError` when there is none of that name."""
        try:
            return self._modules[name]
        except KeyError:
            raise ArtifactError(str(self.path), expected=f"a program {name}", found="none") from None


def read_weights(directory: Path, weights: Mapping[str, WeightSpec]) -> dict[str, np.ndarray]:
    """The weights of a version, mapped read-only from the files that hold them.

    Raises:
        ArtifactError: a file is missing or too short.
    """
    found: dict[str, np.ndarray] = {}
    for name, spec in weights.items():
        path = directory / spec.file
        try:
            if 0 in spec.shape:
                found[name] = np.empty(spec.shape, dtype=spec.dtype)
            else:
                found[name] = np.memmap(path, spec.dtype, mode="r", offset=spec.offset, shape=spec.shape)
        except (OSError, ValueError) as error:
            wanted = f"{spec.dtype} {list(spec.shape)} of weight {name} from byte {spec.offset} on"
            raise ArtifactError(str(path), expected=wanted, found=str(error)) from error
    return found
