"""Hostile inputs: JSON from the schemas of an OpenAPI document, protobuf messages from their descriptors.

Each is made to be nearly right, so that it gets past the first check and meets the next. Everything comes
from one seeded generator: a failing input can be made again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from google.protobuf.descriptor import FieldDescriptor

__all__ = ["Hostile", "ProtoInputs", "RestInputs"]

_INTEGERS: Final = (
    *(0, 1, 2, 5, 10, 64, 200, 1000, 1001, -1, -2),
    *(2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30),
)
_NUMBERS: Final = (0.0, -0.0, 0.5, 1e-320, 1e300, -1e300, 1.5, 65504.0, 65520.0, 3.4e38, 3.5e38)
_TEXTS: Final = (
    *(
        "",
        " ",
        "0",
        "-1",
        "nann",
        "balanced",
        "best_first",
        "level",
        "exhaustive",
        "serving_default",
        "retrieve",
    ),
    *(
        "comm_seq",
        "level_topn",
        "top_k",
        "signature_def",
        "\0",
        "a\nb",
        "é",
        "\u202e",
        "\ud800",
        "\U0001f600",
    ),
    *("../../etc/passwd", "%2e%2e", "${x}", "{}", "' OR 1=1 --", "NaN", "1e999", "x" * 600, "x" * 70_000),
)
_NOT_FINITE: Final = (float("nan"), float("inf"), float("-inf"))
_ARRAY_LENGTHS: Final = (0, 1, 2, 3, 6, 6, 20)
_MAX_DEPTH: Final = 6
_HEADERS: Final = (
    "Content-Type: application/json",
    "Content-Type: text/plain",
    "Content-Type: application/json; charset=utf-16",
    "Content-Type: ",
    "Content-Encoding: gzip",
    "Accept: */*;q=\xff",
    "X-Request-Id: a\tb",
    "X-Request-Id: " + "r" * 300,
    "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "Traceparent: 00-zz-",
    "Authorization: Bearer \xe9\xe8",
    "Authorization: Basic Og==",
    "X-API-Key: nobody",
    "X-Forwarded-For: ::1",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: close",
    "Expect: 100-continue",
    "Cookie: " + "c" * 4000,
)


class Hostile:
    """Values that no schema asked for."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def integer(self) -> int:
        return self.rng.choice(_INTEGERS) if self.chance(0.8) else self.rng.randrange(-(2**40), 2**40)

    def number(self) -> float:
        return self.rng.choice(_NUMBERS) if self.chance(0.7) else self.rng.uniform(-1e3, 1e3)

    def text(self) -> str:
        return self.rng.choice(_TEXTS)

    def value(self, depth: int = 0) -> Any:
        """Any JSON value."""
        simple = (lambda: None, lambda: self.chance(0.5), self.integer, self.number, self.text, self.text)
        nested = (
            lambda: [self.value(depth + 1) for _ in range(self.rng.randrange(4))],
            lambda: {self.text(): self.value(depth + 1) for _ in range(self.rng.randrange(4))},
            self._deep,
        )
        makers: Sequence[Callable[[], Any]] = simple if depth >= _MAX_DEPTH else (*simple, *nested)
        return self.rng.choice(makers)()

    def _deep(self) -> Any:
        value: Any = self.text()
        for _ in range(self.rng.choice((10, 100, 500))):
            value = [value] if self.chance(0.7) else {"a": value}
        return value

    def damaged(self, content: bytes) -> bytes:
        """`content` with a few bytes changed, added or cut off."""
        changed = bytearray(content)
        for _ in range(self.rng.randrange(1, 4)):
            position = self.rng.randrange(len(changed) + 1)
            match self.rng.randrange(4):
                case 0 if position < len(changed):
                    changed[position] ^= 1 << self.rng.randrange(8)
                case 1:
                    changed[position:position] = self.rng.randbytes(self.rng.randrange(1, 9))
                case 2:
                    del changed[position:]
                case _:
                    changed[position:position] = changed[: self.rng.randrange(64)]
        return bytes(changed)


