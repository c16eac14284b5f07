"""What is wrong with class embeddings is said before a model is built; RegionCLIP's crash among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from helpers.models import names, tiny_cfg
from torch import nn

import d2_headadapt.modeling.text.preflight as preflight_module
from d2_headadapt import ClassTable
from d2_headadapt.errors import Finding, TextError
from d2_headadapt.modeling.text.bundle import TextBundle
from d2_headadapt.modeling.text.preflight import preflight, refuse_text, width_of_regions
from d2_headadapt.modeling.text.problems import WIDTHS, check_bundle, encoders_of, width_of
from d2_headadapt.setup.yaml import resolve_config

CLASSES = ["cat", "dog", "bus"]


def embeddings(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def text_cfg(
    path: Path, matrix: np.ndarray, classes: list[str] = CLASSES, kind: str = "standard", **text: Any
) -> CfgNode:
    """A tiny detector whose classifier is ``matrix``, with the names of its rows as ``text``'s NAMES."""
    np.save(path / "clip.npy", matrix)
    cfg = tiny_cfg(kind, masks=False)
    node = cfg.MODEL.HEAD_ADAPT
    node.PREDICTOR = "HeadAdaptTextOutputLayers"
    node.TARGET_CLASSES = list(classes)
    node.TEXT.FILE = str(path / "clip.npy")
    node.TEXT.NAMES = list(classes)
    for key, value in text.items():
        node.TEXT[key] = value
    return cfg


class RegionCLIPHead(nn.Module):
    """The lines of RegionCLIP's ``FastRCNNOutputLayers.__init__`` that read a text file."""

    def __init__(self, num_classes: int, text_emb_dim: int, path: Path) -> None:
        super().__init__()
        self.cls_score = nn.Linear(text_emb_dim, num_classes, bias=False)
        with torch.no_grad():
            pre_computed_w = torch.load(path)
            self.cls_score.weight.copy_(pre_computed_w)


def test_the_width_crash_of_regionclip_and_what_we_say_of_the_same_file(tmp_path: Path) -> None:
    """A file of RN50x4 (640) in a model as wide as RN50 (1024)."""
    path = tmp_path / "coco_rn50x4.pth"
    torch.save(torch.from_numpy(embeddings(3, 640)), path)
    with pytest.raises(RuntimeError) as stock:
        RegionCLIPHead(3, 1024, path)
    assert str(stock.value) == (
        "The size of tensor a (1024) must match the size of tensor b (640) at non-singleton dimension 1"
    )
    # Another count of classes changes nothing: the width is what torch compares first.
    with pytest.raises(RuntimeError, match=r"\(1024\) must match .* \(640\) at non-singleton dimension 1"):
        RegionCLIPHead(4, 1024, path)

    cfg = text_cfg(tmp_path, embeddings(3, 640), PROJECTION="never", FILE=str(path))
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
    with pytest.raises(TextError) as error:
        resolve_config(cfg, reads_labels=False)
    said = error.value
    assert said.where == f"MODEL.HEAD_ADAPT.TEXT.FILE, {path}"
    assert "1024, as the model's region features" in said.expected
    assert said.found == "(3, 640), of width 640, which looks like RN50x4"
    assert "an encoder of that width (RN50 or RN50x64)" in said.fix
    assert "MODEL.HEAD_ADAPT.TEXT.PROJECTION auto (a trained linear layer 1024 -> 640)" in said.fix
    assert "MODEL.ROI_BOX_HEAD.FC_DIM" in said.fix
    assert said.exit_code == 3

    # Both ways out, as the message has them.
    for key, value in (("MODEL.HEAD_ADAPT.TEXT.PROJECTION", "auto"), ("MODEL.ROI_BOX_HEAD.FC_DIM", 640)):
        mended = text_cfg(tmp_path, embeddings(3, 640), PROJECTION="never", FILE=str(path))
        mended.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
        mended.merge_from_list([key, value])
        resolve_config(mended, reads_labels=False)


