"""The class-count keys of configs, what holds a count, and that looking changes nothing."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils import logger as detectron2_logger
from helpers import foreign_heads as heads
from helpers.models import tiny_cfg
from helpers.streams import random_streams
from omegaconf import DictConfig
from torch import nn

from d2_headadapt.adapt.discovery import Discovery, Evidence, check_declared, settle_layouts
from d2_headadapt.adapt.registry import layouts_of
from d2_headadapt.errors import ConfigError
from d2_headadapt.setup import count_keys as looking
from d2_headadapt.setup.count_keys import count_keys, discover, discover_lazy, discover_yaml, space_of_key
from d2_headadapt.setup.shape_builds import SkipInitialisers, nothing_changed, observe_build

THING = "MODEL.ROI_HEADS.NUM_CLASSES"


# Which keys count classes.


def test_keys_of_a_yaml_are_found_whatever_the_project() -> None:
    cfg = get_cfg()
    cfg.MODEL.FCOS = CfgNode({"NUM_CLASSES": 80, "NUM_CLS_CONVS": 4})
    cfg.MODEL.YOLOF = CfgNode({"DECODER": {"NUM_CLASSES": 80, "NUM_ANCHORS": 5}})
    cfg.MODEL.OTHER = CfgNode({"NUM_THING_CLASSES": 8, "TEST_NUM_CLASSES": [3], "NUM_CLASSES": None})
    assert set(count_keys(cfg)) == {
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "MODEL.RETINANET.NUM_CLASSES",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
        "MODEL.FCOS.NUM_CLASSES",
        "MODEL.YOLOF.DECODER.NUM_CLASSES",
        "MODEL.OTHER.NUM_THING_CLASSES",
    }


def test_keys_of_a_lazy_model_are_numbers_of_their_own() -> None:
    """An interpolation follows its source; how many classes a federated loss draws is no class count."""
    model = DictConfig(
        {
            "num_classes": 80,
            "criterion": {"num_classes": "${..num_classes}"},
            "stages": [{"num_classes": 80, "fed_loss_num_classes": 50}, {"num_classes": None}],
            "keypoint_head": {"num_keypoints": 17, "num_convs": 8},
        }
    )
    assert count_keys(model) == {
        "model.num_classes": 80,
        "model.stages[0].num_classes": 80,
        "model.keypoint_head.num_keypoints": 17,
    }


@pytest.mark.parametrize(
    ("key", "space"),
    [
        ("MODEL.FCOS.NUM_CLASSES", "thing"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff"),
        ("model.sem_seg_head.num_classes", "stuff"),
        ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "keypoint"),
        ("model.roi_heads.keypoint_head.num_keypoints", "keypoint"),
        ("MODEL.POINT_HEAD.NUM_CLASSES", ""),
    ],
)
def test_a_name_tells_the_space(key: str, space: str) -> None:
    assert space_of_key(key) == space


# What a model reads.


def look(make: Callable[[Mapping[str, int]], nn.Module], **counts: int) -> Discovery:
    return discover(make, counts)


def test_a_key_that_changes_no_shape_is_idle() -> None:
    found = discover_yaml(tiny_cfg(ours=False))
    assert [family.keys for family in found.families] == [(THING,)]
    assert set(found.idle) == set(count_keys(get_cfg())) - {THING}
    assert found.families[0].built == (5, 6, 15)


def test_equal_counts_of_two_spaces_are_told_apart() -> None:
    def make(counts: Mapping[str, int]) -> nn.Module:
        return heads.tree(boxes=heads.conv(counts["A.NUM_CLASSES"]), sem_seg=heads.conv(counts["SEM_SEG.NUM_CLASSES"]))

    found = discover(make, {"A.NUM_CLASSES": 54, "SEM_SEG.NUM_CLASSES": 54})
    assert {x.tensor.split(".")[0]: x.space for x in found.layouts} == {"boxes": "thing", "sem_seg": "stuff"}


def test_keys_that_must_be_equal_move_together() -> None:
    def make(counts: Mapping[str, int]) -> nn.Module:
        if counts["A.NUM_CLASSES"] != counts["POINT_HEAD.NUM_CLASSES"]:
            raise ValueError("counts differ")
        return heads.tree(
            first=heads.conv(counts["A.NUM_CLASSES"]), second=heads.conv(counts["POINT_HEAD.NUM_CLASSES"])
        )

    found = discover(make, {"C.NUM_CLASSES": 9, "A.NUM_CLASSES": 9, "POINT_HEAD.NUM_CLASSES": 9, "D.NUM_CLASSES": 3})
    assert [family.keys for family in found.families] == [("A.NUM_CLASSES", "POINT_HEAD.NUM_CLASSES")]
    assert found.idle == ("C.NUM_CLASSES", "D.NUM_CLASSES") and not found.stuck
    assert {x.tensor for x in found.layouts} == {
        f"{n}.{leaf}" for n in ("first", "second") for leaf in ("weight", "bias")
    }


def test_one_key_follows_the_other_where_only_one_of_them_asserts() -> None:
    """The first may move alone, the second may not: they are one family, and nothing is found twice."""

    def make(counts: Mapping[str, int]) -> nn.Module:
        if counts["B.NUM_CLASSES"] > counts["A.NUM_CLASSES"]:
            raise ValueError("B has more")
        return heads.tree(a=heads.conv(counts["A.NUM_CLASSES"]), b=heads.conv(counts["B.NUM_CLASSES"]))

    found = discover(make, {"A.NUM_CLASSES": 9, "B.NUM_CLASSES": 9})
    assert [set(family.keys) for family in found.families] == [{"A.NUM_CLASSES", "B.NUM_CLASSES"}]
    assert len(found.layouts) == 4 and not found.refused


def test_a_key_that_cannot_be_changed_is_stuck_with_its_line() -> None:
    def make(counts: Mapping[str, int]) -> nn.Module:
        if counts["A.NUM_CLASSES"] != 9:
            raise ValueError("nine only")
        return heads.tree(a=heads.conv(counts["A.NUM_CLASSES"]), b=heads.conv(counts["B.NUM_CLASSES"]))

    found = discover(make, {"A.NUM_CLASSES": 9, "B.NUM_CLASSES": 9})
    (stuck,) = found.stuck
    assert (stuck.key, stuck.value, stuck.error) == ("A.NUM_CLASSES", 9, "ValueError: nine only")
    assert stuck.line.startswith(f"{__file__}:") and stuck.line.endswith('raise ValueError("nine only")')
    assert stuck.tried == ("together with B.NUM_CLASSES",)
    assert {x.tensor for x in found.layouts} == {"b.weight", "b.bias"} and not found.complete
    assert any("what follows A.NUM_CLASSES" in line for line in found.describe())


def test_a_count_that_cannot_grow_by_ten_is_stuck_not_half_known() -> None:
    def make(counts: Mapping[str, int]) -> nn.Module:
        if counts["NUM_CLASSES"] > 12:
            raise ValueError("twelve at most")
        return heads.fcos(counts["NUM_CLASSES"])

    found = look(make, NUM_CLASSES=9)
    assert [stuck.error for stuck in found.stuck] == ["ValueError: twelve at most"] and not found.families


def test_a_model_that_cannot_be_built_is_said() -> None:
    cfg = tiny_cfg(ours=False)
    cfg.MODEL.META_ARCHITECTURE = "Unknown"
    with pytest.raises(ConfigError, match="META_ARCH: expected the name of a registered component"):
        discover_yaml(cfg)


# What holds a count.


class FedLossHead(nn.Module):
    """Asserts as detectron2's predictor does that the weights of the federated loss have its count."""

    def __init__(self, num_classes: int, use_fed_loss: bool, rows: int = 5) -> None:
        super().__init__()
        self.cls_score = nn.Linear(4, num_classes)
        if use_fed_loss:
            if num_classes != rows:
                raise AssertionError("their size should match num_classes")
            self.register_buffer("fed_loss_cls_weights", torch.ones(rows))


