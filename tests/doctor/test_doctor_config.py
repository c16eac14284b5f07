"""HA1xx: each check with a config that it must find and one beside it on which it must be silent; and the whole zoo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.projects import point_rend
from helpers.datasets import write_coco

from d2_headadapt import add_headadapt_config
from d2_headadapt.doctor.finding import CHECKS, DoctorContext, Finding
from d2_headadapt.doctor.running import run_checks

ZOO = Path(model_zoo.__file__).parent / "configs"
YAMLS = sorted(str(path.relative_to(ZOO)) for path in ZOO.rglob("*.yaml"))
CONFIG_CHECKS = [one for code, one in sorted(CHECKS.items()) if code.startswith("HA1")]
QUICK = [one for one in CONFIG_CHECKS if one.quick]


def findings(context: DoctorContext, code: str = "HA1") -> list[Finding]:
    return [one for one in run_checks(context, CONFIG_CHECKS).findings if one.code.startswith(code)]


@pytest.fixture
def opts(tmp_path: Path) -> list[str]:
    """Three classes to train on, the same three to test on, the same in another order, and one of two classes."""
    write_coco(tmp_path, ["a", "b", "c"], name="train")
    write_coco(tmp_path, ["a", "b", "c"], name="same")
    write_coco(tmp_path, ["b", "a", "c"], name="mixed")
    write_coco(tmp_path, ["x", "y", "z"], name="others")
    entries = [
        {"name": name, "json": str(tmp_path / f"{name}.json"), "images": str(tmp_path / name)}
        for name in ("train", "same", "mixed", "others")
    ]
    return ["DATASETS.REGISTER", json.dumps(entries), "DATASETS.TRAIN", "['train']", "MODEL.WEIGHTS", ""]


RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
BOX_HEAD = ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
HEADS = ["MODEL.ROI_HEADS.NAME", "HeadAdaptROIHeads", *BOX_HEAD]
STANDARD = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"]

# Code, severity, what the message says, the config, and the one beside it.
CASES: list[tuple[str, str, str, list[str], list[str]]] = [
    ("HA101", "error", "Nearest: 'SOLVER.BASE_LR'", ["SOLVER.BASE_LRR", "0.01"], ["SOLVER.BASE_LR", "0.01"]),
    ("HA101", "error", "003", ["SOLVER.BASE_LR", "003"], ["SOLVER.BASE_LR", "0.003"]),
    ("HA101", "error", "a list", ["DATASETS.TRAIN", "('train')"], ["DATASETS.TRAIN", "('train',)"]),
    ("HA101", "error", "a list", ["SOLVER.STEPS", "abc"], ["SOLVER.STEPS", "[30, 40]"]),
    (
        "HA102",
        "error",
        "is not there",
        ["DATASETS.REGISTER", '[{"name": "far", "json": "no.json", "images": "no"}]', "DATASETS.TRAIN", "[]"],
        ["DATASETS.REGISTER", "[]", "DATASETS.TRAIN", "[]"],
    ),
    ("HA103", "error", "Nearest: 'train'", ["DATASETS.TRAIN", "['trian']"], []),
    ("HA103", "error", "'smae'", ["DATASETS.TEST", "['smae']"], ["DATASETS.TEST", "['same']"]),
    ("HA103", "note", "to train on", ["DATASETS.TRAIN", "[]"], []),
    (
        "HA104",
        "error",
        "'name' or 'position'",
        ["MODEL.HEAD_ADAPT.MATCH", "names"],
        ["MODEL.HEAD_ADAPT.MATCH", "position"],
    ),
    (
        "HA104",
        "error",
        "another list",
        ["DATASETS.TRAIN", "['train', 'others']"],
        ["DATASETS.TRAIN", "['train', 'same']"],
    ),
    ("HA105", "error", "another order", ["DATASETS.TEST", "['mixed']"], ["DATASETS.TEST", "['same']"]),
    ("HA105", "error", "'x' in others", ["DATASETS.TEST", "['others']"], ["DATASETS.TEST", "['same']"]),
    (
        "HA106",
        "warning",
        "background is counted",
        [*HEADS, "MODEL.ROI_HEADS.NUM_CLASSES", "4"],
        [*HEADS, "MODEL.ROI_HEADS.NUM_CLASSES", "3"],
    ),
    ("HA106", "note", "overwritten", ["MODEL.ROI_HEADS.NUM_CLASSES", "7"], ["MODEL.ROI_HEADS.NUM_CLASSES", "80"]),
    (
        "HA107",
        "warning",
        "Write it under MODEL.RETINANET.NUM_CLASSES",
        [*RETINANET, "MODEL.ROI_HEADS.NUM_CLASSES", "3"],
        [*RETINANET, "MODEL.RETINANET.NUM_CLASSES", "3"],
    ),
    ("HA107", "warning", "never reads", ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.4"], []),
    ("HA107", "warning", "MODEL.MASK_ON", [*RETINANET, "MODEL.MASK_ON", "True"], RETINANET),
    (
        "HA107",
        "warning",
        "HeadAdaptROIHeads",
        [*STANDARD, "MODEL.HEAD_ADAPT.PREDICTOR", "Mine"],
        [*HEADS, "MODEL.HEAD_ADAPT.PREDICTOR", "Mine"],
    ),
    (
        "HA121",
        "warning",
        "20 times",
        ["SOLVER.BASE_LR", "0.1", "SOLVER.IMS_PER_BATCH", "4"],
        ["SOLVER.BASE_LR", "0.1", "SOLVER.IMS_PER_BATCH", "32"],
    ),
    ("HA121", "error", "-0.1", ["SOLVER.BASE_LR", "-0.1"], ["SOLVER.BASE_LR", "0.01"]),
    ("HA121", "note", "times", ["SOLVER.BASE_LR", "1e-6"], ["SOLVER.BASE_LR", "1e-4"]),
    ("HA122", "warning", "unless your trainer builds Cosine", ["SOLVER.LR_SCHEDULER_NAME", "Cosine"], []),
    ("HA122", "warning", "a trainer with", ["SOLVER.LR_SCHEDULER_NAME", "WarmupTwoStageMultiStepLR"], []),
    ("HA122", "error", ": WarmupCosineLR, unless", ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosinLR"], []),
    ("HA122", "error", "at least 1", ["SOLVER.MAX_ITER", "0"], ["SOLVER.MAX_ITER", "1"]),
    (
        "HA122",
        "error",
        "ValueError",
        ["SOLVER.STEPS", "[50]", "SOLVER.MAX_ITER", "50"],
        ["SOLVER.STEPS", "[49]", "SOLVER.MAX_ITER", "50"],
    ),
    (
        "HA123",
        "warning",
        "SOLVER.STEPS: (33, 44)",
        ["SOLVER.STEPS", "[60]", "SOLVER.MAX_ITER", "50"],
        ["SOLVER.STEPS", "[40]", "SOLVER.MAX_ITER", "50", "SOLVER.WARMUP_ITERS", "5"],
    ),
    (
        "HA123",
        "warning",
        "fills the whole training",
        ["SOLVER.WARMUP_ITERS", "500", "SOLVER.MAX_ITER", "300"],
        ["SOLVER.WARMUP_ITERS", "100", "SOLVER.MAX_ITER", "300"],
    ),
    # The default of 1000, and the constant kind.
    (
        "HA123",
        "warning",
        "the last iteration has 6% of SOLVER.BASE_LR",
        ["SOLVER.MAX_ITER", "60"],
        ["SOLVER.MAX_ITER", "60", "SOLVER.WARMUP_FACTOR", "1.0"],
    ),
    (
        "HA123",
        "warning",
        "Write SOLVER.WARMUP_ITERS: 6.",
        ["SOLVER.MAX_ITER", "60", "SOLVER.WARMUP_METHOD", "constant"],
        ["SOLVER.MAX_ITER", "60", "SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_ITERS", "6"],
    ),
    (
        "HA124",
        "warning",
        "nothing is evaluated",
        ["TEST.EVAL_PERIOD", "100"],
        ["TEST.EVAL_PERIOD", "100", "DATASETS.TEST", "['same']"],
    ),
    ("HA126", "warning", "Nearest: 'BGR'", ["INPUT.FORMAT", "BGRR"], ["INPUT.FORMAT", "BGR"]),
    ("HA126", "error", "1 values, and 3", ["MODEL.PIXEL_STD", "[1.0]"], ["MODEL.PIXEL_STD", "[57.0, 57.0, 58.0]"]),
    (
        "HA126",
        "note",
        "other order of channels",
        ["INPUT.FORMAT", "RGB"],
        ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"],
    ),
    (
        "HA127",
        "warning",
        "a multiple of 8",
        ["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "12"],
        ["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "16"],
    ),
    ("HA127", "error", "IMS_PER_BATCH: 1", ["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH", "1"]),
    ("HA128", "error", "--import", ["MODEL.ROI_HEADS.NAME", "MyROIHeads"], HEADS),
    ("HA128", "error", "MODEL.ROI_BOX_HEAD.NAME", HEADS[:2], HEADS),
    ("HA128", "error", "'FastRCNNConvFCHead'", [*STANDARD, *BOX_HEAD[:1], "FastRCNNConvFC"], [*STANDARD, *BOX_HEAD]),
    (
        "HA128",
        "error",
        "build_resnet_backbone",
        ["MODEL.BACKBONE.NAME", "build_resnet_backbon"],
        ["MODEL.BACKBONE.NAME", "build_resnet_backbone"],
    ),
]


@pytest.mark.parametrize(
    ("code", "severity", "says", "wrong", "beside"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_mistake_is_found_and_its_neighbour_is_not(
    code: str, severity: str, says: str, wrong: list[str], beside: list[str], opts: list[str], monkeypatch: Any
) -> None:
    # Two processes for a reference of eight, on any machine.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8 if "8" in wrong else 1)
    found = [one for one in findings(DoctorContext(opts=[*opts, *wrong]), code) if says in str(one)]
    assert [one.severity for one in found] == [severity], findings(DoctorContext(opts=[*opts, *wrong]))
    assert found[0].fix.endswith(".")
    assert findings(DoctorContext(opts=[*opts, *beside]), code) == []


def test_the_clean_config_has_no_finding_at_all(opts: list[str]) -> None:
    report = run_checks(DoctorContext(opts=[*opts, "DATASETS.TEST", "['same']"]), CONFIG_CHECKS)
    assert (report.findings, report.not_run, report.checks) == ((), {}, len(CONFIG_CHECKS))


def test_every_check_has_a_case() -> None:
    elsewhere = {"HA108", "HA109", "HA110", "HA125", "HA129"}
    assert {one.code for one in CONFIG_CHECKS} == {case[0] for case in CASES} | elsewhere


def test_a_task_that_nobody_reads_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("VERSION: 2\nMODEL: {TASKS: {colour: {'on': box, classes: [red, blue]}}}\n")
    [found] = findings(DoctorContext(str(path), STANDARD), "HA108")
    assert found.severity == "error" and found.fix == "Set MODEL.ROI_HEADS.NAME HeadAdaptROIHeads."
    assert findings(DoctorContext(str(path), HEADS), "HA108") == []


def script(change: Callable[[CfgNode], Any], opts: list[str]) -> DoctorContext:
    """A config that a user's own code builds, without ``setup``."""
    cfg = DoctorContext(opts=opts).part("registered").clone()
    change(cfg)
    return DoctorContext(ready=cfg, quick=True)


