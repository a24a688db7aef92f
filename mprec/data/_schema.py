"""Which columns of a table are what: a small JSON file beside a log.

    {
      "label": {"column": "rating", "at_least": 4},
      "features": {
        "user": {},
        "item": {"column": "movie_id", "min_count": 2},
        "genres": {"separator": "|"},
        "query": {"raw": true}
      },
      "dense": {"age": {}, "price": {"log1p": true}},
      "time": "timestamp",
      "users": "user",
      "split": "user-time"
    }

``label`` is a column of 0, 1, true and false, or one of numbers that count as a click from ``at_least`` on.
A feature is a column of integers or text, or of lists of them; text with a ``separator`` is a list, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mprec.data.dataset import SPLITS
from mprec.data.vocabulary import check_options
from mprec.errors import DataError

__all__ = ["Dense", "Feature", "Schema"]


@dataclass(frozen=True)
class Feature:
    """``column`` of the table; None: of the feature's name. Others as for :func:`mprec.data.criteo.read`."""

    column: str | None = None
    separator: str | None = None
    min_count: int = 1
    max_size: int | None = None
    oov: int = 1
    raw: bool = False


@dataclass(frozen=True)
class Dense:
    """A column of numbers; where one is missing or no number, 0. ``log1p``: ``log(1 + max(x, 0))``."""

    column: str | None = None
    log1p: bool = False


@dataclass(frozen=True)
class Schema:
    """What a table's columns are."""

    label: str | None  # None: the log is read without labels
    at_least: float | None
    features: Mapping[str, Feature]
    dense: Mapping[str, Dense]
    time: str | None = None
    users: str | None = None
    split: str | None = None

    @classmethod
    def read(cls, file: Path) -> Schema:
        """``DataError`` names what is wrong with the file."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"schema {file}: {error}") from error
        try:
            return cls.of(content)
        except (ValueError, TypeError) as error:
            raise DataError(f"schema {file}: {error}") from error

    @classmethod
    def of(cls, content: Any) -> Schema:
        """From JSON types. ``ValueError`` or ``TypeError`` names what is wrong."""
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        known = ("label", "features", "dense", "time", "users", "split")
        _check_keys("the schema", content, known)
        label = content.get("label")
        label = {"column": label} if isinstance(label, str) else label
        if not isinstance(label, dict) or not isinstance(label.get("column"), str):
            raise ValueError(f"label: expected a column or {{'column': ..., 'at_least': ...}}, got {label!r}")
        _check_keys("label", label, ("column", "at_least"))
        made = {}
        for kind, each in (("features", Feature), ("dense", Dense)):
            told = content.get(kind, {})
            if isinstance(told, list):
                told = {name: {} for name in told}
            if not isinstance(told, dict):
                raise ValueError(f"{kind}: expected an object or a list of columns, got {told!r}")
            made[kind] = {name: _made(each, f"{kind}: {name!r}", given) for name, given in told.items()}
        if not made["features"]:
            raise ValueError("features: expected at least one")
        for name in made["features"]:
            if not name or "." in name or "/" in name:
                raise ValueError(f"features: expected names without dots and slashes, got {name!r}")
        for key in ("time", "users"):
            if not isinstance(content.get(key), str | None):
                raise ValueError(f"{key}: expected a column, got {content[key]!r}")
        if (split := content.get("split")) is not None and split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if split == "user-time" and content.get("users") is None:
            raise ValueError("split: user-time needs users, the column that says whose a row is")
        own = {key: content.get(key) for key in ("time", "users", "split")}
        return cls(label["column"], label.get("at_least"), made["features"], made["dense"], **own)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, equal only for equal schemas."""
        return asdict(self)


def _check_keys(where: str, told: dict, known: tuple[str, ...]) -> None:
    if unknown := sorted(set(told) - set(known)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _made(kind: type, where: str, told: Any) -> Any:
    """A ``Feature`` or a ``Dense`` of what the file tells of it: options, or the name of its column."""
    told = {"column": told} if isinstance(told, str) else told
    if not isinstance(told, dict):
        raise ValueError(f"{where}: expected an object or a column, got {told!r}")
    _check_keys(where, told, tuple(field.name for field in fields(kind)))
    made = kind(**told)
    if isinstance(made, Feature):
        try:
            check_options(made.min_count, made.max_size, made.oov)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return made
