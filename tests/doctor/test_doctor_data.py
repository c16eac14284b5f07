"""HA201 to HA225: each mistake is named, and the dataset next to it stays silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode, Instances
from helpers.doctor import Change, codes, data_report, one_of, registered_context, write_set

from d2_headadapt.doctor.coco_json import MASK_BROKEN, MASK_NONE, MASK_POLYGON, MASK_RLE, read_coco
from d2_headadapt.doctor.finding import CHECKS, DoctorContext
from d2_headadapt.doctor.running import run_checks
from d2_headadapt.errors import DatasetError

MASKS = ("MODEL.MASK_ON", "True")
KEYPOINTS = ("MODEL.KEYPOINT_ON", "True", "INPUT.RANDOM_FLIP", "none")


def on(key: str, **values: Any) -> Change:
    """Set keys of the first item of a list."""
    return lambda content: content[key][0].update(values)


def every(key: str, change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda content: [change(item) for item in content[key]]


def without(key: str, *, first: bool = False) -> Change:
    return lambda content: [one.pop(key, None) for one in content["annotations"][: 1 if first else None]]


def drop_class(category: int) -> Change:
    return lambda content: content.update(
        annotations=[one for one in content["annotations"] if one["category_id"] != category]
    )


def supercategory(content: dict[str, Any]) -> None:
    for category in content["categories"]:
        category["supercategory"] = "pets"
    content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})


def corners(one: dict[str, Any]) -> None:
    x, y, width, height = one["bbox"]
    # Placed low and to the right, as most of an image's objects are not in its upper left quarter.
    one["bbox"] = [x + 10, y + 10, min(x + 10 + width, 64), min(y + 10 + height, 64)]


def relative(one: dict[str, Any]) -> None:
    one["bbox"] = [value / 64 for value in one["bbox"]]


def tiny(one: dict[str, Any]) -> None:
    one["bbox"] = [0, 1, 2, 2]


def keypoints(count: int = 2, shown: int = 2) -> Change:
    def change(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["keypoints"] = ["left", "right"]
        for one in content["annotations"]:
            one.update(keypoints=[5, 5, shown] * count, num_keypoints=count)

    return change


def both(*changes: Change) -> Change:
    def change(content: dict[str, Any]) -> None:
        for one in changes:
            one(content)

    return change


def one_keypoint_list(count: int) -> Change:
    return lambda content: content["annotations"][0].update(keypoints=[5, 5, 2] * count)


def empty_images(content: dict[str, Any]) -> None:
    content["annotations"] = content["annotations"][:-4]


# code, severity, text that the finding shows, the mistake, the dataset next to it, options
CASES: list[tuple[str, str, str, Change, Change | None, tuple[str, ...]]] = [
    ("HA201", "error", "no list of images", lambda c: c.pop("images"), lambda c: c.pop("info"), ()),
    ("HA201", "error", "no list of categories", lambda c: c.update(categories={}), lambda c: c.update(info=[]), ()),
    ("HA202", "error", "333", on("annotations", category_id=333), on("annotations", category_id=30), ()),
    ("HA202", "error", "'10'", on("annotations", category_id="10"), on("annotations", category_id=20), ()),
    ("HA203", "warning", "image 99", on("annotations", image_id=99), on("annotations", image_id=3), ()),
    ("HA203", "error", "12 of 12", every("annotations", lambda a: a.update(image_id=str(a["image_id"]))), None, ()),
    ("HA204", "error", "twice: 5", on("images", id=5), on("images", id=50, file_name="0.png"), ()),
    ("HA204", "error", "twice: 3", on("annotations", id=3), on("annotations", id=300), ()),
    ("HA204", "error", "without an id", without("id", first=True), on("annotations", id="a"), ()),
    ("HA204", "error", "twice: 20", on("categories", id=20), on("categories", supercategory=20), ()),
    ("HA205", "warning", "'pets'", supercategory, on("categories", supercategory="pets"), ()),
    (
        "HA205",
        "warning",
        "'background'",
        lambda c: c["categories"].append({"id": 5, "name": "background"}),
        lambda c: c["categories"].append({"id": 5, "name": "fish"}),
        (),
    ),
    (
        "HA205",
        "warning",
        "'fish'",
        lambda c: c["categories"].append({"id": 0, "name": "fish"}),
        # Another class is empty too, so that an empty class 0 is no sign of anything.
        lambda c: c["categories"].extend([{"id": 0, "name": "fish"}, {"id": 90, "name": "ant"}]),
        (),
    ),
    ("HA206", "warning", "1 of 3 classes: 'dog'", drop_class(20), None, ()),
    (
        "HA206",
        "warning",
        "'dog'",
        every("annotations", lambda a: a.update(iscrowd=int(a["category_id"] == 20))),
        on("annotations", iscrowd=1),
        (),
    ),
    ("HA207", "error", "image 0", on("images", width=0), on("images", license=0), ()),
    ("HA207", "error", "file_name", lambda c: c["images"][0].pop("file_name"), None, ()),
    ("HA208", "error", "only crowds", every("annotations", lambda a: a.update(iscrowd=1)), None, ()),
    ("HA208", "error", "no image", lambda c: c.update(images=[], annotations=[]), None, ()),
    (
        "HA208",
        "error",
        "no annotation",
        lambda c: c["annotations"].clear(),
        every("annotations", lambda a: a.update(iscrowd=int(a["id"] > 2))),
        (),
    ),
    ("HA209", "note", "2 of 6", empty_images, without("area"), ()),
    ("HA211", "error", "'cat'", on("categories", name="cat"), on("categories", name="Cat"), ()),
    ("HA211", "error", "None", on("categories", name=None), on("categories", name=7), ()),
    ("HA213", "error", "any annotation", without("segmentation"), None, MASKS),
    ("HA213", "error", "1 of 12", without("segmentation", first=True), on("annotations", area=1), MASKS),
    (
        "HA213",
        "error",
        "1 of 12",
        on("annotations", segmentation=[]),
        on("annotations", segmentation=[], iscrowd=1),
        MASKS,
    ),
    ("HA214", "warning", "1 of 12", on("annotations", segmentation=[[1, 2, 3, 4]]), without("segmentation"), ()),
    (
        "HA215",
        "error",
        "polygons in others",
        on("annotations", segmentation={"size": [64, 64], "counts": [0, 4096]}),
        on("annotations", segmentation={"size": [64, 64], "counts": [0, 4096]}, iscrowd=1),
        MASKS,
    ),
    ("HA216", "error", "any annotation", without("keypoints"), keypoints(), KEYPOINTS),
    ("HA216", "error", "9 numbers, which are 3", keypoints(3), keypoints(2), KEYPOINTS),
    (
        "HA216",
        "error",
        "1 of 12",
        both(keypoints(), one_keypoint_list(0)),
        both(keypoints(), one_keypoint_list(2)),
        KEYPOINTS,
    ),
    ("HA219", "error", "annotation 2 ", on("annotations", ignore=1), on("annotations", ignore=0), ()),
    ("HA221", "error", "annotation 2 ", on("annotations", bbox=[1, 2, 3]), on("annotations", bbox=[1, 2, 3, 4]), ()),
    ("HA221", "error", "1 of 12", on("annotations", bbox=[1, 2, None, 4]), on("annotations", bbox=[1.5, 2, 3, 4]), ()),
    ("HA221", "error", "12 of 12", without("bbox"), without("area"), ()),
    (
        "HA222",
        "warning",
        "[1, 2, 0, 4]",
        on("annotations", bbox=[1, 2, 0, 4]),
        on("annotations", bbox=[1, 2, 0.1, 4]),
        (),
    ),
    ("HA222", "warning", "nan", on("annotations", bbox=[1, 2, float("nan"), 4]), None, ()),
    (
        "HA222",
        "error",
        "12 of 12",
        every("annotations", lambda a: a.update(bbox=[9, 9, -3, 5])),
        every("annotations", lambda a: a.update(bbox=[9, 9, 3, 5])),
        (),
    ),
    ("HA223", "error", "nearly all fit", every("annotations", corners), None, ()),
    ("HA224", "error", "no number above 1", every("annotations", relative), every("annotations", tiny), ()),
    (
        "HA225",
        "warning",
        "by 20 pixels",
        on("annotations", bbox=[60, 2, 24, 4]),
        on("annotations", bbox=[60, 2, 5, 4]),
        (),
    ),
]


@pytest.mark.parametrize(
    ("code", "severity", "shown", "mistake", "beside", "opts"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_mistake_is_named_and_the_set_beside_it_is_silent(
    tmp_path: Path,
    code: str,
    severity: str,
    shown: str,
    mistake: Change,
    beside: Change | None,
    opts: tuple[str, ...],
) -> None:
    path = write_set(tmp_path, "wrong", mistake)
    found = one_of(data_report(registered_context(tmp_path, path, None, *opts)), code)
    assert found.severity == severity
    assert shown in f"{found.where} {found.found} {found.expected}"
    assert str(path) in found.where or "DATASETS.TRAIN" in found.where
    assert found.fix.endswith((".", "?"))
    DatasetCatalog.remove("doctor_train")
    MetadataCatalog.remove("doctor_train")
    good = write_set(tmp_path, "good", both(keypoints(), beside or (lambda content: None)))
    report = data_report(registered_context(tmp_path, good, None, *opts))
    assert code not in codes(report)
    assert not report.of("error")


FAILS_IN_STOCK = ("HA201", "HA202", "HA204", "HA207", "HA208", "HA213", "HA215", "HA216", "HA219", "HA221")
"""Codes whose error is an exception of detectron2; the others train or load something wrong."""
SILENT_IN_STOCK = ("twice: 5", "twice: 20", "9 numbers, which are 3")


def read_by_stock(path: Path, opts: tuple[str, ...]) -> None:
    """Load a set and map every image as detectron2's training does, and ask for what its heads ask for."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MASK_ON", "False", "INPUT.MIN_SIZE_TRAIN", "(0,)", *opts])
    name = f"stock_{path.stem}"
    pairs = {"keypoint_names": ["left", "right"], "keypoint_flip_map": [("left", "right")]}
    register_coco_instances(name, pairs, str(path), str(path.with_suffix("")))
    cfg.DATASETS.TRAIN = (name,)
    points = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    augmentations = [ResizeShortestEdge((64,), 64, "choice")]
    mapper = DatasetMapper(**{**DatasetMapper.from_config(cfg), "is_train": True, "augmentations": augmentations})
    dicts = get_detection_dataset_dicts([name], min_keypoints=points)
    assert dicts
    # As the batches of the ROI heads are joined.
    instances = [one["instances"] for one in map(mapper, dicts)]
    for one in instances:
        assert (one.has("gt_masks") or not cfg.MODEL.MASK_ON) and (one.has("gt_keypoints") or not cfg.MODEL.KEYPOINT_ON)
    joined = Instances.cat(instances)
    assert len(joined)


