from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.data import MetadataCatalog
from detectron2.model_zoo.model_zoo import _ModelZooUrls

from d2_headadapt.adapt.classes import ClassMap, ClassTable, normalise
from d2_headadapt.adapt.matching import match_classes
from d2_headadapt.adapt.vocabularies import (
    has_vocabulary,
    reviewed_pairs,
    synonyms_of,
    vocabulary,
    vocabulary_names,
    zoo_tables,
)
from d2_headadapt.errors import ClassTableError

SIZES = {
    ("cityscapes", "thing"): 8,
    ("cityscapes", "stuff"): 19,
    ("coco", "thing"): 80,
    ("coco", "stuff"): 54,
    ("coco", "keypoint"): 17,
    ("coco_keypoints", "thing"): 1,
    ("coco_keypoints", "keypoint"): 17,
    ("coco_stuff", "stuff"): 54,
    ("lvis_v0.5", "thing"): 1230,
    ("lvis_v1", "thing"): 1203,
    ("objects365", "thing"): 365,
    ("voc", "thing"): 20,
}
THINGS = ["cityscapes", "coco", "lvis_v0.5", "lvis_v1", "objects365", "voc"]

# COCO classes that no exact name, normalised name or synonym of LVIS v1 answers -> the class of LVIS's own table.
COCO_IN_LVIS = {
    "car": "car_(automobile)",
    "bus": "bus_(vehicle)",
    "train": "train_(railroad_vehicle)",
    "tie": "necktie",
    "skis": "ski",
    "sports ball": "ball",
    "wine glass": "wineglass",
    "orange": "orange_(fruit)",
    "laptop": "laptop_computer",
    "mouse": "mouse_(computer_equipment)",
    "remote": "remote_control",
    "keyboard": "computer_keyboard",
    "cell phone": "cellular_telephone",
    "microwave": "microwave_oven",
    "hair drier": "hair_dryer",
}


def match(target: ClassTable, source: ClassTable, pairs: bool = True) -> ClassMap:
    return match_classes(
        target,
        source,
        source_synonyms=synonyms_of(source),
        target_synonyms=synonyms_of(target),
        reviewed=reviewed_pairs() if pairs else (),
    )


def named(mapping: ClassMap) -> dict[str, str]:
    return {mapping.target.names[t]: mapping.source.names[s] for t, s in mapping.carried}


@pytest.mark.parametrize(("name", "space"), SIZES)
def test_vocabulary_has_its_size(name: str, space: str) -> None:
    assert len(vocabulary(name, space)) == SIZES[name, space]


def test_vocabulary_names_are_complete_and_sorted() -> None:
    assert vocabulary_names() == tuple(sorted({name for name, _ in SIZES}))


@pytest.mark.parametrize(
    ("name", "dataset", "key", "space"),
    [
        ("coco", "coco_2017_train", "thing_classes", "thing"),
        ("coco", "coco_2017_train_panoptic_separated", "stuff_classes", "stuff"),
        ("coco", "keypoints_coco_2017_train", "keypoint_names", "keypoint"),
        ("coco_keypoints", "keypoints_coco_2017_train", "thing_classes", "thing"),
        ("coco_stuff", "coco_2017_train_panoptic_stuffonly", "stuff_classes", "stuff"),
        ("lvis_v1", "lvis_v1_train", "thing_classes", "thing"),
        ("lvis_v0.5", "lvis_v0.5_train", "thing_classes", "thing"),
        ("cityscapes", "cityscapes_fine_instance_seg_train", "thing_classes", "thing"),
        ("cityscapes", "cityscapes_fine_sem_seg_train", "stuff_classes", "stuff"),
        ("voc", "voc_2007_trainval", "thing_classes", "thing"),
    ],
)
def test_vocabulary_is_what_the_registered_dataset_has(name: str, dataset: str, key: str, space: str) -> None:
    assert list(vocabulary(name, space).names) == list(MetadataCatalog.get(dataset).get(key))


def test_vocabulary_does_not_follow_a_dataset_put_under_a_builtin_name() -> None:
    MetadataCatalog.remove("coco_2017_train")
    MetadataCatalog.get("coco_2017_train").thing_classes = ["cell"]
    assert vocabulary("coco").names[0] == "person"


