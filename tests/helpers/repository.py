"""A folder with a training script of the usual kind that has never heard of this package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .commands import Ran, python
from .datasets import write_coco
from .files import save_stock
from .models import names, stock_model, tiny_cfg

OLD = names(5)
NEW = ["class 3", "zebra", "class 0"]
CLS = "roi_heads.box_predictor.cls_score.weight"
SOURCE = ("--set", "MODEL.HEAD_ADAPT.SOURCE_CLASSES", repr(OLD))
SCRIPT = """
import hashlib
import json
import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.utils import comm


class MyCheckpointer(DetectionCheckpointer):
    pass


def main(args):
    register_coco_instances("mine", {}, "data.json", "data")
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    default_setup(cfg, args)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    name = "roi_heads.box_predictor.cls_score.weight"
    before = getattr(trainer.model, "module", trainer.model).state_dict()[name].clone()
    trainer.train()
    after = getattr(trainer.model, "module", trainer.model).state_dict()
    seen = {
        "checkpointer": type(trainer.checkpointer).__name__,
        "own": type(MyCheckpointer(trainer.model)).__name__,
        "count": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "rows": len(before),
        "hash": hashlib.sha256(b"".join(v.numpy().tobytes() for v in after.values())).hexdigest(),
        "argv": sys.argv[1:],
    }
    torch.save(before, f"before_{comm.get_rank()}.pt")
    with open(f"seen_{comm.get_rank()}.json", "w") as f:
        json.dump(seen, f)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, dist_url="auto", args=(args,))
"""


def adopted(*words: object, cwd: Path, under: Sequence[str] = (), env: dict[str, str] | None = None) -> Ran:
    """``d2-headadapt run WORDS``, where wanted as a module of ``torch.distributed.run``."""
    return python(*under, "-m", "d2_headadapt", "run", *words, cwd=cwd, env=env)


class Repository:
    """Such a folder: ``their_train.py``, ``c.yaml``, ``old.pth`` of five classes and a dataset.

    Args:
        folder: where.
        classes: of the dataset.
        num_classes: of the yaml.
    """

    def __init__(self, folder: Path, classes: Sequence[str] = NEW, *, num_classes: int = 80) -> None:
        self.folder = folder
        self.classes = list(classes)
        (folder / "their_train.py").write_text(SCRIPT)
        model = stock_model(5, seed=21, masks=False)
        self.old = {name: value.clone() for name, value in model.state_dict().items()}
        weights = save_stock(model, folder / "old.pth")
        write_coco(folder, self.classes)
        cfg = tiny_cfg(masks=False, ours=False, num_classes=num_classes)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 2, 1e-4
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(weights), "out"
        (folder / "c.yaml").write_text(cfg.dump())

    def start(self, *words: object, more: tuple[str, ...] = ()) -> Ran:
        return python(*words, "--config-file", "c.yaml", *more, cwd=self.folder)

    def run(self, *options: str, script: tuple[str, ...] = ("their_train.py",), more: tuple[str, ...] = ()) -> Ran:
        ran = adopted(*SOURCE, *options, *script, "--config-file", "c.yaml", *more, cwd=self.folder)
        assert ran.code == 0, ran.err[-3000:]
        return ran

    def seen(self, rank: int = 0) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / f"seen_{rank}.json").read_text())
        return loaded

    def carried(self, rank: int = 0) -> list[bool]:
        """Class by class of the new list, and for background: whether the row is the file's."""
        rows, old = torch.load(self.folder / f"before_{rank}.pt"), self.old[CLS]
        places = {i: OLD.index(name) if name in OLD else None for i, name in enumerate(self.classes)}
        # The script's own number of classes may be larger than the list.
        places[len(rows) - 1] = len(OLD)
        return [place is not None and torch.equal(rows[i], old[place]) for i, place in places.items()]


def shipped(name: str) -> Path:
    """One of detectron2's own scripts; its wheel installs them as a top-level package, a checkout of it does not."""
    spec = importlib.util.find_spec("tools")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec is not None else Path()
    if not (folder / name).is_file() or "detectron2" not in (folder / name).read_text(encoding="utf-8"):
        pytest.skip("detectron2's own scripts are not installed here")
    return folder / name
