import json
import sys

import numpy as np
import pandas as pd
import pytest

from data.bad_rows import BadRows
from data.config import Columns, DataConfig
from data.sources import data_root as configured_root
from data.sources import read
from data.splits import split


@pytest.fixture
def read_real(data_root):
    def read_one(name: str, **settings):
        if not (data_root / name).exists():
            pytest.skip(f"{name} is not in {data_root}")
        return read(DataConfig(source=name, root=data_root, **settings))

    return read_one


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("SHARDREC_GROUPLENS_URL", "http://127.0.0.1:9")  # a port that nobody listens to


def sizes(interactions) -> tuple[int, int, int]:
    return len(interactions.raw_users), interactions.catalog.num_items, len(interactions.item)


def by_raw_id(catalog) -> dict[str, tuple[str, tuple[str, ...]]]:
    return dict(zip(catalog.raw_ids, zip(catalog.titles, catalog.categories, strict=True), strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ml-100k", (943, 1682, 100_000)),
        ("ml-1m", (6040, 3706, 1_000_209)),
        ("ml-latest-small", (610, 9724, 100_836)),
        ("recbole-ml-100k", (943, 1682, 100_000)),
        ("amazon-beauty", (22_363, 12_101, 198_502)),
        ("amazon-toys", (19_412, 11_924, 167_597)),
        ("lastfm", (1220, 4606, None)),
    ],
)
def test_published_sizes(read_real, name, expected):
    interactions = read_real(name)
    assert sizes(interactions)[: 2 + (expected[2] is not None)] == tuple(n for n in expected if n is not None)
    assert interactions.name == name
    assert interactions.catalog.has_titles == (not name.startswith("amazon"))


def test_titles_and_categories_of_movielens(read_real):
    for name in ("ml-100k", "ml-1m", "ml-latest-small", "recbole-ml-100k"):
        title, categories = by_raw_id(read_real(name).catalog)["1"]
        assert title == "Toy Story (1995)"
        assert {"Animation", "Comedy"} <= set(categories)
    # latin-1 and UTF-8
    assert "Misérables, Les (1995)" in read_real("ml-1m").catalog.titles
    assert any(title.startswith("Misérables, Les") for title in read_real("ml-latest-small").catalog.titles)


def test_recbole_carries_the_ratings_of_movielens(read_real):
    ours, theirs = read_real("ml-100k"), read_real("recbole-ml-100k")
    for column in ("user", "item", "timestamp", "rating"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column))
    assert split(ours, DataConfig()).hash == split(theirs, DataConfig()).hash


def test_sequences_keep_their_order(read_real, data_root):
    interactions = read_real("amazon-beauty")
    first_line = (data_root / "amazon-beauty" / "sequences.txt").open().readline().split()
    of_first_user = interactions.item[interactions.user == 0]
    assert [interactions.catalog.raw_ids[item] for item in of_first_user] == first_line[1:]
    assert interactions.catalog.raw_ids[1:4] == ("1", "2", "3")


def test_lastfm_rows_become_users_and_stay_split(read_real, data_root):
    interactions = read_real("lastfm")
    made = split(interactions, DataConfig(split="global-time"))
    rows = {
        phase: [json.loads(line) for line in (data_root / "lastfm" / f"{phase}.jsonl").open()]
        for phase in ("train", "valid", "test")
    }
    assert made.kind == "presplit"
    assert made.item_counts().sum() == made.train_end.sum() == len(rows["train"])
    assert np.array_equal(made.item_counts(), np.bincount([row["next"] + 1 for row in rows["train"]], minlength=4607))
    for phase in ("valid", "test"):
        targets = made.targets(phase)
        assert len(targets) == len(rows[phase])
        for row, user, position, target in zip(
            rows[phase], targets.user, targets.position, made.target_items(phase), strict=True
        ):
            assert made.raw_users[user].startswith(phase)
            assert made.train_end[user] == 0
            assert (made.history(user, position) - 1).tolist() == row["history"]  # raw ids count from 0
            assert target - 1 == row["next"]
    # Each training row is a window of at most ten items in some user's training part.
    windows = [
        (tuple(items[max(0, end - 10) : end]), items[end])
        for items in ((made.training_items(user) - 1).tolist() for user in range(made.num_users))
        for end in range(len(items))
    ]
    expected = [(tuple(item for item in row["history"] if item != 4606), row["next"]) for row in rows["train"]]
    assert sorted(windows) == sorted(expected)