class EmbeddingHead(nn.Module):
    """Reads its rows from a file, D columns, and the frequencies of the classes from another."""

    def __init__(self, num_classes: int, embeddings: str, frequencies: str = "") -> None:
        super().__init__()
        is_array = embeddings.endswith(".npy")
        rows = torch.as_tensor(np.load(embeddings)) if is_array else torch.load(embeddings, weights_only=True)
        if len(rows) != num_classes:
            raise AssertionError(f"{len(rows)} rows for {num_classes} classes")
        self.cls_score = nn.Linear(rows.shape[1], num_classes, bias=False)
        if frequencies:
            counts = json.loads(Path(frequencies).read_text())
            self.register_buffer("freq_weight", torch.tensor([float(c["image_count"]) for c in counts]))
            if len(counts) != num_classes:
                raise AssertionError("frequencies")


def test_a_federated_loss_is_taken_away() -> None:
    found = discover_lazy(L(FedLossHead)(num_classes=5, use_fed_loss=True))
    assert [(f.keys, f.lowered) for f in found.families] == [(("model.num_classes",), "model.use_fed_loss off")]
    assert {x.tensor for x in found.layouts} == {"cls_score.weight", "cls_score.bias"}
    assert found.unprobed == ("fed_loss_cls_weights",) and not found.stuck and not found.complete


