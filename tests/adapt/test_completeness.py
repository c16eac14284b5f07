"""The completeness law: the tensors that follow a class count are exactly those that layouts claim, at the same places.

What follows a count is found by building each model at several counts (:mod:`d2_headadapt.setup.count_keys`), which
knows nothing of the declared layouts.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.projects import deeplab, point_rend
from torch import nn

import d2_headadapt.adapt.detectron2_heads as _  # noqa: F401  only registration
from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.discovery import Discovery, check_declared, settle_layouts
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.registry import layouts_of
from d2_headadapt.errors import ConfigError
from d2_headadapt.setup.count_keys import discover, discover_lazy, discover_yaml
from d2_headadapt.setup.shape_builds import SkipInitialisers

ZOO = Path(model_zoo.__file__).parent / "configs"
YAMLS = sorted(str(path.relative_to(ZOO)) for path in ZOO.rglob("*.yaml") if not path.name.startswith("Base-"))
NEEDS_COMPILED_OPS = {
    "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml",
}


def build(cfg: CfgNode, k: int | None = None) -> nn.Module:
    """The model's shapes: as configured, or with k things, k + 1 stuff classes and k + 2 keypoints."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if k is not None:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = k
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = k + 1
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = k + 2
    with SkipInitialisers():
        model: nn.Module = build_model(cfg)
    return model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_law(found: Discovery, model: nn.Module, *, refused: Collection[str] = ()) -> None:
    """Found and declared are the same set at the same places; ``refused`` are those that only a layout can tell."""
    declared = layouts_of(model)
    claimed = {layout.tensor: layout for layout in declared if not layout.agnostic}
    assert all(HeadLayout.from_json(x.to_json()) == x for x in declared)
    assert claimed.keys() == found.sized.keys()
    assert {x.sized.tensor for x in found.refused} == set(refused)
    for layout in found.layouts:
        assert layout.same_kind(claimed[layout.tensor]) and layout.space == claimed[layout.tensor].space
    assert check_declared(found, declared) == ()
    assert not found.stuck and not found.unprobed


def check_yaml(cfg: CfgNode, *, refused: Collection[str] = ()) -> Discovery:
    found = discover_yaml(cfg)
    check_law(found, build(cfg), refused=refused)
    return found


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
        with pytest.raises(ConfigError, match="DeformConv"):
            discover_yaml(_zoo(name))
        return
    check_yaml(_zoo(name))


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


COARSE = {f"roi_heads.mask_head.coarse_head.prediction.{leaf}" for leaf in ("weight", "bias")}
"""49 outputs per class: no shape tells whether a class's stand together."""


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("each_layer", [False, True])
def test_point_rend_instances_are_covered(agnostic: bool, each_layer: bool) -> None:
    cfg = _point_rend("StandardPointHead")
    cfg.MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK = agnostic
    cfg.MODEL.POINT_HEAD.COARSE_PRED_EACH_LAYER = each_layer
    found = check_yaml(cfg, refused=COARSE)
    assert {family.keys for family in found.families} == {
        ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.POINT_HEAD.NUM_CLASSES")
    }


def test_implicit_point_rend_is_covered() -> None:
    """The parameters of one layer's weights and of its biases are two blocks of classes on one axis."""
    parameters = {f"roi_heads.mask_head.parameter_head.prediction.{leaf}" for leaf in ("weight", "bias")}
    check_yaml(_point_rend("ImplicitPointHead", "ImplicitPointRendMaskHead"), refused=parameters)


def test_point_rend_semantic_is_covered() -> None:
    cfg = _zoo("Misc/semantic_R_50_FPN_1x.yaml")
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.NAME = "StandardPointHead"
    cfg.MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME = "SemSegFPNHead"
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    found = check_yaml(cfg)
    assert {x.space for x in found.layouts} == {"stuff"}


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
    check_yaml(cfg)


def test_panoptic_deeplab_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    if (
        importlib.util.find_spec("panopticapi") is None
    ):  # Its mapper of datasets needs a function of it, its model does not.
        stand_in = ModuleType("panopticapi.utils")
        stand_in.rgb2id = None
        monkeypatch.setitem(sys.modules, "panopticapi", ModuleType("panopticapi"))
        monkeypatch.setitem(sys.modules, "panopticapi.utils", stand_in)
    from detectron2.projects import panoptic_deeplab

    cfg = get_cfg()
    panoptic_deeplab.add_panoptic_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.DATASETS.TRAIN = ("a_panoptic_dataset",)  # Its constructor asks for the metadata of one.
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    for head, name in ((cfg.MODEL.SEM_SEG_HEAD, "SemSeg"), (cfg.MODEL.INS_EMBED_HEAD, "InsEmbed")):
        head.NAME = f"PanopticDeepLab{name}Head"
        head.ASPP_CHANNELS, head.CONVS_DIM, head.HEAD_CHANNELS = 32, 32, 32
        head.IN_FEATURES, head.PROJECT_FEATURES = ["res2", "res3", "res5"], ["res2", "res3"]
        head.PROJECT_CHANNELS = [32, 32]
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [512, 512]
    check_yaml(cfg)