@pytest.mark.parametrize(
    ("case", "index"),
    [
        (case, i)
        for i, case in enumerate(CASES)
        if case[1] == "error" and case[0] in FAILS_IN_STOCK and case[2] not in SILENT_IN_STOCK
    ],
    ids=lambda one: str(one) if isinstance(one, int) else one[0],
)
def test_detectron2_itself_fails_where_an_error_says_so(tmp_path: Path, case: Any, index: int) -> None:
    _, _, _, mistake, beside, opts = case
    good = write_set(tmp_path, "good", both(keypoints(), beside or (lambda content: None)))
    read_by_stock(good, opts)
    wrong = write_set(tmp_path, "wrong", mistake)
    # It may be any exception: what a user meets is what the doctor spares.
    with pytest.raises(Exception):  # noqa: B017
        read_by_stock(wrong, opts)


def test_a_good_dataset_is_silent_with_every_head_enabled(tmp_path: Path) -> None:
    train, test = (write_set(tmp_path, name, keypoints(), images=8) for name in ("train", "test"))
    # The random pixels of both are the same.
    for picture in test.with_suffix("").iterdir():
        picture.write_bytes(picture.read_bytes() + b"\0")
    sigmas = ("TEST.KEYPOINT_OKS_SIGMAS", "(0.05, 0.05)")
    report = data_report(registered_context(tmp_path, train, test, *MASKS, *KEYPOINTS, *sigmas))
    assert report.findings == () and report.not_run == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"images": [{"id": 1}, ], "annotations": [], "categories": []}', "comma"),
        ('{"images": [], "annotations": [], "categories": []', "expecting"),
        ('{"images": [], "annotations": [], "categories": []} x', "after the end"),
        ("[]", "expecting a mapping"),
        ("", "expecting a mapping"),
        ('{"images": [null], "annotations": [], "categories": []}', "null"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": "b", "name": "c"}]}', "no order"),
    ],
)
def test_a_damaged_json_is_an_error_that_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=says):
        read_coco(str(path))
    found = one_of(data_report(registered_context(tmp_path, path)), "HA201")
    assert found.severity == "error" and str(path) in found.where


