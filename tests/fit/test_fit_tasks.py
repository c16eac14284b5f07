"""New rows of task heads are solved: of images, and of boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from helpers.classifier import TASKS, classifier, classifier_cfg, picture, pictures
from helpers.commands import fresh_loggers
from helpers.fit import SETTINGS, scene, scenes
from helpers.models import build_seeded, same_bits, state_of, tiny_cfg
from PIL import Image
from torch import nn

from d2_headadapt import HeadAdaptCheckpointer, Trainer
from d2_headadapt.cli.parser import main
from d2_headadapt.data.task_labels import MISSING
from d2_headadapt.engine.train import default_argument_parser, setup
from d2_headadapt.files import read_checkpoint
from d2_headadapt.fit import FitHook, FitReport, fit_new_rows
from d2_headadapt.fit import tasks as tasks_room
from d2_headadapt.fit.boxes import region_features, stages_of
from d2_headadapt.fit.images import View, choose_images, mirror

EVERY = {"colour": (0, 1, 2), "light": (0, 1), "tags": (0, 1, 2, 3)}


def fit(model: nn.Module, new: Any, entries: Any = None, **settings: Any) -> FitReport:
    entries = pictures(36) if entries is None else entries
    return fit_new_rows(model, entries, picture, new=new, settings=replace(SETTINGS, **settings))


def accuracies(model: nn.Module) -> dict[str, float]:
    """Of pictures that no fit saw."""
    entries = pictures(72)[36:]
    with torch.no_grad():
        found = model.eval()([picture(entry) for entry in entries])
    return {
        name: sum(out[f"pred_{name}"] == entry["tasks"][name] for out, entry in zip(found, entries, strict=True)) / 36
        for name in TASKS
    }


def changed_rows(before: dict[str, torch.Tensor], model: nn.Module) -> dict[str, list[int]]:
    pairs = [(name, value, before[name]) for name, value in model.state_dict().items()]
    return {
        name: [i for i in range(len(new)) if not torch.equal(new[i], old[i])]
        for name, new, old in pairs
        if not torch.equal(new, old)
    }


def test_every_task_starts_trained() -> None:
    model = classifier(seed=4)
    before = state_of(model)
    report = fit(model, EVERY)
    assert set(report.solved) == {"heads.colour", "heads.light", "heads.tags"}
    assert not report.without_examples and report.images == 36
    assert min(accuracies(model).values()) > 0.9
    assert changed_rows(before, model) == {
        f"heads.{name}.predictor.{leaf}": list(classes)
        for name, classes in EVERY.items()
        for leaf in ("weight", "bias")
    }


def test_a_new_class_is_found_and_carried_rows_keep_every_bit() -> None:
    model = classifier(seed=4)
    # A model that knows red and green; blue is new to it.
    fit(model, {"colour": (0, 1)}, pictures(36, colours=(0, 1)))
    with torch.no_grad():
        model.heads["colour"].predictor.bias[2] = -9.0
    before = state_of(model)
    assert accuracies(model)["colour"] < 0.7
    report = fit(model, {"colour": (2,)})
    assert accuracies(model)["colour"] > 0.9
    assert changed_rows(before, model) == {f"heads.colour.predictor.{leaf}": [2] for leaf in ("weight", "bias")}
    (part,) = report.parts
    assert part.part == "heads.colour" and part.score["held-out loss"][1] < part.score["held-out loss"][0]


def test_a_class_without_an_example_keeps_its_recipe_and_is_named() -> None:
    model = classifier(seed=4)
    before = state_of(model)
    report = fit(model, {"colour": (0, 1, 2)}, pictures(36, colours=(0, 2)))
    assert report.without_examples == {"colour": (1,)}
    assert changed_rows(before, model) == {f"heads.colour.predictor.{leaf}": [0, 2] for leaf in ("weight", "bias")}


def test_missing_labels_are_left_out_of_the_fit() -> None:
    """An image that nobody labelled is no example of class -1, and no counter-example either."""
    entries = pictures(36)
    for i, entry in enumerate(entries):
        entry["tasks"] = {**entry["tasks"], **({"colour": None, "tags": None} if i // 6 % 2 else {"light": None})}
    model, fewer = classifier(seed=4), classifier(seed=4)
    report = fit(model, EVERY, entries)
    assert {part.part: part.regions for part in report.parts} == {f"heads.{name}": 36 for name in TASKS}
    fit(fewer, {"light": (0, 1)}, entries)
    assert torch.equal(model.heads["light"].predictor.weight, fewer.heads["light"].predictor.weight)
    assert min(accuracies(model).values()) > 0.9
    empty = [{**entry, "tasks": {**entry["tasks"], "light": None}} for entry in entries]
    before = state_of(model)
    report = fit(model, {"light": (0, 1)}, empty)
    assert report.parts[0].action == "kept" and report.without_examples == {"light": (0, 1)}
    assert same_bits(before, state_of(model))


def test_single_missing_elements_of_several_labels_are_no_counter_examples() -> None:
    def most_grey_unknown(entry: Any) -> Any:
        mapped = picture(entry)
        if entry["image_id"] >= 6 and mapped["tasks"]["tags"][2] == 1:
            mapped["tasks"]["tags"][2] = MISSING
        return mapped

    model = classifier(seed=4)
    fit_new_rows(model, pictures(36), most_grey_unknown, new={"tags": (2,)}, settings=SETTINGS)
    entries = pictures(72)[36:]
    with torch.no_grad():
        found = model.eval()([picture(entry) for entry in entries])
    right = [(2 in out["pred_tags"]) == (2 in e["tasks"]["tags"]) for out, e in zip(found, entries, strict=True)]
    assert sum(right) > 32


@pytest.mark.parametrize("settings, reason", [({"parts": ("box",)}, "FIT.PARTS"), ({}, "512 features are too many")])
def test_what_is_not_solved_is_said(settings: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_room, "WIDEST", 511 if not settings else 512)
    model = classifier(seed=4, POOLING="flatten", INPUT_SIZE=[64, 64])
    before = state_of(model)
    report = fit(model, {"colour": (1,)}, **settings)
    (part,) = report.parts
    assert part.action == "kept" and reason in part.reason
    assert report.without_examples == {"colour": (1,)} and same_bits(before, state_of(model))


def test_flattened_features_are_solved_where_they_are_few() -> None:
    model = classifier(seed=4, POOLING="flatten")
    assert fit(model, {"colour": (0, 1, 2)}).solved == ("heads.colour",)
    assert accuracies(model)["colour"] > 0.9


def test_nothing_random_is_drawn_and_the_fit_repeats() -> None:
    state = torch.get_rng_state()
    models = [classifier(seed=4) for _ in range(2)]
    torch.set_rng_state(state)
    for model in models:
        fit(model, EVERY)
    assert torch.equal(state, torch.get_rng_state())
    assert same_bits(state_of(models[0]), state_of(models[1]))


def test_images_of_rare_task_classes_come_first() -> None:
    entries = pictures(60, colours=(0,))
    entries[41]["tasks"]["colour"] = 2
    chosen = choose_images(entries, (), replace(SETTINGS, images=5), {"colour": (0, 2)})
    shown = [entries[i]["tasks"]["colour"] for i in chosen]
    counts = [
        2 in [entries[i]["tasks"]["colour"] for i in choose_images(entries, (), replace(SETTINGS, images=5, seed=s), t)]
        for s in range(30)
        for t in ({"colour": (0, 2)},)
    ]
    assert len(shown) == 5 and sum(counts) > 10  # 2.5 of 30 by chance.


def box_model(kind: str) -> nn.Module:
    cfg = tiny_cfg(kind, masks=False, num_classes=3)
    cfg.MODEL.TASKS.shade = CfgNode({"on": "box", "classes": ["r", "g", "b"]})
    cfg.MODEL.TASKS.cool = CfgNode({"on": "box", "classes": ["warm", "cool"], "kind": "multi"})
    return build_seeded(cfg, 0).eval()


def labelled_scene(entry: dict[str, Any]) -> dict[str, Any]:
    """The colours of squares as tasks; every seventh box has no label."""
    mapped = scene(entry)
    truth = mapped["instances"]
    truth.gt_shade = truth.gt_classes.clone()
    truth.gt_cool = torch.stack([truth.gt_classes == 0, truth.gt_classes == 2], 1).float()
    if entry["image_id"] % 4 == 0:
        truth.gt_shade[0] = MISSING
        truth.gt_cool[0] = MISSING
    return mapped


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_box_tasks_are_solved_at_true_boxes(kind: str) -> None:
    model = box_model(kind)
    before = state_of(model)
    settings = replace(SETTINGS, parts=("task",))
    new = {"shade": (0, 1, 2), "cool": (0, 1)}
    report = fit_new_rows(model, scenes(40), labelled_scene, new=new, settings=settings)
    # A cascade has tasks at its last stage only.
    stages = stages_of(model.roi_heads, "roi_heads")[-1:]
    assert len(report.solved) == 2 and not report.without_examples
    assert all(".tasks." in name and name.split(".")[-2] == "predictor" for name in changed_rows(before, model))
    right: list[bool] = []
    cool: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad():
        for entry in scenes(60)[40:]:
            truth = scene(entry)["instances"]
            images = model.preprocess_image([scene(entry)])
            view = View(0, 0, model.backbone(images.tensor), (64, 64), truth)
            for stage in stages:
                logits = stage.predictor.tasks(region_features(model.roi_heads, stage, view, truth.gt_boxes))
                shade = logits["shade"].argmax(1) == truth.gt_classes
                right += shade.tolist()
                for score, is_cool in zip(logits["cool"][:, 1].sigmoid(), truth.gt_classes == 2, strict=True):
                    cool[bool(is_cool)].append(float(score))
    # Chance is a third.
    assert sum(right) / len(right) > 0.6
    assert sum(cool[True]) / len(cool[True]) > sum(cool[False]) / len(cool[False]) + 0.05


def test_a_mirrored_view_keeps_the_labels_of_its_boxes() -> None:
    truth = labelled_scene(scenes(2)[1])["instances"]
    found = mirror(truth)
    assert torch.equal(found.gt_shade, truth.gt_shade) and torch.equal(found.gt_cool, truth.gt_cool)
    assert not found.has("gt_masks")


def on_disk(folder: Path, count: int = 24) -> dict[str, Any]:
    """Pictures of one colour each, none of them square, and the entry of their csv."""
    (folder / "images").mkdir()
    rows = ["id,colour"]
    for i, entry in enumerate(pictures(count)):
        pixels = picture(entry)["image"][:, :, :20].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[..., ::-1].copy()).save(folder / "images" / f"{i}.png")
        rows.append(f"{i},{'NA' if i % 8 == 5 else TASKS['colour']['classes'][entry['tasks']['colour']]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    csv, images = str(folder / "labels.csv"), str(folder / "images")
    return {"name": "pictures", "csv": csv, "images": images, "file": "{id}.png", "tasks": ["colour"]}


def run_of(folder: Path, pooling: str) -> tuple[list[str], Path]:
    """The command line of a run whose weights know red and green, and whose pictures are blue, too."""
    cfg = classifier_cfg({"colour": {}}, POOLING=pooling)
    cfg.MODEL.WEIGHTS = str(folder / "old.pth")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (32,), 32
    cfg.DATASETS.TRAIN, cfg.DATASETS.REGISTER = ("pictures",), [on_disk(folder)]
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 4, 1e-4, 4
    cfg.MODEL.HEAD_ADAPT.FIT.REFITS = [2]
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(folder / "out")
    (folder / "run.yaml").write_text(cfg.dump(), encoding="utf-8")
    old = classifier({"colour": {"classes": ["green", "red"]}}, seed=4, POOLING=pooling)
    HeadAdaptCheckpointer(old, str(folder)).save("old", iteration=0)
    return ["--config-file", str(folder / "run.yaml")], folder / "old.pth"


@pytest.mark.parametrize("pooling", ["avg", "flatten"])
def test_the_fit_command_solves_the_rows_of_a_csv(pooling: str, tmp_path: Path, capsys: Any) -> None:
    arguments, old = run_of(tmp_path, pooling)
    output = tmp_path / "new.pth"
    with fresh_loggers():
        assert main(["fit", *arguments, "--weights", str(old), "--output", str(output)]) == 0
    assert "heads.colour" in capsys.readouterr().out
    before, after = (read_checkpoint(str(path)) for path in (old, output))
    names = after["d2_headadapt"]["tables"]["colour"]
    assert names == ["blue", "green", "red"] and not after["d2_headadapt"]["extra"]
    was, now = (content["model"]["heads.colour.predictor.weight"] for content in (before, after))
    assert torch.equal(now[1:], was)
    model = classifier({"colour": {"classes": names}}, POOLING=pooling).eval()
    model.load_state_dict(after["model"])
    with torch.no_grad():
        blue = torch.stack([out["scores_colour"][0] for out in model([picture(entry) for entry in pictures(30)])])
    shown = torch.tensor([entry["tasks"]["colour"] == 2 for entry in pictures(30)])
    assert blue[shown].min() > blue[~shown].max()


def test_a_run_starts_with_solved_rows_and_solves_them_again(tmp_path: Path) -> None:
    arguments, _ = run_of(tmp_path, "avg")
    with fresh_loggers():
        trainer = Trainer(setup(default_argument_parser().parse_args(arguments)))
        trainer.resume_or_load(resume=False)
        (hook,) = [hook for hook in trainer._hooks if isinstance(hook, FitHook)]
        trainer.train()
    assert hook.report is not None and hook.report.solved == ("heads.colour",)
    assert not trainer.checkpointer.untrained
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert "iteration 2: fitted 1 of 1 new classes" in log
