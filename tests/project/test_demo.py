"""The demonstrations: their data set, their fairness, and their code path in a very short run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REAL, ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.datasets import load_coco_json
from detectron2.engine import DefaultTrainer
from PIL import Image

from d2_headadapt.engine.train import default_argument_parser, main
from d2_headadapt.errors import UsageError
from d2_headadapt.fit import FitHook

QUICK = ("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "1", "SOLVER.IMS_PER_BATCH", "2")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of tools/ by its name; that folder is no package."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the configs, whose output/ is nobody else's."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(digits: Any, scenes: int = 4) -> list[Any]:
    return [digits.Split(split.name, split.classes, split.pool, scenes) for split in digits.SPLITS]


# The data set


def test_drawing_twice_gives_the_same_bytes(tool: Any, tmp_path: Path) -> None:
    digits = tool("demo_digits")
    for folder in ("a", "b"):
        digits.draw_datasets(tmp_path / folder, small(digits))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4 * (1 + 4)
    assert [f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()] == []


def test_another_seed_draws_other_scenes(tool: Any, tmp_path: Path) -> None:
    digits = tool("demo_digits")
    for seed in (1, 2):
        digits.draw_datasets(tmp_path / str(seed), small(digits)[:1], seed)
    first, second = ((tmp_path / seed / "base_train" / "0001.png").read_bytes() for seed in "12")
    assert first != second


def test_no_sample_of_handwriting_is_in_two_pools(tool: Any) -> None:
    from sklearn.datasets import load_digits

    digits = tool("demo_digits")
    pools = digits.digit_pools()
    every = [sample.tobytes() for pool in pools.values() for samples in pool.values() for sample in samples]
    assert sorted(every) == sorted((image / 16.0).tobytes() for image in load_digits().images)
    assert all(len(samples) > 30 for pool in pools.values() for samples in pool.values())


def test_the_json_is_coco_with_attributes_and_boxes_inside_the_images(tool: Any, tmp_path: Path) -> None:
    digits = tool("demo_digits")
    digits.draw_datasets(tmp_path, small(digits, 30)[2:3])
    coco = json.loads((tmp_path / "new_train.json").read_text(encoding="utf-8"))
    assert [c["name"] for c in coco["categories"]] == list(digits.TARGET_CLASSES)
    names = {c["id"]: c["name"] for c in coco["categories"]}
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w >= 4 and h >= 4 and x + w <= digits.SIDE and y + h <= digits.SIDE
        value = digits.DIGITS.index(names[annotation["category_id"]])
        assert annotation["attributes"]["parity"] == ("odd" if value % 2 else "even")
        assert annotation["attributes"]["colour"] in digits.COLOURS
    records = load_coco_json(str(tmp_path / "new_train.json"), str(tmp_path / "new_train"), "d", ["attributes"])
    assert len(records) == 30 and all("attributes" in a for r in records for a in r["annotations"])
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"]) == (digits.SIDE, digits.SIDE)


def test_a_box_holds_ink_of_its_colour(tool: Any) -> None:
    digits = tool("demo_digits")
    rng = np.random.default_rng(0)
    scene, annotations = digits.draw_scene(digits.TARGET_CLASSES, digits.digit_pools()["test"], rng)
    assert annotations
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        distance = np.abs(scene[y : y + h, x : x + w] - np.array(digits.COLOURS[annotation["attributes"]["colour"]]))
        assert distance.sum(-1).min() < 40


def test_three_classes_are_carried_and_none_keeps_its_place(tool: Any) -> None:
    demo = tool("demo")
    assert set(demo.CARRIED) == {"four", "five", "six"} and set(demo.NEW) == {"seven", "eight", "nine"}
    places = [(demo.TARGET_CLASSES.index(name), demo.BASE_CLASSES.index(name)) for name in demo.CARRIED]
    assert all(target != source for target, source in places)


# The run


def test_a_short_run_of_the_demo(
    tool: Any, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, digits, arms = tool("demo"), tool("demo_digits"), tool("demo_arms")
    trainers: dict[str, Any] = {}
    solved: dict[str, list[tuple[str, ...]]] = {}
    load = arms.load_arm

    def remember(arm: Any, *args: Any) -> Any:
        trainer = load(arm, *args)
        trainers[arm.folder] = SimpleNamespace(
            checkpointer=type(trainer.checkpointer),
            bases=type(trainer).__mro__,
            heads=type(trainer.model.roi_heads).__name__,
            classes=trainer.model.roi_heads.num_classes,
        )
        return trainer

    class Watch(arms.Watch):
        def before_train(self) -> None:
            reports = [hook.report for hook in self.trainer._hooks if isinstance(hook, FitHook)]
            solved[self.result.arm.folder] = [report.solved for report in reports if report is not None]
            super().before_train()

    monkeypatch.setattr(arms, "Watch", Watch)
    monkeypatch.setattr(demo, "load_arm", remember)
    stale = project / "output" / "demo" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("from an earlier run")

    stock, ours, fitted = results = demo.run(splits=small(digits), opts=QUICK)

    assert trainers["stock"].checkpointer is DetectionCheckpointer
    assert trainers["stock"].bases[1] is DefaultTrainer
    assert trainers["stock"].heads == "StandardROIHeads" and trainers["ours"].heads == "HeadAdaptROIHeads"
    assert {trainer.classes for folder, trainer in trainers.items() if folder != "base"} == {6}
    assert all([iteration for iteration, _ in result.curve] == [0, 1, 2] for result in results)
    assert len(ours.batches) == 2 and stock.batches == ours.batches == fitted.batches
    assert all([len(pictures) for pictures in result.pictures] == [4, 4] for result in results)
    assert solved.pop("fitted") == [("roi_heads.box_predictor",)], "evaluated before the fit"
    assert set(map(tuple, solved.values())) == {()}
    out = capsys.readouterr().out
    commands = [
        line.strip() for line in out.splitlines() if "tools/train_net.py --config-file configs/demo.yaml" in line
    ]
    assert "3 of 6 thing classes carried" in out and len(commands) == 2
    assert len([line for line in out.splitlines() if "of 3 new classes on 4 images in " in line]) == 1
    assert "d2.evaluation" not in out and "loss" not in out, "detectron2's log is on the console"
    files = {path.name for path in stale.parent.iterdir()}
    assert {"curves.png", "predictions.png", "table.txt", "results.json", "log.txt"} <= files
    assert "stale.txt" not in files
    written = json.loads((stale.parent / "results.json").read_text(encoding="utf-8"))["arms"]
    assert list(written) == ["stock detectron2", "d2_headadapt", "d2_headadapt, fitted"]
    assert all([point["iteration"] for point in arm["curve"]] == [0, 1, 2] for arm in written.values())

    # A printed command does the same: tools/train_net.py is this call.
    finals = {}
    for command, arm in zip(commands, ("ours", "fitted"), strict=True):
        shown = [*shlex.split(command)[2:], "OUTPUT_DIR", "output/again"]
        main(default_argument_parser().parse_args(shown))
        saved = [torch.load(project / "output" / folder / "model_final.pth") for folder in (f"demo/{arm}", "again")]
        assert [k for k, v in saved[0]["model"].items() if not torch.equal(v, saved[1]["model"][k])] == []
        finals[arm] = saved[0]["model"]["roi_heads.box_predictor.cls_score.weight"]
    assert not torch.equal(finals["ours"], finals["fitted"])


def test_arms_that_saw_different_images_cannot_be_compared(tool: Any) -> None:
    arms = tool("demo_arms")
    a, b, c = (arms.ArmResult(arm, batches=["x:1", "y:2"]) for arm in (arms.STOCK, arms.OURS, arms.FITTED))
    assert arms.same_batches([a, b, c]) == 2
    c.batches[0] = "x:2"
    with pytest.raises(RuntimeError, match="stock detectron2 and d2_headadapt, fitted saw different images from itera"):
        arms.same_batches([a, b, c])
    b.batches[1] = "y:3"
    with pytest.raises(RuntimeError, match="saw different images from iteration 1 on"):
        arms.same_batches([a, b])
    b.batches = ["x:1"]
    with pytest.raises(RuntimeError, match="saw different images from iteration 1 on"):
        arms.same_batches([a, b])


def test_classes_without_ground_truth_do_not_count(tool: Any) -> None:
    arms = tool("demo_arms")
    metrics = {"AP-a": 10.0, "AP-b": float("nan"), "AP-c": 30.0}
    assert arms.group_ap(metrics, ("a", "b", "c")) == 20.0
    assert np.isnan(arms.group_ap(metrics, ("b",)))


def test_a_missing_package_is_one_line_that_says_what_to_type(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = tool("demo_arms")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(UsageError, match=r"found no scikit-learn\. Type: pip install 'd2_headadapt\[demo\]'") as raised:
        arms.check_extras()
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


# The real model


def test_without_the_real_material_demo_real_exits_2_and_names_the_variable(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("D2HA_REAL", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo_real.py"])
    assert tool("demo_real").main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: D2HA_REAL: expected") and error.count("\n") == 1


@pytest.mark.real
def test_the_subset_is_the_part_of_coco128_that_shows_the_target_classes(tool: Any, tmp_path: Path) -> None:
    demo_real = tool("demo_real")
    source = REAL / "coco128" / "val.json"
    demo_real.write_subset(source, tmp_path / "val.json")
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (source, tmp_path / "val.json"))
    assert [c["name"] for c in new["categories"]] == list(demo_real.TARGET_CLASSES)
    old_names = {c["id"]: c["name"] for c in old["categories"]}
    new_names = {c["id"]: c["name"] for c in new["categories"]}
    kept = {a["id"]: old_names[a["category_id"]] for a in old["annotations"]}
    kept = {key: name for key, name in kept.items() if name in demo_real.TARGET_CLASSES}
    assert {a["id"]: new_names[a["category_id"]] for a in new["annotations"]} == kept
    assert new["images"] == old["images"]
    assert not set(demo_real.NEW) & {*kept.values(), *old_names.values()}


def test_a_row_that_is_not_the_file_s_is_counted(tool: Any) -> None:
    demo_real = tool("demo_real")
    names = demo_real.vocabulary("coco").names
    generator = torch.Generator().manual_seed(0)
    key = demo_real.PREDICTOR
    sizes = {
        "cls_score.weight": (81, 4),
        "cls_score.bias": (81,),
        "bbox_pred.weight": (320, 4),
        "bbox_pred.bias": (320,),
    }
    file = {key + leaf: torch.randn(size, generator=generator) for leaf, size in sizes.items()}
    rows = [names.index(n) if n in names else 0 for n in demo_real.TARGET_CLASSES] + [80]
    boxes = [4 * row + i for row in rows[:-1] for i in range(4)]
    model = {name: value[rows if "cls" in name else boxes].clone() for name, value in file.items()}
    assert demo_real.count_equal_rows(file, model) == (122, 122)
    for leaf, row in (("cls_score.weight", -1), ("bbox_pred.bias", 0)):
        model[key + leaf][row] += 1e-7 + model[key + leaf][row].abs() * 1e-6
    assert demo_real.count_equal_rows(file, model) == (120, 122)