def test_the_count_crash_of_regionclip_and_what_we_say_of_the_same_file(tmp_path: Path) -> None:
    """A file of 1203 classes in a model of 4: an error only where the rows cannot be told by name."""
    path = tmp_path / "lvis.pth"
    torch.save(torch.from_numpy(embeddings(1203, 24)), path)
    with pytest.raises(RuntimeError) as stock:
        RegionCLIPHead(4, 24, path)
    assert str(stock.value) == (
        "The size of tensor a (4) must match the size of tensor b (1203) at non-singleton dimension 0"
    )
    four = ["cat", "dog", "cup", "zebra"]
    wrong = text_cfg(tmp_path, embeddings(4, 24), four, PROJECTION="never", FILE=str(path))
    with pytest.raises(TextError) as error:
        resolve_config(wrong, reads_labels=False)
    assert "4 rows (axis 0), for the 4 names of MODEL.HEAD_ADAPT.TEXT.NAMES" in error.value.expected
    assert "as rows, 1203 classes of width 24" in error.value.found
    assert "MODEL.HEAD_ADAPT.TEXT.NAMES lvis_v1" in error.value.fix
    # And what it says to type works: the four rows are picked by name.
    right = text_cfg(tmp_path, embeddings(4, 24), four, PROJECTION="never", FILE=str(path), NAMES="lvis_v1")
    resolve_config(right, reads_labels=False)
    assert right.MODEL.ROI_HEADS.NUM_CLASSES == 4


@pytest.mark.parametrize("shape", [(1, 24), (24,), (3, 1)])
def test_a_file_that_regionclip_would_repeat_silently_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "one.pth"
    torch.save(torch.ones(shape), path)
    RegionCLIPHead(3, 24, path)
    problems = preflight(text_cfg(tmp_path, embeddings(3, 24), FILE=str(path)))
    assert [p.code for p in problems] == ["HA401"]
    assert "silently repeat for every class" in problems[0].found


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
@pytest.mark.parametrize("projection", ["auto", "never"])
def test_what_fits_is_silent(kind: str, projection: str, tmp_path: Path) -> None:
    width = {"standard": 24, "cascade": 24, "c4": 128}[kind]
    cfg = text_cfg(tmp_path, embeddings(3, width), kind=kind, PROJECTION=projection)
    assert preflight(cfg) == []
    assert width_of_regions(cfg) == width


def test_the_width_of_regions_draws_no_number_and_leaves_the_config(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, embeddings(3, 24))
    before, state = cfg.dump(), torch.get_rng_state()
    assert width_of_regions(cfg) == 24
    assert cfg.dump() == before
    assert torch.equal(torch.get_rng_state(), state)
    cfg.MODEL.BACKBONE.NAME = "nobody_registered_it"
    assert width_of_regions(cfg) is None


def test_a_config_without_text_is_not_looked_at(tmp_path: Path) -> None:
    cfg = tiny_cfg()
    assert preflight(cfg) == []
    cfg.MODEL.HEAD_ADAPT.TEXT.FILE = str(tmp_path / "missing.npy")
    (unread,) = preflight(cfg)
    assert (unread.code, unread.severity) == ("HA407", "warning")
    assert "PREDICTOR HeadAdaptTextOutputLayers" in unread.fix
    assert refuse_text(cfg) == [unread]


@pytest.mark.parametrize(
    ("key", "value", "code", "fix"),
    [
        ("FILE", "", "HA401", "Name a .npy"),
        ("FILE", "nowhere.npy", "HA401", "Correct MODEL.HEAD_ADAPT.TEXT.FILE"),
        ("PROJECTION", "maybe", "HA407", "TEXT.PROJECTION auto"),
        ("BACKGROUND", "zeros", "HA407", "TEXT.BACKGROUND learned"),
        ("PRECEDENCE", "both", "HA407", "TEXT.PRECEDENCE file"),
        ("TEMPERATURE", 0.0, "HA407", "TEXT.TEMPERATURE 50.0"),
        ("TEMPERATURE", float("nan"), "HA407", "TEXT.TEMPERATURE 50.0"),
        ("TRAINABLE", True, "HA407", "TEXT.PRECEDENCE checkpoint"),
        ("ENCODER", "RN50", "HA402", "correct MODEL.HEAD_ADAPT.TEXT.ENCODER"),
        ("BACKGROUND", "file", "HA401", "TEXT.BACKGROUND learned or zero"),
    ],
)
def test_keys_that_cannot_be_used(key: str, value: Any, code: str, fix: str, tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, embeddings(3, 24), **{key: value})
    (problem,) = preflight(cfg)
    assert (problem.code, problem.severity) == (code, "error")
    assert fix in problem.fix
    with pytest.raises(TextError):
        resolve_config(cfg, reads_labels=False)


def test_stock_roi_heads_would_build_a_linear_classifier(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, embeddings(3, 24))
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    (problem,) = preflight(cfg)
    assert problem.code == "HA407" and "HeadAdaptROIHeads" in problem.fix


