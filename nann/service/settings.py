"""Every setting of the server: one frozen object, read once at start.

A value comes from a flag of ``nann serve``, else from the environment variable ``NANN_<FIELD>``,
else from its default. Nothing else in the service reads the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import EnvSettingsSource
from typing_extensions import Self, override

__all__ = ["ENV_PREFIX", "Settings", "SettingsError", "load_settings"]

ENV_PREFIX: Final = "NANN_"

# What Kubernetes puts into every container for each Service of the namespace whose name begins with
# "nann" (kubernetes.io, "Environment variables" of a Service; Docker's link variables).
_SERVICE_LINK: Final = re.compile(
    r"NANN_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)"
)
_SERVICE_LINK_PORT: Final = re.compile(r"NANN_(\w+_)?PORT")
_SERVICE_LINK_URL: Final = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(ValueError):
    """A setting is missing, unknown or out of range; the message says which and what to do."""


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_LINK.fullmatch(name):
        return True
    return _SERVICE_LINK_PORT.fullmatch(name) is not None and _SERVICE_LINK_URL.match(value) is not None


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nann" / "xla"


class Settings(BaseSettings):
    """Settings of ``nann serve``. Times, sizes and counts carry their unit in the name."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    repository: Path = Field(description="Model repository: <repository>/<model>/<version>/.")
    model: str | None = Field(
        default=None, description="Serve this model only; by default every model of the repository."
    )

    host: str = Field(
        default="127.0.0.1", description="Address both servers listen on; 0.0.0.0 for every interface."
    )
    rest_port: int = Field(default=8501, ge=0, le=65535, description="Port of REST; 0 takes any free one.")
    grpc_port: int = Field(default=8500, ge=0, le=65535, description="Port of gRPC; 0 takes any free one.")

    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where searches run; auto takes the best there is."
    )
    lanes: int = Field(
        default=2, ge=1, le=64, description="Searches that run at a time, each on a thread of its own."
    )
    intra_op_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads one search may use in the model; by default the processors are shared out "
        "between the lanes.",
    )
    max_batch_size: int = Field(
        default=16, ge=1, le=256, description="Queries that share one search at most."
    )
    batch_wait_ms: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Hold a batch that is not full this long; 0 starts it when a lane is free.",
    )
    queue_limit: int = Field(
        default=256, ge=1, description="Queries that may wait; one more is refused (429)."
    )
    queue_work_limit: int = Field(
        default=4_000_000,
        ge=1,
        description="Estimated items to score that may wait, summed over the waiting queries.",
    )

    max_k: int = Field(default=1000, ge=1, description="Largest k a query may ask for.")
    max_ids: int = Field(
        default=10_000, ge=1, description="Longest history, include, exclude and event list of a call."
    )
    max_ef: int = Field(
        default=10_000, ge=1, description="Largest ef, and largest entry of level_topn, of a query."
    )
    max_beam_width: int = Field(default=4096, ge=1, description="Largest beam_width of a query.")
    max_steps_limit: int = Field(default=4096, ge=1, description="Largest max_steps of a query.")
    max_queries_per_call: int = Field(
        default=64, ge=1, le=10_000, description="Most queries in one batch call."
    )
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="Largest REST request body.")
    max_message_bytes: int = Field(default=8 << 20, ge=1024, description="Largest gRPC request message.")
    default_timeout_ms: float = Field(
        default=10_000.0,
        gt=0,
        description="Deadline of a query that brings none; a query's own is never lengthened.",
    )

    default_profile: str | None = Field(
        default=None,
        description="Search profile of a query that names none; by default balanced, where a model has it.",
    )
    exclude_seen_default: bool = Field(
        default=True,
        description="Whether a user's own items are left out of the answer unless the query says otherwise.",
    )
    empty_history: Literal["popular", "error"] = Field(
        default="popular",
        description="Answer to a history without one known item: popular items, marked, or an error.",
    )

    user_store: str | None = Field(
        default=None,
        description="Where live events are kept: a SQLite file, or 'memory' (lost at exit); "
        "by default <repository>/users.sqlite3.",
    )
    user_history_limit: int = Field(default=200, ge=1, description="Newest live events kept for each user.")

    verify: Literal["full", "fast"] = Field(
        default="full", description="Check of a version at load: hashes, or sizes only."
    )
    xla_cache_dir: Path = Field(
        default_factory=_cache_dir,
        description="XLA's cache of compiled programs; makes the next start faster.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe line logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="Form of log lines; auto is console on a terminal and json elsewhere."
    )
    access_log: bool = Field(default=False, description="Log one line for each request.")
    drain_grace_s: float = Field(
        default=20.0,
        gt=0,
        description="Time that accepted requests get to finish after SIGTERM; keep it under the pod's.",
    )
    ready_file: Path | None = Field(
        default=None,
        description="Written once ready: JSON with pid, rest_port and grpc_port, for whoever started us.",
    )

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment; a Service called nann-grpc must not set `grpc_port`."""
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value
            for name, value in env_settings.env_vars.items()
            if not _is_service_link(name.upper(), value or "")
        }
        return init_settings, env_settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_queries_per_call > self.queue_limit:
            raise ValueError(
                f"max_queries_per_call ({self.max_queries_per_call}) is above queue_limit "
                f"({self.queue_limit}): a full batch call could never be admitted"
            )
        return self

    @property
    def user_store_location(self) -> str:
        """``memory`` or the path of the SQLite file."""
        return self.user_store or str(self.repository / "users.sqlite3")

    def printable(self) -> dict[str, str | int | float | bool | None]:
        """The settings for a log line; secrets, and passwords in URLs, are hidden."""
        return {name: _printable(getattr(self, name)) for name in type(self).model_fields}


def _printable(value: Any) -> str | int | float | bool | None:
    if isinstance(value, SecretStr):
        return "**********"
    if isinstance(value, str) and "://" in value:
        url = urlsplit(value)
        if url.password is not None:
            where = url.netloc.rpartition("@")[2]
            return urlunsplit(url._replace(netloc=f"{url.username}:**********@{where}"))
    return str(value) if isinstance(value, Path) else value


def load_settings(environ: Mapping[str, str] | None = None, **flags: Any) -> Settings:
    """Settings from the flags that were given (None: not given), the environment and the defaults.

    Raises:
        SettingsError: a value is wrong, a required one is missing, or a ``NANN_`` variable is unknown.
    """
    _refuse_unknown(os.environ if environ is None else environ)
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors(include_url=False))
        raise SettingsError(problems) from None


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(
        name
        for name, value in environ.items()
        if name.upper().startswith(ENV_PREFIX)
        and name.upper() not in known
        and not _is_service_link(name.upper(), value)
    )
    if unknown:
        raise SettingsError(
            f"unknown setting {', '.join(unknown)}: see `nann serve --help` for those there are, and unset it"
        )


def _describe(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if not where:
        return str(problem["msg"])
    flag = f"--{where.replace('_', '-')} ({ENV_PREFIX}{where.upper()})"
    if problem["type"] == "missing":
        return f"{flag} is required"
    return f"{flag}: {problem['msg']}, got {problem['input']!r}"
