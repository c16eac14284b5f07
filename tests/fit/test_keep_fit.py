"""Added classes are solved; the old path and its detections stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fit import SETTINGS, scene, scenes
from helpers.keep import KINDS, base_model, differs, extended, keep_settings
from helpers.models import detections, state_of
from PIL import Image
from torch import nn

from d2_headadapt import attach_keep
from d2_headadapt.data.negatives import SHARE, negative_images, with_negatives
from d2_headadapt.errors import DatasetError
from d2_headadapt.fit import fit_new_rows
from d2_headadapt.fit.keep import own_dataset
from d2_headadapt.modeling.keep import keep_of

NEW = ("red", "green")


def fitted(kind: str, *, masks: bool = False, packs: Any = (NEW,), labels: Any = (*NEW, "class 2"), **keys: Any) -> Any:
    """A model with the squares' colours added, and the fit's report; blue is an old class."""
    model = base_model(kind, masks=masks)
    settings = keep_settings(packs, labels, **keys)
    attach_keep(model, settings)
    new = {f"added_{i}": range(len(settings.packs[i].classes)) for i in settings.trained}
    return model, fit_new_rows(model, scenes(24), scene, new=new, settings=SETTINGS)


def found_classes(model: nn.Module, count: int = 8) -> list[set[int]]:
    """Classes of new detections of at least 0.4 in some images that were not fitted on."""
    images = [scene(entry) for entry in scenes(24 + count)[24:]]
    return [
        set(d["pred_classes"][(d["pred_classes"] >= 5) & (d["scores"] > 0.4)].tolist())
        for d in detections(model, images)
    ]


@pytest.mark.parametrize(("kind", "masks"), [(kind, kind in ("standard", "c4")) for kind in KINDS])
def test_only_the_branch_is_written_and_old_detections_stay(kind: str, masks: bool) -> None:
    images = [scene(entry) for entry in scenes(3)]
    plain = base_model(kind, masks=masks)
    before, weights = detections(plain, images), state_of(plain)
    model, report = fitted(kind, masks=masks, proposals="auto")
    assert differs(before, detections(model, images)) == []
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert report.new == {"added_0": (0, 1)} and report.without_examples == {}
    assert any("keep.packs.0" in part for part in report.solved)


def test_the_branch_finds_new_classes_and_leaves_old_ones_to_the_old_path() -> None:
    model, _ = fitted("standard", proposals="on")
    wanted = [{5 + a["category_id"] for a in entry["annotations"] if a["category_id"] < 2} for entry in scenes(32)[24:]]
    found = found_classes(model)
    complete = sum(there <= seen for seen, there in zip(found, wanted, strict=True))
    assert complete >= 6, (found, wanted)


def test_fitting_twice_gives_the_same_bits() -> None:
    one, _ = fitted("standard")
    other, _ = fitted("standard")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_packs_do_not_see_each_other() -> None:
    """The second pack's rows are the same whether the first one is there or not."""
    alone, _ = fitted("standard", packs=[("green",)], labels=("red", "green", "class 2"))
    beside, _ = fitted("standard", packs=[("red",), ("green",)], labels=("lion", "green", "class 2"))
    one, two = keep_of(alone).packs[0], keep_of(beside).packs[1]
    names = dict(one.named_parameters())
    assert all(torch.equal(names[name], value) for name, value in two.named_parameters())


def test_second_proposals_say_what_the_old_ones_find() -> None:
    model, report = fitted("standard", proposals="on")
    (second,) = (part for part in report.parts if part.part.endswith(".second"))
    assert second.reason.startswith("on: the old proposals find ") and bool(keep_of(model).packs[0].second.on)
    _, report = fitted("standard", proposals="off")
    assert not any(part.part.endswith(".second") for part in report.parts)


def test_negatives_have_room_of_their_own(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (64, 64), (10 * i, 200, 40)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = negative_images(str(tmp_path))
    assert [Path(entry["file_name"]).name for entry in found] == ["0.png", "1.png", "2.png"]
    assert all(entry["annotations"] == [] for entry in found)
    assert negative_images("") == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="a folder of images, or a registered dataset, found a folder without"):
        negative_images(str(tmp_path / "empty"))
    with pytest.raises(DatasetError, match="found neither"):
        negative_images(str(tmp_path / "nothing"))


@pytest.mark.parametrize("kind", ["standard", "retinanet"])
def test_a_photo_without_new_classes_changes_what_is_solved(kind: str, tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        Image.new("RGB", (64, 64), (230, 40, 40)).save(tmp_path / f"{i}.png")

    def draw(entry: dict[str, Any]) -> dict[str, Any]:
        if "file_name" not in entry:
            return scene(entry)
        pixels = torch.tensor([230, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
        return {"image": pixels, "height": 64, "width": 64}

    for where in ("", str(tmp_path)):
        model = base_model(kind)
        attach_keep(model, keep_settings([NEW], (*NEW, "class 2"), proposals="off", negatives=where))
        report = fit_new_rows(model, scenes(16), draw, new={"added_0": (0, 1)}, settings=SETTINGS)
        assert report.images == 16 + (4 if where else 0)
        name = "keep.packs.0.cls_score.weight" if kind == "retinanet" else "predictors.0.cls_score.weight"
        rows.append(next(value for key, value in model.state_dict().items() if key.endswith(name)))
    assert not torch.equal(*rows)


@pytest.mark.parametrize(("images", "negatives"), [(3, 1), (6, 5), (6, 100), (100, 7), (1, 0)])
def test_a_share_of_the_training_images_are_negatives(images: int, negatives: int) -> None:
    mixed = with_negatives([{"image_id": i} for i in range(images)], [{"file_name": i} for i in range(negatives)])
    beside = [entry["file_name"] for entry in mixed if "file_name" in entry]
    assert set(beside) == set(range(negatives))
    assert len(beside) / len(mixed) == pytest.approx(SHARE if negatives else 0, abs=0.05)
    counts = [sum(entry.get("image_id") == i for entry in mixed) for i in range(images)]
    assert min(counts) == max(counts)


def test_a_failed_fit_leaves_the_branch_as_it_was() -> None:
    model = extended(base_model("standard"), keep_settings([NEW], negatives="/nowhere/at/all"))
    before = state_of(model)
    with pytest.raises(DatasetError, match="KEEP_NEGATIVES"):
        fit_new_rows(model, scenes(4, (0, 1)), scene, new={"added_0": (0, 1)}, settings=SETTINGS)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_pack_sees_its_own_objects_alone() -> None:
    model = extended(base_model("standard"), keep_settings([["rhino"], ["lion"]], ["lion", "class 1", "rhino"]))
    entry = {"image_id": 0, "annotations": [{"category_id": k, "bbox": [0, 0, 1, 1]} for k in (0, 1, 2)]}
    keep = keep_of(model)
    assert [a["category_id"] for a in own_dataset(keep, 0, [entry])[0]["annotations"]] == [0]
    assert len(entry["annotations"]) == 3