@pytest.mark.parametrize("suffix", [".npy", ".pth"])
def test_an_embedding_file_is_grown_in_a_copy(suffix: str, tmp_path: Path) -> None:
    embeddings, frequencies = tmp_path / f"rows{suffix}", tmp_path / "counts.json"
    rows = torch.rand(5, 6)
    if suffix == ".npy":
        np.save(embeddings, rows.numpy())
    else:
        torch.save(rows, embeddings)
    frequencies.write_text(json.dumps([{"image_count": i + 1} for i in range(5)]))
    before = embeddings.read_bytes()
    model = L(EmbeddingHead)(num_classes=5, embeddings=str(embeddings), frequencies=str(frequencies))
    found = discover_lazy(model)
    assert [f.lowered for f in found.families] == ["a grown copy of model.embeddings and model.frequencies"]
    assert {x.tensor: x.rebuilt for x in found.layouts} == {"cls_score.weight": False, "freq_weight": True}
    assert found.complete and embeddings.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_detectron2s_own_federated_loss_gets_more_frequencies() -> None:
    """Its weights come from the dataset's metadata, which is given back as it was."""
    frequencies = [{"id": i, "image_count": i + 1} for i in range(5)]
    MetadataCatalog.get("five_classes").class_image_count = frequencies
    cfg = tiny_cfg(ours=False)
    cfg.DATASETS.TRAIN = ("five_classes",)
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
    found = discover_yaml(cfg)
    assert [(f.keys, f.lowered) for f in found.families] == [((THING,), "a grown copy of class_image_count")]
    assert [x.tensor for x in found.layouts if x.rebuilt] == ["roi_heads.box_predictor.fed_loss_cls_weights"]
    assert found.complete and not found.refused
    assert MetadataCatalog.get("five_classes").class_image_count is frequencies and len(frequencies) == 5


# Configs.


def test_an_unknown_projects_own_key_is_followed() -> None:
    """YOLOF's, on an architecture of this test: detectron2's own keys are idle, whatever they say."""
    cfg = get_cfg()
    cfg.MODEL.YOLOF = CfgNode({"DECODER": {"NUM_CLASSES": 20}})
    found = discover_yaml(cfg, lambda c: heads.yolof(c.MODEL.YOLOF.DECODER.NUM_CLASSES))
    assert [family.keys for family in found.families] == [("MODEL.YOLOF.DECODER.NUM_CLASSES",)]
    assert THING in found.idle and {x.groups for x in found.layouts} == {5}


