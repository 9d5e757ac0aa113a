"""Multiply-adds as the model's own graph has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import Sizes, make_model_world

from nann.offline.benchmark.compare import multiply_adds
from nann.offline.benchmark.compare.multiply_adds import MultiplyAdds, count_multiply_adds


def test_the_attention_model_is_counted_by_hand(tmp_path: Path) -> None:
    make_model_world(tmp_path / "version", num_items=30)
    assert Sizes() == Sizes(history_length=6, input_dim=8, query=16, hidden=(16, 8))
    pairs = 16 * 6 + 6 * 16 + 16 * 8 + 8  # logits, weighted values, two dense layers
    user = 6 * (8 * (16 + 16) + 8 * 16)  # keys with their bias and padding, values
    assert multiply_adds._count(tmp_path / "version") == MultiplyAdds(score=pairs, encode=user)


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"manifest\.json"):
        count_multiply_adds(tmp_path)
