"""Class axes of public projects' real models, where ``D2HA_PROJECTS`` names the folder that holds their checkouts.

Each is a folder with the repository's name. Seen at: AdelaiDet 3672122, CenterNet2 (with its package ``centernet``),
Detic 436cda2, MaskFormer da3e60d, SparseR-CNN 0e5028d, YOLOF a44b7af, detrex e244e6c, few-shot-object-detection
148a039. ``tests/helpers/foreign_heads.py`` has the same names and sizes for runs without them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT

from d2_headadapt.adapt.discovery import Discovery

PROJECTS = os.environ.get("D2HA_PROJECTS", "")
ONE = "1 row per class"
LAST = f"{ONE}, background last"
BOXES = "4 rows per class"

CASES: list[tuple[str, str, dict[str, str], set[str]]] = [
    ("AdelaiDet", "configs/FCOS-Detection/R_50_1x.yaml", {"proposal_generator.fcos_head.cls_logits": ONE}, set()),
    (
        "AdelaiDet",
        "configs/CondInst/MS_R_50_3x_sem.yaml",
        {"proposal_generator.fcos_head.cls_logits": ONE, "mask_branch.logits": ONE},
        set(),
    ),
    (
        "AdelaiDet",
        "configs/BlendMask/R_50_1x.yaml",
        {"proposal_generator.fcos_head.cls_logits": ONE},
        {"basis_module.seg_head.*"},
    ),
    ("AdelaiDet", "configs/SOLOv2/R50_3x.yaml", {"ins_head.cate_pred": ONE}, set()),
    (
        "AdelaiDet",
        "configs/FCPose/R_50_3X.yaml",
        {
            "proposal_generator.fcos.fcos_head.cls_logits": ONE,
            "proposal_generator.basis_module.p3_logits": ONE,
            "proposal_generator.basis_module.p1_logits": ONE,
        },
        {"proposal_generator.basis_module.upsampler.*"},
    ),
    ("CenterNet2", "configs/CenterNet-FPN_R50_1x.yaml", {"proposal_generator.centernet_head.cls_logits": ONE}, set()),
    ("YOLOF", "configs/yolof_R_50_C5_1x.yaml", {"decoder.cls_score": f"{ONE}, 5 anchors"}, set()),
    (
        "MaskFormer",
        "configs/ade20k-150/maskformer_R50_bs16_160k.yaml",
        {"sem_seg_head.predictor.class_embed": LAST, "criterion": "rebuilt"},
        set(),
    ),
    ("detrex", "projects/detr/configs/models/detr_r50.py", {"class_embed": LAST, "criterion": "rebuilt"}, set()),
    (
        "detrex",
        "projects/dino/configs/models/dino_r50.py",
        {"class_embed.*": ONE, "transformer.decoder.class_embed.*": ONE, "label_enc": ONE},
        set(),
    ),
    (
        "detrex",
        "projects/dn_detr/configs/models/dn_detr_r50.py",
        {"class_embed": ONE, "denoising_generator.label_encoder": LAST},
        set(),
    ),
    (
        "SparseR-CNN",
        "projects/SparseRCNN/configs/sparsercnn.res50.100pro.3x.yaml",
        {"head.head_series.*.class_logits": LAST, "criterion": "rebuilt"},
        set(),
    ),
    (
        "few-shot-object-detection",
        "configs/PascalVOC-detection/split1/faster_rcnn_R_101_FPN_base1.yaml",
        {"roi_heads.box_predictor.cls_score": LAST, "roi_heads.box_predictor.bbox_pred": BOXES},
        set(),
    ),
    (
        "few-shot-object-detection",
        "configs/PascalVOC-detection/split1/faster_rcnn_R_101_FPN_ft_all1_1shot.yaml",
        {"roi_heads.box_predictor.cls_score": LAST, "roi_heads.box_predictor.bbox_pred": BOXES},
        set(),
    ),
    (
        "Detic",
        "configs/BoxSup-C2_L_CLIP_R5021k_640b64_4x.yaml",
        {"roi_heads.box_predictor.*": "rebuilt", "roi_heads.box_predictor.*.cls_score": LAST},
        set(),
    ),
]


@pytest.mark.parametrize(("project", "config", "found", "refused"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_real_models(project: str, config: str, found: dict[str, str], refused: set[str]) -> None:
    folder = Path(PROJECTS) / project
    if not PROJECTS or not folder.is_dir():
        pytest.skip(f"D2HA_PROJECTS names no folder with a checkout of {project}")
    worker = ROOT / "tests" / "workers" / "project_layouts.py"
    ran = subprocess.run(
        [sys.executable, str(worker), project, str(folder), config], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    seen = Discovery.from_json(json.loads(ran.stdout.splitlines()[-1]))
    kinds = {_layer(x.tensor): "rebuilt" if x.rebuilt else x.describe() for x in seen.layouts}
    assert kinds == found
    assert {_layer(x.sized.tensor) for x in seen.refused} == refused
    assert not seen.stuck


def _layer(tensor: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", tensor.rpartition(".")[0])
