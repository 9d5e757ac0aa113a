"""Which lane searches next: free ones, and of those only the ones that can be trusted.

A lane is *proven* while its last search succeeded. A search that fails casts doubt on every lane of its
group, because lanes of one device share its fate; each returns with a real search that succeeds on that
very lane. A dead device frees its lanes at once, so without this it would attract all the traffic.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

__all__ = ["Rotation"]


class Rotation:
    """The lanes of one batcher, by number; ``groups[lane]`` names the device that the lane is on.

    A lane takes `depth` batches at a time, of which it searches one.
    """

    def __init__(self, groups: Sequence[Hashable], *, depth: int = 1) -> None:
        self._groups = tuple(groups)
        self._depth = depth
        self._n_taken = [0] * len(groups)
        self._several = len(set(groups)) > 1
        self._free = list(range(len(groups)))
        self._proven = set(self._free)

    @property
    def n_busy(self) -> int:
        """Lanes that search now."""
        return len(self._groups) - len(self._free)

    @property
    def n_proven(self) -> int:
        """Lanes that nothing is known against, busy ones too."""
        return len(self._proven)

    @property
    def doubted(self) -> tuple[int, ...]:
        """Free lanes that a real search must prove before they get traffic again."""
        return tuple(lane for lane in sorted(self._free) if lane not in self._proven)

    def next_lane(self) -> int | None:
        """The lane that traffic should go to: of the device with the fewest busy lanes, the last one freed.

        None when there is none. While no lane at all is proven, traffic may try any free one: an
        answer that comes as an error at once is better than one that comes too late, and it may succeed.
        """
        candidates = [lane for lane in self._free if lane in self._proven or not self._proven]
        if not candidates or not self._several:
            return candidates[-1] if candidates else None
        free = [self._groups[lane] for lane in self._free]
        busy = {group: self._groups.count(group) - free.count(group) for group in set(free)}
        return min(reversed(candidates), key=lambda lane: busy[self._groups[lane]])

    def lanes_with_room(self) -> list[int]:
        """Proven lanes that search and would take one more batch for afterwards."""
        return [lane for lane in self._proven if 0 < self._n_taken[lane] < self._depth]

    def spare_lane(self) -> int | None:
        """A proven lane that leaves another one free for whoever comes next, or the only lane there is."""
        free = sum(lane in self._proven for lane in self._free)
        return self.next_lane() if free > 1 or (free and len(self._groups) == 1) else None

    def take(self, lane: int) -> None:
        """A batch is sent to `lane`, which is free or has room."""
        if not self._n_taken[lane]:
            self._free.remove(lane)
        self._n_taken[lane] += 1

    def give_back(self, lane: int, *, succeeded: bool) -> None:
        """A search on `lane` ended."""
        self._n_taken[lane] -= 1
        if not self._n_taken[lane]:
            self._free.append(lane)
        if succeeded:
            self._proven.add(lane)
        elif lane in self._proven:  # a lane in doubt that fails again says nothing new of its neighbours
            group = self._groups[lane]
            self._proven -= {other for other in self._proven if self._groups[other] == group}
