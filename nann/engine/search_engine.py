"""One loaded version, ready to answer: checks queries, runs them on lanes, gives values back.

A lane is a thread's worth of scratch memory. The engine starts no thread, does no waiting and no
IO after `load`; who calls `search` with which lane is the caller's affair (one thread at a time).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nann.engine.backend import Admission
from nann.engine.catalog import Catalog
from nann.engine.errors import BackendError, InvalidQuery, Unsupported
from nann.engine.filters import FilterCache
from nann.engine.gate import GateRequest
from nann.engine.lanes import LaneProcess, Lanes, LocalLanes
from nann.engine.retrievers.policies import check_params, level_walk
from nann.engine.retrievers.retriever import Answer, PreparedQuery, silent
from nann.engine.types import Hits, ItemId, Note, Query, SearchParams, UserId

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32

    from nann.engine.artifacts import Artifact, Manifest, Verify
    from nann.engine.backend import Backend
    from nann.engine.devices import DeviceMemory, Precision, ScorerName
    from nann.engine.scoring.scorer import Scorer

__all__ = ["DEFAULT_PROFILES", "PreparedQuery", "SearchEngine", "WarmUp"]

# Measured on Brunch, docs/results.md: best_first scores about nine items for each place in its pool.
SCORED_PER_EF = 9
# Below this share of admissible items the pool is widened, so that it still holds enough of them.
_FULL_POOL_SHARE = 0.7

DEFAULT_PROFILES: Mapping[str, Mapping[str, Any]] = {
    "fast": {"policy": "best_first", "ef": 200, "beam_width": 64},
    "balanced": {"policy": "best_first", "ef": 400, "beam_width": 64},
    "exact": {"policy": "exhaustive"},
}


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What warming up took, and whether a score is independent of the shape it is computed in.

    `n_programs` were compiled, or loaded from XLA's cache.
    """

    seconds: float
    n_programs: int
    bit_equal: bool


