"""Known chatter is dropped, everything else arrives where stderr went."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = r"""
import os, sys
from nann.engine.scoring.native_log import quiet_native_log
quiet_native_log()
quiet_native_log()  # the second call changes nothing
print("from Python", file=sys.stderr)
os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n")
os.write(2, b"I0000 00:00:1795226621.113484    2234 port.cc:153] oneDNN custom operations are on.\n")
os.write(2, b"I0000 00:00:1795226621.1    2234 device_compiler.h:208] Compiled cluster using XLA!\n")
os.write(2, b"I0000 00:00:1795226621.1    2234 dump_mlir_util.cc:269] disabling MLIR crash reproducer\n")
os.write(2, b"To enable the following instructions: AVX2 FMA, rebuild TensorFlow with the flags.\n")
os.write(2, b"E0000 00:00:1795226621.113484    2234 real_trouble.cc:1] the device is on fire\n")
os.write(2, b"last native line\n")
os.close(2)  # the end of the pipe: everything before it has been forwarded when the thread is done
import threading
[thread.join(10) for thread in threading.enumerate() if thread.name == "native-log"]
"""


def test_chatter_is_dropped_and_the_rest_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert set(done.stderr.splitlines()) == {
        "from Python",
        "E0000 00:00:1795226621.113484    2234 real_trouble.cc:1] the device is on fire",
        "last native line",
    }