def test_known_names_stand_where_they_should() -> None:
    assert vocabulary("coco").names[:3] == ("person", "bicycle", "car")
    assert vocabulary("coco", "stuff").names[:2] == ("things", "banner")
    assert vocabulary("objects365").names[0] == "Person"
    assert vocabulary("objects365").names[37] == "Monitor/TV"
    assert vocabulary("objects365").names[364] == "Table Tennis"
    assert vocabulary("voc").names[-1] == "tvmonitor"


@pytest.mark.parametrize("written", ["COCO", "Lvis_V1", "LVIS-v1", "lvis v0.5", "Objects365"])
def test_names_are_matched_in_any_case(written: str) -> None:
    assert has_vocabulary(written)
    assert len(vocabulary(written)) > 20


@pytest.mark.parametrize("written", ["coco2017", "", "lvis", "my_train"])
def test_other_names_are_no_vocabulary(written: str) -> None:
    assert not has_vocabulary(written)


def test_unknown_vocabulary_names_the_nearest_and_the_list() -> None:
    with pytest.raises(
        ClassTableError, match=r"vocabulary 'object365': expected one of cityscapes, coco, .*Nearest: 'objects365'"
    ) as e:
        vocabulary("object365")
    assert e.value.exit_code == 1


def test_vocabulary_without_that_space_names_those_that_have_it() -> None:
    with pytest.raises(
        ClassTableError,
        match=r"vocabulary 'voc'.*space 'keypoint', found tables for 'thing' only.*coco, coco_keypoints",
    ):
        vocabulary("voc", "keypoint")
    with pytest.raises(ClassTableError, match=r"that has one: there is none"):
        vocabulary("voc", "colour")


# --- data files


@pytest.fixture(scope="module")
def data() -> Path:
    return Path(__file__).resolve().parents[2] / "d2_headadapt" / "adapt"


