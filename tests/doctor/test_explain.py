"""``d2-headadapt explain`` on the texts that torch, detectron2, fvcore and numpy themselves produce."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import get_detection_dataset_dicts
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from fvcore.common.checkpoint import Checkpointer
from helpers.commands import cli
from helpers.files import logged, texts
from torch import nn

from d2_headadapt.doctor.explain import explain, explanation_text
from d2_headadapt.doctor.known_errors import KNOWN
from d2_headadapt.doctor.running import CHECKS


class TextClassifier(nn.Module):
    """RegionCLIP's constructor in short."""

    def __init__(self, classes: int, width: int, file: torch.Tensor) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes, bias=False)
        with torch.no_grad():
            pre_computed_w = file
            self.cls_score.weight.copy_(pre_computed_w)


class Wiki(nn.Module):
    """The classifier of the question, one convolution short of what its linear layer wants."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.view(-1, 65536)[:, :4], torch.zeros(32, dtype=torch.long))


def step_after_a_head_change(kind: type[torch.optim.Optimizer], **keys: float) -> None:
    old, new = nn.Linear(3, 81), nn.Linear(3, 5)
    saved = kind(old.parameters(), lr=0.1, **keys)
    old(torch.ones(1, 3)).sum().backward()
    saved.step()
    resumed = kind(new.parameters(), lr=0.1, **keys)
    resumed.load_state_dict(saved.state_dict())
    new(torch.ones(1, 3)).sum().backward()
    resumed.step()


def conflict(name: str) -> None:
    MetadataCatalog.get(name).thing_classes = ["cat"]
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]


def predict_beyond() -> None:
    evaluator = COCOEvaluator.__new__(COCOEvaluator)
    evaluator._logger, evaluator._tasks = logging.getLogger("test"), ("bbox",)
    evaluator._metadata = MetadataCatalog.get("d2ha_one").set(thing_dataset_id_to_contiguous_id={1: 0})
    evaluator._eval_predictions([{"instances": [{"category_id": 24}]}])


def nan_loss() -> None:
    with EventStorage(7):
        SimpleTrainer.write_metrics({"loss_cls": torch.tensor(float("nan")), "loss_box": torch.tensor(1.0)}, 0.1, 7)


def refused_pickle() -> None:
    buffer = io.BytesIO()
    torch.save({"score": np.float64(3.0)}, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def register_twice() -> None:
    DatasetCatalog.register("d2ha_twice", list)
    DatasetCatalog.register("d2ha_twice", list)


def disagree() -> None:
    MetadataCatalog.get("d2ha_a").thing_classes = ["cat"]
    MetadataCatalog.get("d2ha_b").thing_classes = ["dog"]
    with logged("detectron2"):
        check_metadata_consistency("thing_classes", ["d2ha_a", "d2ha_b"])


def empty_dataset() -> None:
    DatasetCatalog.register("d2ha_empty", list)
    get_detection_dataset_dicts("d2ha_empty", filter_empty=False)


def heuristic_match() -> None:
    value = torch.zeros(1)
    with logged("detectron2"):
        align_and_update_state_dicts({"a.conv.w": value, "b.conv.w": value}, {"conv.w": value}, c2_conversion=False)


def strict_load() -> None:
    nn.Linear(5, 4).load_state_dict(nn.Linear(5, 3).state_dict(), strict=False)


# What raises, the error's name, and words that the answer must hold: its numbers and what to type.
CASES: dict[str, tuple[Callable[[], object], str, tuple[str, ...]]] = {
    "RegionCLIP, dimension 1": (
        lambda: TextClassifier(1203, 1024, torch.zeros(1203, 640)),
        "two sizes",
        ("1024 wide (RN50 in CLIP)", "640 wide (RN50x4 in CLIP)", "NUM_CLASSES has nothing to do", "TEXT_EMB_DIM 640"),
    ),
    "RegionCLIP, dimension 0": (
        lambda: TextClassifier(66, 1024, torch.zeros(1203, 1024)),
        "two sizes",
        ("66 rows", "1203", "widths agree", "MODEL.HEAD_ADAPT.TEXT.FILE"),
    ),
    "SGD": (
        lambda: step_after_a_head_change(torch.optim.SGD, momentum=0.9),
        "two sizes",
        ("81 rows", "head has 5", "MODEL.HEAD_ADAPT.RESUME adapt"),
    ),
    "AdamW": (
        lambda: step_after_a_head_change(torch.optim.AdamW),
        "two sizes",
        ("81 rows", "head has 5", "MODEL.HEAD_ADAPT.RESUME adapt"),
    ),
    "batch": (
        lambda: Wiki()(torch.zeros(32, 256, 28, 28)),
        "batch sizes",
        ("N is 65536", "200704 values (98 x 65536 / 32)", "256 x 28 x 28", "nn.Linear(200704"),
    ),
    "label": (
        lambda: F.cross_entropy(torch.zeros(2, 5), torch.tensor([1, 9])),
        "label out of range",
        ("label is 9", "at least 10"),
    ),
    "linear": (
        lambda: nn.Linear(65536, 4)(torch.zeros(2, 200704)),
        "matrix shapes",
        ("takes 65536", "gets 200704", "nn.Linear(200704, 4)"),
    ),
    "convolution": (
        lambda: nn.Conv2d(3, 4, 3)(torch.zeros(1, 5, 8, 8)),
        "channels",
        ("takes 3", "gets 5"),
    ),
    "state dict": (strict_load, "state dict size mismatch", ("weight is [3, 5]", "[4, 5]")),
    "component": (
        lambda: ROI_HEADS_REGISTRY.get("StandartROIHeads"),
        "unregistered component",
        ("StandartROIHeads", "ROI_HEADS", "--import", "'StandardROIHeads'"),
    ),
    "dataset": (
        lambda: DatasetCatalog.get("coco_2017_vall"),
        "unregistered dataset",
        ("coco_2017_vall", "DATASETS.REGISTER", "coco_2017_val"),
    ),
    "missing comma": (lambda: DatasetCatalog.get("m"), "unregistered dataset", ("one letter", "tuple")),
    "twice": (register_twice, "dataset registered twice", ("DatasetCatalog.remove('d2ha_twice')",)),
    "builtin name": (lambda: conflict("coco_my"), "metadata conflict", ("builtin", "your own name")),
    "own name": (lambda: conflict("d2ha_own"), "metadata conflict", ("MetadataCatalog.remove('d2ha_own')",)),
    "disagreeing": (disagree, "different metadata", ("thing_classes",)),
    "no metadata": (
        lambda: MetadataCatalog.get("d2ha_none").thing_classes,
        "no such metadata",
        ("DatasetCatalog.get('d2ha_none')",),
    ),
    "prediction": (
        predict_beyond,
        "prediction beyond the dataset",
        ("class 24", "1 classes", "MODEL.ROI_HEADS.NUM_CLASSES 1 "),
    ),
    "keypoints": (
        lambda: np.zeros(6) / np.zeros(17)[:, None].squeeze(1),
        "keypoint counts",
        ("KEYPOINT_OKS_SIGMAS", "NUM_KEYPOINTS 6"),
    ),
    "masks": (lambda: Instances((4, 4)).gt_masks, "missing masks", ("MODEL.MASK_ON False", "segmentation")),
    "keypoint field": (lambda: Instances((4, 4)).gt_keypoints, "missing keypoints", ("MODEL.KEYPOINT_ON False",)),
    "own field": (lambda: Instances((4, 4)).gt_colour, "missing field", ("gt_colour", "MODEL.TASKS")),
    "pickle": (refused_pickle, "weights only", ("numpy", "MODEL.HEAD_ADAPT.TRUST_FILE True")),
    "heuristics": (heuristic_match, "ambiguous names", ("MODEL.HEAD_ADAPT.RENAME",)),
    "nan": (nan_loss, "nan loss", ("iteration 7", "(loss_cls first)", "SOLVER.BASE_LR")),
    "key": (lambda: get_cfg().merge_from_list(["SOLVER.BASELR", 1]), "unknown key", ("SOLVER.BASELR",)),
    "no data": (empty_dataset, "no data", ("d2ha_empty", "FILTER_EMPTY_ANNOTATIONS")),
}


def raised(action: Callable[[], object]) -> str:
    """The traceback that Python would print."""
    try:
        action()
    except Exception:
        return traceback.format_exc()
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("case", CASES)
def test_a_real_error_gets_its_cause_its_numbers_and_what_to_type(case: str) -> None:
    action, name, words = CASES[case]
    text = raised(action)
    first, *_ = explain(text)
    assert first.name == name
    answer = " ".join(f"{first.cause} {first.mend}".split())
    assert [word for word in words if word not in answer] == []
    assert len(first.cause.splitlines()) <= 2
    assert first.line in " ".join(text.split())


@pytest.mark.parametrize("case", ["batch", "component", "missing comma", "nan", "masks", "builtin name"])
def test_the_last_line_alone_and_wrapped_by_a_terminal_is_enough(case: str) -> None:
    action, name, _ = CASES[case]
    last = raised(action).split("\nTraceback")[-1].split(", line ")[-1].split("\n", 1)[1]
    wrapped = "\x1b[31m" + last.replace(" ", "\n", 3) + "\x1b[0m"
    assert explain(wrapped)[0].name == name


def test_the_batch_answer_says_what_it_assumes_where_the_view_is_not_in_the_text() -> None:
    last = raised(CASES["batch"][0]).strip().splitlines()[-1]
    assert "If N is 65536, as in a common tutorial: then an image has 200704" in explain(last)[0].cause
    other = explain(last.replace("98", "97").replace("32", "31"))[0]
    assert "97/31 = 3.129 times N" in other.cause and "65536" not in other.cause


def test_the_bare_line_at_dimension_0_says_both_readings_and_asks_for_the_traceback() -> None:
    last = raised(CASES["SGD"][0]).strip().splitlines()[-1]
    answer = explain(last)[0]
    assert "in optimizer.step" in answer.cause and "copy_" in answer.cause and "paste all of it" in answer.mend


def test_the_bare_line_at_dimension_1_with_two_encoder_widths_is_an_embedding() -> None:
    last = raised(CASES["RegionCLIP, dimension 1"][0]).strip().splitlines()[-1]
    assert "RN50x4" in explain(last)[0].cause


def test_any_other_addition_is_not_called_an_optimizer() -> None:
    text = raised(lambda: torch.zeros(2, 3) + torch.zeros(2, 4))
    answer = explain(text)[0]
    assert "optimizer state" not in answer.cause and "embedding" not in answer.cause
    assert "whole traceback" in answer.mend


def load_log(tmp_path: Path) -> str:
    """What fvcore logs when a head of 81 rows meets one of 5."""

    class Model(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.cls_score, self.extra = nn.Linear(4, rows), nn.Linear(1, rows - 3)

    torch.save({"model": dict(Model(81).state_dict())}, tmp_path / "a.pth")
    with logged("fvcore") as records:
        Checkpointer(Model(5)).load(str(tmp_path / "a.pth"))
    return texts(records)


def test_the_log_of_a_skipped_head_names_the_classifier(tmp_path: Path) -> None:
    first = explain(load_log(tmp_path))[0]
    assert (first.name, first.times) == ("skipped tensor", 4)
    assert first.cause.startswith("cls_score.weight has 81 rows in the checkpoint and 5 in the model")
    assert "d2-headadapt adapt" in first.mend


def test_an_exception_counts_before_the_log_around_it_and_the_rest_is_mentioned(tmp_path: Path) -> None:
    log, error = load_log(tmp_path), raised(CASES["nan"][0])
    for text in (f"{log}\n{error}", f"{error}\n{log}"):
        names = [e.name for e in explain(text)]
        assert names[:2] == ["nan loss", "skipped tensor"] and "not in the file" in names
        shown, is_known = explanation_text(text)
        assert (
            is_known and shown.startswith("error: Loss became infinite") and "also in this text: Skip loading" in shown
        )


def test_the_last_of_two_exceptions_counts() -> None:
    first, last = raised(CASES["component"][0]), raised(CASES["batch"][0])
    assert [e.name for e in explain(f"{first}\nDuring handling...\n\n{last}")][:2] == [
        "batch sizes",
        "unregistered component",
    ]


TOLD = "Dataset 'my_train' is not registered! Available datasets are:"


PLACES = [("source", False), ("marks", False), ("exception", True), ("log", True)]


@pytest.mark.parametrize(("place", "is_known"), PLACES)
def test_the_exception_s_line_counts_and_not_the_source_that_is_shown_above_it(place: str, is_known: bool) -> None:
    """Python shows the line that raised, whose text may be the message of another branch."""
    lines = {
        "source": f'    raise KeyError("{TOLD}")\n    ^^^^^^^\nValueError: of something else',
        "marks": f"    return f(x)\n           ^^^^ {TOLD}\nValueError: of something else",
        "exception": f"    return f(x)\nKeyError: {TOLD}",
        "log": f"    return f(x)\nValueError: of something else\n[11/27] ERROR: {TOLD}",
    }[place]
    text = f'Traceback (most recent call last):\n  File "catalog.py", line 4, in get\n{lines}\n'
    assert explanation_text(text)[1] is is_known


def test_the_cuda_assert_in_both_forms() -> None:
    # The two texts are a GPU's, which no test here has: they are those of the threads in which people ask.
    line = "Loss.cu:242: nll_loss_forward: block: [0,0,0] Assertion `t >= 0 && t < n_classes` failed."
    error = "RuntimeError: CUDA error: device-side assert triggered"
    assert explain(f"{line}\nTraceback (most recent call last):\n{error}")[0].name == "device-side assert"
    assert explain(error)[0].name == "device-side assert, text only"


@pytest.mark.parametrize(
    "text",
    ["", "hello", "ZeroDivisionError: division by zero", "KeyError: 'bbox'", "The size of the prize must match"],
)
def test_an_unknown_error_is_called_unknown(text: str) -> None:
    ran = cli("explain", text)
    assert ran.code == 1
    assert "not known" in ran.out and "config.yaml" in ran.out and "collect_env" in ran.out
    assert "cause:" not in ran.out


def test_the_command_reads_an_argument_and_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = raised(CASES["batch"][0])
    ran = cli("explain", text)
    assert ran.code == 0 and "mend:\n  Write x.flatten(1)" in ran.out
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert cli("explain", "-").out == ran.out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli("explain", "-").code == 1
    words = "Dataset 'm' is not registered! Available datasets are:"
    several = cli("explain", *words.split())
    assert several.code == 0, "a text without quotes is several arguments"


def test_every_check_that_is_named_exists_and_names_are_different() -> None:
    named = {error.check for error in KNOWN if error.check} | {explain(raised(CASES["SGD"][0]))[0].check}
    assert named - set(CHECKS) == set()
    assert len({error.name for error in KNOWN}) == len(KNOWN)
