"""Every setting of the server: one frozen object, read once at start.

A value comes from a flag of ``nann serve``, else from the environment variable ``NANN_<FIELD>``,
else from its default. Nothing else in the service reads the environment, but OpenTelemetry its own variables.
Two of TensorFlow Serving's container are understood besides: see `_as_in_tensorflow_serving`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import EnvSettingsSource
from typing_extensions import Self, override

from nann.engine.devices import parse_devices, parse_memory_limit
from nann.service.types import parse_policy

__all__ = ["ENV_PREFIX", "Settings", "SettingsError", "load_settings"]

ENV_PREFIX: Final = "NANN_"

# Times the largest message it bounds the memory that callers can take.
_GRPC_CALLS: Final = 1024

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


def _cache_dir(kind: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nann" / kind


class Settings(BaseSettings):
    """Settings of ``nann serve``. Times, sizes and counts carry their unit in the name."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    repository: Path = Field(description="Model repository: <repository>/<model>/<version>/.")
    model: str | None = Field(
        default=None, description="Serve this model only; by default every model of the repository."
    )
    model_config_file: Path | None = Field(
        default=None,
        description="The models to serve in TensorFlow Serving's text format, in place of every model of "
        "the repository.",
    )
    version_policy: str = Field(
        default="latest:1",
        description="Versions of a model to serve: latest:N, all, or specific:N,N…; a model config file "
        "has its own.",
    )
    poll_interval_s: float = Field(
        default=1.0, ge=0, description="Look for new versions this often; 0 never, only when asked to."
    )
    model_config_poll_interval_s: float = Field(
        default=0.0, ge=0, description="Read the model config file again this often; 0 at start only."
    )
    swap_order: Literal["load-first", "unload-first"] = Field(
        default="load-first",
        description="Load a new version beside the old one, or in its place (half the memory, and no "
        "answers meanwhile).",
    )
    check_memory: bool = Field(
        default=True,
        description="Refuse to load a version beside others when its expected size is above what is free.",
    )

    host: str = Field(
        default="127.0.0.1", description="Address both servers listen on; 0.0.0.0 for every interface."
    )
    rest_port: int = Field(default=8501, ge=0, le=65535, description="Port of REST; 0 takes any free one.")
    grpc_port: int = Field(default=8500, ge=0, le=65535, description="Port of gRPC; 0 takes any free one.")

    api_keys_file: Path | None = Field(
        default=None,
        description="Keys that callers must send, one a line: NAME ROLE KEY; by default nobody needs one.",
    )
    open_metrics: bool = Field(
        default=False, description="Whether /metrics and /healthz need no key, where there are keys."
    )
    open_docs: bool = Field(
        default=False,
        description="Whether /docs, /openapi.json and gRPC reflection need no key, where there are keys.",
    )
    tls_cert_file: Path | None = Field(
        default=None,
        description="Certificate chain of both servers in PEM; by default they speak without TLS.",
    )
    tls_key_file: Path | None = Field(default=None, description="Its private key in PEM, not encrypted.")
    tls_client_ca_file: Path | None = Field(
        default=None,
        description="Authorities in PEM; with it every caller must show a certificate of one of them.",
    )

    device: str = Field(
        default="auto",
        description="Where searches run: cpu, a GPU (cuda:0), several (cuda:0,cuda:1), or auto, which "
        "takes a GPU that works, else the CPU, and says why.",
    )
    scorer: Literal["auto", "tensorflow", "pjrt"] = Field(
        default="auto", description="What runs the model; auto takes what is installed and published."
    )
    score_precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="Precision of what goes into the model's matrix products (pjrt only); sums are float32.",
    )
    search_process: bool = Field(
        default=True,
        description="On a CPU, search in a process of its own, so that requests and searches do not wait for "
        "one Python interpreter. On a GPU searches stay in the server's process.",
    )
    search_timeout_s: float = Field(
        default=120.0,
        ge=0,
        description="A search process that keeps a batch for longer is ended and started anew; 0 never.",
    )
    lanes: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Searches that run at a time on each device, each on a thread of its own.",
    )
    intra_op_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads one search may use in the model; by default the processors are shared out "
        "between the lanes.",
    )
    max_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Queries that share one search at most; by default 16 on a CPU and 64 on a GPU.",
    )
    max_batch_work: int | None = Field(
        default=None,
        ge=1,
        description="Estimated items that a batch of several queries scores at most; by default 100,000 on a "
        "CPU and 2,000,000 on a GPU.",
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
    max_header_bytes: int = Field(
        default=16 << 10, ge=1024, description="Largest request line and headers, or gRPC metadata."
    )
    max_connections: int = Field(
        default=1024,
        ge=1,
        description="Most connections of each server; more are refused, but a few for probes.",
    )
    max_grpc_calls: int | None = Field(
        default=None,
        ge=1,
        description="Most gRPC calls at a time, more are refused as overload; by default 1,024, or twice "
        "queue_limit where that is more.",
    )
    client_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest time a caller may take to send a request, or to go on reading an answer.",
    )
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
        description="Where live events are kept: a SQLite file, a Redis (redis://, rediss://, unix://), or "
        "'memory' (lost at exit); by default <repository>/users.sqlite3.",
    )
    user_store_timeout_ms: float = Field(
        default=250.0, gt=0, description="Longest wait for an answer, or for a connection, of Redis."
    )
    user_store_failure: Literal["base", "error"] = Field(
        default="base",
        description="Answer to a user_id while the user store does not answer: from the model's own history "
        "of the user, marked, or an error (503).",
    )
    user_history_limit: int = Field(default=200, ge=1, description="Newest live events kept for each user.")

    verify: Literal["full", "fast"] = Field(
        default="full", description="Check of a version at load: hashes, or sizes only."
    )
    xla_cache_dir: Path = Field(
        default_factory=lambda: _cache_dir("xla"),
        description="XLA's cache of compiled programs; makes the next start faster.",
    )

    kernel_cache_dir: Path = Field(
        default_factory=lambda: _cache_dir("cupy"),
        description="Cache of compiled CUDA kernels; makes the next start on a GPU faster.",
    )

    device_memory_limit: str | None = Field(
        default=None,
        description="Most memory of each GPU for the graph, the item tables and the lanes: bytes (20GiB) "
        "or a share (60%); by default what is free.",
    )
    xla_memory_fraction: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Most memory of each GPU for XLA, as a share of all of it; taken as needed, not at "
        "start.",
    )
    exit_after_impaired_s: float = Field(
        default=60.0,
        ge=0,
        description="End the process (exit 1) when no lane of a model has worked for this long; 0 never.",
    )

    shadow_exact_every: int = Field(
        default=0,
        ge=0,
        description="Search one in so many answered queries again exhaustively, on an idle lane, and export "
        "their recall; 0 none.",
    )
    shadow_exact_max_items: int | None = Field(
        default=None,
        ge=1,
        description="Skip an exhaustive search that would score more items; by default as max_batch_work.",
    )

    tracing: Literal["off", "otlp"] = Field(
        default="off",
        description="Send traces by OpenTelemetry's protocol to where the OTEL_… variables say.",
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
    drain_linger_s: float = Field(
        default=0.5,
        ge=0,
        description="New requests get a refusal for so long after SIGTERM, at most half of the grace; then "
        "ports close.",
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

    @field_validator("device")
    @classmethod
    def _names_devices(cls, text: str) -> str:
        if text != "auto":
            parse_devices(text)
        return text

    @field_validator("device_memory_limit")
    @classmethod
    def _is_memory(cls, text: str | None) -> str | None:
        if text is not None:
            parse_memory_limit(text)
        return text

    @field_validator("version_policy")
    @classmethod
    def _is_policy(cls, text: str) -> str:
        parse_policy(text)
        return text

    @model_validator(mode="before")
    @classmethod
    def _repository_of_config_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("repository") is None and values.get("model_config_file") is not None:
            return {**values, "repository": Path(values["model_config_file"]).absolute().parent}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model_config_file is not None and self.model is not None:
            raise ValueError("give model or model_config_file, not both")
        if self.model_config_poll_interval_s and self.model_config_file is None:
            raise ValueError("model_config_poll_interval_s needs model_config_file")
        if self.max_queries_per_call > self.queue_limit:
            raise ValueError(
                f"max_queries_per_call ({self.max_queries_per_call}) is above queue_limit "
                f"({self.queue_limit}): a full batch call could never be admitted"
            )
        return self

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("give tls_cert_file and tls_key_file together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        return self

    @property
    def grpc_calls_limit(self) -> int:
        """`max_grpc_calls`, or its default, which lets the queue be full first: it says when to come back."""
        return self.max_grpc_calls or max(_GRPC_CALLS, 2 * self.queue_limit)

    @property
    def user_store_location(self) -> str:
        """``memory``, a URL of Redis, or the path of the SQLite file."""
        return self.user_store or str(self.repository / "users.sqlite3")

    def printable(self) -> dict[str, str | int | float | bool | None]:
        """The settings for a log line; secrets, and passwords in URLs, are hidden."""
        return {name: _printable(getattr(self, name)) for name in type(self).model_fields}


def _printable(value: Any) -> str | int | float | bool | None:
    if isinstance(value, SecretStr):
        return "**********"
    if isinstance(value, str) and "://" in value:
        return _without_password(value)
    return str(value) if isinstance(value, Path) else value


def _without_password(url: str) -> str:
    # By pattern: a password with an unescaped '#' or '/' makes a parser see no password at all.
    url = re.sub(r"(?s)(?<=://)([^:@/]*):.*@", r"\1:**********@", url)
    # Redis takes its options in the query as well, this one among them.
    return re.sub(r"(?i)(password=)[^&]*", r"\1**********", url)


def load_settings(environ: Mapping[str, str] | None = None, **flags: Any) -> Settings:
    """Settings from the flags that were given (None: not given), the environment and the defaults.

    Raises:
        SettingsError: a value is wrong, a required one is missing, or a ``NANN_`` variable is unknown.
    """
    environ = os.environ if environ is None else environ
    _refuse_unknown(environ)
    given = {name: value for name, value in flags.items() if value is not None}
    given |= _as_in_tensorflow_serving(environ, given)
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors(include_url=False))
        raise SettingsError(problems) from None


def _as_in_tensorflow_serving(environ: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the variables of TensorFlow Serving's container say, where no setting of ours says it.

    It serves ``$MODEL_BASE_PATH/$MODEL_NAME``, by default under ``/models`` (tools/docker/Dockerfile):
    a repository and a model of it.
    """
    name, base_path = environ.get("MODEL_NAME"), environ.get("MODEL_BASE_PATH")
    ours = {variable.upper() for variable, value in environ.items() if value} | {
        ENV_PREFIX + field.upper() for field in given
    }
    # The names are common enough to be there for another's sake: whoever names a repository means it.
    if not (name or base_path) or {ENV_PREFIX + "REPOSITORY", ENV_PREFIX + "MODEL_CONFIG_FILE"} & ours:
        return {}
    found: dict[str, Any] = {"repository": Path(base_path or "/models")}
    if name and ENV_PREFIX + "MODEL" not in ours:
        found["model"] = name
    return found


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
    return f"{flag}: {problem['msg']}, got {_printable(problem['input'])!r}"
