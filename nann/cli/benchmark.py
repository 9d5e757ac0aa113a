"""``nann benchmark`` placeholder"""

from __future__ import annotations


def benchmark_command() -> None:
    """x"""
