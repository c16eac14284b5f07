"""Tasks through ``Trainer`` and ``build_evaluator``, from the config alone; without tasks all of it is stock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from helpers.classifier import classifier_cfg
from helpers.commands import ROOT, fresh_loggers
from helpers.datasets import write_coco
from helpers.models import tiny_cfg
from PIL import Image

from d2_headadapt import Trainer
from d2_headadapt.data.task_mapper import TaskMapper
from d2_headadapt.engine.gradient_watch import NEVER_CALLED, NO_HEAD, NO_LOSS
from d2_headadapt.engine.train import build_evaluator, default_argument_parser, main, setup
from d2_headadapt.errors import ConfigError
from d2_headadapt.evaluation.task_evaluator import TaskEvaluator
from d2_headadapt.key import shown

CLASSES = ["cat", "dog", "emu"]
BOX_TASKS = {"parity": {"on": "box"}, "scene": {"on": "box", "classes": ["day", "night"]}}


@pytest.fixture(autouse=True)
def _fresh_loggers() -> Iterator[None]:
    with fresh_loggers():
        yield


def settings_of(cfg: CfgNode, folder: Path, entry: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[str]:
    """Write the config as a yaml that trains and tests on one dataset; the arguments that name it."""
    config = yaml.safe_load(cfg.dump())
    config["MODEL"]["TASKS"] = {name: dict(task) for name, task in tasks.items()}
    config["DATASETS"].update(TRAIN=[entry["name"]], TEST=[entry["name"]], REGISTER=[dict(entry)])
    config["INPUT"].update(MIN_SIZE_TRAIN=[64], MIN_SIZE_TEST=64, MAX_SIZE_TRAIN=64, MAX_SIZE_TEST=64)
    config["DATALOADER"].update(NUM_WORKERS=0)
    config["SOLVER"].update(IMS_PER_BATCH=2, BASE_LR=1e-4, MAX_ITER=2, STEPS=[], WARMUP_ITERS=0)
    config["MODEL"]["HEAD_ADAPT"]["FIT"]["ENABLED"] = False
    config["OUTPUT_DIR"] = str(folder / "out")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return ["--config-file", str(folder / "c.yaml")]


def coco(folder: Path, *, labelled: bool = True) -> dict[str, Any]:
    """A dataset whose boxes are even or odd; the first one has no label."""
    path = write_coco(folder, CLASSES)
    content = json.loads(path.read_text())
    for i, box in enumerate(content["annotations"] if labelled else ()):
        box["attributes"] = {"parity": ["even", "odd"][i % 2], "scene": "day"} if i else {}
    path.write_text(json.dumps(content))
    entry: dict[str, Any] = {"name": "d2ha_tasks", "json": str(path), "images": str(folder / "data")}
    return entry | ({"tasks": {"parity": {"on": "box"}, "scene": {"on": "box"}}} if labelled else {})


def csv(folder: Path) -> dict[str, Any]:
    (folder / "images").mkdir()
    rows = ["id,colour,tags"]
    for i, (colour, tags) in enumerate([("red", "new|old"), ("blue", "NA"), ("NA", "new"), ("red", "old")]):
        Image.new("RGB", (32, 32), colour if colour != "NA" else "green").save(folder / "images" / f"{i}.png")
        rows.append(f"{i},{colour},{tags}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    tasks = {"colour": "colour", "tags": "tags"}
    images = {"csv": str(folder / "labels.csv"), "images": str(folder / "images"), "file": "{id}.png"}
    return {"name": "d2ha_tasks", "tasks": tasks, **images}


def run(arguments: list[str]) -> Any:
    return main(default_argument_parser().parse_args(arguments))


def last_metrics(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.json").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def test_a_detector_with_tasks_trains_and_is_judged_from_its_yaml_alone(tmp_path: Path) -> None:
    run(settings_of(tiny_cfg(masks=False), tmp_path, coco(tmp_path), BOX_TASKS))
    metrics = last_metrics(tmp_path)
    assert {"loss_task_parity", "loss_task_scene", "bbox/AP", "tasks/parity/top1", "tasks/scene/coverage"} <= set(
        metrics
    )
    assert 0 <= metrics["tasks/parity/coverage"] <= 100
    stored = json.loads((tmp_path / "out" / "inference" / "d2ha_tasks_tasks.json").read_text())
    assert [row["class"] for row in stored["tasks"]["parity"]["classes"]] == ["even", "odd"]
    assert (tmp_path / "out" / "inference" / "d2ha_tasks_confusion_parity.png").is_file()
    # An untrained network's scores are so large that a task may be right, to the last bit, by chance.
    log = (tmp_path / "out" / "log.txt").read_text()
    assert NEVER_CALLED not in log and NO_LOSS not in log and shown(NO_HEAD) not in log


def test_a_classifier_trains_and_is_judged_from_a_csv(tmp_path: Path) -> None:
    tasks = {"colour": {"on": "image"}, "tags": {"on": "image", "kind": "multi"}}
    arguments = settings_of(classifier_cfg({}), tmp_path, csv(tmp_path), tasks)
    run(arguments)
    metrics = last_metrics(tmp_path)
    assert {"tasks/colour/top1", "tasks/colour/macro_f1", "tasks/tags/mAP", "tasks/tags/macro_f1"} <= set(metrics)
    assert round(metrics["tasks/colour/top1"] * 3 / 100, 6) in (0, 1, 2, 3), "three labels"
    assert not any(key.startswith("bbox") for key in metrics)
    events = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("events.out.tfevents.*"))
    assert b"confusion/d2ha_tasks/colour" in events and b"tasks/colour/top1" in events


def test_evaluators_stand_beside_each_other(tmp_path: Path) -> None:
    arguments = settings_of(tiny_cfg(masks=False), tmp_path, coco(tmp_path), BOX_TASKS)
    found = build_evaluator(setup(default_argument_parser().parse_args(arguments)), "d2ha_tasks")
    assert isinstance(found, DatasetEvaluators)
    assert [type(one) for one in found._evaluators] == [COCOEvaluator, TaskEvaluator]


def test_a_dataset_of_labels_alone_needs_a_task(tmp_path: Path) -> None:
    cfg = tiny_cfg(masks=False)
    cfg.OUTPUT_DIR = str(tmp_path)
    MetadataCatalog.get("d2ha_labels").set(evaluator_type="tasks")
    with pytest.raises(ConfigError, match=r"MODEL.TASKS: expected a task to evaluate on dataset 'd2ha_labels'"):
        build_evaluator(cfg, "d2ha_labels")


def test_without_tasks_loaders_and_evaluator_are_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = settings_of(tiny_cfg(masks=False), tmp_path, coco(tmp_path, labelled=False), {})
    cfg = setup(default_argument_parser().parse_args(arguments))
    asked: list[Any] = []
    for name in ("build_train_loader", "build_test_loader"):
        stock = getattr(DefaultTrainer, name).__func__
        monkeypatch.setattr(
            DefaultTrainer,
            name,
            classmethod(lambda cls, *args, stock=stock: (asked.append(args), stock(cls, *args))[1]),
        )
    trained, tested = Trainer.build_train_loader(cfg), Trainer.build_test_loader(cfg, "d2ha_tasks")
    assert asked == [(cfg,), (cfg, "d2ha_tasks")]
    for loader in (trained.dataset.dataset, tested):
        mapper = getattr(loader, "dataset", loader)._map_func._obj
        assert type(mapper) is DatasetMapper
    assert type(build_evaluator(cfg, "d2ha_tasks")) is COCOEvaluator


def test_mutation_with_tasks_the_loaders_are_not(tmp_path: Path) -> None:
    arguments = settings_of(tiny_cfg(masks=False), tmp_path, coco(tmp_path), BOX_TASKS)
    cfg = setup(default_argument_parser().parse_args(arguments))
    assert type(Trainer.build_test_loader(cfg, "d2ha_tasks").dataset._map_func._obj) is TaskMapper
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert all(one["instances"].has("gt_parity") for one in batch)


def test_who_has_no_tasks_does_not_wait_for_scikit_learn() -> None:
    code = "import sys, d2_headadapt; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=False).returncode == 0
