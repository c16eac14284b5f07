"""``extend``, ``pack``, ``add``, ``remove``; T3 and T4: stock loads the file, and packs do not see each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from helpers.commands import cli
from helpers.keep import OLD, KeepPlace, differs
from helpers.models import batch, detections, names, stock_model
from helpers.resume import writers_are_closed
from torch import nn

from d2_headadapt import ClassTable, HeadAdaptCheckpointer, KeepSettings, PackSpec, Trainer, attach_keep
from d2_headadapt.checkpoint.kept import kept_in
from d2_headadapt.checkpoint.provenance import provenance_of
from d2_headadapt.engine.train import default_argument_parser, setup
from d2_headadapt.fit import FitHook

__all__ = ["writers_are_closed"]


@pytest.fixture
def place(tmp_path: Path) -> KeepPlace:
    torch.set_num_threads(1)
    return KeepPlace(tmp_path)


def stock_detections(path: Path) -> list[dict[str, torch.Tensor]]:
    """What stock detectron2 makes of a file."""
    model = stock_model(OLD, seed=5)
    DetectionCheckpointer(model).load(str(path))
    return detections(model, batch(OLD))


def extended_model(path: Path, *packs: tuple[str, ...]) -> nn.Module:
    """The file in a model with these packs."""
    model = stock_model(OLD, seed=6)
    attach_keep(model, KeepSettings(ClassTable(names(OLD)), tuple(map(PackSpec, packs))))
    HeadAdaptCheckpointer(model).load(str(path), checkpointables=[])
    return model


def by_name(model: nn.Module, table: list[str]) -> list[set[tuple[Any, ...]]]:
    """Detections with their class names, in no order."""
    return [
        {
            (table[k], score, *box)
            for k, score, box in zip(
                image["pred_classes"].tolist(), image["scores"].tolist(), image["pred_boxes"].tolist(), strict=True
            )
        }
        for image in detections(model, batch(OLD))
    ]


def test_extend_writes_a_file_whose_old_detections_are_stocks(place: KeepPlace) -> None:
    before = stock_detections(place.base)
    tests = ["DATASETS.TEST", "('d2ha_keep_old_test','d2ha_keep_both_test')"]
    ran = place.run("extend", "--weights", place.base, "--output", place.folder / "more.pth", opts=tests)
    assert ran.code == 0, ran.err
    assert "old detections identical on 4 images, checked against the base model" in ran.out
    assert "d2ha_keep_both_test" in ran.out and "new detections >= 0.5" in ran.out
    assert "rhino, gnu beside 5 classes" in ran.out
    path = place.folder / "more.pth"
    assert differs(before, stock_detections(path)) == [] and len(stock_detections(path)[0]["scores"]) == len(
        before[0]["scores"]
    )
    kept = kept_in(provenance_of(str(path), False), "")
    assert kept is not None and kept.packs == (PackSpec(("rhino", "gnu")),) and kept.classes == tuple(names(OLD))
    assert differs(before, detections(extended_model(path, ("rhino", "gnu")), batch(OLD))) == []


def test_packs_commute_and_can_be_taken_out(tmp_path: Path) -> None:
    place, after = (
        KeepPlace(tmp_path / name, classes, name) for name, classes in (("a", ["rhino"]), ("b", ["lion", "gnu"]))
    )
    rhino, lion = place.extended("rhino.pth"), after.extended("lion.pth")
    packs = [place.folder / "rhino.pack", place.folder / "lion.pack"]
    for path, pack in zip((rhino, lion), packs, strict=True):
        assert cli("pack", path, "--output", pack).code == 0
    one, other = place.folder / "one.pth", place.folder / "other.pth"
    assert cli("add", place.base, *packs, "--output", one).code == 0
    assert cli("add", place.base, *packs[::-1], "--output", other).code == 0
    first = by_name(extended_model(one, ("rhino",), ("lion", "gnu")), [*names(OLD), "rhino", "lion", "gnu"])
    second = by_name(extended_model(other, ("lion", "gnu"), ("rhino",)), [*names(OLD), "lion", "gnu", "rhino"])
    assert first == second
    # A session after a session is the two packs.
    both = after.extended("both.pth", weights=rhino)
    a, b = (torch.load(path)["model"] for path in (one, both))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    ran = cli("remove", one, "--class", "rhino", "--output", place.folder / "less.pth")
    assert ran.code == 0 and "without rhino" in ran.out
    a, b = (torch.load(path)["model"] for path in (place.folder / "less.pth", lion))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert cli("remove", lion, "--class", "gnu", "--output", place.folder / "none.pth").code == 0
    a, b = (torch.load(path)["model"] for path in (place.folder / "none.pth", place.base))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_suppress_is_compared_before_anything_is_hidden(place: KeepPlace) -> None:
    ran = place.run(
        "extend", "--weights", place.base, "--output", place.folder / "more.pth", "--images", 2,
        opts=["MODEL.HEAD_ADAPT.KEEP_DETECTIONS", "suppress", "MODEL.HEAD_ADAPT.KEEP_SUPPRESS_SCORE", 0.01],
    )  # fmt: skip
    assert ran.code == 0 and "old detections identical on 2 images" in ran.out, ran.err


def test_a_saved_config_is_a_config(place: KeepPlace) -> None:
    """What a run dumps is settled, and describes the run; another dataset is not mixed in silently."""
    assert place.run("train", opts=["MODEL.WEIGHTS", place.base]).code == 0
    saved = place.folder / "out" / "config.yaml"
    path = place.folder / "again.pth"
    ran = cli("extend", "--config-file", saved, "--weights", place.base, "--output", path)
    assert ran.code == 0 and "rhino, gnu beside 5 classes" in ran.out, ran.err
    ran = cli(
        "extend", "--config-file", saved, "--weights", place.base, "--output", place.folder / "no.pth",
        "DATASETS.REGISTER", "[]", "DATASETS.TRAIN", "('coco_2017_val',)",
    )  # fmt: skip
    assert ran.code == 1 and "classes of the base or added ones" in ran.err


def test_two_test_sets_are_judged_at_once(place: KeepPlace) -> None:
    """Old, new and all classes of each; the base alone, whose added rows are random, is refused."""
    tests = ["DATASETS.TEST", "('d2ha_keep_old_test','d2ha_keep_both_test')"]
    ran = place.run("train", "--eval-only", opts=["MODEL.WEIGHTS", place.extended(), *tests])
    assert ran.code == 0, ran.err
    table = ran.out.split("Old and new classes:")[1].splitlines()
    rows = {line.split()[0]: line.split()[2:] for line in table if line.startswith("d2ha_keep_")}
    assert rows["d2ha_keep_old_test"][1] == "-" and rows["d2ha_keep_old_test"][3].isdigit()
    assert "-" not in rows["d2ha_keep_both_test"][:3] and rows["d2ha_keep_both_test"][3] == "-"
    ran = place.run("train", "--eval-only", opts=["MODEL.WEIGHTS", place.base, *tests])
    assert ran.code == 1 and "random rows for added_0: gnu, rhino" in ran.err


def test_a_pack_of_another_base_says_which_base_it_wants(place: KeepPlace) -> None:
    from helpers.files import save_stock

    more = place.extended()
    assert cli("pack", more, "--output", place.folder / "a.pack").code == 0
    other = save_stock(stock_model(OLD, seed=22), place.folder / "other.pth")
    output = place.folder / "both.pth"
    ran = cli("add", other, place.folder / "a.pack", "--output", output)
    assert ran.code == 1 and "its own base: 5 classes (class 0, class 1" in ran.err and not output.exists()
    ran = cli("add", other, place.base, "--output", output)
    assert ran.code == 1 and "expected a class pack, found a file of another kind" in ran.err
    ran = cli("add", more, place.folder / "a.pack", "--output", output)
    assert ran.code == 1 and "rhino" in ran.err and not output.exists()
    ran = cli("remove", more, "--class", "lion", "--output", output)
    assert ran.code == 1 and "one of the added classes: rhino, gnu, found 'lion'" in ran.err
    ran = cli("remove", place.base, "--class", "rhino", "--output", output)
    assert ran.code == 1 and "a model with added classes" in ran.err and not output.exists()


def test_a_changed_tensor_is_named(place: KeepPlace) -> None:
    """Whoever edits or trains a file further loses the guarantee, and hears it."""
    more = place.extended()
    content = torch.load(more)
    content["model"]["backbone.fpn_lateral2.weight"][0] += 1e-6
    torch.save(content, place.folder / "bad.pth")
    for command in (
        ["predict", "--weights", place.folder / "bad.pth", "--images", place.folder / "train", "--output",
         place.folder / "seen"],
        ["extend", "--weights", place.folder / "bad.pth", "--output", place.folder / "next.pth"],
        ["train", "--eval-only", "MODEL.WEIGHTS", place.folder / "bad.pth"],
    ):  # fmt: skip
        ran = place.run(*command)
        assert ran.code == 1 and "tensors changed: backbone.fpn_lateral2.weight" in ran.err, command
    ran = cli("add", place.folder / "bad.pth", more, "--output", place.folder / "next.pth")
    assert ran.code == 1 and "1 others: backbone.fpn_lateral2.weight" in ran.err


def test_predict_names_old_and_new_classes(place: KeepPlace) -> None:
    more = place.extended()
    ran = place.run(
        "predict", "--weights", more, "--images", place.folder / "train", "--output", place.folder / "seen",
        "--least-score", "0", opts=["MODEL.HEAD_ADAPT.KEEP", ""],
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads((place.folder / "seen" / "predictions.json").read_text())
    classes = {one["class"] for image in found["images"] for one in image["detections"]}
    assert classes & {"rhino", "gnu"} and classes & set(names(OLD)) and classes <= {*names(OLD), "rhino", "gnu"}


def trainer_of(place: KeepPlace, *opts: Any, resume: bool = False) -> Trainer:
    args = default_argument_parser().parse_args(["--config-file", str(place.config), *map(str, opts)])
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=resume)
    return trainer


def test_negatives_are_trained_on(place: KeepPlace) -> None:
    trainer = trainer_of(
        place, "MODEL.WEIGHTS", place.base, "MODEL.HEAD_ADAPT.KEEP_NEGATIVES", place.folder / "old_test",
        "SOLVER.MAX_ITER", 1,
    )  # fmt: skip
    seen = [entry["file_name"] for _, batch in zip(range(20), trainer.data_loader, strict=False) for entry in batch]
    assert {Path(name).parent.name for name in seen} == {"train", "old_test"}
    trainer.train()


def test_training_on_frozen_features_is_not_undone_by_solving_the_rows_again(place: KeepPlace) -> None:
    """On the same features a second solution is the first one."""
    opts = ["MODEL.WEIGHTS", place.base, "SOLVER.MAX_ITER", 3, "MODEL.HEAD_ADAPT.FIT.REFITS", "[2]"]
    rows = []
    for head in ("shared", "copy"):
        trainer = trainer_of(place, *opts, "MODEL.HEAD_ADAPT.KEEP_HEAD", head, "OUTPUT_DIR", place.folder / head)
        solved: list[int] = []
        hook = next(hook for hook in trainer._hooks if isinstance(hook, FitHook))
        hook._refit = lambda done, first, solved=solved: solved.append(done)
        trainer.train()
        rows.append(solved)
    assert rows == [[], [2]]


def test_training_moves_the_branch_alone_and_resumes(place: KeepPlace) -> None:
    before = stock_detections(place.base)
    trainer = trainer_of(place, "MODEL.WEIGHTS", place.base)
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {
        id(p) for n, p in trainer.model.named_parameters() if ".keep.packs.0." in n and ".second." not in n
    }
    final = place.folder / "out" / "model_final.pth"
    assert differs(before, stock_detections(final)) == []
    again = trainer_of(place, "MODEL.WEIGHTS", place.base, "SOLVER.MAX_ITER", 3, resume=True)
    assert again.start_iter == 2
    again.train()
    assert differs(before, stock_detections(final)) == []
    ran = place.run("train", "--resume", opts=["MODEL.WEIGHTS", place.base, "MODEL.HEAD_ADAPT.KEEP", ""])
    assert ran.code == 1 and "a run that was begun under the same MODEL.HEAD_ADAPT.KEEP" in ran.err
    with torch.no_grad():
        again.model.backbone.fpn_lateral2.weight[0] += 1
    with pytest.raises(ValueError, match=r"1 of \d+ tensors changed: backbone.fpn_lateral2.weight"):
        again.checkpointer.save("spoilt")
    assert not (place.folder / "out" / "spoilt.pth").exists()


@pytest.mark.parametrize(
    ("classes", "opts", "said"),
    [
        (["Class_1", "rhino"], [], "new class 'Class_1': expected a name that the base does not have in another"),
        (["class 1"], [], "expected a class that the base does not have, found none in DATASETS.TRAIN"),
        (["rhino"], ["MODEL.HEAD_ADAPT.SOURCE_CLASSES", "None"], "MODEL.HEAD_ADAPT.SOURCE_CLASSES coco"),
        (["rhino"], ["MODEL.HEAD_ADAPT.FREEZE", "['backbone.*']"], "MODEL.HEAD_ADAPT.FREEZE"),
        (["rhino"], ["MODEL.HEAD_ADAPT.KEEP", "well"], "which this version does not have"),
        (["rhino"], ["MODEL.HEAD_ADAPT.KEEP", "all"], "expected exact, or nothing, found 'all'"),
        (["rhino"], ["MODEL.HEAD_ADAPT.KEEP_HEAD", "own"], "KEEP_HEAD: expected one of shared, copy"),
        (["rhino"], ["MODEL.HEAD_ADAPT.KEEP_NEGATIVES", "nowhere"], "a folder of images, or a registered dataset"),
        (["rhino"], ["TEST.AUG.ENABLED", "True"], "augmented tests merge old and new detections"),
        (
            ["rhino"],
            ["MODEL.HEAD_ADAPT.SOURCE_CLASSES", "['a','b']"],
            "holds 5 classes (1 row per class, background last), but MODEL.HEAD_ADAPT.SOURCE",
        ),
        (["rhino"], ["DATASETS.TEST", "('d2ha_keep_both_test',)"], "classes of the base or added ones"),
    ],
)
def test_bad_input_gets_one_message_and_nothing_is_written(
    tmp_path: Path, classes: list[str], opts: list[str], said: str
) -> None:
    place = KeepPlace(tmp_path, classes)
    ran = place.run("extend", "--weights", place.base, "--output", tmp_path / "more.pth", opts=opts)
    assert ran.code == 1 and said in ran.err, ran.err
    assert not (tmp_path / "more.pth").exists()
