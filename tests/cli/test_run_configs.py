"""Configs that a script reads under ``run``: yaml with this package's keys, LazyConfigs, datasets and tasks."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from helpers.commands import Ran, fresh_loggers
from helpers.datasets import write_coco
from helpers.files import save_stock
from helpers.lazy import DATA, write_config, write_lazy
from helpers.models import names, stock_model
from helpers.repository import CLS, SOURCE, Repository, adopted, shipped

from d2_headadapt.cli.run.classes import prepare_lazy
from d2_headadapt.cli.run.models import Architecture
from d2_headadapt.config.settings import settings_of
from d2_headadapt.said import BesideDetectron2

# Its data loader is built before its model, and its processes are handed the config itself.
LOADER_FIRST = """
import json
import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import launch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm


def main(cfg):
    images = next(iter(build_detection_train_loader(cfg)))
    model = build_model(cfg)
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    seen = {
        "images": len(images),
        "checkpointer": type(DetectionCheckpointer(model)).__name__,
        "rows": len(model.roi_heads.box_predictor.cls_score.weight),
        "count": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "is": [isinstance(model, architecture), issubclass(architecture, torch.nn.Module), architecture.__name__],
        "from_config": callable(architecture.from_config),
    }
    with open(f"seen_{comm.get_rank()}.json", "w") as f:
        json.dump(seen, f)


if __name__ == "__main__":
    cfg = get_cfg()
    cfg.merge_from_file(sys.argv[1])
    cfg.merge_from_list(sys.argv[3:])
    cfg.freeze()
    launch(main, int(sys.argv[2]), dist_url="auto", args=(cfg,))
"""
TASKS = """
_BASE_: ../c.yaml
MODEL:
  TASKS:
    parity: {on: box, classes: [even, odd]}
    scene: {on: box}
"""


def with_entries(repository: Repository, **more: Any) -> None:
    """Let the yaml register the dataset, by paths beside it."""
    path = repository.folder / "c.yaml"
    config = yaml.safe_load(path.read_text())
    config["DATASETS"]["REGISTER"] = [{"name": "mine", "json": "data.json", "images": "data", **more}]
    path.write_text(yaml.safe_dump(config))


def test_data_loaders_before_the_model_and_a_config_that_is_handed_over(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    with_entries(repository)
    (tmp_path / "child").mkdir()
    tasks = "MODEL: {TASKS: {parity: {on: box, classes: [even, odd]}}}"
    (tmp_path / "child" / "c.yaml").write_text(f"_BASE_: ../c.yaml\n{tasks}\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "loader_first.py").write_text(LOADER_FIRST)
    ran = adopted("--heads", "scripts/loader_first.py", "child/c.yaml", 2, cwd=tmp_path)
    assert ran.code == 0, ran.err[-3000:]
    for rank in (0, 1):
        seen = repository.seen(rank)
        assert seen == {
            "images": 1,
            "checkpointer": "HeadAdaptCheckpointer",
            "rows": 81,
            "count": 80,
            "is": [True, True, "GeneralizedRCNN"],
            "from_config": True,
        }
    said = ran.out + ran.err
    assert said.count("mine has 3 thing classes and the script's model 80, which stays") == 1
    assert said.count("DatasetMapper, which leaves the labels of tasks out") == 1


def test_an_architecture_is_the_registry_s_for_everything_but_a_call() -> None:
    stock = META_ARCH_REGISTRY.get("GeneralizedRCNN")
    ours = Architecture(stock)
    assert copy.copy(ours).stock is stock and ours.from_config == stock.from_config

    class Theirs(ours):  # type: ignore[misc]
        pass

    assert Theirs.__mro__[1] is stock and issubclass(Theirs, stock) and issubclass(ours, torch.nn.Module)
    assert isinstance(stock.__new__(stock), ours) and not isinstance(torch.nn.Identity(), ours)


def test_messages_go_where_detectron2_s_go() -> None:
    """To its handlers; to our own where it has none; nowhere where a script set up this package's logger itself."""
    seen: list[str] = []

    class Noting(logging.Handler):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.note = name

        def emit(self, record: logging.LogRecord) -> None:
            seen.append(f"{self.note}: {record.getMessage()}")

    with fresh_loggers():
        ours, theirs = logging.getLogger("d2_headadapt"), logging.getLogger("detectron2")
        ours.propagate = False
        ours.handlers = [BesideDetectron2([Noting("own")])]
        ours.warning("one")
        theirs.addHandler(Noting("detectron2"))
        ours.warning("two")
        ours.addHandler(Noting("script"))
        ours.warning("three")
    assert seen == ["own: one", "detectron2: two", "script: three"]