def _set(path: str, value: Any) -> Callable[[CfgNode], None]:
    def change(cfg: CfgNode) -> None:
        *names, last = path.split(".")
        node = cfg
        for name in names:
            node = node[name]
        setattr(node, last, value)

    return change


SCRIPTS: list[tuple[str, str, str, str, Any, Any]] = [
    ("HA103", "error", "Write DATASETS.TEST: [same]", "DATASETS.TEST", "same", ("same",)),
    ("HA106", "error", "MODEL.RETINANET.NUM_CLASSES: 3", "MODEL.RETINANET.NUM_CLASSES", 2, 3),
    ("HA106", "warning", "background is counted", "MODEL.RETINANET.NUM_CLASSES", 4, 3),
    ("HA106", "warning", "'80'", "MODEL.RETINANET.NUM_CLASSES", 80, 3),
    ("HA109", "error", "Write SOLVER.BASE_LR: 0.001.", "SOLVER.BASE_LR", "1e-3", 1e-3),
    ("HA109", "warning", "Write SOLVER.STEPS: [30].", "SOLVER.STEPS", 30, (30,)),
    ("HA109", "error", "Write SOLVER.MAX_ITER: 300.", "SOLVER.MAX_ITER", "300", 300),
    ("HA109", "error", "MODEL.MASK_ON", "MODEL.MASK_ON", "yes", False),
    ("HA109", "error", "MODEL.FPN.IN_FEATURES: [res4]", "MODEL.FPN.IN_FEATURES", "res4", ["res4"]),
    ("HA109", "warning", "a string", "OUTPUT_DIR", 5, "5"),
    ("HA110", "warning", "SOLVER.BASE_LR", "BASE_LR", 0.1, None),
    ("HA110", "warning", "SOLVER.MAX_ITER", "SOLVER.MAX_ITERS", 100, None),
    ("HA110", "warning", "perhaps MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASES", 3, None),
]