def test_a_json_that_is_not_there_leaves_the_other_checks_not_run(tmp_path: Path) -> None:
    report = data_report(registered_context(tmp_path, tmp_path / "none.json"))
    assert codes(report) == ["HA201"]
    assert "none.json" in report.not_run["HA202"]


def test_one_unreadable_set_does_not_hide_the_mistakes_of_another(tmp_path: Path) -> None:
    train = write_set(tmp_path, "train", on("annotations", category_id=333))
    report = data_report(registered_context(tmp_path, train, tmp_path / "none.json"))
    assert {"HA201", "HA202"} <= set(codes(report))


def test_the_reader_gives_what_the_whole_json_says(tmp_path: Path) -> None:
    path = write_set(tmp_path, "set", keypoints())
    content = json.loads(path.read_text())
    labels = read_coco(str(path))
    # Another layout of the same file: indented, annotations first.
    other = tmp_path / "other.json"
    other.write_text(json.dumps(dict(reversed(content.items())), indent=2))
    again = read_coco(str(other))
    for one in (labels, again):
        assert one.boxes.tolist() == [a["bbox"] for a in content["annotations"]]
        assert [one.ids[k] for k in one.category] == [a["category_id"] for a in content["annotations"]]
        assert [one.images[i] for i in one.image] == [a["image_id"] for a in content["annotations"]]
        assert one.names == ["cat", "dog", "bird"] and set(one.visible) == {2} and set(one.keypoints) == {6}


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (None, MASK_NONE),
        ([], MASK_NONE),
        ([[]], MASK_BROKEN),
        ([[1, 2, 3, 4]], MASK_BROKEN),
        ([[1, 2, 3, 4, 5, 6, 7]], MASK_BROKEN),
        ([[1, 2.5, 3e1, -4, 5, 6]], MASK_POLYGON),
        ([[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]], MASK_POLYGON),
        ({"size": [4, 4], "counts": [0, 16]}, MASK_RLE),
        ({"size": [4, 4], "counts": "abc"}, MASK_RLE),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_masks_are_told_apart_without_being_parsed(tmp_path: Path, mask: Any, kind: int, indent: int | None) -> None:
    path = write_set(tmp_path, "set", on("annotations", segmentation=mask, note='a "segmentation": [[1]] in a text'))
    path.write_text(json.dumps(json.loads(path.read_text()), indent=indent))
    labels = read_coco(str(path))
    assert labels.mask.tolist() == [kind] + [MASK_POLYGON] * 11
    assert labels.boxes.shape == (12, 4)


