from __future__ import annotations

from pathlib import Path

import pytest

from nann.service.errors import NotEnoughMemory
from nann.service.headroom import available_bytes, check_headroom

MIB = 1 << 20


def system(root: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"meminfo": root / "meminfo", "cgroup_v2": root / "v2", "cgroup_v1": root / "v1"}


MEMINFO = {"meminfo": "MemTotal:  8000 kB\nMemFree: 10 kB\nMemAvailable:    4096 kB\nHugePages_Free: 0\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"meminfo": "MemTotal: 5 kB\n"}, None),
        (MEMINFO, 4 * MIB),
        ({**MEMINFO, "v2/memory.max": "max\n", "v2/memory.current": "5\n"}, 4 * MIB),
        ({**MEMINFO, "v2/memory.max": f"{3 * MIB}\n", "v2/memory.current": f"{MIB}\n"}, 2 * MIB),
        (
            {
                **MEMINFO,
                "v2/memory.max": f"{3 * MIB}\n",
                "v2/memory.current": f"{2 * MIB}\n",
                "v2/memory.stat": f"anon {MIB}\ninactive_file {MIB}\n",
            },
            2 * MIB,
        ),
        ({"v2/memory.max": f"{MIB}", "v2/memory.current": f"{2 * MIB}"}, 0),
        (
            {
                "v1/memory.limit_in_bytes": f"{9 * MIB}",
                "v1/memory.usage_in_bytes": f"{4 * MIB}",
                "v1/memory.stat": f"total_inactive_file {MIB}",
            },
            6 * MIB,
        ),
        ({"v1/memory.limit_in_bytes": str(2**63 - 4096), "v1/memory.usage_in_bytes": "1"}, None),
    ],
)
def test_the_least_that_is_free_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available_bytes(**system(tmp_path, files)) == expected


def test_this_system_tells_something_or_nothing() -> None:
    available = available_bytes()
    assert available is None or available > 0


def test_a_refusal_says_how_much_and_what_to_do() -> None:
    check_headroom(5 * MIB, 5 * MIB)
    check_headroom(5 * MIB, None)
    with pytest.raises(NotEnoughMemory, match=r"needs about 5 MiB and 4 MiB are free.*unload-first"):
        check_headroom(5 * MIB, 4 * MIB)
