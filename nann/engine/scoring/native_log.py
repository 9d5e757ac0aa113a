"""Keeps TensorFlow's native start-up chatter off stderr.

TensorFlow 2.21 writes through absl before absl's logging is initialised, so no environment variable
silences it: a missing GPU driver, oneDNN's notice, and two lines an XLA cache entry that is read back
(it is first tried as text; LLVM tuning hints count as missing machine features). None of it is news,
and real failures arrive as exceptions. A process that talks to people calls `quiet_native_log` first.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading

__all__ = ["quiet_native_log"]

_CHATTER = re.compile(
    rb"^WARNING: All log messages before absl::InitializeLog"
    rb"|^[IWE]\d{4} [\d:.]+ +\d+ (port|cudart_stub|cuda_platform|text_format|cpu_aot_loader|cpu_feature_guard"
    rb"|cpu_client|service|device_compiler|mlir_graph_optimization_pass|dump_mlir_util|loader|reader"
    rb"|fingerprinting)\.(cc|h):\d+\]"
    rb"|^To enable the following instructions: .* rebuild TensorFlow"
    rb"|^E\d{4} [\d:.]+ +\d+ util\.cc:\d+\] oneDNN supports DT_HALF"
)


def quiet_native_log() -> None:
    """From now on drop known chatter that native code writes to file descriptor 2.

    Python's own stderr goes straight to where it went before, and every other native line follows it.
    Called again, or where there is no stderr, it does nothing.
    """
    if isinstance(sys.stderr, _Direct) or sys.stderr is None:
        return
    try:
        original = os.dup(2)
    except OSError:
        return
    sys.stderr.flush()
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = _Direct(io.FileIO(os.dup(original), "w"), line_buffering=True, errors="backslashreplace")
    threading.Thread(target=_forward, args=(reading, original), name="native-log", daemon=True).start()


class _Direct(io.TextIOWrapper):
    """Python's stderr after the split."""


def _forward(reading: int, original: int) -> None:
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            if not _CHATTER.match(line):
                os.write(original, line)
