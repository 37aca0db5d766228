"""What a run leaves behind is read back as it was; a folder is not shared by different runs."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from data.interactions import Catalog
from launch.config import RunConfig, dump, parse
from launch.run_folder import RunFolder, read_catalog, write_catalog

CONFIG = parse(["--model=sasrec", "--data.source=sample"])


@pytest.mark.parametrize("has_titles", [True, False])
def test_a_catalog_is_read_back(tmp_path: Path, has_titles: bool) -> None:
    catalog = Catalog(
        titles=("", 'The "Ü"', "三国志\n", "B003"),
        categories=((), ("Drama", "Crime|Noir"), (), ("Drama",)),
        raw_ids=("", "1", "02", "B003"),
        has_titles=has_titles,
    )
    write_catalog(catalog, tmp_path / "catalog.json")
    assert read_catalog(tmp_path / "catalog.json") == catalog


def changed(config: RunConfig, section: str, **settings: object) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **settings)})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dump(CONFIG)))
    return RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (changed(CONFIG, "method", hidden_size=8), "method.hidden_size: 64 there, 8 here"),
        (changed(CONFIG, "train", lr=0.5), "train.lr: 0.001 there, 0.5 here"),
        (changed(CONFIG, "data", sample_users=9), "data.sample_users: 500 there, 9 here"),
        (changed(CONFIG, "evaluation", protocol="sampled-100"), "evaluation.protocol: full there, sampled-100 here"),
        (parse(["--model=bigrec", "--data.source=sample"]), "backbone.name: None there, tiny here"),
    ],
)
def test_another_run_is_refused(folder: RunFolder, config: RunConfig, named: str) -> None:
    with pytest.raises(SystemExit, match="--resume never to overwrite it") as exit:
        folder.require_same(config)
    if config.model == CONFIG.model:
        assert f"({named})" in str(exit.value.code)


def test_settings_of_speed_and_place_may_differ(folder: RunFolder) -> None:
    folder.require_same(CONFIG)
    folder.require_same(changed(CONFIG, "train", micro_batch_size=2, eval_batch_size=3, trackers=[], epochs=99))
    folder.require_same(changed(CONFIG, "data", root=Path("/elsewhere"), cache=Path("/cache")))


def test_a_setting_that_came_later_has_its_default(folder: RunFolder) -> None:
    written = yaml.safe_load(folder.config_file.read_text())
    del written["data"]["cold_items"]
    folder.config_file.write_text(yaml.safe_dump(written))
    folder.require_same(CONFIG)
    with pytest.raises(SystemExit, match=r"data\.cold_items: 0\.0 there, 0\.1 here"):
        folder.require_same(changed(CONFIG, "data", cold_items=0.1))


def test_a_new_folder_is_nobodys(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").require_same(CONFIG)


def test_what_a_finished_run_leaves(trained: Path) -> None:
    folder = RunFolder(trained)
    results = folder.results()
    assert results["model"] == "sasrec"
    assert {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (1, 5, 10, 20)} <= results["test"].keys()
    assert parse(["--config", str(folder.config_file)]).method.hidden_size == 16
    assert json.loads((trained / "environment.json").read_text())["world_size"] == 1
    assert sorted(path.name for path in folder.model.iterdir()) == ["catalog.json", "config.json", "model.safetensors"]
    assert folder.ranks("test").is_file()
    assert folder.ranks("valid").is_file()
    assert not list(trained.glob("*.unfinished"))
