"""One road for every predictor and architecture, with default keys: train, save, resume, evaluate, predict, export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from helpers.classifier import classifier_cfg
from helpers.commands import Ran, cli
from helpers.lazy import TINY
from helpers.models import tiny_cfg
from PIL import Image

from d2_headadapt import PREDICTOR_REGISTRY, AdaptPlan
from d2_headadapt.checkpoint.provenance import KEY
from d2_headadapt.export import read_tables
from d2_headadapt.files import read_checkpoint

THINGS, STUFF, POINTS, COLOURS = ["yak", "zebra", "gnu"], ["grass", "sky"], ["nose", "tail"], ["red", "green"]
NAMES = {"thing": THINGS, "stuff": STUFF, "keypoint": POINTS, "colour": COLOURS}
DEFAULT, TEXT = "HeadAdaptOutputLayers", "HeadAdaptTextOutputLayers"
DATA = {"coco": "d2ha_trip", "sem_seg": "d2ha_trip_stuff", "tasks": "d2ha_trip_tasks"}


def faster(cfg: CfgNode, kind: str) -> None:
    """Nothing more."""


def keypoints(cfg: CfgNode, kind: str) -> None:
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (8,)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05] * len(POINTS)


def panoptic(cfg: CfgNode, kind: str) -> None:
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.NORM = 8, ""


def semantic(cfg: CfgNode, kind: str) -> None:
    panoptic(cfg, kind)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"


def retinanet(cfg: CfgNode, kind: str) -> None:
    m = cfg.MODEL
    m.META_ARCHITECTURE = "RetinaNet"
    m.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    m.RESNETS.OUT_FEATURES = m.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    m.RETINANET.NUM_CONVS, m.RETINANET.SCORE_THRESH_TEST = 1, 0.0


FAMILIES: dict[str, tuple[str, bool, Callable[[CfgNode, str], None]]] = {
    "mask": ("standard", True, faster),
    "cascade": ("cascade", True, faster),
    "c4": ("c4", False, faster),
    "keypoint": ("standard", False, keypoints),
    "panoptic": ("standard", True, panoptic),
    "retinanet": ("standard", False, retinanet),
    "semantic": ("standard", False, semantic),
}
"""Name -> kind of :func:`tiny_cfg`, masks, and what else it needs."""
WITH_PREDICTOR = ("mask", "cascade", "c4", "keypoint", "panoptic")
FCOS = f"""
from detectron2 import model_zoo
from detectron2.config import LazyConfig
model = model_zoo.get_config("common/models/fcos.py").model
tiny, dataloader, optimizer, lr_multiplier, train = LazyConfig.load(
    {str(TINY)!r}, ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
model.backbone.bottom_up = tiny.backbone.bottom_up
model.backbone.bottom_up.out_features = ("res3", "res4", "res5")
model.backbone.out_channels = 8
model.backbone.top_block.update(in_channels=8, out_channels=8)
model.head.input_shape[0].channels = 8
model.head.update(conv_dims=[8], norm="")
model.update(test_score_thresh=0.0, pixel_std=[5000.0] * 3)
dataloader.train.dataset.names = dataloader.test.dataset.names = "d2ha_trip"
dataloader.train.mapper.augmentations.pop()
train.max_iter = 2
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    benchmark = torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Four images with boxes, stuff and labels of a task, as a dataset of each of :data:`DATA`'s kinds."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    dicts: list[dict[str, Any]] = []
    for i in range(4):
        Image.fromarray(random.randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        Image.fromarray((np.arange(64 * 64).reshape(64, 64) // 2048).astype(np.uint8)).save(folder / f"{i}.stuff.png")
        annotations = []
        for j in range(2):
            x, y = (int(v) for v in random.randint(0, 32, 2))
            annotations.append(
                {
                    "bbox": [x, y, 24, 20],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": (i + j) % 3,
                    "segmentation": [[x, y, x + 24, y, x + 24, y + 20, x, y + 20]],
                    "keypoints": [x + 6, y + 6, 2, x + 16, y + 12, 2],
                }
            )
        entry = {"file_name": str(folder / f"{i}.png"), "image_id": i, "height": 64, "width": 64}
        stuff = {"sem_seg_file_name": str(folder / f"{i}.stuff.png")}
        dicts.append({**entry, **stuff, "annotations": annotations, "tasks": {"colour": i % 2}})
    known: dict[str, Any] = {"stuff_classes": STUFF, "ignore_label": 255}
    things = {"thing_classes": THINGS, "keypoint_names": POINTS, "keypoint_flip_map": []}
    for kind, name in DATA.items():
        DatasetCatalog.register(name, lambda: dicts)
        MetadataCatalog.get(name).set(evaluator_type=kind, **known, **(things if kind == "coco" else {}))
    yield sorted(folder.glob("?.png"))
    for name in DATA.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def yaml_of(cfg: CfgNode, folder: Path, data: str, tasks: dict[str, Any]) -> Path:
    """A config whose training takes moments; everything that a user would not touch is as by default."""
    config = yaml.safe_load(cfg.dump())
    config["DATASETS"].update(TRAIN=[data], TEST=[data])
    config["INPUT"].update(MIN_SIZE_TRAIN=[64], MIN_SIZE_TEST=64, MAX_SIZE_TRAIN=64, MAX_SIZE_TEST=64)
    config["INPUT"].update(RANDOM_FLIP="none")
    config["DATALOADER"].update(NUM_WORKERS=0)
    config["SOLVER"].update(IMS_PER_BATCH=2, BASE_LR=1e-4, MAX_ITER=2, STEPS=[], WARMUP_ITERS=0)
    # Wide maps of an untrained network would have a softmax that is no number.
    config["MODEL"]["PIXEL_STD"] = [5000.0] * 3
    config["MODEL"]["TASKS"] = tasks
    config["OUTPUT_DIR"] = str(folder / "out")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder / "c.yaml"


def detector(folder: Path, family: str, predictor: str) -> Path:
    """The config of a family with one of our predictors."""
    kind, masks, more = FAMILIES[family]
    cfg = tiny_cfg(kind, masks=masks)
    more(cfg, kind)
    cfg.MODEL.HEAD_ADAPT.PREDICTOR = predictor
    if predictor == TEXT:
        np.save(folder / "text.npy", np.random.RandomState(1).randn(len(THINGS), 12).astype(np.float32))
        cfg.MODEL.HEAD_ADAPT.TEXT.FILE = str(folder / "text.npy")
        cfg.MODEL.HEAD_ADAPT.TEXT.NAMES = THINGS
    return yaml_of(cfg, folder, DATA["sem_seg" if family == "semantic" else "coco"], {})


class Trip:
    """The commands of one road, each of which has to end well."""

    def __init__(self, config: Path, *, key: str = "SOLVER.MAX_ITER", equals: bool = False) -> None:
        self.config, self.out = config, config.parent / "out"
        self.weights = self.out / "model_final.pth"
        self.longer = [f"{key}=3"] if equals else [key, "3"]

    def run(self, *arguments: object) -> Ran:
        command, *more = arguments
        ran = cli(command, "--config-file", self.config, *more)
        assert ran.code == 0, f"{command} {more}: {ran.out[-2000:]}\n{ran.err}"
        return ran

    def train_and_go_on(self) -> None:
        self.run("train")
        assert read_checkpoint(str(self.weights))["iteration"] == 1
        ran = self.run("train", "--resume", *self.longer)
        said = ran.out + ran.err
        assert read_checkpoint(str(self.weights))["iteration"] == 2
        assert "HA307" not in said
        plan = AdaptPlan.from_json((self.out / "head_adapt_plan.json").read_text())
        # What the constructor makes anew by intention takes nothing from the file: embeddings.
        taken = plan.by_action("copied")
        assert plan.changed() == () and all(t in taken or t.cause.meant for t in plan.tensors)
        assert AdaptPlan.from_json(json.dumps(plan.to_json())) == plan

    def evaluate(self) -> None:
        self.run("train", "--eval-only", "--resume", *self.longer)
        weights = (
            [f"train.init_checkpoint={self.weights}"] if len(self.longer) == 1 else ["MODEL.WEIGHTS", self.weights]
        )
        other = [f"train.output_dir={self.out}2"] if len(self.longer) == 1 else ["OUTPUT_DIR", f"{self.out}2"]
        self.run("train", "--eval-only", *weights, *other)

    def predict(self, images: list[Path]) -> list[dict[str, Any]]:
        output = self.config.parent / "seen"
        asked = ("--weights", self.weights, "--output", output, "--least-score", "0")
        self.run("predict", *asked, "--images", *images[:2])
        found: list[dict[str, Any]] = json.loads((output / "predictions.json").read_text())["images"]
        assert len(found) == 2 and not any("error" in entry for entry in found)
        return found

    def export(self, spaces: set[str]) -> None:
        output = self.config.parent / "m.ts"
        self.run("export", "--weights", self.weights, "--format", "traced", "--output", output)
        tables = read_tables(str(output))
        assert {space: list(table.names) for space, table in tables.items()} == {s: NAMES[s] for s in spaces}

    def names(self) -> set[str]:
        """The label spaces that the saved file knows, with the right names."""
        tables = read_checkpoint(str(self.weights))[KEY]["tables"]
        assert tables == {space: NAMES[space] for space in tables}
        return set(tables)


def whole(trip: Trip, images: list[Path]) -> None:
    """All of it, for a model that gives boxes."""
    trip.train_and_go_on()
    trip.evaluate()
    found = trip.predict(images)
    assert any(entry["detections"] for entry in found)
    assert {d["class"] for entry in found for d in entry["detections"]} <= set(THINGS)
    trip.export(trip.names())


def test_the_families_are_those_that_have_our_predictors() -> None:
    assert [name for name, _ in PREDICTOR_REGISTRY] == [DEFAULT, TEXT]


@pytest.mark.parametrize("predictor", [name for name, _ in PREDICTOR_REGISTRY])
@pytest.mark.parametrize("family", WITH_PREDICTOR)
def test_a_detector_uses_its_own_checkpoint(family: str, predictor: str, images: list[Path], tmp_path: Path) -> None:
    whole(Trip(detector(tmp_path, family, predictor)), images)


def test_a_dense_detector_uses_its_own_checkpoint(images: list[Path], tmp_path: Path) -> None:
    whole(Trip(detector(tmp_path, "retinanet", DEFAULT)), images)


def test_a_detector_of_a_lazy_config_uses_its_own_checkpoint(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(
        f"{FCOS}\ntrain.output_dir = dataloader.evaluator.output_dir = {str(tmp_path / 'out')!r}\n"
    )
    whole(Trip(tmp_path / "c.py", key="train.max_iter", equals=True), images)


def test_a_semantic_model_uses_its_own_checkpoint_and_predicts_no_boxes(images: list[Path], tmp_path: Path) -> None:
    trip = Trip(detector(tmp_path, "semantic", DEFAULT))
    trip.train_and_go_on()
    trip.evaluate()
    asked = ("--config-file", trip.config, "--weights", trip.weights, "--output", tmp_path / "seen")
    ran = cli("predict", *asked, "--images", images[0])
    assert ran.code == 1 and "expected a model that gives boxes, or tasks of images" in ran.err
    trip.export(trip.names())


def test_a_classifier_of_images_uses_its_own_checkpoint(images: list[Path], tmp_path: Path) -> None:
    tasks = {"colour": {"on": "image", "classes": COLOURS}}
    trip = Trip(yaml_of(classifier_cfg({}), tmp_path, DATA["tasks"], tasks))
    trip.train_and_go_on()
    trip.evaluate()
    assert {entry["tasks"]["colour"]["label"] for entry in trip.predict(images)} <= set(COLOURS)
    trip.export(trip.names())