@pytest.mark.parametrize(
    ("code", "severity", "says", "key", "wrong", "right"), SCRIPTS, ids=[f"{c[0]}-{i}" for i, c in enumerate(SCRIPTS)]
)
def test_what_a_script_sets_is_seen_before_training(
    code: str, severity: str, says: str, key: str, wrong: Any, right: Any, opts: list[str]
) -> None:
    """yacs looks at values of files and command lines only."""
    base = [*opts, *RETINANET, "MODEL.RETINANET.NUM_CLASSES", "3"]
    found = [one for one in run_checks(script(_set(key, wrong), base), QUICK).findings if one.code == code]
    assert [one.severity for one in found] == [severity]
    assert says.strip("'") in f"{found[0].where} {found[0].found} {found[0].expected} {found[0].fix}"
    beside = script(_set(key, right), base) if right is not None else script(lambda cfg: None, base)
    assert [one for one in run_checks(beside, QUICK).findings if one.code == code] == []


def test_counts_that_our_heads_settle_themselves_stop_nobody(opts: list[str]) -> None:
    context = script(_set("MODEL.ROI_HEADS.NUM_CLASSES", 2), [*opts, *HEADS])
    assert [one.severity for one in run_checks(context, QUICK).findings] == ["note"]
    context = script(_set("MODEL.ROI_HEADS.NUM_CLASSES", 2), [*opts, *STANDARD, *BOX_HEAD])
    assert [one.severity for one in run_checks(context, QUICK).findings] == ["error"]