def test_the_place_of_damage_is_that_in_the_file(tmp_path: Path) -> None:
    path = write_set(tmp_path, "set")
    text = path.read_text()
    at = text.rindex('"iscrowd"')
    path.write_text(text[:at] + "!" + text[at:])
    with pytest.raises(DatasetError, match=rf"\(char {at}\)"):
        read_coco(str(path))


@pytest.mark.real
@pytest.mark.parametrize("file", ["coco128/val.json", "bccd/train.json"])
def test_the_reader_agrees_with_detectron2_on_real_files(real: Path, file: str) -> None:
    labels = read_coco(str(real / file))
    dicts = load_coco_json(str(real / file), "", "read_by_detectron2")
    there = sorted((labels.images[i], labels.category[m], *labels.boxes[m]) for m, i in enumerate(labels.image))
    assert there == sorted((d["image_id"], a["category_id"], *a["bbox"]) for d in dicts for a in d["annotations"])
    assert labels.names == MetadataCatalog.get("read_by_detectron2").thing_classes


def test_own_classes_under_a_builtin_name_get_a_name_of_their_own_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What many do: their json in the place of COCO's."""
    path = write_set(tmp_path, "mine")
    monkeypatch.setitem(vars(MetadataCatalog.get("coco_2017_val")), "json_file", str(path))
    context = DoctorContext("", ["DATASETS.TRAIN", "('coco_2017_val',)", "MODEL.MASK_ON", "False"])
    found = one_of(data_report(context), "HA212")
    assert "80 classes" in found.found and "DATASETS.REGISTER" in found.fix
    with pytest.raises(AssertionError, match="cannot be set to a different value"):
        load_coco_json(str(path), "", "coco_2017_val")