class SearchEngine:
    """Answers queries over one artifact. See the module docstring for who may call what when."""

    def __init__(
        self,
        artifact: Artifact,
        lanes: Sequence[tuple[Backend[Any, Any], Scorer]] | Lanes,
        *,
        max_batch: int,
        max_k: int = 1000,
        lane_devices: Sequence[str] | None = None,
        placement: str = "",
    ) -> None:
        """An engine of ready-made lanes, or of one lane for each (backend, scorer); they may share a scorer.

        `lane_devices` names the device of each lane, by default one for all: a failure of one lane casts
        doubt on those beside it. `placement` says where the engine searches, and why there.
        """
        if isinstance(lanes, Sequence):
            if not lanes:
                raise ValueError("an engine has at least 1 lane")
            lanes = LocalLanes(artifact, lanes)
        if max_batch < 1 or max_k < 1:
            raise ValueError("an engine has a max_batch and a max_k of at least 1")
        self.manifest: Manifest = artifact.manifest
        self.n_lanes = lanes.count
        self.lane_depth = lanes.depth
        self.lane_devices = tuple(lane_devices) if lane_devices is not None else ("cpu",) * lanes.count
        self.placement = placement
        self.max_batch = max_batch
        self.max_k = max_k
        self._artifact = artifact
        self._lanes = lanes
        self._catalog = Catalog(artifact)
        self._gate_tables = artifact.gate
        self._filters = FilterCache(self._catalog.table)

    @classmethod
    def load(
        cls,
        version_dir: Path,
        *,
        device: str = "cpu",
        scorer: ScorerName = "auto",
        lanes: int = 2,
        max_batch: int | None = None,
        verify: Verify = "full",
        xla_cache_dir: Path | None = None,
        kernel_cache_dir: Path | None = None,
        max_k: int = 1000,
        intra_op_threads: int | None = None,
        memory: DeviceMemory | None = None,
        precision: Precision = "float32",
    ) -> SearchEngine:
        """Verify, map and load a version. `warm_up` must run before the first `search`.

        `device` is what `devices.choose_devices` takes; the other parameters are those of
        `devices.open_lanes`, `lanes` for each device; `max_batch` is `devices.default_max_batch` when
        not given.

        Raises:
            ValueError: `device` names no devices.
            ArtifactError: the version is damaged; names the file, what was expected and what was found.
            Unsupported: the device or the scorer is not one this machine or version has.
            BackendError: the version does not fit into the device's memory.
        """
        from nann.engine.artifacts import Artifact
        from nann.engine.devices import choose_devices, default_max_batch, open_lanes

        devices, reason = choose_devices(device, scorer=scorer)
        max_batch = default_max_batch(devices) if max_batch is None else max_batch
        artifact = Artifact.open(version_dir, verify=verify)
        opened = open_lanes(
            artifact,
            devices,
            scorer=scorer,
            lanes=lanes,
            max_batch=max_batch,
            xla_cache_dir=xla_cache_dir,
            kernel_cache_dir=kernel_cache_dir,
            intra_op_threads=intra_op_threads,
            memory=memory,
            precision=precision,
        )
        return cls(
            artifact,
            opened.pairs,
            max_batch=max_batch,
            max_k=max_k,
            lane_devices=opened.devices,
            placement=f"{reason}; scorer {opened.scorer}",
        )

    @property
    def n_compilations(self) -> int:
        return self._lanes.n_compilations

    @property
    def lane_process(self) -> LaneProcess | None:
        """The process that searches, where that is not this one."""
        return self._lanes.process

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables that every lane shares."""
        tables = (*self._artifact.neighbors, *self._artifact.item_state.values())
        return sum(table.nbytes for table in tables)

    @property
    def profiles(self) -> Mapping[str, Mapping[str, Any]]:
        """Search parameters by profile name: the artifact's own over the defaults."""
        return {**DEFAULT_PROFILES, **self.manifest.profiles}

    def warm_up(self) -> WarmUp:
        """Compile every program, then run every kind of search on every lane, so that no request does.

        Raises:
            BackendError: a program failed, or a score was not finite.
        """
        started = time.perf_counter()
        bit_equal = self._lanes.warm_up()
        for lane in range(self.n_lanes):
            for batch in self._warm_up_batches():
                for hits in self.search(batch, lane):
                    if bad := [note.count for note in hits.notes if note.code == "nonfinite_scores"]:
                        raise BackendError(f"the model gives {bad[0]} items a NaN or infinite score")
        return WarmUp(time.perf_counter() - started, self.n_compilations, bit_equal)

    def check(self, query: Query) -> PreparedQuery:
        """Resolve a query's ids and check it against this model; touches no lane.

        Raises:
            InvalidQuery: names the field that is wrong.
            Unsupported: comm_seq for a model that has no such encoder.
        """
        if not 1 <= query.k <= self.max_k:
            raise InvalidQuery(f"k must be between 1 and {self.max_k}, not {query.k}")
        check_params(query.params)
        if (query.history is None) == (query.comm_seq is None):
            raise InvalidQuery("exactly one of history and comm_seq must be given")
        notes: list[Note] = []
        known = None if query.history is None else self._known(query.history, "history", query.strict, notes)
        comm_seq = None if query.comm_seq is None else self._comm_seq(query.comm_seq)
        walked = comm_seq if query.params.policy == "best_first" else None
        history, own, starts = self._user_side(known, walked, notes)
        admission = self._admission(query, notes, history=known)
        params, retriever, cost = self._plan(query, admission, notes)
        if params.policy in ("level", "level_pruned"):
            starts = self._artifact.entry_points
        return PreparedQuery(
            k=query.k,
            params=params,
            retriever=retriever,
            history=history,
            comm_seq=comm_seq,
            known_history=None if known is None else int(known.size),
            starts=starts,
            admission=admission,
            gate=self._gate(query.k, params, own, admission),
            cost=cost,
            notes=tuple(notes),
            with_attributes=query.with_attributes,
        )

    def search(
        self,
        batch: Sequence[PreparedQuery],
        lane: int,
        probe: Callable[[str], None] | None = None,
    ) -> list[Hits]:
        """Answer a batch of queries of equal `compat`, in their order.

        ``probe(phase)`` is called as each phase ends: encode, expand or scan, gather, score, merge, results.

        Raises:
            BackendError: the model or device failed; no query of the batch has an answer.
        """
        if not 1 <= len(batch) <= self.max_batch or len({query.compat for query in batch}) != 1:
            raise ValueError(f"a batch holds 1 to {self.max_batch} queries of one compat")
        answers, launches = self._lanes.search(batch, lane, probe or silent)
        hits = self._hits(batch, answers, launches=launches)
        if probe is not None:
            probe("results")
        return hits

    def popular(self, query: Query) -> Hits:
        """The most popular admissible items, scored by their share of all behaviours; no model runs.

        Raises:
            InvalidQuery: k or a filter is wrong.
        """
        if not 1 <= query.k <= self.max_k:
            raise InvalidQuery(f"k must be between 1 and {self.max_k}, not {query.k}")
        notes: list[Note] = []
        admission = self._admission(query, notes)
        items = self._catalog.by_popularity
        if admission is not None:
            allowed = np.ones(items.size, np.bool_) if admission.mask is None else admission.mask.copy()
            allowed[admission.excluded] = False
            items = items[allowed[items]]
        items = items[: query.k]
        notes.append(Note("popular_fallback", "popular items, scored by their share of all behaviours"))
        return Hits(
            item_ids=self._catalog.item_ids(items),
            scores=self._artifact.item_weights[items].tolist(),
            n_scored=0,
            steps=0,
            notes=tuple(notes),
            attributes=self._catalog.attributes(items) if query.with_attributes else None,
        )

    def user_history(self, user_id: UserId) -> tuple[ItemId, ...] | None:
        """The artifact's own history of a user, oldest first; None for a user it does not know."""
        return self._catalog.user_history(user_id)

    def item_attributes(self, item_id: ItemId) -> Mapping[str, Any] | None:
        """What the artifact knows of an item; None for an item it does not have."""
        row = self._catalog.item_index([item_id])
        return None if row[0] < 0 else self._catalog.attributes(row)[0]

    def close(self) -> None:
        """Give the lanes' memory and the weights back; mapped files go with the last reference to them."""
        self._lanes.close()

    # -- checking ------------------------------------------------------------------------------

    def _user_side(
        self,
        known: Int32[np.ndarray, " n"] | None,
        comm_seq: Float32[np.ndarray, " width"] | None,
        notes: list[Note],
    ) -> tuple[Int32[np.ndarray, " length"] | None, Int32[np.ndarray, " known"], Int32[np.ndarray, " n"]]:
        """The encoded window (None: no history), its known items, and these and popular ones as starts.

        `known` are the history's known items, `comm_seq` is given where its items are to be recognised.
        """
        artifact, history = self._artifact, None
        length = self.manifest.history_length
        own = np.empty(0, dtype=np.int32)
        if known is not None:
            own = known[-length:]
            history = np.full(length, -1, dtype=np.int32)
            history[: own.size] = own
            if not own.size:
                notes.append(Note("empty_history", "no known item in the history"))
        elif comm_seq is not None and artifact.input_rows is not None:
            own, unknown = artifact.input_rows.recognise(comm_seq.reshape(length, -1))
            if unknown:
                text = "comm_seq: rows that are no item's in this version; the walk does not start there"
                notes.append(Note("unrecognised_comm_seq_rows", text, unknown))
        starts = np.concatenate([own, artifact.start_points])
        return history, own, starts if starts.size else artifact.walk_entry_points

    def _gate(
        self, k: int, params: SearchParams, own: Int32[np.ndarray, " known"], admission: Admission | None
    ) -> GateRequest | None:
        """What chooses the items to score for a user with the known items `own`, where anything does."""
        tables = self._gate_tables
        if not params.gate_width or tables is None:
            return None
        # Where the last admissible place is: all excluded items may rank above it, and a share of the others.
        places, share = k, 1.0
        if admission is not None:
            places += admission.excluded.size
            share = admission.count / self._artifact.num_items
        rank = min(params.ef, math.ceil(places / share))
        return tables.request(own, rank=rank, margin=params.gate_margin)

    def _comm_seq(self, comm_seq: np.ndarray) -> Float32[np.ndarray, " width"]:
        width = self.manifest.history_length * self.manifest.input_dim
        if comm_seq.shape != (width,):
            raise InvalidQuery(f"comm_seq must hold {width} numbers, not {list(comm_seq.shape)}")
        if comm_seq.dtype.kind not in "fiu":
            raise InvalidQuery(f"comm_seq must hold real numbers, not {comm_seq.dtype}")
        with np.errstate(over="ignore"):  # a float64 may be too large for the model's float32
            embedded = comm_seq.astype(np.float32)
        if not np.isfinite(embedded).all():
            raise InvalidQuery("comm_seq holds a NaN, an infinity or a number too large for float32")
        if not self._lanes.takes_comm_seq:
            raise Unsupported("this model cannot be queried by comm_seq")
        return embedded

    def _known(
        self, item_ids: Sequence[ItemId], name: str, strict: bool, notes: list[Note]
    ) -> Int32[np.ndarray, " n"]:
        index = self._catalog.item_index(item_ids)
        known = index[index >= 0]
        if unknown := index.size - known.size:
            if strict:
                first = next(item for item, row in zip(item_ids, index, strict=True) if row < 0)
                raise InvalidQuery(f"{name}: {unknown} unknown item ids, the first is {first!r}")
            notes.append(Note(f"unknown_{name}_items", f"{name}: unknown item ids were skipped", unknown))
        return known

    def _admission(
        self, query: Query, notes: list[Note], *, history: Int32[np.ndarray, " n"] | None = None
    ) -> Admission | None:
        """Which items may be returned; `history` are the rows of ``query.history`` where they are known."""
        seen = (
            history
            if history is not None and query.seen is query.history
            else self._known(query.seen, "seen", False, [])
        )
        excluded = np.concatenate([self._known(query.exclude, "exclude", query.strict, notes), seen])
        mask: Bool[np.ndarray, " N"] | None = None
        if query.filter is not None:
            mask = self._filters.mask(query.filter)
        if query.include is not None:
            included = np.zeros(self._artifact.num_items, dtype=np.bool_)
            included[self._known(query.include, "include", query.strict, notes)] = True
            mask = included if mask is None else mask & included
        if mask is None and not excluded.size:
            return None
        # On a busy thread, whose caches are never warm, np.unique takes three times as long.
        excluded = np.array(sorted({*excluded.tolist()}), dtype=np.int32)
        total = self._artifact.num_items if mask is None else int(mask.sum())
        removed = excluded.size if mask is None else int(mask[excluded].sum())
        return Admission(mask, excluded, total - removed)

    def _plan(
        self, query: Query, admission: Admission | None, notes: list[Note]
    ) -> tuple[SearchParams, Any, int]:
        """The parameters that will run, which retriever runs them, and the items it will about score."""
        params, num_items = query.params, self._artifact.num_items
        if params.policy == "inner_product":
            if query.history is None:
                raise Unsupported("the policy 'inner_product' needs a history, not a comm_seq")
            if self._artifact.item_vectors is None:
                raise Unsupported("this version carries no item vectors for the policy 'inner_product'")
        if params.gate_width and self._gate_tables is None:
            raise Unsupported("this version carries no gate (nann distill makes one)")
        admissible = num_items if admission is None else admission.count
        if params.policy == "exhaustive":
            return SearchParams(policy="exhaustive"), "exhaustive", admissible
        if params.policy in ("level", "level_pruned"):
            degree = self._artifact.neighbors[0].shape[1]
            walked, n_expanded = level_walk(params, query.k)
            level_cost = self._artifact.entry_points.size + n_expanded * degree // 2
            return walked, "hnsw", min(level_cost, num_items)
        scored_per_ef = SCORED_PER_EF if params.policy == "best_first" else 1
        ef = max(params.ef, query.k)
        if admission is not None:
            # Excluded items may all be among the best, so the pool must have room beside them. Whole
            # multiples of ef keep queries with different exclusions in one batch.
            places, share = query.k + admission.excluded.size, admissible / num_items
            ef *= math.ceil(places / ef)
            # A gate leaves out what ranks below the last place of the answer: that place must be inside.
            enough = max(_FULL_POOL_SHARE, places / ef) if params.gate_width else _FULL_POOL_SHARE
            while share < enough and ef < num_items:
                share, ef = 2 * share, 2 * ef
        ef = min(ef, max(num_items, 1))
        if admission is not None and admissible <= scored_per_ef * ef:
            text = "few items are admissible, so all of them were scored"
            notes.append(Note("scored_all_admissible", text, admissible))
            return SearchParams(policy="exhaustive"), "exhaustive", admissible
        if params.policy == "inner_product":
            return SearchParams(policy="inner_product", ef=ef), "inner_product", ef
        walked = SearchParams(
            ef=ef,
            gate_width=params.gate_width,
            gate_margin=params.gate_margin if params.gate_width else SearchParams().gate_margin,
            beam_width=min(params.beam_width, ef),
            max_steps=min(params.max_steps, max(num_items, 1)),  # a step expands at least one item
        )
        return walked, "hnsw", min(scored_per_ef * ef, num_items)

    # -- results -------------------------------------------------------------------------------

    def _hits(
        self, batch: Sequence[PreparedQuery], answers: Sequence[Answer], *, launches: int
    ) -> list[Hits]:
        """The answers by item id. Ids and scores become Python values once a batch, not once a query."""
        splits = [0, *itertools.accumulate(answer.item_index.size for answer in answers)]
        item_ids = self._catalog.item_ids(np.concatenate([answer.item_index for answer in answers]))
        scores = np.concatenate([answer.score for answer in answers]).tolist()
        return [
            Hits(
                item_ids=item_ids[start:stop],
                scores=scores[start:stop],
                n_scored=sum(answer.scored_per_step) + answer.remainder_scored,
                steps=len(answer.scored_per_step),
                notes=_notes(query, answer),
                attributes=self._catalog.attributes(answer.item_index) if query.with_attributes else None,
                explain={
                    "retriever": query.retriever,
                    "policy": query.params.policy,
                    "ef": query.params.ef if query.params.policy in ("best_first", "inner_product") else None,
                    "scored_per_step": list(answer.scored_per_step),
                    "estimated": answer.estimated,
                    "launches": launches,
                },
            )
            for query, answer, (start, stop) in zip(batch, answers, itertools.pairwise(splits), strict=True)
        ]

    def _warm_up_batches(self) -> list[list[PreparedQuery]]:
        some = self._catalog.item_ids(self._catalog.by_popularity[: self.manifest.history_length])
        topn = (8, 8, 8, 8, 8, 8)
        batches = []
        gated = [] if self._gate_tables is None else [SearchParams(gate_width=8)]
        for params in (
            *gated,
            SearchParams(),
            SearchParams(policy="level", level_topn=topn),
            SearchParams(policy="level_pruned", level_ef=(8, 8, 8)),
        ):
            for exclude in ((), some[:1]):
                asked = Query(k=8, params=params, history=some, exclude=exclude, with_attributes=True)
                queries = [self.check(replace(asked, history=some[: n + 1])) for n in range(2)]
                walked = [q for q in queries if q.retriever == "hnsw"]
                batches += [[q] for q in queries[:1]] + ([walked] if len(walked) <= self.max_batch else [])
        include = self.check(Query(k=8, params=SearchParams(), history=some, include=some))
        return [batch for batch in [*batches, [include]] if batch]


def _notes(query: PreparedQuery, answer: Answer) -> tuple[Note, ...]:
    notes = list(query.notes)
    if answer.remainder_scored:
        text = "the walk ended with too few items, so the rest was scored"
        notes.append(Note("remainder_scored", text, answer.remainder_scored))
    if answer.nonfinite:
        notes.append(Note("nonfinite_scores", "NaN or infinite scores do not rank", answer.nonfinite))
    return tuple(notes)