def test_keys_of_ones_own_are_left_alone() -> None:
    """PointRend adds keys in sections of detectron2's, some named like keys elsewhere."""
    cfg = get_cfg()
    add_headadapt_config(cfg)
    point_rend.add_pointrend_config(cfg)
    cfg.MODEL.MINE = CfgNode({"BASE_LR": 1.0})
    cfg.MY_SWITCH = True
    assert findings(DoctorContext(ready=cfg), "HA110") == []


def test_an_imported_module_brings_its_keys(tmp_path: Path) -> None:
    module = tmp_path / "doctor_component.py"
    module.write_text("def add_one_config(cfg):\n    cfg.SOLVER.BASE_LRX = 1.0\n")
    context = DoctorContext(opts=["SOLVER.BASE_LRX", "2.0"], imports=[str(module)])
    assert findings(context, "HA101") == findings(context, "HA110") == []


KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_HEADS.NAME", "HeadAdaptROIHeads", *BOX_HEAD]


@pytest.mark.parametrize(("sigmas", "silent"), [(0, False), (2, False), (3, True), (17, False)])
def test_sigmas_of_another_number_are_found(sigmas: int, silent: bool, opts: list[str]) -> None:
    wrong = [*opts, *KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3", "DATASETS.TEST", "['same']"]
    found = findings(DoctorContext(opts=[*wrong, "TEST.KEYPOINT_OKS_SIGMAS", str([0.1] * sigmas)]), "HA125")
    assert [one.severity for one in found] == ([] if silent else ["error"])
    assert silent or "[0.05, 0.05, 0.05]" in found[0].fix
    # COCO's own 17 need none, and nobody asks where nothing is evaluated.
    for beside in ([*wrong[:-3], "17", *wrong[-2:]], wrong[:-2]):
        assert findings(DoctorContext(opts=beside), "HA125") == []


@pytest.mark.parametrize(
    ("pairs", "silent"), [([("left", "right")], True), ([("left", "rihgt")], False), ([], True), (None, True)]
)
def test_a_flip_map_of_other_names_is_found(pairs: Any, silent: bool, opts: list[str]) -> None:
    values = {"keypoint_names": ["beak", "left", "right"], "keypoint_flip_map": pairs}
    DatasetCatalog.register("birds", list)
    MetadataCatalog.get("birds").set(thing_classes=["bird"], **{k: v for k, v in values.items() if v is not None})
    found = findings(DoctorContext(opts=[*opts, *KEYPOINTS, "DATASETS.TRAIN", "['birds']"]), "HA125")
    assert [one.severity for one in found] == ([] if silent else ["error"])
    assert silent or "'rihgt'" in found[0].found


def test_without_flips_the_flip_map_is_read_all_the_same(opts: list[str]) -> None:
    DatasetCatalog.register("birds", list)
    MetadataCatalog.get("birds").set(thing_classes=["bird"], keypoint_names=["beak"])
    context = DoctorContext(opts=[*opts, *KEYPOINTS, "DATASETS.TRAIN", "['birds']", "INPUT.RANDOM_FLIP", "none"])
    assert [one.severity for one in findings(context, "HA125")] == ["error"]


def test_a_test_set_without_an_evaluator_is_found(opts: list[str]) -> None:
    DatasetCatalog.register("bare", list)
    MetadataCatalog.get("bare").thing_classes = ["a", "b", "c"]
    [found] = findings(DoctorContext(opts=[*opts, "DATASETS.TEST", "['bare']"]), "HA129")
    assert "'bare'" in found.where
    MetadataCatalog.get("bare").evaluator_type = "coco"
    assert findings(DoctorContext(opts=[*opts, "DATASETS.TEST", "['bare']"]), "HA129") == []


@pytest.mark.parametrize("name", YAMLS)
def test_no_zoo_config_has_a_finding(name: str) -> None:
    """Neither errors nor warnings; their datasets are registered, and their files need not be there."""
    report = run_checks(DoctorContext(str(ZOO / name)), CONFIG_CHECKS)
    # Tests of detectron2 itself: shorter than their own warm-up.
    instant = ["HA123"] if "instant_test" in name else []
    assert [found.code for found in report.findings] == instant
    assert report.not_run == {}


@pytest.mark.parametrize("name", [name for name in YAMLS if "quick_schedules" not in name][::4])
def test_no_zoo_config_is_stopped_in_a_script(name: str) -> None:
    cfg = model_zoo.get_config(name)
    assert run_checks(DoctorContext(ready=cfg, quick=True), QUICK).of("error") == []