def rows(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def test_objects365_ids_run_from_one(data: Path) -> None:
    assert [int(row["id"]) for row in rows(data / "objects365.csv")] == list(range(1, 366))


def test_objects365_has_thirteen_mended_spellings(data: Path) -> None:
    mended = [(row["old_name"], row["name"]) for row in rows(data / "objects365.csv") if row["old_name"]]
    assert len(mended) == 13
    assert ("Moniter/TV", "Monitor/TV") in mended
    assert all(old != name for old, name in mended)


def test_data_files_are_plain_unix_text(data: Path) -> None:
    for path in data.iterdir():
        content = path.read_bytes()
        assert b"\r" not in content
        assert not content.startswith(b"\xef\xbb\xbf")
        assert content.endswith(b"\n")


@pytest.mark.real
def test_objects365_is_detics_file_name_by_name(real: Path, data: Path) -> None:
    with open(real / "text" / "Objects365_names_fix.csv", encoding="utf-8", newline="") as file:
        detic = [(int(i), old, fixed) for i, old, fixed in csv.reader(file)]
    ours = [(int(row["id"]), row["old_name"] or row["name"], row["name"]) for row in rows(data / "objects365.csv")]
    assert ours == detic


# --- synonyms


def test_lvis_tables_have_lvis_synonyms() -> None:
    synonyms = synonyms_of(vocabulary("lvis_v1"))
    assert "tv" in synonyms["television_set"]
    assert "couch" in synonyms["sofa"]
    assert all(normalise(name) != normalise(other) for name in synonyms for other in synonyms[name])


def test_subset_of_a_vocabulary_in_any_spelling_has_its_synonyms_under_its_own_spelling() -> None:
    assert "couch" in synonyms_of(ClassTable(["Television-Set", "Sofa"]))["Sofa"]


def test_lvis_v05_tables_have_their_own_synonyms() -> None:
    # In v0.5 the class of persons is called baby, its first synonym.
    assert "person" in synonyms_of(vocabulary("lvis_v0.5"))["baby"]


def test_one_foreign_name_and_there_are_no_synonyms() -> None:
    assert synonyms_of(ClassTable(["sofa", "television_set", "flux capacitor"])) == {}
    assert synonyms_of(vocabulary("coco")) == {}


def test_no_lvis_synonym_belongs_to_two_classes() -> None:
    for name in ("lvis_v1", "lvis_v0.5"):
        owners: dict[str, set[str]] = {}
        for owner, others in synonyms_of(vocabulary(name)).items():
            for other in others:
                owners.setdefault(normalise(other), set()).add(owner)
        assert {other: own for other, own in owners.items() if len(own) > 1} == {}


def test_objects365_is_found_in_both_spellings() -> None:
    fixed = vocabulary("objects365")
    old = ClassTable([*(synonyms_of(fixed).get(name, (name,))[0] for name in fixed.names)], origin="old spelling")
    assert old.names[37] == "Moniter/TV"
    for target, source in ((fixed, old), (old, fixed)):
        assert match(target, source, pairs=False).rows == tuple(range(365))


def test_old_spelling_of_objects365_takes_coco_rows_too() -> None:
    assert named(match(ClassTable(["Moniter/TV", "Dinning Table"]), vocabulary("coco"))) == {
        "Moniter/TV": "tv",
        "Dinning Table": "dining table",
    }


def test_synonyms_cannot_be_changed_by_who_gets_them() -> None:
    with pytest.raises(TypeError):
        synonyms_of(vocabulary("lvis_v1"))["sofa"] = ("settee",)  # type: ignore[index]


# --- reviewed pairs


def test_every_reviewed_name_is_a_class_of_some_vocabulary() -> None:
    old = {row["old_name"] for row in rows(Path(__file__).parents[2] / "d2_headadapt" / "adapt" / "objects365.csv")}
    known = {name for vocab in THINGS for name in vocabulary(vocab).names} | old
    for pair in reviewed_pairs():
        assert set(pair) <= known, pair


def test_reviewed_names_are_of_the_vocabularies_that_their_row_names(data: Path) -> None:
    short = {"lvis": ["lvis_v1", "lvis_v0.5"]}
    for row in rows(data / "aliases.csv"):
        left, right = row["vocabularies"].replace("objects365 (old spelling)", "").split("|")
        for name, vocabularies in ((row["name"], left.split()), (row["other_name"], right.split())):
            for vocab in vocabularies:
                for table in map(vocabulary, short.get(vocab, [vocab])):
                    assert table.find(name) is not None, (name, table)


def test_no_reviewed_pair_is_there_twice_or_says_what_normalising_says() -> None:
    pairs = [frozenset(map(normalise, pair)) for pair in reviewed_pairs()]
    assert len(set(pairs)) == len(pairs)
    assert all(len(pair) == 2 for pair in pairs)


def test_no_table_has_both_names_of_a_pair_as_two_classes() -> None:
    for a, b in reviewed_pairs():
        for vocab in THINGS:
            assert None in (vocabulary(vocab).find(a), vocabulary(vocab).find(b)), (a, b, vocab)


@pytest.mark.parametrize(("target", "source"), list(permutations(THINGS, 2)))
def test_every_vocabulary_maps_onto_every_other_one_to_one(target: str, source: str) -> None:
    there = match(vocabulary(target), vocabulary(source))
    back = match(vocabulary(source), vocabulary(target))
    assert there.shared == ()
    assert sorted((s, t) for t, s in there.carried) == sorted(back.carried)


def test_fifteen_coco_classes_are_found_in_lvis_through_reviewed_pairs_alone() -> None:
    coco, lvis = vocabulary("coco"), vocabulary("lvis_v1")
    with_pairs, without = named(match(coco, lvis)), named(match(coco, lvis, pairs=False))
    assert {name: with_pairs[name] for name in with_pairs.keys() - without.keys()} == COCO_IN_LVIS
    assert [coco.names[t] for t in match(coco, lvis).new] == ["hot dog", "potted plant"]


def test_coco_classes_that_lvis_v05_lacks() -> None:
    mapping = match(vocabulary("coco"), vocabulary("lvis_v0.5"))
    assert [mapping.target.names[t] for t in mapping.new] == ["hot dog", "potted plant", "oven"]
    assert named(mapping)["person"] == "baby"


def test_all_voc_classes_are_found_in_coco() -> None:
    mapping = named(match(vocabulary("voc"), vocabulary("coco")))
    assert len(mapping) == 20
    assert {name: other for name, other in mapping.items() if name != other} == {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
        "pottedplant": "potted plant",
        "sofa": "couch",
        "tvmonitor": "tv",
    }


def test_coco_classes_found_in_objects365() -> None:
    mapping = match(vocabulary("coco"), vocabulary("objects365"))
    assert [mapping.target.names[t] for t in mapping.new] == ["sports ball"]
    assert {name: other for name, other in named(mapping).items() if normalise(name) != normalise(other)} == {
        "bird": "Wild Bird",
        "handbag": "Handbag/Satchel",
        "suitcase": "Luggage",
        "skis": "Skiboard",
        "bowl": "Bowl/Basin",
        "orange": "Orange/Tangerine",
        "tv": "Monitor/TV",
        "teddy bear": "Stuffed Toy",
        "hair drier": "Hair Dryer",
    }


def test_cityscapes_rider_is_nobody_else() -> None:
    for source in ("coco", "voc", "lvis_v1", "objects365"):
        assert "rider" not in named(match(vocabulary("cityscapes"), vocabulary(source)))


@pytest.mark.real
def test_text_embeddings_agree_with_the_reviewed_pairs(real: Path) -> None:
    files = {
        "coco": "coco_clip_a+cname.npy",
        "lvis_v1": "lvis_v1_clip_a+cname.npy",
        "objects365": "o365_clip_a+cnamefix.npy",
    }
    rows_of = {name: np.load(real / "text" / file).astype(np.float32) for name, file in files.items()}
    unit = {name: matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for name, matrix in rows_of.items()}
    # Words of two meanings: the animal is nearer to the name than the thing is (adapt/SOURCES.md).
    not_nearest = {("mouse", "mouse_(computer_equipment)"), ("teddy bear", "Stuffed Toy")}
    checked = 0
    for a, b in reviewed_pairs():
        for left, right in permutations(files, 2):
            i, j = vocabulary(left).find(a), vocabulary(right).find(b)
            if i is None or j is None:
                continue
            cosine = unit[right] @ unit[left][i]
            assert cosine[j] > 0.86, (a, b)
            assert (a, b) in not_nearest or cosine.argmax() == j, (a, b)
            checked += 1
    assert checked >= len(COCO_IN_LVIS) + 9


# --- model zoo

PREFIXES = ["detectron2://", "https://dl.fbaipublicfiles.com/detectron2/"]
ZOO = sorted(_ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX.items())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("config", "suffix"), ZOO)
def test_every_model_of_the_zoo_has_the_classes_of_its_training_set(config: str, suffix: str, prefix: str) -> None:
    tables = zoo_tables(f"{prefix}{config}/{suffix}")
    assert tables is not None
    if config.startswith("new_baselines/"):  # lazy configs: all of them take configs/common/data/coco.py
        assert tables == {"thing": vocabulary("coco")}
        return
    cfg = model_zoo.get_config(config + ".yaml")
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        assert tables == {}
        return
    assert list(tables["thing"].names) == list(metadata.thing_classes)
    assert ("keypoint" in tables) == cfg.MODEL.KEYPOINT_ON
    if "keypoint" in tables:
        assert list(tables["keypoint"].names) == list(metadata.keypoint_names)
    assert ("stuff" in tables) == (cfg.MODEL.META_ARCHITECTURE == "PanopticFPN")
    if "stuff" in tables:
        assert list(tables["stuff"].names) == list(metadata.stuff_classes)
        assert len(tables["stuff"]) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    classes = cfg.MODEL.RETINANET if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else cfg.MODEL.ROI_HEADS
    assert len(tables["thing"]) == classes.NUM_CLASSES


