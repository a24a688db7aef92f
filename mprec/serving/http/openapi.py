"""The description of the application that ``/openapi.json`` gives, true for the models that serve."""

from __future__ import annotations

from typing import Any

from mprec._native import __version__
from mprec.serving.build import ModelInputs
from mprec.serving.http import wire
from mprec.serving.http.parse import MAX_SLA_MS, Limits

__all__ = ["describe"]


def describe(inputs: ModelInputs, limits: Limits) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    error = _content({"$ref": "#/components/schemas/Error"})
    health = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}

    def refusal(text: str) -> dict:
        return {"description": text, "content": error}

    def get(text: str, content: dict, *more: tuple[str, str]) -> dict:
        responses = {"200": {"description": text, "content": content}}
        return {"get": {"summary": text, "responses": responses | {s: {"description": t} for s, t in more}}}

    score = {
        "summary": "Scores of the samples of a query",
        "requestBody": {
            "required": True,
            "content": {
                **_content({"$ref": "#/components/schemas/Query"}, _example(inputs)),
                wire.CONTENT_TYPE: {
                    "schema": {"type": "string", "format": "binary", "description": wire.__doc__}
                },
            },
        },
        "responses": {
            "200": {
                "description": "The scores, in the order of the samples",
                "content": {
                    **_content({"$ref": "#/components/schemas/Answer"}),
                    wire.CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}},
                },
            },
            "400": refusal("The query's own fault; the error names the row and the feature"),
            "408": refusal("The request did not come in time"),
            "413": refusal(
                f"More than {limits.max_body_bytes} bytes, {limits.max_samples} samples or "
                f"{limits.max_ids} IDs"
            ),
            "415": refusal("The body is compressed"),
            "429": refusal("Refused for load; reason full or overload"),
            "500": refusal("The model failed on this query"),
            "503": refusal("Starting or closing; reason starting or closed"),
            "504": refusal("The deadline passed while the query waited; reason expired"),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mprec",
            "version": __version__,
            "description": "Click probabilities within a latency target",
        },
        "paths": {
            "/": get("A page that shows the load as it is now", {"text/html": {}}),
            "/score": {"post": score},
            "/healthz": get("The process is alive", _content(health)),
            "/readyz": get(
                "Queries are welcome", _content(health), ("503", "Starting, silent or draining; see status")
            ),
            "/health": get("As /readyz, with status serving", _content(health), ("503", "As /readyz")),
            "/stats": get("Counts, latencies of the last ten seconds", _content({"type": "object"})),
            "/metrics": get("Counts for Prometheus", {"text/plain": {}}),
            "/openapi.json": get("This document", _content({"type": "object"})),
            "/reload": {
                "post": {
                    "summary": "Load the models again, from this machine alone; queries go on meanwhile",
                    "responses": {
                        "200": {"description": "The new models serve"},
                        "403": refusal("Not from this machine, or without its token"),
                        "409": refusal("Another reload is under way"),
                        "500": refusal("The models before go on serving"),
                    },
                }
            },
        },
        "components": {"schemas": _schemas(inputs, limits)},
    }


def _content(schema: dict, example: Any = None) -> dict:
    return {"application/json": {"schema": schema} | ({} if example is None else {"example": example})}


def _schemas(inputs: ModelInputs, limits: Limits) -> dict[str, Any]:
    features = [
        {
            "title": name,
            "oneOf": [_id(vocabulary), {"type": "array", "items": _id(vocabulary), "description": "a bag"}],
        }
        for name, vocabulary in zip(inputs.names, inputs.vocabularies, strict=True)
    ]
    row = {
        "type": "array",
        "prefixItems": features,
        "items": False,
        "minItems": len(features),
        "maxItems": len(features),
    }
    raw = {
        "type": "array",
        "description": "As they stand in a log: text, integers, null, or bags of them",
        "minItems": len(features),
        "maxItems": len(features),
    }
    numbers = {
        "type": "array",
        "items": {"type": "number"},
        "minItems": inputs.num_dense,
        "maxItems": inputs.num_dense,
    }
    rows = {"type": "array", "minItems": 1, "maxItems": limits.max_samples}
    return {
        "Query": {
            "type": "object",
            "properties": {
                "ids": {**rows, "items": row},
                **({"values": {**rows, "items": raw}} if inputs.encoders is not None else {}),
                "dense": {**rows, "items": numbers},
                "sla_ms": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": MAX_SLA_MS},
            },
            "required": ["dense"] if inputs.num_dense else [],
            "oneOf": [{"required": ["ids"]}, *([{"required": ["values"]}] if inputs.encoders else [])],
            "additionalProperties": False,
        },
        "Answer": {
            "type": "object",
            "properties": {
                "scores": {"type": "array", "items": {"type": "number"}},
                "paths": {"type": "object", "additionalProperties": {"type": "integer"}},
                "latency_ms": {"type": "number"},
            },
            "required": ["scores", "paths", "latency_ms"],
        },
        "Error": {
            "type": "object",
            "properties": {"error": {"type": "string"}, "reason": {"type": "string"}},
            "required": ["error", "reason"],
        },
    }


def _id(vocabulary: int) -> dict:
    return {"type": "integer", "minimum": 0, "maximum": vocabulary - 1}


def _example(inputs: ModelInputs) -> dict[str, Any]:
    example: dict[str, Any] = {"ids": [[0] * len(inputs.vocabularies)], "sla_ms": 50}
    return example | ({"dense": [[0.0] * inputs.num_dense]} if inputs.num_dense else {})