def test_two_counts_of_detr_are_two_keys_of_one_space() -> None:
    model = L(_detr)(num_classes=20, criterion={"num_classes": 20})
    found = discover_lazy(model)
    assert [f.keys for f in found.families] == [("model.num_classes",), ("model.criterion.num_classes",)]
    assert {x.layout.tensor: x.evidence for x in found.found} == {
        "class_embed.weight": Evidence.LOSS_WEIGHTS,
        "class_embed.bias": Evidence.LOSS_WEIGHTS,
        "criterion.empty_weight": Evidence.BUFFER,
    }


def _detr(num_classes: int, criterion: Mapping[str, int]) -> nn.Module:
    return heads.detr(num_classes, criterion["num_classes"])


def test_interpolations_follow_and_a_device_that_is_missing_does_not_matter() -> None:
    whole = DictConfig({"train": {"device": "cuda:7"}, "model": {}}, flags={"allow_objects": True})
    whole.model = L(_on_device)(num_classes=20, inner={"num_classes": "${..num_classes}"}, device="${train.device}")
    found = discover_lazy(whole.model)
    assert [f.keys for f in found.families] == [("model.num_classes",)] and len(found.layouts) == 4
    assert whole.model.num_classes == 20 and whole.model.device == "cuda:7" == whole.train.device


def _on_device(num_classes: int, inner: Mapping[str, int], device: str) -> nn.Module:
    return heads.tree(a=heads.conv(num_classes), b=heads.conv(inner["num_classes"])).to(torch.device(device))


def test_lazy_cascades_lists_are_walked() -> None:
    model = LazyConfig.load(str(Path(__file__).parents[1] / "helpers" / "lazy_tiny.py")).model
    box = L(FastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=24),
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        num_classes=80,
    )
    assert count_keys(DictConfig({"stages": [box]}, flags={"allow_objects": True})) == {
        "model.stages[0].num_classes": 80
    }
    found = discover_lazy(model)
    assert {x.space for x in found.layouts} == {"thing"} and not found.refused


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
@pytest.mark.parametrize("train", [(), ("no_such_dataset",), ("coco_2017_val",)])
def test_our_heads_take_the_count_from_their_table_and_are_found_all_the_same(
    kind: str, train: tuple[str, ...]
) -> None:
    """With a class table, the count key would change nothing."""
    cfg = tiny_cfg(kind)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ["a", "b", "c", "d", "e"]
    cfg.DATASETS.TRAIN = train
    found = discover_yaml(cfg)
    with SkipInitialisers():
        declared = layouts_of(build_model(cfg))
    assert {x.tensor: x.describe() for x in found.layouts} == {
        x.tensor: x.describe() for x in declared if not x.agnostic
    }


def test_a_text_classifier_is_held_by_its_embeddings(tmp_path: Path) -> None:
    """Its file has one row per listed name: nothing is known of the key, so nothing is contradicted."""
    np.save(tmp_path / "clip.npy", np.random.rand(5, 40).astype(np.float32))
    cfg = tiny_cfg(masks=False)
    node = cfg.MODEL.HEAD_ADAPT
    node.PREDICTOR, node.TARGET_CLASSES = "HeadAdaptTextOutputLayers", ["cat", "dog", "bus", "zebra", "cup"]
    node.TEXT.FILE, node.TEXT.NAMES = str(tmp_path / "clip.npy"), ["cat", "dog", "bus", "zebra", "cup"]
    found = discover_yaml(cfg)
    assert [stuck.key for stuck in found.stuck] == [THING]
    with SkipInitialisers():
        declared = layouts_of(build_model(cfg))
    assert check_declared(found, declared) == () and settle_layouts(declared, found) == declared


def test_a_head_that_needs_its_table_is_stuck_not_idle() -> None:
    """Where the model cannot be built without it, the table decides the count, and the key only seems to do nothing."""

    def build(cfg: CfgNode) -> nn.Module:
        return heads.fcos(len(cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES))

    cfg = tiny_cfg()
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ["a", "b", "c", "d", "e"]
    found = discover_yaml(cfg, build)
    assert {stuck.key for stuck in found.stuck} == set(count_keys(cfg)) and not found.idle
    assert {stuck.error for stuck in found.stuck} == {"TypeError: object of type 'NoneType' has no len()"}