def tasks_of(folder: Path, script: str, *more: object) -> Ran:
    repository = Repository(folder)
    content = json.loads((folder / "data.json").read_text())
    for i, box in enumerate(content["annotations"]):
        box["attributes"] = {"parity": ["even", "odd"][i % 2], "scene": ["day", "night"][i % 2]}
    (folder / "data.json").write_text(json.dumps(content))
    with_entries(repository, tasks={"parity": {"on": "box"}, "scene": {"on": "box"}})
    (folder / "child").mkdir()
    (folder / "child" / "c.yaml").write_text(script)
    train = folder / "their_train.py"
    theirs = '    register_coco_instances("mine", {}, "data.json", "data")\n'
    train.write_text(train.read_text().replace(theirs, ""))
    return adopted("--heads", *SOURCE, "their_train.py", "--config-file", "child/c.yaml", *more, cwd=folder)


def test_tasks_of_the_script_s_own_yaml(tmp_path: Path) -> None:
    """Declared there (a bare ``on`` is a truth value in YAML), set on the command line, and trained."""
    # Of random weights, some give exactly as much to one class as they take from the other: a gradient of zero.
    more = ("MODEL.TASKS.scene.loss_weight", "0.5", "SOLVER.MAX_ITER", "1", "SEED", "7")
    ran = tasks_of(tmp_path, TASKS, *more)
    assert ran.code == 0, ran.err[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert lines[0]["loss_task_parity"] > 0 and lines[0]["loss_task_scene"] > 0
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert saved["d2_headadapt"]["tables"]["scene"] == ["day", "night"]
    assert "got no gradient" not in ran.out


def test_a_task_that_is_there_twice_is_one_line(tmp_path: Path) -> None:
    ran = tasks_of(tmp_path, f"{TASKS}    parity: {{on: box}}\n")
    assert ran.code == 1
    assert "MODEL.TASKS: expected different names, found 'parity' in lines 5 and 7" in ran.err
    assert "Traceback" not in ran.err


def test_a_lazy_config_of_detectron2_s_own_script(tmp_path: Path) -> None:
    script = shipped("lazyconfig_train_net.py")
    old = names(5)
    weights = save_stock(stock_model(5, seed=21), tmp_path / "old.pth")
    config = write_lazy(
        tmp_path / "configs",
        ["class 3", "zebra", "class 0"],
        f"head_adapt.update(source_classes={old!r}, target_classes='lazy_data')\n",
    )
    words = (
        f"train.init_checkpoint={weights}",
        "train.max_iter=1",
        "train.device=cpu",
        "dataloader.train.num_workers=0",
    )
    ran = adopted(script, "--config-file", config, *words, "dataloader.train.total_batch_size=1", cwd=tmp_path)
    assert ran.code == 0, ran.err[-3000:]
    plan = json.loads((tmp_path / "configs" / "out" / "head_adapt_plan.json").read_text())
    carried = {t["name"]: t["carried"] for t in plan["tensors"]}
    assert carried[CLS] == [[0, 3], [2, 0]]
    assert "model.roi_heads.num_classes was 80, is 3, the classes of lazy_data" in ran.out


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("count", "known"), [(2, None), (3, ["ant", "bee", "cat"]), (5, ["ant", "bee", "cat"])])
def test_a_lazy_config_keeps_its_number_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, count: int, known: list[str] | None
) -> None:
    """That of its file, and that which a script writes later."""
    name = f"lazy_{when}_{count}"
    data = DATA.replace("lazy_data", name)
    write_coco(tmp_path, ["ant", "bee", "cat"])
    monkeypatch.chdir(tmp_path)
    lazy = LazyConfig.load(str(write_config(tmp_path, data)))
    if when == "before":
        lazy.model.roi_heads.num_classes = count
    prepare_lazy(lazy)
    lazy.model.roi_heads.num_classes = count
    model = instantiate(lazy.model)
    assert len(model.state_dict()[CLS]) == count + 1
    settings = settings_of(model)
    assert settings is not None and settings.as_stock
    table = settings.target.get("thing")
    assert (None if table is None else list(table.named)) == known and (table is None or len(table) == count)
