"""``KEEP: exact`` through every door: RetinaNet and cascade yamls, LazyConfigs, ``run``, and exported models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import ROOT, cli, python
from helpers.files import save_stock
from helpers.fit import tiny_model
from helpers.keep import OLD, KeepPlace, differs
from helpers.lazy import write_lazy
from helpers.models import batch, detections, names, stock_model
from helpers.resume import writers_are_closed

from d2_headadapt.checkpoint.kept import branch_of

__all__ = ["writers_are_closed"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def old_part(path: Path) -> dict[str, torch.Tensor]:
    """The base's tensors of a file."""
    model = torch.load(path)["model"]
    return {name: value for name, value in model.items() if branch_of(name) is None}


def same_base(path: Path, base: Path) -> bool:
    one, other = old_part(path), old_part(base)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def retinanet_place(folder: Path) -> KeepPlace:
    """The yaml of a RetinaNet, and its base."""
    place = KeepPlace(folder)
    config = yaml.safe_load(place.config.read_text())
    model = config["MODEL"]
    model["META_ARCHITECTURE"] = "RetinaNet"
    model["BACKBONE"]["NAME"] = "build_retinanet_resnet_fpn_backbone"
    model["RESNETS"]["OUT_FEATURES"] = model["FPN"]["IN_FEATURES"] = ["res3", "res4", "res5"]
    model["RETINANET"].update(NUM_CONVS=1, SCORE_THRESH_TEST=0.0)
    place.config.write_text(yaml.safe_dump(config))
    save_stock(tiny_model("retinanet", num_classes=OLD), Path(place.base))
    return place


def test_a_retinanet_is_extended_trained_and_exported(tmp_path: Path) -> None:
    place = retinanet_place(tmp_path)
    more = place.extended()
    assert same_base(more, place.base)
    ran = place.run("train", opts=["MODEL.WEIGHTS", place.base])
    assert ran.code == 0, ran.err
    assert same_base(tmp_path / "out" / "model_final.pth", place.base)
    ran = place.run(
        "export", "--weights", more, "--format", "traced", "--output", tmp_path / "m.ts", "--image", tmp_path / "train"
    )
    assert ran.code == 0, ran.err


def test_a_traced_model_gives_the_extended_detections(tmp_path: Path) -> None:
    place = KeepPlace(tmp_path)
    more = place.extended()
    ran = place.run(
        "export", "--weights", more, "--format", "traced", "--output", tmp_path / "m.ts", "--image", tmp_path / "train"
    )
    assert ran.code == 0, ran.err
    ran = place.run("export", "--weights", more, "--format", "scripted", "--output", tmp_path / "m.pt")
    assert ran.code == 1 and "Type --format traced" in ran.err


def test_a_cascade_is_extended(tmp_path: Path) -> None:
    place = KeepPlace(tmp_path)
    config = yaml.safe_load(place.config.read_text())
    config["MODEL"]["ROI_HEADS"]["NAME"] = "CascadeROIHeads"
    config["MODEL"]["ROI_BOX_HEAD"]["CLS_AGNOSTIC_BBOX_REG"] = True
    place.config.write_text(yaml.safe_dump(config))
    save_stock(stock_model(OLD, "cascade", seed=21), Path(place.base))
    assert same_base(place.extended(), place.base)


def test_a_lazy_config_is_extended(tmp_path: Path) -> None:
    base = save_stock(stock_model(OLD, seed=21, masks=True), tmp_path / "base.pth")
    keys = f"head_adapt.update(keep='exact', source_classes={names(OLD)!r})\n"
    config = write_lazy(tmp_path, ["rhino", "gnu"], keys)
    more = tmp_path / "more.pth"
    ran = cli("extend", "--config-file", config, "--weights", base, "--output", more)
    assert ran.code == 0, ran.err
    assert "old detections identical on 4 images" in ran.out and same_base(more, base)
    assert any(name.endswith("mask_predictor.weight") for name in torch.load(more)["model"])
    ran = cli("train", "--config-file", config, f"train.init_checkpoint={base}")
    assert ran.code == 0, ran.err
    assert same_base(tmp_path / "out" / "model_final.pth", base)


SCRIPT = """
import sys
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
register_coco_instances("own_train", {}, "train.json", "train")
cfg = get_cfg()
cfg.merge_from_file("stock.yaml")
cfg.DATASETS.TRAIN = ("own_train",)
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
"""


def test_somebodys_script_trains_the_branch_alone(tmp_path: Path) -> None:
    place = KeepPlace(tmp_path)
    config: dict[str, Any] = yaml.safe_load(place.config.read_text())
    for key in ("HEAD_ADAPT", "TASKS", "CLASSIFIER", "CONV_NET"):
        del config["MODEL"][key]
    del config["DATASETS"]["REGISTER"]
    config["MODEL"].update(WEIGHTS=str(place.base))
    config["MODEL"]["ROI_HEADS"]["NAME"] = "StandardROIHeads"
    (tmp_path / "stock.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "own.py").write_text(SCRIPT)
    ran = python(
        "-m", "d2_headadapt", "run", "--fit", "--set", "MODEL.HEAD_ADAPT.KEEP", "exact",
        "--set", "MODEL.HEAD_ADAPT.SOURCE_CLASSES", repr(names(OLD)), "own.py", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err[-2000:]
    final = tmp_path / "out" / "model_final.pth"
    assert same_base(final, place.base)
    before, after = stock_model(OLD, seed=1), stock_model(OLD, seed=2)
    before.load_state_dict(torch.load(place.base)["model"])
    after.load_state_dict(torch.load(final)["model"], strict=False)
    assert differs(detections(before, batch(OLD)), detections(after, batch(OLD))) == []


def test_two_processes_train_the_branch_alone(tmp_path: Path) -> None:
    place = KeepPlace(tmp_path)
    ran = python(
        ROOT / "tools" / "train_net.py", "--config-file", place.config, "--num-gpus", 2, "--dist-url", "auto",
        "MODEL.WEIGHTS", place.base, cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err[-2000:]
    assert same_base(tmp_path / "out" / "model_final.pth", place.base)
