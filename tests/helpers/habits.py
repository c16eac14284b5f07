"""A script with habits of detectron2's users, each tried by itself; what came of it is written as JSON.

It has never heard of this package: ``python`` shows what stock detectron2 makes of each habit, and ``d2-headadapt run``
what becomes of it there. ``named`` is ``cfg.MODEL.HEAD_ADAPT`` where there is one: what a user adds for ``run``.
"""

from __future__ import annotations

SCRIPT = '''
import json
import logging
import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model

ROWS = "roi_heads.box_predictor.cls_score.weight"
said = []


class Noting(logging.Handler):
    def emit(self, record):
        said.append((record.levelname, record.getMessage()))


def config(**keys):
    cfg = get_cfg()
    cfg.merge_from_file("c.yaml")
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = "out", 1, ()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = keys.pop("classes", 5)
    cfg.MODEL.WEIGHTS = keys.pop("weights", "old.pth")
    cfg.DATASETS.TRAIN = keys.pop("train", ("five",))
    cfg.DATASETS.TEST = keys.pop("test", ())
    for key, value in keys.items():
        if "HEAD_ADAPT" in cfg.MODEL:
            cfg.MODEL.HEAD_ADAPT[key] = value
    return cfg


def head(model):
    return model.state_dict()[ROWS].clone()


def trained(cfg):
    """What a training starts from, and that it runs."""
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    rows = head(trainer.model)
    trainer.train()
    return rows


def predicted(cfg):
    predictor = DefaultPredictor(cfg)
    predictor(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    return head(predictor.model)


def loop(cfg):
    """The order of plain_train_net.py: the model, its weights, and data afterwards."""
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return head(model)


def dataset(name, classes, load=None):
    DatasetCatalog.register(name, load or (lambda: DatasetCatalog.get("five")))
    if classes:
        MetadataCatalog.get(name).set(thing_classes=classes)
    return (name,)


def broken():
    raise KeyError("a dataset that is not for this machine")


def own_tasks():
    cfg = config()
    cfg.MODEL.TASKS = ["detection", "tracking"]
    return trained(cfg)


def own_task_nodes():
    cfg = config()
    cfg.MODEL.TASKS = CfgNode({"detection": CfgNode({"WEIGHT": 1.0})})
    return trained(cfg)


def dumped():
    cfg = config()
    text = cfg.dump()
    assert "HEAD_ADAPT" not in text and "REGISTER" not in text and "CONV_NET" not in text, text
    return head(build_model(cfg)) * 0


class Own(DetectionCheckpointer):
    def _load_file(self, filename):
        return {"model": torch.load(filename, weights_only=True)["model"]}


def own_checkpointer():
    model = build_model(config())
    Own(model, "out").resume_or_load("old.pth", resume=False)
    return head(model)


HABITS = {
    # a training
    "a string as TRAIN": lambda: trained(config(train=("five"))),
    "a list as TRAIN": lambda: trained(config(train=["five"])),
    "one class too many": lambda: trained(config(classes=6, weights="six.pth")),
    "one class too many, the five named": lambda: trained(config(classes=6, weights="six.pth", SOURCE_CLASSES=OLD)),
    "80 left standing": lambda: trained(config(classes=80, weights="eighty.pth")),
    "80 left standing, in a loop": lambda: loop(config(classes=80, weights="eighty.pth")),
    "names that differ by case": lambda: trained(config(train=dataset("case", ["cat", "Cat", "dog", "gnu", "ant"]))),
    "a name twice": lambda: trained(config(train=dataset("twice", ["cat", "cat", "dog", "gnu", "ant"]))),
    "numbers as names": lambda: predicted(config(train=dataset("numbers", [0, 1, 2, 3, 4]))),
    "no names": lambda: trained(config(train=dataset("nameless", None))),
    "keys of its own under MODEL.TASKS": own_tasks,
    "nodes of its own under MODEL.TASKS": own_task_nodes,
    "a class more than the file": lambda: trained(config(classes=6)),
    "a file of another model": lambda: trained(config(weights="other.pth")),
    "a file with little of this model": lambda: trained(config(weights="little.pth")),
    "no file": lambda: trained(config(weights="")) * 0,
    # a prediction
    "TRAIN left at COCO": lambda: predicted(config(train=("coco_2017_train",))),
    "TRAIN left at COCO, a file that names its classes": lambda: predicted(
        config(train=("coco_2017_train",), weights="named.pth", classes=4)
    ),
    "TRAIN that nobody registered": lambda: predicted(config(train=("gone",))),
    "no TRAIN": lambda: predicted(config(train=())),
    "a string as TEST": lambda: predicted(config(test=("five"))),
    "two training sets with other classes": lambda: predicted(
        config(train=dataset("a", list("vwxyz")) + dataset("b", list("zyxwv")))
    ),
    "a training set that cannot be loaded": lambda: predicted(config(train=dataset("broken", None, broken))),
    "more training classes than the model has": lambda: predicted(config(train=dataset("nine", list("rstuvwxyz")))),
    "fewer training classes than the model has": lambda: predicted(config(train=dataset("three", list("xyz")))),
    "a checkpointer that reads files itself": own_checkpointer,
    "a config that is dumped": dumped,
}


if __name__ == "__main__":
    OLD = [f"class {i}" for i in range(5)]
    register_coco_instances("five", {}, "data.json", "data")
    came = {}
    for name, habit in HABITS.items():
        for logger in ("d2_headadapt", "detectron2", "fvcore"):
            if not any(isinstance(one, Noting) for one in logging.getLogger(logger).handlers):
                logging.getLogger(logger).addHandler(Noting())
        said.clear()
        torch.manual_seed(3)
        try:
            rows = habit()
            came[name] = {"error": None, "rows": rows.tolist()}
        except Exception as exc:
            came[name] = {"error": f"{type(exc).__name__}: {exc}", "rows": []}
        came[name]["warnings"] = [text for level, text in said if level == "WARNING"]
    with open(sys.argv[1], "w") as file:
        json.dump(came, file)
'''