@pytest.mark.parametrize(
    ("name", "misleads"),
    # A cascade cannot be built otherwise, which its layout knows.
    [("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", False), ("Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml", True)],
)
def test_agnostic_layers_of_a_one_class_model_stay_agnostic(name: str, misleads: bool) -> None:
    """Their shapes are those of a class-specific layer; the config says which, and building more classes shows it."""
    cfg = _zoo(name)
    many = {x.tensor: x.describe() for x in layouts_of(build(cfg))}
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    found, declared = discover_yaml(cfg), layouts_of(build(cfg))
    assert ({x.tensor: x.describe() for x in declared} != many) == misleads
    settled = settle_layouts(declared, found)
    assert {x.tensor: x.describe() for x in settled} == many
    assert (check_declared(found, declared) != ()) == misleads and check_declared(found, settled) == ()


def test_an_agnostic_point_head_of_a_one_class_model_keeps_its_class_inputs() -> None:
    cfg = _point_rend("StandardPointHead")
    cfg.MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK = True
    many = {x.tensor: x.class_axes for x in layouts_of(build(cfg))}
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.POINT_HEAD.NUM_CLASSES = 1
    settled = settle_layouts(layouts_of(build(cfg)), discover_yaml(cfg))
    assert {x.tensor: x.class_axes for x in settled} == many


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", {"ROI_HEADS": 54, "SEM_SEG_HEAD": 54}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", {"ROI_HEADS": 256}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", {"ROI_HEADS": 1}),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", {"ROI_HEADS": 1024, "RETINANET": 1024}),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", {"RETINANET": 1}),
        ("Misc/semantic_R_50_FPN_1x.yaml", {"SEM_SEG_HEAD": 128}),
    ],
)
def test_counts_that_meet_other_sizes_are_no_special_cases(name: str, counts: dict[str, int]) -> None:
    cfg = _zoo(name)
    for node, count in counts.items():
        cfg.MODEL[node].NUM_CLASSES = count
    check_yaml(cfg)


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
    found = check_yaml(cfg)
    boxes = [x for x in layouts_of(build(cfg)) if "bbox_pred" in x.tensor]
    assert {x.rows_per_class for x in boxes} == {5} and {x.agnostic for x in boxes} == {agnostic}
    assert {x.rows_per_class for x in found.layouts if "bbox_pred" in x.tensor} == (set() if agnostic else {5})


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

    found = discover(lambda counts: head(counts["num_classes"]), {"num_classes": 5})
    check_law(found, head(5))
    for layouts in (layouts_of(head(5)), found.layouts):
        assert [x.tensor for x in layouts if x.rebuilt] == ["fed_loss_cls_weights"]


def _lazy_files() -> list[str]:
    return sorted(str(path.relative_to(ZOO)) for folder in ("COCO-*", "Misc", "new_baselines", "common/models")
                  for path in ZOO.glob(f"{folder}/*.py"))  # fmt: skip


WITHOUT_CLASSES = {"Misc/torchvision_imagenet_R_50.py"}
"""An ImageNet classifier of torchvision, no detectron2 head."""


NEEDS_OTHER_PACKAGES = {"Misc/mmdet_mask_rcnn_R_50_FPN_1x.py": "mmdet", "common/models/mask_rcnn_vitdet.py": "timm"}


@pytest.mark.parametrize("name", _lazy_files())
def test_every_lazy_config_is_covered(name: str) -> None:
    if name in NEEDS_OTHER_PACKAGES:
        pytest.importorskip(NEEDS_OTHER_PACKAGES[name])
    model = LazyConfig.load(str(ZOO / name)).get("model")
    if name in WITHOUT_CLASSES:
        assert "RPN" not in str(model) and "ROIHeads" not in str(model)
        return
    found = discover_lazy(model)
    assert found.families, "no class count in this config: say so in WITHOUT_CLASSES"
    with SkipInitialisers():
        check_law(found, instantiate(model))


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
    large, small = build(_zoo(name), 80), build(_zoo(name), 5)
    plan = plan_adaptation(
        shapes(large), shapes(small), layouts_of(small), source_tables=tables[0], target_tables=tables[1]
    )
    claimed = {x.tensor for x in layouts_of(small) if not x.agnostic}
    assert {t.name for t in plan.by_action("carried")} == claimed
    assert {t.name for t in plan.by_action("copied")} == shapes(small).keys() - claimed
    assert all(t.verified and not t.new for t in plan.by_action("carried"))