def test_a_class_without_a_row_is_named(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, embeddings(3, 24), NAMES=["cat", "dog", "truck"])
    (problem,) = preflight(cfg)
    assert problem.code == "HA403" and "none for bus" in problem.found
    cfg.MODEL.HEAD_ADAPT.ALIASES = ["bus=truck", "lorry=wagon"]
    assert preflight(cfg) == []


def bundle(matrix: torch.Tensor, *, normalised: bool = False, encoder: str = "") -> TextBundle:
    return TextBundle(ClassTable(CLASSES), matrix, None, encoder, normalised, "clip.npy")


def good() -> torch.Tensor:
    return torch.from_numpy(embeddings(3, 512))


def found(text: TextBundle) -> list[tuple[str, str]]:
    return [(p.code, p.severity) for p in check_bundle(text, text.names)]


def test_values_rows_and_norms() -> None:
    assert found(bundle(good())) == []
    for bad in (float("nan"), float("inf")):
        broken = good()
        broken[1, 3] = bad
        (problem,) = check_bundle(bundle(broken))
        assert problem.code == "HA404" and "rows of dog" in problem.found
    zero = good()
    zero[2] = 0
    assert [(p.code, "bus" in p.found) for p in check_bundle(bundle(zero), ClassTable(CLASSES))] == [("HA404", True)]
    twins = good()
    twins[2] = 3 * twins[0]
    (problem,) = check_bundle(bundle(twins), ClassTable(CLASSES))
    assert (problem.code, problem.severity) == ("HA405", "error") and "cat = bus" in problem.found
    # A model that does not have both is not touched by it, and a list of names for NEW_ROWS only warned of.
    assert check_bundle(bundle(twins), ClassTable(["cat", "dog"])) == []
    assert [p.severity for p in check_bundle(bundle(twins))] == ["warning"]
    unit = torch.nn.functional.normalize(good(), dim=1)
    assert found(bundle(unit, normalised=True)) == found(bundle(unit)) == []
    assert found(bundle(good(), normalised=True)) == [("HA406", "warning")]
    assert found(bundle(torch.cat([unit[:2], good()[2:]]))) == [("HA406", "warning")]


@pytest.mark.parametrize(("encoder", "width"), [*WIDTHS.items(), ("rn50X4", 640), ("vit_b_32", 512), ("ViT-L", 768)])
def test_known_widths(encoder: str, width: int) -> None:
    assert width_of(encoder) == width
    text = bundle(torch.from_numpy(embeddings(3, width)), encoder=encoder)
    assert check_bundle(text, text.names) == []
    (problem,) = check_bundle(bundle(torch.from_numpy(embeddings(3, width + 1)), encoder=encoder))
    assert problem.code == "HA402" and "which no CLIP encoder writes" in problem.found


def test_an_encoder_that_nobody_knows_is_not_judged() -> None:
    assert width_of("SigLIP") is None and width_of("") is None
    assert check_bundle(bundle(good(), encoder="SigLIP")) == []
    assert encoders_of(640) == ["RN50x4"]


def test_nearest_rows_need_no_row_for_every_class(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, embeddings(3, 24), NAMES=["cat", "dog", "truck"])
    cfg.MODEL.HEAD_ADAPT.PREDICTOR = "HeadAdaptOutputLayers"
    cfg.MODEL.HEAD_ADAPT.NEW_ROWS = "nearest"
    assert preflight(cfg) == []
    cfg.MODEL.HEAD_ADAPT.TEXT.FILE = ""
    assert [p.code for p in preflight(cfg)] == ["HA401"]


@pytest.mark.parametrize(
    ("file", "vocabulary"),
    [("coco_clip_a+cname", "coco"), ("lvis_v1_clip_a+cname", "lvis_v1"), ("o365_clip_a+cnamefix", "objects365")],
)
def test_detics_published_files_are_sound(file: str, vocabulary: str, real: Path) -> None:
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.HEAD_ADAPT.PREDICTOR = "HeadAdaptTextOutputLayers"
    cfg.MODEL.HEAD_ADAPT.TEXT.FILE = str(real / "text" / f"{file}.npy")
    cfg.MODEL.HEAD_ADAPT.TEXT.NAMES = cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = vocabulary
    cfg.MODEL.HEAD_ADAPT.TEXT.ENCODER = "ViT-B/32"
    assert preflight(cfg) == []


def test_mutation_without_the_check_the_width_is_met_by_the_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = text_cfg(tmp_path, embeddings(len(names(3)), 640), PROJECTION="never")
    assert [p.code for p in preflight(cfg)] == ["HA402"]
    monkeypatch.setattr(preflight_module, "width_of_regions", lambda _: None)
    nothing: list[Finding] = []
    assert preflight(cfg) == nothing
