"""The completeness law: the tensors whose shape changes with the class count are exactly those that layouts claim."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.projects import deeplab, point_rend
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

import d2_headadapt.adapt.detectron2_heads as _  # noqa: F401  only registration
from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.registry import layouts_of

ZOO = Path(model_zoo.__file__).parent / "configs"
YAMLS = sorted(str(path.relative_to(ZOO)) for path in ZOO.rglob("*.yaml") if not path.name.startswith("Base-"))
NEEDS_COMPILED_OPS = {
    "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml",
}


def build_on_meta(cfg: CfgNode, k: int) -> nn.Module:
    """The model for k things, k + 1 stuff classes and k + 2 keypoints, so that no two counts are mixed up."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = k
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = k + 1
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = k + 2
    if "POINT_HEAD" in cfg.MODEL:
        cfg.MODEL.POINT_HEAD.NUM_CLASSES = k if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" else k + 1
    with torch.device("meta"):
        model: nn.Module = build_model(cfg)
    return model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_law(large: nn.Module, small: nn.Module) -> None:
    """Changed shapes and claimed tensors are the same set, and every claim fits its counts."""
    before, after = shapes(large), shapes(small)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    for model, found in ((large, before), (small, after)):
        assert all(HeadLayout.from_json(x.to_json()) == x for x in layouts_of(model))
        claimed = {x.tensor: x for x in layouts_of(model) if not x.agnostic}
        assert claimed.keys() == changed
        for name, layout in claimed.items():
            assert layout.num_classes(found[name]) is not None


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def compiled_ops() -> bool:
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", YAMLS)
def test_every_zoo_config_is_covered(name: str) -> None:
    if name in NEEDS_COMPILED_OPS and not compiled_ops():
        with pytest.raises(ImportError, match="DeformConv"):
            build_on_meta(_zoo(name), 80)
        return
    check_law(build_on_meta(_zoo(name), 80), build_on_meta(_zoo(name), 5))


def test_the_zoo_has_the_configs_that_the_law_was_stated_for() -> None:
    assert len(YAMLS) >= 86 and set(YAMLS) >= NEEDS_COMPILED_OPS


def _zoo(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / name))
    return cfg