def test_llara_rows_that_start_with_a_history(tmp_path):
    rows = {
        "train": [([0, 1], 2), ([0, 1, 2], 3), ([4], 0), ([9], 4), ([4], 1)],
        "valid": [([0, 9], 1)],
        "test": [([2], 3)],
    }
    for phase, of_phase in rows.items():
        text = "".join(json.dumps({"history": history, "next": target}) + "\n" for history, target in of_phase)
        (tmp_path / f"{phase}.jsonl").write_text(text)
    (tmp_path / "id2name.txt").write_text("".join(f"{i}::Artist {i}\n" for i in range(9)))  # so 9 is padding
    interactions = read(DataConfig(source=str(tmp_path)))
    made = split(interactions, DataConfig())
    sequences = [(made.items[a:b] - 1).tolist() for a, b in zip(made.offsets, made.offsets[1:], strict=False)]
    assert interactions.raw_users == (
        "test-000000",
        "train-000000",
        "train-000001",
        "train-000002",
        "valid-000000",
    )
    assert sequences == [[2, 3], [0, 1, 2, 3], [4, 0], [4, 1], [0, 1]]
    assert interactions.catalog.titles[5] == "Artist 4"
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"history": [1]}\n')
    with pytest.raises(BadRows, match=r"train\.jsonl:6: "):
        read(DataConfig(source=str(tmp_path)))


def write_ten_million_layout(folder):
    folder.mkdir()
    ratings = ["1::122::5::838985046", "1::185::4.5::838983525", "2::122::3::868245777"]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    movies = "122::Café: the Movie (1992)::Comedy|Romance\n185::Net::Worth (1995)::(no genres listed)\n"
    (folder / "movies.dat").write_text(movies, encoding="utf-8")


def test_movielens_10m(tmp_path):
    write_ten_million_layout(tmp_path / "ml-10m")
    interactions = read(DataConfig(source="ml-10m", root=tmp_path))
    assert interactions.rating.tolist() == [4.5, 5.0, 3.0]
    assert interactions.catalog.titles == ("", "Café: the Movie (1992)", "Net::Worth (1995)")
    assert interactions.catalog.categories == ((), ("Comedy", "Romance"), ())


def test_movielens_csv(tmp_path):
    folder = tmp_path / "ml-32m"
    folder.mkdir()
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,7\n1,2,0.5,6\n")
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n2,"American President, The (1995)",Comedy|Drama\n10,Été (1995),Drama\n'
    )
    interactions = read(DataConfig(source="ml-32m", root=tmp_path))
    assert interactions.item.tolist() == [1, 2]
    assert interactions.catalog.titles == ("", "American President, The (1995)", "Été (1995)")


def test_bad_rows_of_several_files_make_one_error(tmp_path):
    write_ten_million_layout(tmp_path / "ml-10m")
    with (tmp_path / "ml-10m" / "ratings.dat").open("a") as file:
        file.write("3::122::five::1\n")
    with (tmp_path / "ml-10m" / "movies.dat").open("a") as file:
        file.write("no separator\n")
    config = DataConfig(source="ml-10m", root=tmp_path)
    with pytest.raises(BadRows, match=r"Malformed rows: 2 [^$]*ratings.dat:4: [^$]*movies.dat:3: "):
        read(config)
    config.on_bad_rows = "skip"
    assert sizes(read(config)) == (2, 2, 3)


TABLE = {
    "user_id": ["ann", "ann", "bob", "ann"],
    "item_id": [30, 4, 30, 5],
    "rating": [4.0, 3.5, 1.0, 2.0],
    "timestamp": [3, 1, 2, 1],
    "title": ["Heat, the film", "Fargo", "Heat, the film", None],
    "genres": ["Crime|Drama", "Crime", "Crime|Drama", ""],
}


def write_csv(frame, folder):
    frame.to_csv(folder / "events.csv", index=False)
    return folder / "events.csv"


def write_tsv(frame, folder):
    frame.to_csv(folder / "events.tsv", index=False, sep="\t")
    return folder / "events.tsv"


def write_parquet(frame, folder):
    frame.to_parquet(folder / "events.parquet")
    return folder / "events.parquet"


def write_parquet_folder(frame, folder):
    (folder / "events").mkdir()
    frame[:2].to_parquet(folder / "events" / "0.parquet")
    frame[2:].to_parquet(folder / "events" / "1.parquet")
    return folder / "events"


def write_huggingface(frame, folder):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_pandas(frame, preserve_index=False).save_to_disk(folder / "events")
    return folder / "events"


def write_huggingface_splits(frame, folder):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_pandas(frame, preserve_index=False)
    datasets.DatasetDict({"train": train, "other": train.select([0])}).save_to_disk(folder / "events")
    return folder / "events"


WRITERS = [
    write_csv,
    write_tsv,
    write_parquet,
    write_parquet_folder,
    write_huggingface,
    write_huggingface_splits,
]


