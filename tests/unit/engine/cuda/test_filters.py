"""`filters.cu` against NumPy: mask minus excluded items, as bitmaps."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_kernels import REAL, SMALL, Device, program, sets

from nann.engine.cuda.modules import BlockSizes

I32, I64, U32 = np.int32, np.int64, np.uint32
UNTOUCHED = U32(0xABCD1234)


def packed(mask: np.ndarray, words: int) -> np.ndarray:
    raw = np.zeros(4 * words, np.uint8)
    bits = np.packbits(mask, bitorder="little")
    raw[: bits.size] = bits
    return raw.view(U32)


def check(
    sizes: BlockSizes, num_items: int, rules: list[tuple[np.ndarray | None, list[int]] | None], seed: int = 0
) -> None:
    """``rules[b]``: no filter, or (mask or all, excluded items)."""
    words = -(-num_items // 32)
    admissible = np.full((len(rules), words), UNTOUCHED, U32)
    masks = np.zeros(len(rules), I64)
    excluded = [[] if rule is None else rule[1] for rule in rules]
    flat = np.array([item for items in excluded for item in items] or [0], I32)
    starts = np.cumsum([0, *map(len, excluded)]).astype(I32)
    filtered = np.array([rule is not None for rule in rules], I32)
    with Device() as device:
        for b, rule in enumerate(rules):
            if rule is not None and rule[0] is not None:
                masks[b] = device.put(packed(rule[0], words))[0]
        program("filters.cu", sizes).run(
            "admit",
            (-(-words // sizes.filter_block), len(rules)),
            sizes.filter_block,
            [filtered, masks, flat, starts, admissible, I64(words)],
            shared_bytes=4 * sizes.filter_block,
            seed=seed,
        )
    for b, (rule, found) in enumerate(zip(rules, sets(admissible), strict=True)):
        if rule is None:
            assert (admissible[b] == UNTOUCHED).all()
            continue
        mask, barred = rule
        wanted = set(range(num_items)) if mask is None else set(np.flatnonzero(mask).tolist())
        assert {item for item in found if item < num_items} == wanted - set(barred)


@pytest.mark.parametrize("num_items", [1, 32, 33, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("seed", range(3))
def test_masks_and_exclusions(num_items, seed) -> None:
    rng = np.random.default_rng(seed)

    def some(n: int) -> list[int]:
        return sorted(rng.permutation(num_items)[:n].tolist())

    mask = rng.random(num_items) < 0.5
    rules = [None, (None, []), (mask, some(5)), (None, some(40)), (mask, []), (~mask, some(num_items))]
    rng.shuffle(rules)
    check(SMALL, num_items, rules, seed=seed)


def test_exclusions_at_the_borders_of_words_and_blocks() -> None:
    border = 32 * SMALL.filter_block
    barred = [0, 31, 32, border - 1, border, border + 31, 2 * border - 1, 2 * border]
    check(SMALL, 2 * border + 1, [(None, barred), (None, [border]), (None, [])])


def test_the_real_block() -> None:
    rng = np.random.default_rng(5)
    num_items = 20_011
    rules = [
        (rng.random(num_items) < 0.3, sorted(rng.permutation(num_items)[:900].tolist())),
        None,
        (None, [7]),
    ]
    check(REAL, num_items, rules)