@pytest.mark.parametrize(
    ("names", "silent"),
    [(["cat", "dog", "bird"], True), (["dog", "cat", "bird"], False), (("cat", "dog", "bird"), False)],
)
def test_thing_classes_that_are_set_must_be_those_of_the_json(tmp_path: Path, names: Any, silent: bool) -> None:
    path = write_set(tmp_path, "set")
    context = registered_context(tmp_path, path)
    MetadataCatalog.get("doctor_train").thing_classes = names
    assert ("HA212" not in codes(data_report(context))) is silent
    # detectron2 itself agrees.
    if silent:
        load_coco_json(str(path), "", "doctor_train")
    else:
        with pytest.raises(AssertionError):
            load_coco_json(str(path), "", "doctor_train")


def test_an_id_map_of_another_file_is_a_conflict(tmp_path: Path) -> None:
    context = registered_context(tmp_path, write_set(tmp_path, "set"))
    MetadataCatalog.get("doctor_train").thing_dataset_id_to_contiguous_id = {1: 0, 2: 1, 3: 2}
    assert "{1: 0, 2: 1, 3: 2}" in one_of(data_report(context), "HA212").found


def test_keypoints_want_a_flip_map_and_sigmas(tmp_path: Path) -> None:
    train, test = (write_set(tmp_path, name, keypoints()) for name in ("train", "test"))
    context = registered_context(tmp_path, train, test, "MODEL.KEYPOINT_ON", "True")
    found = [one for one in data_report(context).findings if one.code == "HA217"]
    assert ["keypoint_flip_map" in one.found for one in found] == [True, False]
    assert "COCO's 17" in found[1].found and "2 numbers" in found[1].expected
    flip = [("left", "right")]
    MetadataCatalog.get("doctor_train").set(keypoint_names=["left", "right"], keypoint_flip_map=flip)
    opts = ("MODEL.KEYPOINT_ON", "True", "TEST.KEYPOINT_OKS_SIGMAS", "(0.05, 0.05)", "MODEL.MASK_ON", "False")
    names = ("DATASETS.TRAIN", "('doctor_train',)", "DATASETS.TEST", "('doctor_test',)")
    assert "HA217" not in codes(data_report(DoctorContext("", [*names, *opts])))