class RestInputs:
    """Whole HTTP requests to the paths of an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any], hostile: Hostile, *, row_width: int) -> None:
        """`row_width` is the length of a valid `comm_seq`, which no random value would have."""
        self._document = document
        self._hostile = hostile
        self._row = [0.25] * row_width
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]

    def request(self) -> bytes:
        """One request, mostly well formed as HTTP."""
        hostile, rng = self._hostile, self._hostile.rng
        method, path, operation = rng.choice(self._operations)
        target = "/".join(self._segment(part) for part in path.split("/"))
        if hostile.chance(0.1):
            target += "?" + quote(self._text()[:200], safe="=&") + "=" + quote(self._text(), safe="")
        if hostile.chance(0.03):
            method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"))
        body = self._body(operation)
        headers = [rng.choice(_HEADERS) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        head = "\r\n".join((f"{method} {target} HTTP/1.1", "Host: fuzz", *headers))
        return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body

    def malformed(self) -> bytes:
        """Bytes that may be no HTTP at all."""
        return self._hostile.damaged(self.request()[:4096])

    def _text(self) -> str:
        return self._hostile.text().encode("utf-8", "replace").decode()[:300]

    def _segment(self, part: str) -> str:
        if "{" not in part:
            return part
        name, colon, method = part.partition(":")
        if self._hostile.chance(0.6):
            value = "nann" if "model" in name else str(self._hostile.rng.randrange(1, 50))
        else:
            value = self._text() if self._hostile.chance(0.7) else str(self._hostile.integer())
        return quote(value, safe="") + colon + method

    def _body(self, operation: Mapping[str, Any]) -> bytes:
        hostile, rng = self._hostile, self._hostile.rng
        if "requestBody" not in operation:
            return b"" if hostile.chance(0.9) else rng.randbytes(20)
        if hostile.chance(0.01):
            return rng.choice((b"[", b'{"filter":', b'{"a":[')) * rng.choice((2_000, 50_000))
        content = operation["requestBody"]["content"]["application/json"]
        examples = [example["value"] for example in content.get("examples", {}).values()]
        if examples and hostile.chance(0.4):
            value = self._varied(rng.choice(examples))
        else:
            value = self._of(content["schema"], 0)
        text = json.dumps(value).encode()
        if hostile.chance(0.1):
            return hostile.damaged(text)
        return text

    def _varied(self, value: Any) -> Any:
        """An example with some of its parts replaced."""
        if self._hostile.chance(0.05):
            return self._hostile.value()
        match value:
            case dict():
                return {
                    name: self._row_or(self._varied(part), name)
                    for name, part in value.items()
                    if not self._hostile.chance(0.05)
                }
            case list():
                return [self._varied(part) for part in value]
            case _:
                return value

    def _row_or(self, value: Any, name: str) -> Any:
        """A history of the right size where one belongs, so that the rest of the request is looked at."""
        return [self._row] if name == "comm_seq" and self._hostile.chance(0.6) else value

    def _of(self, schema: Mapping[str, Any], depth: int) -> Any:
        """A value of `schema`, or now and then of none."""
        hostile, rng = self._hostile, self._hostile.rng
        if depth > _MAX_DEPTH or hostile.chance(0.06):
            return hostile.value(depth)
        if "$ref" in schema:
            return self._of(self._resolved(schema["$ref"]), depth + 1)
        for word in ("oneOf", "anyOf"):
            if word in schema:
                return self._of(rng.choice(schema[word]), depth + 1)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        makers: dict[str, Callable[[], Any]] = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: [
                self._of(schema.get("items", {}), depth + 1) for _ in range(rng.choice(_ARRAY_LENGTHS))
            ],
            "integer": hostile.integer,
            "number": hostile.number,
            "string": hostile.text,
            "boolean": lambda: hostile.chance(0.5),
            "null": lambda: None,
        }
        return makers.get(schema.get("type", ""), lambda: hostile.value(depth))()

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        made = {
            name: self._row_or(self._of(part, depth + 1), name)
            for name, part in schema.get("properties", {}).items()
            if self._hostile.chance(0.95 if name in required else 0.2)
        }
        if "properties" not in schema or self._hostile.chance(0.05):
            made[self._hostile.text()] = self._hostile.value(depth + 1)
        return made

    def _resolved(self, reference: str) -> Mapping[str, Any]:
        found: Any = self._document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert isinstance(found, Mapping)
        return found


class ProtoInputs:
    """Protobuf messages of any class."""

    def __init__(self, hostile: Hostile) -> None:
        self._hostile = hostile

    def content(self, message_class: Any) -> bytes:
        """The bytes of a message, or of something like one."""
        hostile = self._hostile
        if hostile.chance(0.1):
            return hostile.rng.randbytes(hostile.rng.randrange(64))
        content: bytes = self.message(message_class).SerializeToString()
        return hostile.damaged(content) if hostile.chance(0.2) else content

    def message(self, message_class: Any) -> Any:
        """A message with random fields."""
        made = message_class()
        self.fill(made, 0)
        return made

    def fill(self, message: Any, depth: int) -> None:
        """Set about half of the fields of `message`."""
        for field in message.DESCRIPTOR.fields:
            if self._hostile.chance(0.5):
                self._set(message, field, depth)

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if is_message and depth > _MAX_DEPTH:
            return
        name = field.name
        if is_message and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            for _ in range(self._hostile.rng.randrange(3)):
                entries = getattr(message, name)
                if value.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                    self.fill(entries[self._scalar(key)], depth + 1)
                else:
                    entries[self._scalar(key)] = self._scalar(value)
        elif field.is_repeated:
            for _ in range(self._hostile.rng.choice((0, 1, 2, 6))):
                if is_message:
                    self.fill(getattr(message, name).add(), depth + 1)
                else:
                    getattr(message, name).append(self._scalar(field))
        elif is_message:
            getattr(message, name).SetInParent()
            self.fill(getattr(message, name), depth + 1)
        else:
            setattr(message, name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        hostile, rng = self._hostile, self._hostile.rng
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 4, 12, 6400)))
        makers: dict[int, Callable[[], Any]] = {
            FieldDescriptor.CPPTYPE_BOOL: lambda: hostile.chance(0.5),
            FieldDescriptor.CPPTYPE_STRING: lambda: hostile.text().encode("utf-8", "replace").decode(),
            FieldDescriptor.CPPTYPE_FLOAT: lambda: rng.choice((hostile.number(), *_NOT_FINITE)),
            FieldDescriptor.CPPTYPE_DOUBLE: lambda: rng.choice((hostile.number(), *_NOT_FINITE)),
            FieldDescriptor.CPPTYPE_ENUM: lambda: rng.choice([v.number for v in field.enum_type.values]),
            FieldDescriptor.CPPTYPE_INT32: lambda: _within(hostile.integer(), 32),
            FieldDescriptor.CPPTYPE_INT64: lambda: _within(hostile.integer(), 64),
            FieldDescriptor.CPPTYPE_UINT32: lambda: hostile.integer() % 2**32,
            FieldDescriptor.CPPTYPE_UINT64: lambda: hostile.integer() % 2**64,
        }
        return makers[field.cpp_type]()


def _within(number: int, bits: int) -> int:
    return (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