def _point_rend(head: str, name: str = "PointRendMaskHead") -> CfgNode:
    cfg = _zoo("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.ROI_MASK_HEAD.NAME = name
    cfg.MODEL.ROI_MASK_HEAD.FC_DIM, cfg.MODEL.ROI_MASK_HEAD.NUM_FC = 64, 2
    cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    # No pooling: the mask head reads the feature maps itself.
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    cfg.MODEL.POINT_HEAD.NAME = head
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.POINT_HEAD.FC_DIM, cfg.MODEL.POINT_HEAD.NUM_FC = 64, 3
    return cfg


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("each_layer", [False, True])
def test_point_rend_instances_are_covered(agnostic: bool, each_layer: bool) -> None:
    cfg = _point_rend("StandardPointHead")
    cfg.MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK = agnostic
    cfg.MODEL.POINT_HEAD.COARSE_PRED_EACH_LAYER = each_layer
    check_law(build_on_meta(cfg, 80), build_on_meta(cfg, 5))


def test_implicit_point_rend_is_covered() -> None:
    cfg = _point_rend("ImplicitPointHead", "ImplicitPointRendMaskHead")
    check_law(build_on_meta(cfg, 80), build_on_meta(cfg, 5))


def test_point_rend_semantic_is_covered() -> None:
    cfg = _zoo("Misc/semantic_R_50_FPN_1x.yaml")
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.NAME = "StandardPointHead"
    cfg.MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME = "SemSegFPNHead"
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    large = build_on_meta(cfg, 80)
    check_law(large, build_on_meta(cfg, 5))
    assert {x.space for x in layouts_of(large)} == {"stuff"}


@pytest.mark.parametrize("head", ["DeepLabV3Head", "DeepLabV3PlusHead"])
def test_deeplab_is_covered(head: str) -> None:
    cfg = get_cfg()
    deeplab.add_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = head
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res5"] if head == "DeepLabV3PlusHead" else ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32, 32
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES, cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = ["res2"], [32]
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [512, 512]
    check_law(build_on_meta(cfg, 80), build_on_meta(cfg, 5))


@pytest.mark.parametrize("agnostic", [False, True])
def test_rotated_boxes_are_covered(agnostic: bool) -> None:
    cfg = _zoo("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [[-90, 0, 90]]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1, 1, 1, 1, 1)
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignRotated"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10, 10, 5, 5, 1)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    large = build_on_meta(cfg, 80)
    check_law(large, build_on_meta(cfg, 5))
    boxes = [x for x in layouts_of(large) if "bbox_pred" in x.tensor]
    assert {x.rows_per_class for x in boxes} == {5} and {x.agnostic for x in boxes} == {agnostic}


def test_federated_loss_weights_are_claimed_and_rebuilt() -> None:
    """They change with the class count, are a buffer, and come from the dataset."""
    from detectron2.modeling.box_regression import Box2BoxTransform

    from d2_headadapt.modeling.predictor import HeadAdaptOutputLayers

    def head(k: int) -> nn.Module:
        return HeadAdaptOutputLayers(
            ShapeSpec(channels=8),
            box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
            num_classes=k,
            use_fed_loss=True,
            use_sigmoid_ce=True,
            get_fed_loss_cls_weights=lambda: torch.ones(k),
        )

    check_law(head(80), head(5))
    assert [x.tensor for x in layouts_of(head(5)) if x.rebuilt] == ["fed_loss_cls_weights"]


def _lazy_files() -> list[str]:
    return sorted(str(path.relative_to(ZOO)) for folder in ("COCO-*", "Misc", "new_baselines", "common/models")
                  for path in ZOO.glob(f"{folder}/*.py"))  # fmt: skip


def _set_counts(node: Any, k: int) -> int:
    """Set every class count of a LazyConfig that is a number of its own; returns how many there were."""
    if isinstance(node, ListConfig):
        return sum(_set_counts(child, k) for child in node)
    if not isinstance(node, DictConfig):
        return 0
    found = 0
    for key in list(node):
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if key in ("num_classes", "num_keypoints"):
            semantic = "SemSeg" in str(node.get("_target_", ""))
            node[key] = k + 2 if key == "num_keypoints" else k + 1 if semantic else k
            found += 1
        else:
            found += _set_counts(node[key], k)
    return found


WITHOUT_CLASSES = {"Misc/torchvision_imagenet_R_50.py"}
"""An ImageNet classifier of torchvision, no detectron2 head."""


NEEDS_OTHER_PACKAGES = {"Misc/mmdet_mask_rcnn_R_50_FPN_1x.py": "mmdet", "common/models/mask_rcnn_vitdet.py": "timm"}


@pytest.mark.parametrize("name", _lazy_files())
def test_every_lazy_config_is_covered(name: str) -> None:
    models = []
    if name in NEEDS_OTHER_PACKAGES:
        pytest.importorskip(NEEDS_OTHER_PACKAGES[name])
    for k in (80, 5):
        config = LazyConfig.load(str(ZOO / name)).get("model")
        if name in WITHOUT_CLASSES:
            assert "RPN" not in str(config) and "ROIHeads" not in str(config)
            return
        assert _set_counts(config, k), "no class count in this config: say so in WITHOUT_CLASSES"
        # ViT reads values while it is built, which the meta device does not have.
        with torch.device("cpu" if "vitdet" in name else "meta"):
            models.append(instantiate(config))
    check_law(*models)


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "Misc/semantic_R_50_FPN_1x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_every_head_of_the_family_is_carried_by_name(name: str) -> None:
    """On detectron2's own models: each class-sized tensor is carried, and nothing else changes."""
    counts = {"thing": (80, 5), "stuff": (81, 6), "keypoint": (82, 7)}
    tables = {
        side: {space: ClassTable([f"{space} {i}" for i in order(n[side])]) for space, n in counts.items()}
        for side, order in ((0, range), (1, lambda k: range(2 * k, k, -1)))
    }
    large, small = build_on_meta(_zoo(name), 80), build_on_meta(_zoo(name), 5)
    plan = plan_adaptation(
        shapes(large), shapes(small), layouts_of(small), source_tables=tables[0], target_tables=tables[1]
    )
    claimed = {x.tensor for x in layouts_of(small) if not x.agnostic}
    assert {t.name for t in plan.by_action("carried")} == claimed
    assert {t.name for t in plan.by_action("copied")} == shapes(small).keys() - claimed
    assert all(t.verified and not t.new for t in plan.by_action("carried"))