def test_images_without_a_visible_keypoint_are_left_out_as_detectron2_does(tmp_path: Path) -> None:
    def one_image_has_none(content: dict[str, Any]) -> None:
        keypoints()(content)
        for one in content["annotations"][:2]:
            del one["keypoints"]

    context = registered_context(tmp_path, write_set(tmp_path, "set", one_image_has_none), None, *KEYPOINTS)
    assert "HA216" not in codes(data_report(context))
    context = DoctorContext("", [*context.opts, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "0"])
    assert "2 of 12" in one_of(data_report(context), "HA216").found


@pytest.mark.parametrize("architecture", ["RetinaNet", "ProposalNetwork"])
def test_masks_that_no_head_reads_are_not_asked_for(tmp_path: Path, architecture: str) -> None:
    path = write_set(tmp_path, "set", without("segmentation"))
    context = registered_context(tmp_path, path, None, *MASKS, "MODEL.META_ARCHITECTURE", architecture)
    assert "HA213" not in codes(data_report(context))


def test_run_length_masks_are_good_with_bitmask(tmp_path: Path) -> None:
    path = write_set(tmp_path, "set", on("annotations", segmentation={"size": [64, 64], "counts": [0, 4096]}))
    context = registered_context(tmp_path, path, None, *MASKS, "INPUT.MASK_FORMAT", "bitmask")
    assert "HA215" not in codes(data_report(context))


