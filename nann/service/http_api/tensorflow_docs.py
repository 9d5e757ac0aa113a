"""What /docs and /openapi.json say of TensorFlow Serving's paths."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["METADATA", "PREDICT", "STATUS"]

_ERROR_SCHEMA: Final = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
}
_WORDS: Final = {
    400: "The request is not of the right form, or names an unknown label or signature.",
    404: "No such model or version.",
    413: "The body is larger than the server reads.",
    501: "A form of the request that is not offered.",
    503: "Too many queries wait, or the model is not ready.",
    504: "The deadline passed.",
}
_LEVEL_TOPN: Final = [100, 200, 200, 200, 200, 5]
_TENSOR: Final = {
    "description": 'Rows of numbers, or of {"b64": float16 values, little-endian}.',
    "oneOf": [
        {
            "type": "array",
            "items": {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "object"}]},
        },
        {"type": "object", "properties": {"b64": {"type": "string"}}, "required": ["b64"]},
    ],
}
_WIDTHS: Final = {"type": "array", "items": {"type": "integer"}, "minItems": 6, "maxItems": 6}
_SIGNATURE: Final = {"type": "string", "enum": ["serving_default", "retrieve"]}


def _inputs(comm_seq: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"comm_seq": comm_seq, "level_topn": _WIDTHS},
        "required": ["comm_seq", "level_topn"],
    }


def _json(schema: dict[str, Any], example: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema, "example": example}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {
            "description": _WORDS[status],
            **_json(_ERROR_SCHEMA, {"error": "Missing model name in request."}),
        }
        for status in statuses
    }


STATUS: Final[dict[str, Any]] = {
    "responses": {
        200: {
            "description": "The states of the versions.",
            **_json(
                {"type": "object"},
                {
                    "model_version_status": [
                        {
                            "version": "1",
                            "state": "AVAILABLE",
                            "status": {"error_code": "OK", "error_message": ""},
                        }
                    ]
                },
            ),
        },
        **_errors(400, 404, 503),
    }
}
METADATA: Final[dict[str, Any]] = {
    "responses": {
        200: {
            "description": "The signatures that may be called.",
            **_json(
                {"type": "object"},
                {
                    "model_spec": {"name": "nann", "signature_name": "", "version": "1"},
                    "metadata": {"signature_def": {"signature_def": {}}},
                },
            ),
        },
        **_errors(400, 404, 503),
    }
}
PREDICT: Final[dict[str, Any]] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "oneOf": [
                            {
                                "type": "object",
                                "properties": {"signature_name": _SIGNATURE, "inputs": _inputs(_TENSOR)},
                                "required": ["inputs"],
                            },
                            {
                                "type": "object",
                                "properties": {
                                    "signature_name": _SIGNATURE,
                                    "instances": {
                                        "type": "array",
                                        "minItems": 1,
                                        "items": _inputs(_TENSOR["oneOf"][0]["items"]),  # type: ignore[index]
                                    },
                                },
                                "required": ["instances"],
                            },
                        ]
                    },
                    "examples": {
                        "columns": {
                            "summary": "Columns; the history shortened here",
                            "value": {
                                "signature_name": "retrieve",
                                "inputs": {"comm_seq": [[0.5, -0.25]], "level_topn": _LEVEL_TOPN},
                            },
                        },
                        "rows": {
                            "summary": "Rows; the history shortened here",
                            "value": {
                                "instances": [{"comm_seq": [0.5, -0.25], "level_topn": _LEVEL_TOPN}],
                            },
                        },
                    },
                }
            },
        }
    },
    "responses": {
        200: {
            "description": "Item ids, best first, under `predictions` (rows) or `outputs` (columns).",
            **_json({"type": "object"}, {"outputs": [[204121, 61727, 61718, 104380, 240684]]}),
        },
        **_errors(400, 404, 413, 501, 503, 504),
    },
}
