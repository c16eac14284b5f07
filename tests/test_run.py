"""``d2-headadapt run``: somebody's training script, unmodified, in one process and in several."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Ran, python
from helpers.datasets import write_coco
from helpers.files import save_stock
from helpers.models import names, stock_model, tiny_cfg

OLD = names(5)
NEW = ["class 3", "zebra", "class 0"]
CLS = "roi_heads.box_predictor.cls_score.weight"
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


class Repository:
    """A folder with a training script of the usual kind that has never heard of this package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "their_train.py").write_text(SCRIPT)
        model = stock_model(5, seed=21, masks=False)
        self.old = {name: value.clone() for name, value in model.state_dict().items()}
        weights = save_stock(model, folder / "old.pth")
        write_coco(folder, NEW)
        cfg = tiny_cfg(masks=False, ours=False, num_classes=80)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 2, 1e-4
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(weights), "out"
        (folder / "c.yaml").write_text(cfg.dump())

    def start(self, *words: object) -> Ran:
        return python(*words, "--config-file", "c.yaml", cwd=self.folder)

    def run(self, *options: str, script: tuple[str, ...] = ("their_train.py",), more: tuple[str, ...] = ()) -> Ran:
        source = ["--set", "MODEL.HEAD_ADAPT.SOURCE_CLASSES", repr(OLD)]
        ran = python(
            "-m", "d2_headadapt", "run", *source, *options, *script, "--config-file", "c.yaml", *more, cwd=self.folder
        )
        assert ran.code == 0, ran.err[-3000:]
        return ran

    def seen(self, rank: int = 0) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / f"seen_{rank}.json").read_text())
        return loaded

    def carried(self, rank: int = 0) -> list[bool]:
        """Class by class of the new list, and for background: whether the row is the file's."""
        rows, old = torch.load(self.folder / f"before_{rank}.pt"), self.old[CLS]
        places = [OLD.index(name) if name in OLD else None for name in NEW] + [len(OLD)]
        return [place is not None and torch.equal(rows[i], old[place]) for i, place in enumerate(places)]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_a_script_of_somebody_carries_rows_by_name(repository: Repository) -> None:
    ran = repository.run(more=("SOLVER.MAX_ITER", "1"))
    seen = repository.seen()
    assert seen["checkpointer"] == "HeadAdaptCheckpointer" and seen["rows"] == 4
    assert repository.carried() == [True, False, True, True]
    assert seen["argv"] == ["--config-file", "c.yaml", "SOLVER.MAX_ITER", "1"], "its arguments are untouched"
    assert seen["count"] == 80, "its config is its own"
    said = ran.out + ran.err
    assert seen["own"] == "MyCheckpointer" and "let it inherit from d2_headadapt.HeadAdaptCheckpointer" in said
    assert "2 of 3 thing classes carried" in said


def test_the_same_script_without_run_is_as_before(repository: Repository) -> None:
    ran = repository.start("their_train.py")
    assert ran.code == 0, ran.err[-2000:]
    seen = repository.seen()
    assert seen["checkpointer"] == "DetectionCheckpointer" and seen["rows"] == 81


def test_every_process_of_a_launch_is_reached(repository: Repository) -> None:
    repository.run(more=("--num-gpus", "2"))
    seen = [repository.seen(rank) for rank in (0, 1)]
    assert [one["checkpointer"] for one in seen] == ["HeadAdaptCheckpointer"] * 2
    assert repository.carried(0) == repository.carried(1) == [True, False, True, True]
    assert seen[0]["hash"] == seen[1]["hash"]


def test_a_module_runs_as_with_python_m(repository: Repository) -> None:
    repository.run(script=("-m", "their_train"))
    assert repository.seen()["checkpointer"] == "HeadAdaptCheckpointer"
    assert repository.carried() == [True, False, True, True]


def test_new_rows_are_solved_only_when_asked(repository: Repository) -> None:
    plain = repository.run()
    assert "fitted" not in plain.out + plain.err
    asked = repository.run("--fit", "--heads")
    assert "fitted 1 of 1 new classes" in asked.out + asked.err


def test_no_script_is_a_message(tmp_path: Path) -> None:
    ran = python("-m", "d2_headadapt", "run", "nothing.py", cwd=tmp_path)
    assert ran.code == 2
    assert "error: d2-headadapt run: expected a Python script, found no file 'nothing.py'" in ran.err


@pytest.mark.parametrize("name", ["train_net.py", "plain_train_net.py"])
def test_detectron2_s_own_scripts(name: str, repository: Repository) -> None:
    """The wheel installs them as a top-level package; a checkout of detectron2 does not."""
    spec = importlib.util.find_spec("tools")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec is not None else Path()
    script = folder / name
    if not script.is_file() or "detectron2" not in script.read_text(encoding="utf-8"):
        pytest.skip("detectron2's own scripts are not installed here")
    paths = {"json": str(repository.folder / "data.json"), "images": str(repository.folder / "data")}
    entry = json.dumps([{"name": "mine", **paths}])
    repository.run("--set", "DATASETS.REGISTER", entry, script=(str(script),))
    plan = json.loads((repository.folder / "out" / "head_adapt_plan.json").read_text())
    carried = {t["name"]: t["carried"] for t in plan["tensors"]}
    assert carried[CLS] == [[0, 3], [2, 0]]
    assert (repository.folder / "out" / "model_final.pth").is_file()
