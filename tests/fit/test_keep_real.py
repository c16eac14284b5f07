"""T1 on the real COCO model: three kinds of blood cells behind it, a few images of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import build_model
from helpers.commands import ROOT
from torch import nn

from d2_headadapt import HeadAdaptCheckpointer, Trainer
from d2_headadapt.fit import FitSettings, fit_new_rows, mapper_at_test_size
from d2_headadapt.setup.yaml import load_config, resolve_config


def settled(real: Path, *opts: Any) -> Any:
    weights = str(real / "models" / "fbnet_c4_coco.pth")
    entries = [
        {"name": f"real_keep_{name}", "json": str(real / folder / f"{part}.json"), "images": str(real / folder / part)}
        for name, folder, part in (("cells", "bccd", "train"), ("photos", "coco128", "val"))
    ]
    keys = [
        *("MODEL.WEIGHTS", weights, "MODEL.HEAD_ADAPT.KEEP", "exact", "MODEL.DEVICE", "cpu"),
        *("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('real_keep_cells',)"),
        *("DATASETS.TEST", "('real_keep_photos',)", *map(str, opts)),
    ]
    cfg = load_config(str(ROOT / "configs" / "blood_cells.yaml"), keys, [str(real / "models" / "fbnet_c4.py")])
    resolve_config(cfg)
    return cfg


@torch.no_grad()
def detections(cfg: Any, model: nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    mapper = DatasetMapper(cfg, is_train=False)
    found = []
    for entry in get_detection_dataset_dicts(("real_keep_photos",))[:count]:
        fields = model.eval()([mapper(entry)])[0]["instances"].get_fields()
        found.append({name: getattr(value, "tensor", value) for name, value in fields.items()})
    return found


def test_the_real_models_detections_stay(real: Path) -> None:
    cfg = settled(real)
    stock = build_model(cfg)
    DetectionCheckpointer(stock).load(cfg.MODEL.WEIGHTS)
    before = detections(cfg, stock, 6)
    model = Trainer.build_model(cfg)
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)[:12]
    report = fit_new_rows(
        model, dicts, mapper_at_test_size(cfg), new=checkpointer.rows_to_fit(), settings=FitSettings(mirror=False)
    )
    assert report.new == {"added_0": (0, 1, 2)} and report.without_examples == {}
    after = detections(cfg, model, 6)
    for old, both in zip(before, after, strict=True):
        assert all(torch.equal(old[name], both[name][: len(old["scores"])]) for name in old)
    cells = DatasetMapper(cfg, is_train=False)(dicts[0])
    with torch.no_grad():
        found = model([cells])[0]["instances"]
    assert set(found.pred_classes[found.scores >= 0.5].tolist()) & {80, 81, 82}
    # A mutation that the test must see: one number of one old tensor, by a millionth.
    with torch.no_grad():
        model.get_parameter("roi_heads.box_predictor.cls_score.bias")[0] += 1e-6
    spoilt = detections(cfg, model, 2)
    assert not all(
        torch.equal(a["scores"], b["scores"][: len(a["scores"])]) for a, b in zip(before, spoilt, strict=False)
    )
