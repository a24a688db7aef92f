"""A query's body, JSON or raw numbers, becomes a batch and a latency target."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch

from mprec._native import read_json_query
from mprec.bags import Bags
from mprec.data import Batch
from mprec.serving.build import ModelInputs
from mprec.serving.http.wire import decode_query
from mprec.serving.rows import QueryTooLargeError, rows_to_batch, values_to_ids

__all__ = ["MAX_SLA_MS", "Limits", "parse_binary", "parse_json"]

MAX_SLA_MS = 3_600_000
_KNOWN = ("ids", "values", "dense", "sla_ms")


@dataclass(frozen=True)
class Limits:
    """What one query and one client may take of the server.

    A query of ``max_ids`` holds up the others for some milliseconds. Times are in seconds: for a request's
    head to come, for its body, for a kept connection to stay idle, and for a client to read an answer.
    """

    max_body_bytes: int = 4 << 20
    max_samples: int = 8192
    max_ids: int = 1 << 17
    max_connections: int = 4096
    head_s: float = 10.0
    body_s: float = 10.0
    idle_s: float = 60.0
    write_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {value}")


def parse_json(body: bytes, inputs: ModelInputs, limits: Limits) -> tuple[Batch, float | None]:
    """(batch, SLA in seconds or None) of ``{"ids": [[...], ...], "dense": [[...], ...], "sla_ms": 10}``, or
    of the same with ``values``, as they stand in a log, in place of IDs.

    ``ValueError`` says what is wrong, and where; ``QueryTooLargeError``, which is one, if the query has more
    samples or IDs than it may.
    """
    return _common_json(body, inputs, limits) or _any_json(body, inputs, limits)


def _common_json(body: bytes, inputs: ModelInputs, limits: Limits) -> tuple[Batch, float | None] | None:
    """A query in the form that clients send, read by native code; None if there is anything else to it."""
    bounds = _as_array(tuple(inputs.vocabularies))
    found = read_json_query(body, bounds, inputs.num_dense, limits.max_samples, limits.max_ids)
    if found is None:
        return None
    size, dense, ids, offsets, sla_ms = found
    bags = Bags(ids, offsets, num_features=len(bounds))
    return Batch(dense.view(size, inputs.num_dense), bags, torch.zeros(size)), _seconds(sla_ms or None)


@functools.lru_cache(maxsize=8)
def _as_array(vocabularies: tuple[int, ...]) -> np.ndarray:
    return np.array(vocabularies, dtype=np.int64)


def _any_json(body: bytes, inputs: ModelInputs, limits: Limits) -> tuple[Batch, float | None]:
    """Any JSON: what is wrong with it is said."""
    try:
        query = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if isinstance(query, dict) and "values" in query:
        if "ids" in query:
            raise ValueError("give ids or values, not both")
        query["ids"] = _ids_of(query.pop("values"), inputs, limits)
    if not isinstance(query, dict) or not isinstance(query.get("ids"), list) or not query["ids"]:
        raise ValueError(
            'the body must be {"ids": [[...], ...], "dense": [[...], ...]} with at least one row'
        )
    if unknown := sorted(set(query) - set(_KNOWN)):
        raise ValueError(f"unknown key {unknown[0]!r:.40}: known are {', '.join(_KNOWN)}")
    sla_s = _seconds(query.get("sla_ms"))
    if len(query["ids"]) > limits.max_samples:
        raise QueryTooLargeError(f"ids: expected at most {limits.max_samples} rows, got {len(query['ids'])}")
    batch = rows_to_batch(
        query["ids"],
        query.get("dense"),
        inputs.vocabularies,
        inputs.num_dense,
        max_ids=limits.max_ids,
        may_hold_bools=b"r" in body or b"f" in body,  # of true and false; no known key has either letter
    )
    return batch, sla_s


def _ids_of(values: Any, inputs: ModelInputs, limits: Limits) -> list[list[Any]]:
    """Rows of IDs from rows of raw values."""
    if inputs.encoders is None:
        raise ValueError("values: the models hold no vocabularies, so send ids")
    if not isinstance(values, list) or not values:
        raise ValueError("values: expected at least one row")
    if len(values) > limits.max_samples:
        raise QueryTooLargeError(f"values: expected at most {limits.max_samples} rows, got {len(values)}")
    return values_to_ids(values, inputs.names, inputs.encoders)


def parse_binary(body: bytes, inputs: ModelInputs, limits: Limits) -> tuple[Batch, float | None]:
    """(batch, SLA in seconds or None) of a body that :func:`encode_query` made; errors as ``parse_json``."""
    batch, sla_ms = decode_query(body, inputs, max_samples=limits.max_samples, max_ids=limits.max_ids)
    return batch, _seconds(sla_ms)


def _seconds(sla_ms: Any) -> float | None:
    if sla_ms is None:
        return None
    if isinstance(sla_ms, bool) or not isinstance(sla_ms, int | float) or not 0 < sla_ms <= MAX_SLA_MS:
        raise ValueError(f"sla_ms: expected a number above 0 and at most {MAX_SLA_MS}, got {sla_ms!r:.40}")
    return sla_ms / 1e3