def test_empty_images_that_are_kept_are_no_error(tmp_path: Path) -> None:
    path = write_set(tmp_path, "set", lambda content: content["annotations"].clear())
    context = registered_context(tmp_path, path, None, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    assert "HA208" not in codes(data_report(context))


def labelled_context(folder: Path, labels: list[str | None], task: dict[str, Any], **test: Any) -> DoctorContext:
    def attributes(values: list[str | None]) -> Change:
        return lambda content: [
            one.update(attributes={"coat": values[i % len(values)]}) for i, one in enumerate(content["annotations"])
        ]

    entries = []
    for name, values in (("train", labels), ("test", test.get("test", labels))):
        path = write_set(folder, name, attributes(values))
        images = str(path.with_suffix(""))
        entries.append({"name": f"coat_{name}", "json": str(path), "images": images, "tasks": {"coat": {"on": "box"}}})
    file = folder / "config.yaml"
    tasks = {"coat": {"on": "box", **task}}
    sets = {"REGISTER": entries, "TRAIN": ["coat_train"], "TEST": ["coat_test"]}
    heads = {"NAME": "HeadAdaptROIHeads"}
    file.write_text(json.dumps({"MODEL": {"TASKS": tasks, "MASK_ON": False, "ROI_HEADS": heads}, "DATASETS": sets}))
    return DoctorContext(str(file))


CLASSES = {"classes": ["long", "short"]}


@pytest.mark.parametrize(
    ("labels", "test", "task", "severity", "shown"),
    [
        ([None], ["long"], CLASSES, "error", "DATASETS.TRAIN"),
        (["long"], [None], CLASSES, "warning", "DATASETS.TEST"),
        (["long", "shrt"], ["long"], CLASSES, "error", "'shrt'"),
        (["long", "short", None], ["Long"], CLASSES, None, ""),
        (["long", "short"], ["long"], {}, None, ""),
    ],
)
def test_a_task_wants_labels_that_it_knows(
    tmp_path: Path, labels: list[str | None], test: list[str | None], task: dict[str, Any], severity: str, shown: str
) -> None:
    report = data_report(labelled_context(tmp_path, labels, task, test=test))
    assert report.not_run == {}
    if severity is None:
        assert "HA218" not in codes(report)
    else:
        found = one_of(report, "HA218")
        assert found.severity == severity and shown in found.found
        if "shrt" in shown:
            assert "'short'" in found.fix
            with pytest.raises(DatasetError):
                DatasetCatalog.get("coat_train")


def test_annotation_zero_is_a_miss_for_coco_and_only_in_a_test_set(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = write_set(tmp_path, "set", on("annotations", id=0))
    assert "annotation 0" in one_of(data_report(registered_context(tmp_path, None, path)), "HA210").found
    truth = COCO(str(path))
    given = [{**one, "score": 1.0} for one in truth.dataset["annotations"]]
    judge = COCOeval(truth, truth.loadRes(given), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    # Every box is its own ground truth, and still.
    assert 0 < judge.stats[0] < 1
    DatasetCatalog.remove("doctor_test")
    MetadataCatalog.remove("doctor_test")
    assert "HA210" not in codes(data_report(registered_context(tmp_path, path)))


def test_right_boxes_with_some_over_the_edge_are_not_taken_for_corners(tmp_path: Path) -> None:
    def some_over(content: dict[str, Any]) -> None:
        for one in content["annotations"][:6]:
            one["bbox"] = [50, 20, 20, 20]

    report = data_report(registered_context(tmp_path, write_set(tmp_path, "set", some_over)))
    assert "HA223" not in codes(report)
    assert "6 of 12" in one_of(report, "HA225").found


def test_a_dataset_of_the_users_own_function_is_checked_too(tmp_path: Path) -> None:
    def load(category: int) -> list[dict[str, Any]]:
        box = {"bbox": [4, 4, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        return [
            {
                "file_name": str(tmp_path / "a.png"),
                "image_id": "a",
                "width": 64,
                "height": 64,
                "annotations": [box, {**box, "category_id": category}],
            }
        ]

    for name, category in (("stray", 333), ("fine", 1)):
        DatasetCatalog.register(name, lambda category=category: load(category))
        MetadataCatalog.get(name).set(thing_classes=["cat", "dog"], evaluator_type="mine")
    context = DoctorContext("", ["DATASETS.TRAIN", "('stray',)", "MODEL.MASK_ON", "False"])
    found = one_of(data_report(context), "HA202")
    assert "333" in found.found and "0 to 1" in found.expected
    context = DoctorContext("", ["DATASETS.TRAIN", "('fine',)", "MODEL.MASK_ON", "False"])
    assert codes(data_report(context)) == ["HA231"]  # There is no a.png.


def test_corners_are_corners_only_where_the_dicts_say_otherwise(tmp_path: Path) -> None:
    """``bbox_mode`` XYXY is right in dicts and its numbers are wrong in a json."""
    boxes = [[30.0, 30.0, 60.0, 60.0], [20.0, 30.0, 50.0, 64.0]] * 6

    def load(mode: BoxMode) -> list[dict[str, Any]]:
        items = [{"bbox": box, "bbox_mode": mode, "category_id": 0} for box in boxes]
        return [{"file_name": "a.png", "image_id": 1, "width": 64, "height": 64, "annotations": items}]

    for mode, wrong in ((BoxMode.XYXY_ABS, False), (BoxMode.XYWH_ABS, True)):
        name = f"mode_{mode.name}"
        DatasetCatalog.register(name, lambda mode=mode: load(mode))
        MetadataCatalog.get(name).set(thing_classes=["cat"])
        report = data_report(DoctorContext("", ["DATASETS.TRAIN", f"('{name}',)", "MODEL.MASK_ON", "False"]))
        assert ("HA223" in codes(report)) is wrong


def test_a_quick_run_leaves_large_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_set(tmp_path, "set", on("annotations", category_id=333))
    assert "HA202" in codes(data_report(registered_context(tmp_path, path, quick=True)))
    monkeypatch.setattr("d2_headadapt.doctor.context.QUICK_BYTES", 10)
    context = DoctorContext("", ["DATASETS.TRAIN", "('doctor_train',)"], quick=True)
    assert data_report(context).findings == ()


@pytest.mark.real
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        # Nine classes of COCO have no box in these 128 images, and two images have none: both are so.
        ("coco128/train", "coco128/val", ["HA206", "HA209"]),
        ("bccd/train", "bccd/test", []),
        ("bccd/train", "bccd/val", []),
    ],
)
def test_real_datasets_raise_no_false_alarm(real: Path, train: str, test: str, expected: list[str]) -> None:
    for which, path in (("train", train), ("test", test)):
        register_coco_instances(f"real_{which}", {}, str(real / f"{path}.json"), str(real / path))
    opts = ["DATASETS.TRAIN", "('real_train',)", "DATASETS.TEST", "('real_test',)", "MODEL.MASK_ON", "False"]
    report = data_report(DoctorContext("", opts, all_images=True))
    assert codes(report) == expected and report.not_run == {}
    for finding in report.findings:
        if finding.code == "HA206":
            content = json.loads((real / f"{train}.json").read_text())
            used = {one["category_id"] for one in content["annotations"]}
            empty = [one["name"] for one in content["categories"] if one["id"] not in used]
            assert f"{len(empty)} of 80" in finding.found and all(repr(name) in finding.found for name in empty)


@pytest.mark.real
def test_real_boxes_written_as_corners_or_shares_are_seen(real: Path, tmp_path: Path) -> None:
    """The mistakes that tools make, made on real boxes."""
    for i, (change, code) in enumerate(
        ((lambda b, w, h: [b[0], b[1], b[0] + b[2], b[1] + b[3]], "HA223"),
         (lambda b, w, h: [b[0] / w, b[1] / h, b[2] / w, b[3] / h], "HA224"))
    ):  # fmt: skip
        for dataset in ("coco128", "bccd"):
            content = json.loads((real / dataset / "val.json").read_text())
            sizes = {one["id"]: (one["width"], one["height"]) for one in content["images"]}
            for one in content["annotations"]:
                one["bbox"] = change(one["bbox"], *sizes[one["image_id"]])
            path = tmp_path / f"{dataset}{i}.json"
            path.write_text(json.dumps(content))
            name = f"spoilt_{dataset}_{i}"
            register_coco_instances(name, {}, str(path), str(real / dataset / "val"))
            report = data_report(DoctorContext("", ["DATASETS.TRAIN", f"('{name}',)", "MODEL.MASK_ON", "False"]))
            assert {one.code for one in report.of("error")} == {code}


def test_every_check_of_this_file_has_a_case() -> None:
    named = {case[0] for case in CASES} | {
        "HA210",
        "HA212",
        "HA217",
        "HA218",
        "HA220",
    }  # These have tests of their own.
    here = {code for code in CHECKS if "HA200" < code < "HA226"}  # What follows: test_doctor_evaluation.
    assert here == named


@pytest.mark.parametrize(
    ("change", "opts", "root"),
    [
        (on("categories", name="dog"), (), "HA211"),
        (every("annotations", lambda a: a.update(category_id=99)), (), "HA202"),
        (None, ("MODEL.PIXEL_MEAN", "[1.0]"), "HA126"),
        (None, ("MODEL.BACKBONE.NAME", "Nope"), "HA128"),
        (None, ("MODEL.META_ARCHITECTURE", "Nope"), "HA128"),
        (None, ("DATASETS.TRAIN", "['gone']"), "HA103"),
    ],
)
def test_one_root_cause_is_one_error(tmp_path: Path, change: Change | None, opts: tuple[str, ...], root: str) -> None:
    context = registered_context(tmp_path, write_set(tmp_path, "train", change), None, *opts)
    report = run_checks(context, CHECKS.values())
    assert [finding.code for finding in report.of("error")] == [root], report.findings


def test_one_string_as_training_set_is_one_dataset(tmp_path: Path) -> None:
    """As for detectron2's loaders; the letters of a test set would be taken one by one."""
    cfg = registered_context(tmp_path, write_set(tmp_path, "train")).cfg
    cfg.DATASETS.TRAIN = "doctor_train"
    context = DoctorContext(ready=cfg)
    assert context.train_names == ("doctor_train",) and "HA103" not in codes(run_checks(context, [CHECKS["HA103"]]))
