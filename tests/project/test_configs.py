"""Every yaml of ``configs/``: it loads, it builds, and it says nothing twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REAL
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from d2_headadapt.adapt.vocabularies import zoo_tables
from d2_headadapt.data.datasets import register_datasets
from d2_headadapt.setup.build import build_on_meta
from d2_headadapt.setup.yaml import all_keys, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NEEDS_REAL = ("blood_cells.yaml", "fashion.yaml", "real_coco128.yaml")
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
EVERY = [pytest.param(name, marks=pytest.mark.real if name in NEEDS_REAL else ()) for name in NAMES]
LEAVES = [name for name in NAMES if "_BASE_" in yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))]
ZOO = {
    "faster_rcnn_R_50_C4.yaml": "COCO-Detection/faster_rcnn_R_50_C4_3x",
    "faster_rcnn_R_50_FPN.yaml": "COCO-Detection/faster_rcnn_R_50_FPN_3x",
    "mask_rcnn_R_50_FPN.yaml": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
    "cascade_mask_rcnn_R_50_FPN.yaml": "Misc/cascade_mask_rcnn_R_50_FPN_3x",
}


def load(name: str, real: Path) -> CfgNode:
    imports = [str(real / "models" / "fbnet_c4.py")] if name in NEEDS_REAL else []
    cfg = load_config(str(CONFIGS / name), imports=imports)
    if name == "fashion.yaml":
        # Its classes are those of its csv, wherever the folder of real material is.
        place = {"csv": str(real / "fashion" / "labels.csv"), "images": str(real / "fashion" / "images")}
        register_datasets([{**entry, **place} for entry in cfg.DATASETS.REGISTER])
    return cfg


def flat(cfg: CfgNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in all_keys(cfg):
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        values[key] = list(value) if isinstance(value, tuple) else value
    return values


def written_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        keys += written_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


@pytest.mark.parametrize("name", EVERY)
def test_every_yaml_loads_and_builds_on_the_meta_device(name: str) -> None:
    model = build_on_meta(load(name, REAL))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", EVERY)
def test_names_in_a_yaml_exist(name: str) -> None:
    cfg = load(name, REAL)
    assert cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY
    assert cfg.MODEL.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert cfg.MODEL.ROI_HEADS.NAME.startswith("HeadAdapt") or cfg.MODEL.META_ARCHITECTURE == "MultiTaskClassifier"
    registered = {entry["name"] for entry in cfg.DATASETS.REGISTER} | set(DatasetCatalog.list())
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= registered


@pytest.mark.parametrize("name", EVERY)
def test_no_yaml_writes_a_class_count(name: str) -> None:
    assert not [key for key in written_keys(yaml.safe_load((CONFIGS / name).read_text())) if "NUM_CLASSES" in key]


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_holds_only_what_differs_from_its_base(name: str) -> None:
    leaf = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    base = leaf.pop("_BASE_")
    assert base in NAMES, "a base outside configs/"
    ours, theirs = flat(load_config(str(CONFIGS / name))), flat(load_config(str(CONFIGS / base)))
    # A task is a key that only the leaf has.
    assert [key for key in written_keys(leaf) if key in theirs and ours[key] == theirs[key]] == []


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_leaf_is_the_model_zoo_config_but_for_head_and_weights(name: str) -> None:
    ours = flat(load_config(str(CONFIGS / name)))
    theirs = flat(model_zoo.get_config(f"{ZOO[name]}.yaml"))
    differing = {key for key in theirs if ours[key] != theirs[key]}
    assert differing == {"MODEL.ROI_HEADS.NAME", "MODEL.WEIGHTS"}
    assert ours["MODEL.ROI_HEADS.NAME"] == "HeadAdapt" + theirs["MODEL.ROI_HEADS.NAME"].removeprefix("Standard")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_weights_of_a_leaf_are_the_zoo_s_and_tell_their_classes(name: str) -> None:
    weights = load_config(str(CONFIGS / name)).MODEL.WEIGHTS
    assert weights == f"detectron2://{ZOO[name]}/{model_zoo.get_checkpoint_url(ZOO[name] + '.yaml').split('/', 6)[-1]}"
    tables = zoo_tables(weights)
    assert tables is not None and len(tables["thing"]) == 80
