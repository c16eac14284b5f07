"""The model zoo's own configs at full size, from COCO's 80 classes to another list, and back under stock detectron2.

The weights are randomly initialised and saved by stock: the zoo itself is not downloaded.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from helpers.commands import cli
from helpers.files import save_stock, stock_warnings
from helpers.models import build_seeded

from d2_headadapt import vocabulary

TARGET = ["zebra", "person", "forklift", "dining table", "toothbrush", "Traffic-Light"]
COCO = vocabulary("coco")
# Target class -> COCO class; the last name is spelled as COCO does not.
CARRIED = {0: "zebra", 1: "person", 3: "dining table", 4: "toothbrush", 5: "traffic light"}


def zoo_config(name: str, num_classes: int = 80) -> CfgNode:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    return cfg


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", 1),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", 3),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", 1),
    ],
)
def test_a_zoo_model_moves_and_stock_loads_it_without_a_warning(
    name: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ``adapt`` from the zoo's address, which alone says that the classes are COCO's."""
    old = build_seeded(zoo_config(name)).state_dict()
    local = tmp_path / "model_final.pkl"
    arrays = {key: value.numpy() for key, value in old.items()}
    with local.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file, protocol=4)
    address = f"detectron2://{name.removesuffix('.yaml')}/137257794/model_final.pkl"
    find = PathManager.get_local_path
    monkeypatch.setattr(PathManager, "get_local_path", lambda p, **k: str(local) if p == address else find(p, **k))
    output = tmp_path / "new.pth"
    ran = cli(
        *("adapt", "--config-file", model_zoo.get_config_file(name), "--weights", address, "--output", output),
        *("MODEL.HEAD_ADAPT.TARGET_CLASSES", str(TARGET)),
    )
    assert ran.code == 0, ran.err
    assert "5 of 6 thing classes carried from vocabulary coco (80), 1 new (forklift), 75 dropped" in ran.out
    local.unlink()
    model = build_seeded(zoo_config(name, len(TARGET)), seed=1)
    assert stock_warnings(model, str(output)) == []
    new = model.state_dict()
    targets, sources = list(CARRIED), [COCO.names.index(c) for c in CARRIED.values()]
    for i in range(stages):
        stage = f"roi_heads.box_predictor{f'.{i}' if stages > 1 else ''}"
        for leaf in ("weight", "bias"):
            score, before = new[f"{stage}.cls_score.{leaf}"], old[f"{stage}.cls_score.{leaf}"]
            assert torch.equal(score[[*targets, 6]], before[[*sources, 80]])
            boxes, before = new[f"{stage}.bbox_pred.{leaf}"], old[f"{stage}.bbox_pred.{leaf}"]
            if stages > 1:
                assert torch.equal(boxes, before)
            else:
                assert torch.equal(boxes.unflatten(0, (6, 4))[targets], before.unflatten(0, (80, 4))[sources])
    if "roi_heads.mask_head.predictor.weight" in new:
        key = "roi_heads.mask_head.predictor.weight"
        assert torch.equal(new[key][targets], old[key][sources])
    head = ("roi_heads.box_predictor", "roi_heads.mask_head.predictor")
    assert all(torch.equal(value, old[key]) for key, value in new.items() if not key.startswith(head))


def test_a_users_yaml_on_top_of_the_zoos(tmp_path: Path) -> None:
    """A child yaml with our heads, as the README shows it; the plan needs no second of memory for the model."""
    base = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    path = tmp_path / "mine.yaml"
    keys = {"TARGET_CLASSES": TARGET, "SOURCE_CLASSES": "coco"}
    path.write_text(
        yaml.safe_dump({"_BASE_": base, "MODEL": {"ROI_HEADS": {"NAME": "HeadAdaptROIHeads"}, "HEAD_ADAPT": keys}})
    )
    weights = save_stock(build_seeded(zoo_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")), tmp_path / "w.pth")
    ran = cli("plan", "--config-file", path, "--weights", weights)
    Path(weights).unlink()
    assert ran.code == 0, ran.err
    assert "5 of 6 thing classes carried from vocabulary coco (80)" in ran.out
    assert "1 new (forklift)" in ran.out
    assert "unverified" not in ran.out