@pytest.mark.parametrize("prefix", PREFIXES)
def test_backbones_are_known_to_have_no_classes(prefix: str) -> None:
    assert zoo_tables(f"{prefix}ImageNetPretrained/MSRA/R-50.pkl") == {}


def test_lvis_v1_folder_is_known() -> None:
    assert zoo_tables("detectron2://LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x/1/model_final.pkl") == {
        "thing": vocabulary("lvis_v1")
    }


@pytest.mark.parametrize(
    "path",
    [
        "output/model_final.pth",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl",
        "/data/detectron2://COCO-Detection/x/1/model.pkl",
        "https://example.org/detectron2/COCO-Detection/x/1/model.pkl",
        "https://dl.fbaipublicfiles.com/detectron/COCO-Detection/x/1/model.pkl",
        "detectron2://COCO-DetectionX/x/1/model.pkl",
        "detectron2://CityscapesX/x/1/model.pkl",
        "detectron2://PointRend/InstanceSegmentation/pointrend_rcnn_R_50_FPN_1x_coco/1/model_final.pkl",
        "detectron2://Misc/semantic_R_50_FPN_1x/1/model_final.pkl",
        "detectron2://Misc/torchvision_imagenet_R_50/1/model_final.pkl",
        "detectron2://",
        "",
    ],
)
def test_other_paths_say_nothing_about_classes(path: str) -> None:
    assert zoo_tables(path) is None


def test_tables_are_the_callers_own() -> None:
    path = "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    tables = zoo_tables(path)
    assert tables is not None
    tables.clear()
    assert zoo_tables(path)
