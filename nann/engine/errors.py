"""Every way a retrieval can fail, as one tree.

    RetrievalError
    ├── InvalidQuery        the caller's message is wrong, and retrying it will not help
    ├── NotFound
    │   ├── UnknownModel
    │   ├── UnknownVersion
    │   ├── UnknownLabel
    │   └── UnknownUser
    ├── Unsupported         well formed, but this build or model cannot do it
    ├── Unavailable
    │   ├── NotReady        no model has finished its warm-up
    │   ├── BackendError    out of memory, a launch that failed
    │   │   └── DeviceLost  the device will not answer this process again
    │   └── Overloaded      admission refused; ``retry_after_s`` says when to come back
    ├── DeadlineExceeded    the caller's deadline passed before an answer was ready
    └── ArtifactError       a published version is damaged: names file, expected, found

`service/errors.py` maps each leaf to its HTTP status and gRPC code.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendError",
    "DeadlineExceeded",
    "DeviceLost",
    "InvalidQuery",
    "NotFound",
    "NotReady",
    "Overloaded",
    "RetrievalError",
    "Unavailable",
    "UnknownLabel",
    "UnknownModel",
    "UnknownUser",
    "UnknownVersion",
    "Unsupported",
]


class RetrievalError(Exception):
    """Base of every error that may cross the border between engine, service and caller."""


class InvalidQuery(RetrievalError):
    """The query breaks a rule that the caller can see; the message says which."""


class NotFound(RetrievalError):
    """Something the query names does not exist here."""


class UnknownModel(NotFound):
    """No model of that name is configured."""


class UnknownVersion(NotFound):
    """The model exists, that version of it is not loaded."""


class UnknownLabel(NotFound):
    """The model exists, that version label of it does not."""


class UnknownUser(NotFound):
    """Neither the live store nor the artifact knows that user."""


class Unsupported(RetrievalError):
    """The request is well formed but this model or build cannot carry it out."""


class Unavailable(RetrievalError):
    """Temporarily unable to answer; the same query may succeed later."""


class NotReady(Unavailable):
    """The model has not finished loading and warming up."""


class BackendError(Unavailable):
    """The device or runtime failed while searching; only this batch is lost."""


class DeviceLost(BackendError):
    """The device will not answer this process again: only a restart of the process helps."""


class Overloaded(Unavailable):
    """Admission refused because the queue is full."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RetrievalError):
    """The deadline passed while the query waited or ran."""


class ArtifactError(RetrievalError):
    """A file of a published version is missing, damaged or inconsistent.

    The message always names the file, what was expected and what was found.
    """

    def __init__(self, file: str, *, expected: str, found: str) -> None:
        super().__init__(f"{file}: expected {expected}, found {found}")
        self.file = file
        self.expected = expected
        self.found = found
