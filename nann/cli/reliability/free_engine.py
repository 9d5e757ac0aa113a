"""The whole service in front of an engine that costs nothing: what is left is the service's own cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from nann.cli.server_process import RunningServer, ServerError
from nann.engine.types import Hits, ItemId, Note, Query, SearchParams, UserId

if TYPE_CHECKING:
    from nann.engine.search_engine import SearchEngine

__all__ = ["FreeEngine", "free_server", "serve_free"]

_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0
_POLL_INTERVAL_S = 0.05
# Ids and scores as long as those of Brunch, so that answers are as long.
_FIRST_ID = 1_000_000_000
_COST = 3_600
_PROGRAM = "import sys; from nann.cli.reliability.free_engine import serve_free; serve_free(sys.argv[1])"


@dataclass(frozen=True, slots=True)
class _Prepared:
    params: SearchParams
    k: int
    known_history: int | None
    notes: tuple[Note, ...] = ()
    cost: int = _COST

    @property
    def compat(self) -> Hashable:
        return self.params


class FreeEngine:
    """Answers any query with the same items, at once, or asleep for `search_s` a batch."""

    def __init__(self, *, lanes: int = 2, max_batch: int = 16, search_s: float = 0.0) -> None:
        self.manifest = SimpleNamespace(
            model_name="nann",
            version=1,
            num_items=1000,
            history_length=50,
            input_dim=64,
            item_id_type="int",
            user_id_type="int",
            quality={},
        )
        self.profiles: Mapping[str, Mapping[str, Any]] = {
            "balanced": {"policy": "best_first", "ef": 300, "beam_width": 64}
        }
        self.n_lanes, self.max_batch, self.max_k = lanes, max_batch, 1000
        self.lane_depth = 1
        self.lane_devices = ("cpu",) * lanes
        self.n_compilations = 0
        self.lane_process = None
        self.memory_bytes = 0
        self._search_s = search_s
        self._hits: dict[int, Hits] = {}

    def check(self, query: Query) -> _Prepared:
        return _Prepared(query.params, query.k, None if query.history is None else len(query.history))

    def search(
        self, batch: Sequence[_Prepared], lane: int, probe: Callable[[str], None] | None = None
    ) -> list[Hits]:
        if self._search_s:
            time.sleep(self._search_s)
        return [self._hits.get(prepared.k) or self._make(prepared.k) for prepared in batch]

    def popular(self, query: Query) -> Hits:
        return self._make(query.k)

    def user_history(self, user_id: UserId) -> tuple[ItemId, ...] | None:
        return (_FIRST_ID,)

    def item_attributes(self, item_id: ItemId) -> Mapping[str, Any] | None:
        return None

    def close(self) -> None:
        pass

    def _make(self, k: int) -> Hits:
        hits = Hits(
            item_ids=[_FIRST_ID + rank for rank in range(k)],
            scores=[-rank / 7 for rank in range(k)],
            n_scored=_COST,
            steps=8,
        )
        self._hits[k] = hits
        return hits


def serve_free(arguments: str) -> None:
    """The server process: serve until SIGTERM. `arguments` is JSON: fields of `Settings`, and `search_s`."""
    import uvloop

    from nann.service.app import Application
    from nann.service.logs import configure_logging
    from nann.service.settings import load_settings

    fields = json.loads(arguments)
    engine = FreeEngine(search_s=fields.pop("search_s"))
    settings = load_settings({}, **fields)
    configure_logging(level=settings.log_level, log_format=settings.log_format)
    application = Application(settings, load_engine=lambda _path: cast("SearchEngine", engine))
    sys.exit(uvloop.run(application.run()).code)


@contextmanager
def free_server(place: Path, *, search_s: float = 0.0, **settings: Any) -> Iterator[RunningServer]:
    """Serve a `FreeEngine` in a process of its own while the block runs; its files lie in `place`.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    (place / "models" / "nann" / "1").mkdir(parents=True, exist_ok=True)
    ready_file, log_path = place / "free.ready", place / "free.log"
    ready_file.unlink(missing_ok=True)
    fields = {
        "search_s": search_s,
        "repository": str(place / "models"),
        "user_store": "memory",
        "rest_port": 0,
        "grpc_port": 0,
        "ready_file": str(ready_file),
        "poll_interval_s": 0,
        **settings,
    }
    started_s = time.monotonic()
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(fields)], stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            while not ready_file.is_file():
                if process.poll() is not None or time.monotonic() > started_s + _READY_TIMEOUT_S:
                    raise ServerError(
                        f"the server is not ready: {log_path.read_text(encoding='utf-8')[-500:]}"
                    )
                time.sleep(_POLL_INTERVAL_S)
            ports = json.loads(ready_file.read_text(encoding="utf-8"))
            yield RunningServer(
                rest_url=f"http://127.0.0.1:{ports['rest_port']}",
                grpc_url=f"grpc://127.0.0.1:{ports['grpc_port']}",
                start_s=time.monotonic() - started_s,
                pid=process.pid,
            )
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