@pytest.mark.parametrize("write", WRITERS)
def test_tables_with_usual_columns(tmp_path, write):
    path = write(pd.DataFrame(TABLE), tmp_path)
    interactions = read(DataConfig(source=str(path)))
    assert interactions.name == "events"
    assert interactions.raw_users == ("ann", "bob")
    assert interactions.catalog.raw_ids == ("", "4", "5", "30")
    assert interactions.catalog.titles == ("", "Fargo", "5", "Heat, the film")
    assert interactions.catalog.categories == ((), ("Crime",), (), ("Crime", "Drama"))
    assert interactions.user.tolist() == [0, 0, 0, 1]
    assert interactions.item.tolist() == [1, 2, 3, 3]  # time 1 twice: file order
    assert interactions.rating.tolist() == [3.5, 2.0, 4.0, 1.0]


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_huggingface])
def test_tables_with_named_columns(tmp_path, write):
    frame = pd.DataFrame(TABLE).rename(columns={"user_id": "who", "item_id": "what", "timestamp": "when"})
    path = write(frame, tmp_path)
    config = DataConfig(source=str(path))
    with pytest.raises(ValueError, match=r"no user column.*who, what.*--data\.columns\.user"):
        read(config)
    config.columns = Columns(user="who", item="what", timestamp="when", title="genres")
    interactions = read(config)
    assert interactions.item.tolist() == [1, 2, 3, 3]
    assert interactions.catalog.titles[3] == "Crime|Drama"
    config.columns.rating = "stars"
    with pytest.raises(ValueError, match=r"no rating column stars"):
        read(config)


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_bad_rows_of_tables(tmp_path, write):
    frame = pd.DataFrame(TABLE)
    frame.loc[0, "user_id"] = None
    frame.loc[1, "rating"] = np.inf
    path = write(frame, tmp_path)
    with pytest.raises(BadRows, match="Malformed rows: 2 "):
        read(DataConfig(source=str(path)))
    assert sizes(read(DataConfig(source=str(path), on_bad_rows="skip"))) == (2, 2, 2)


def test_dates_and_lists_of_a_parquet_file(tmp_path):
    frame = pd.DataFrame(TABLE)
    frame["timestamp"] = pd.to_datetime(["2020-03-01", "2020-01-01", "2020-02-01", "2020-01-01"], utc=True)
    frame["genres"] = [["Crime", "Drama"], ["Crime"], ["Crime", "Drama"], []]
    interactions = read(DataConfig(source=str(write_parquet(frame, tmp_path))))
    assert interactions.item.tolist() == [1, 2, 3, 3]
    assert interactions.catalog.categories[3] == ("Crime", "Drama")
    frame["timestamp"] = "yesterday"
    with pytest.raises(ValueError, match=r"column timestamp has type .*--data\.columns\.timestamp"):
        read(DataConfig(source=str(write_parquet(frame, tmp_path))))


def test_atomic_files_with_other_columns(tmp_path):
    (tmp_path / "lfm.inter").write_text("user_id:token\tartist_id:token\tweight:float\n2\ta\t7\n2\tb\t9\n")
    (tmp_path / "lfm.item").write_text("artist_id:token\tname:token_seq\na\tThe Beatles\nb\tCan\n")
    with pytest.raises(ValueError, match=r"no item column.*--data\.columns\.item"):
        read(DataConfig(source=str(tmp_path)))
    config = DataConfig(source=str(tmp_path), columns=Columns(item="artist_id", rating="weight"))
    interactions = read(config)
    assert interactions.catalog.titles == ("", "The Beatles", "Can")
    assert interactions.rating.tolist() == [7.0, 9.0]
    assert interactions.timestamp.tolist() == [0, 1]


def test_sequence_file_with_a_bad_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("1 5 6 5\n2\n3 7\n")
    with pytest.raises(BadRows, match=r"mine\.txt:2: "):
        read(DataConfig(source=str(path)))
    interactions = read(DataConfig(source=str(path), on_bad_rows="skip"))
    assert interactions.item.tolist() == [1, 2, 1, 3]
    assert interactions.timestamp.tolist() == [0, 1, 2, 0]


def test_unknown_names_and_formats(tmp_path):
    with pytest.raises(FileNotFoundError, match="Closest: ml-100k"):
        read(DataConfig(source="ml-10k0", root=tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(DataConfig(source="runs/missing.csv", root=tmp_path))
    (tmp_path / "events.xlsx").touch()
    with pytest.raises(ValueError, match="unknown suffix"):
        read(DataConfig(source=str(tmp_path / "events.xlsx")))
    with pytest.raises(ValueError, match=r"expected u\.data.*found events\.xlsx"):
        read(DataConfig(source=str(tmp_path)))


def test_the_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDREC_DATA", str(tmp_path / "env"))
    assert configured_root(DataConfig()) == tmp_path / "env"
    assert configured_root(DataConfig(root=tmp_path)) == tmp_path
    monkeypatch.delenv("SHARDREC_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configured_root(DataConfig()) == tmp_path / ".cache" / "shardrec"


def test_without_data_and_network_the_error_names_the_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    with pytest.raises(FileNotFoundError) as error:
        read(DataConfig(root=tmp_path))
    for remedy in ("--data.root", "network", "recbole", "--data.source sample"):
        assert remedy in str(error.value)
    with pytest.raises(FileNotFoundError) as error:
        read(DataConfig(source="ml-1m", root=tmp_path))
    assert "recbole" not in str(error.value)


def test_an_installed_recbole_is_the_last_resort(tmp_path, monkeypatch):
    package = tmp_path / "site" / "recbole"
    example = package / "dataset_example" / "ml-100k"
    example.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (example / "ml-100k.inter").write_text(header + "1\t2\t3\t881250949\n")
    monkeypatch.syspath_prepend(package.parent)
    interactions = read(DataConfig(root=tmp_path / "empty"))
    assert interactions.name == "ml-100k"
    assert interactions.timestamp.tolist() == [881250949]
