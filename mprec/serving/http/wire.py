"""Queries and scores as raw numbers, for clients that would rather not write and read JSON.

A query (``Content-Type: application/octet-stream``) is, little-endian and without gaps:

===========  ===============  ============================================================================
type         count            what
===========  ===============  ============================================================================
4 bytes      1                ``mpq1``
uint32       3                B samples, T features, D dense numbers
uint64       1                n IDs in all
float64      1                SLA in milliseconds; 0 for the server's
int64        n                IDs, those of feature 0 for every sample, then those of feature 1, ...
float32      B * D            dense numbers, a row for each sample
int32        T * B, or none   length of each bag, in the order of the IDs; none if every bag has one ID
===========  ===============  ============================================================================

The answer is B float32, one score for each sample; the headers ``x-mprec-latency-ms`` and ``x-mprec-paths``
(JSON) say the rest. Refusals and errors are JSON.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from mprec.bags import Bags
from mprec.data import Batch
from mprec.serving.build import ModelInputs
from mprec.serving.rows import QueryTooLargeError

__all__ = ["CONTENT_TYPE", "decode_query", "decode_scores", "encode_query", "encode_scores"]

CONTENT_TYPE = "application/octet-stream"
_MAGIC = b"mpq1"
_HEADER = struct.Struct("<4sIIIQd")


def encode_query(
    ids: np.ndarray,
    dense: np.ndarray | None = None,
    *,
    lengths: np.ndarray | None = None,
    sla_ms: float | None = None,
) -> bytes:
    """The body of a query, for clients. ``ids`` integer [B, T], or, with ``lengths`` integer [T, B] of the
    bags, [n] in their order (feature-major); ``dense`` float [B, D]; ``sla_ms`` in milliseconds.

    ``ValueError`` if the shapes do not fit together; ``TypeError`` for IDs or lengths that are no integers.
    What the model takes is for the server to check.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    if lengths is None:
        if ids.ndim != 2:
            raise ValueError(f"ids: expected [B, T] where there are no lengths, got shape {ids.shape}")
        (size, features), ids, tail = ids.shape, ids.T, b""
    else:
        lengths = np.asarray(lengths)
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
        if lengths.ndim != 2 or ids.ndim != 1 or lengths.sum() != len(ids):
            raise ValueError(
                f"lengths: expected [T, B] that add up to the number of ids, got shape {lengths.shape} and "
                f"{lengths.sum()} for ids of shape {ids.shape}"
            )
        (features, size), tail = lengths.shape, lengths.astype("<i4").tobytes()
    dense = np.zeros((size, 0)) if dense is None else np.asarray(dense)
    if dense.ndim != 2 or len(dense) != size:
        raise ValueError(f"dense: expected [{size}, D], got shape {dense.shape}")
    header = _HEADER.pack(_MAGIC, size, features, dense.shape[1], ids.size, sla_ms or 0.0)
    return b"".join((header, ids.astype("<i8").tobytes(), dense.astype("<f4").tobytes(), tail))


def decode_query(
    body: bytes, inputs: ModelInputs, *, max_samples: int, max_ids: int
) -> tuple[Batch, float | None]:
    """(batch, SLA in milliseconds or None) of a body. ``ValueError`` says what is wrong, and where;
    ``QueryTooLargeError``, which is one, if it has more samples or IDs than it may."""
    if len(body) < _HEADER.size or body[:4] != _MAGIC:
        raise ValueError(f"the body does not begin with {_MAGIC.decode()} and {_HEADER.size - 4} bytes more")
    _, size, features, num_dense, count, sla_ms = _HEADER.unpack_from(body)
    if (features, num_dense) != (len(inputs.vocabularies), inputs.num_dense):
        raise ValueError(
            f"the body has {features} features and {num_dense} dense numbers, "
            f"the model takes {len(inputs.vocabularies)} and {inputs.num_dense}"
        )
    if not size:
        raise ValueError("the body must have at least one sample")
    if size > max_samples or count > max_ids:
        raise QueryTooLargeError(
            f"the body has {size} samples and {count} IDs, at most {max_samples} and {max_ids} are taken"
        )
    bags = features * size
    least = _HEADER.size + 8 * count + 4 * size * num_dense
    if len(body) not in {least + 4 * bags} | ({least} if count == bags else set()):
        raise ValueError(f"the body has {len(body)} bytes, its header tells of {least} and lengths of bags")
    raw = bytearray(body)  # tensors must be writable
    ids = np.frombuffer(raw, "<i8", count, _HEADER.size).astype(np.int64, copy=False)
    dense = np.frombuffer(raw, "<f4", size * num_dense, _HEADER.size + 8 * count).reshape(size, num_dense)
    dense = dense.astype(np.float32, copy=False)
    if len(body) == least:
        offsets = np.arange(bags + 1)
    else:
        lengths = np.frombuffer(raw, "<i4", bags, least)
        offsets = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
        if (lengths < 0).any() or offsets[-1] != count:
            raise ValueError(f"lengths of bags: expected none below 0, and {count} in all")
    _check_ids(ids, offsets, size, inputs.vocabularies)
    if not np.isfinite(dense).all():
        b, i = np.argwhere(~np.isfinite(dense))[0]
        raise ValueError(f"dense[{b}][{i}]: {dense[b, i]} is not finite")
    bags = Bags(torch.from_numpy(ids), torch.from_numpy(offsets), num_features=features)
    return Batch(torch.from_numpy(dense), bags, torch.zeros(size)), sla_ms or None


def _check_ids(ids: np.ndarray, offsets: np.ndarray, size: int, vocabularies: list[int]) -> None:
    bounds = np.repeat(np.array(vocabularies, dtype=np.uint64), np.diff(offsets[::size]))
    wrong = ids.view(np.uint64) >= bounds  # as unsigned, negative IDs are large
    if wrong.any():
        at = int(wrong.argmax())
        t, b = divmod(int(np.searchsorted(offsets, at, side="right")) - 1, size)
        raise ValueError(f"ids[{b}][{t}]: {ids[at]} is not in [0, {vocabularies[t]})")


def encode_scores(scores: np.ndarray) -> bytes:
    """The body of an answer: float32, little-endian."""
    return scores.astype("<f4", copy=False).tobytes()


def decode_scores(body: bytes) -> np.ndarray:
    """Scores float32 [B] of an answer, for clients."""
    return np.frombuffer(body, "<f4").astype(np.float32)
