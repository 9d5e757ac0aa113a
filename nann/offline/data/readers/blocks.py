"""Text files, plain or compressed, as blocks of whole lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nann.offline.data.errors import UnsupportedInputError
from nann.offline.progress import Progress

__all__ = ["Block", "first_lines", "plain_suffix", "read_blocks"]

BLOCK_BYTES = 32 << 20  # about a million UserBehavior rows: long enough for the parser, short enough to hold
CHUNK_BYTES = 1 << 20
COMPRESSED_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file; the first of them is line `first_line` of it, counted from 1."""

    file: str
    first_line: int
    data: bytes

    @property
    def n_lines(self) -> int:
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, without that of the compression: `.csv` of `a.csv.zst`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_blocks(path: Path, progress: Progress, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Every line of the file, in blocks of about `block_bytes`; blocks are never empty.

    The stage shown counts bytes of the file as it lies on disk. Raises UnsupportedInputError when the
    compressed data is damaged.
    """
    with path.open("rb") as raw, progress.stage(f"read {path.name}", path.stat().st_size, "bytes") as stage:
        line = 1
        parts: list[bytes] = []
        held_bytes = 0
        for chunk in _chunks(raw, path):
            parts.append(chunk)
            held_bytes += len(chunk)
            if held_bytes < block_bytes:
                continue
            data, newline, rest = b"".join(parts).rpartition(b"\n")
            parts, held_bytes = [rest], len(rest)
            if newline:
                block = Block(path.name, line, data + newline)
                line += block.n_lines
                yield block
            stage.move_to(raw.tell())
        stage.move_to(raw.tell())
        if held_bytes:
            yield Block(path.name, line, b"".join(parts))


def first_lines(path: Path, n_bytes: int = 1 << 16) -> list[str]:
    """The whole lines within about the first `n_bytes` of the (decompressed) file."""
    data = b""
    with path.open("rb") as raw:
        for chunk in _chunks(raw, path):
            data += chunk
            if len(data) >= n_bytes:
                data = data.rpartition(b"\n")[0]
                break
    return data.decode("utf-8", errors="replace").splitlines()


def _chunks(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    """The decompressed bytes in order, in pieces of no particular size, none of them empty."""
    match path.suffix.lower():
        case ".gz":
            try:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield from _pieces(stream)
            except (OSError, EOFError, zlib.error) as error:
                raise UnsupportedInputError(f"{path}: damaged gzip data ({error})") from error
        case ".zst":
            yield from _zstd_chunks(raw, path)
        case _:
            yield from _pieces(raw)


def _pieces(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    return iter(lambda: stream.read(CHUNK_BYTES), b"")


def _zstd_chunks(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    """One frame after another; zstandard's own stream reader takes a file cut short for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedInputError(
            f"{path} needs the zstandard package: pip install 'nann[offline]', or unpack the file first"
        ) from error
    frame = None
    for piece in _pieces(raw):
        data = piece
        while data:
            frame = frame if frame is not None else zstandard.ZstdDecompressor().decompressobj()
            try:
                unpacked = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise UnsupportedInputError(f"{path}: damaged zstd data ({error})") from error
            if unpacked:
                yield unpacked
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise UnsupportedInputError(f"{path}: damaged zstd data (the file ends within a frame)")