# Looking changes nothing.


class Noisy(nn.Module):
    """A constructor that does whatever a constructor should not."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.cls = nn.Linear(4, k)
        random.random(), np.random.rand(), torch.rand(1)
        print("building")
        logging.getLogger("somebody").error("building")
        detectron2_logger.log_first_n(logging.ERROR, "said once", name="somebody")
        MetadataCatalog.get("made by asking")
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)


def test_no_random_number_is_drawn_and_no_state_is_changed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before, names, counter = random_streams(), MetadataCatalog.list(), dict(detectron2_logger._LOG_COUNTER)
    registered = [name for name, _ in ROI_HEADS_REGISTRY]
    found = look(lambda counts: Noisy(counts["NUM_CLASSES"]), NUM_CLASSES=3)
    discover_yaml(tiny_cfg(ours=False))
    assert len(found.layouts) == 2
    assert random_streams() == before
    assert MetadataCatalog.list() == names and dict(detectron2_logger._LOG_COUNTER) == counter
    assert [name for name, _ in ROI_HEADS_REGISTRY] == registered
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert logging.root.manager.disable == logging.NOTSET
    assert capsys.readouterr().out == "" and not caplog.records


def test_mutation_a_plain_build_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """What the law above watches does move without the guard."""
    before = random_streams()
    Noisy(3)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    assert all(now != then for now, then in zip(random_streams(), before, strict=True))
    assert "building" in capsys.readouterr().out and "made by asking" in MetadataCatalog.list()


def test_state_is_given_back_after_a_constructor_that_raises() -> None:
    before = random_streams()
    with pytest.raises(ZeroDivisionError), nothing_changed():
        torch.rand(1)
        raise ZeroDivisionError
    assert random_streams() == before and logging.root.manager.disable == logging.NOTSET


def test_a_config_stays_as_it_was() -> None:
    cfg = tiny_cfg(ours=False)
    cfg.freeze()
    before = cfg.dump()
    discover_yaml(cfg)
    assert cfg.dump() == before and cfg.is_frozen()


def test_no_initialiser_runs_in_this_thread_and_afterwards_they_do() -> None:
    with SkipInitialisers():
        weight = torch.zeros(3, 3)
        for skipped in (nn.init.normal_, nn.init.xavier_uniform_, nn.init.trunc_normal_):
            skipped(weight)
        weight.uniform_().normal_()
        nn.init.constant_(tensor=weight, val=1.0)
        assert not weight.any()
    assert nn.init.constant_(weight, 1.0).all()


class ReadsItsWeights(nn.Module):
    """A constructor that needs what an initialiser wrote."""

    def __init__(self, k: int) -> None:
        super().__init__()
        weight = nn.init.uniform_(torch.full((2,), float("nan")), 1.0, 1.0)
        self.cls = nn.Linear(int(weight.sum()), k)


def test_a_constructor_that_reads_what_an_initialiser_wrote_is_built_with_initialisers() -> None:
    with pytest.raises(ValueError, match="NaN"):
        observe_build(lambda: ReadsItsWeights(3))
    assert len(look(lambda counts: ReadsItsWeights(counts["NUM_CLASSES"]), NUM_CLASSES=3).layouts) == 2


def test_the_same_content_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "_REMEMBERED", type(looking._REMEMBERED)())
    built = []

    def build(cfg: CfgNode) -> nn.Module:
        built.append(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        return heads.fcos(cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    cfg = tiny_cfg(ours=False)
    first, number = discover_yaml(cfg, build), len(built)
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = "elsewhere", "other.pth"
    assert discover_yaml(cfg, build) is first and len(built) == number
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    assert discover_yaml(cfg, build) is not first and len(built) == 2 * number
