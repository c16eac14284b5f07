"""The class lists that need no file: public vocabularies, their synonyms, and the model zoo's.

Names come from detectron2's own metadata where it has them, so that a vocabulary and a registered dataset of detectron2
agree name by name. What detectron2 lacks lies beside this file; ``SOURCES.md`` says where each file is from.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from types import MappingProxyType

from ..errors import ClassTableError
from .classes import ClassTable, did_you_mean, normalise
from .matching import Synonyms

ZOO_PREFIXES = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
"""detectron2's PathManager replaces the first by the second; nothing else is known to be the model zoo."""

Names = Sequence[str]


def vocabulary(name: str, space: str = "thing") -> ClassTable:
    """Look up the class table of a built-in vocabulary.

    Args:
        name: one of :func:`vocabulary_names`, in any case.
        space: label space of the table.

    Raises:
        ClassTableError: no such vocabulary, or it has no table for ``space``.

    Example:
        >>> from d2_headadapt import vocabulary
        >>> vocabulary("coco")
        ClassTable(80 classes of vocabulary coco: person, bicycle, car, motorcycle, airplane, bus, ... (74 more))
        >>> len(vocabulary("lvis_v1")), len(vocabulary("coco", "stuff"))
        (1203, 54)
    """
    known = _vocabulary_key(name)
    if known is None:
        raise ClassTableError(
            f"vocabulary {name!r}",
            expected=f"one of {', '.join(vocabulary_names())}",
            found="no vocabulary of that name",
            fix=f"Use one of these names.{did_you_mean(name, vocabulary_names())}",
        )
    spaces = _VOCABULARIES[known]
    if space not in spaces:
        raise ClassTableError(
            f"vocabulary {known!r}",
            expected=f"a table for the space {space!r}",
            found=f"tables for {', '.join(repr(s) for s in spaces)} only",
            fix=f"Use a vocabulary that has one: {', '.join(_vocabularies_with(space)) or 'there is none'}.",
        )
    return _table(known, space)


def vocabulary_names() -> tuple[str, ...]:
    """List the names that :func:`vocabulary` knows, sorted."""
    return tuple(sorted(_VOCABULARIES))


def has_vocabulary(name: str) -> bool:
    """Tell whether ``name``, in any case, is a built-in vocabulary."""
    return _vocabulary_key(name) is not None


@lru_cache(maxsize=64)
def synonyms_of(table: ClassTable) -> Synonyms:
    """Look up other names of the classes of ``table``, known because all its names belong to one vocabulary.

    Args:
        table: any table; a subset of a vocabulary in any order counts as that vocabulary.

    Returns:
        Synonyms: keyed by the names as ``table`` spells them, without an entry for a class that has no other name;
        empty where some name of the table is in none of LVIS v1, LVIS v0.5 and Objects365.
    """
    for groups in (_lvis_groups("lvis_v1"), _lvis_groups("lvis_v0.5"), _objects365_groups()):
        if all(normalise(name) in groups for name in table.names):
            found = {name: _others(name, groups[normalise(name)]) for name in table.names}
            return MappingProxyType({name: others for name, others in found.items() if others})
    return MappingProxyType({})


@lru_cache(maxsize=1)
def reviewed_pairs() -> tuple[tuple[str, str], ...]:
    """List unordered pairs of names that two vocabularies give to the same class, each checked by hand."""
    return tuple((row["name"], row["other_name"]) for row in _rows("aliases.csv"))


def vocabularies_of(count: int, space: str = "thing") -> tuple[str, ...]:
    """Return the vocabularies that have so many classes; of those with the same names only the first.

    Example:
        >>> from d2_headadapt.adapt.vocabularies import vocabularies_of
        >>> vocabularies_of(80), vocabularies_of(20), vocabularies_of(6)
        (('coco',), ('voc',), ())
    """
    found: dict[ClassTable, str] = {}
    for name in _vocabularies_with(space):
        if len(_table(name, space)) == count:
            found.setdefault(_table(name, space), name)
    return tuple(found.values())


@cache
def known_names() -> frozenset[str]:
    """Return every class name and synonym of the vocabularies, normalised."""
    tables = [_table(name, "thing").names for name in _vocabularies_with("thing")]
    return frozenset(normalise(name) for names in (*tables, *_groups(), *reviewed_pairs()) for name in names)


def other_words(name: str) -> frozenset[str]:
    """Other names of what ``name`` means somewhere, normalised: in a vocabulary, a reviewed pair, or everyday words.

    Args:
        name: normalised.
    """
    return _other_words().get(name, frozenset())


@cache
def _other_words() -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for group in (*_groups(), *reviewed_pairs(), *_everyday_words()):
        names = {normalise(other) for other in group}
        for name in names:
            found.setdefault(name, set()).update(names - {name})
    return {name: frozenset(others) for name, others in found.items()}


def _groups() -> list[Names]:
    of_lvis = [group for name in ("lvis_v1", "lvis_v0.5") for group in _lvis_groups(name).values()]
    return [*of_lvis, *_objects365_groups().values()]


@cache
def _everyday_words() -> tuple[Names, ...]:
    """Return each class of ``near_words.csv`` with one other word: the words of a class are not each other's."""
    return tuple((row["name"], word) for row in _rows("near_words.csv") for word in row["other_words"].split())


def zoo_tables(path: str) -> dict[str, ClassTable] | None:
    """Look up the classes of model zoo weights, by label space, from the folder that they are published in.

    Args:
        path: ``MODEL.WEIGHTS`` as the user wrote it, before it becomes the path of a downloaded copy.

    Returns:
        dict or None: empty where the file is known to predict no classes (backbones, proposal networks); ``None``
        where the path is not the model zoo's or the folder does not settle the classes.
    """
    prefix = next((p for p in ZOO_PREFIXES if path.startswith(p)), None)
    if prefix is None:
        return None
    folder, _, rest = path[len(prefix) :].partition("/")
    model = rest.partition("/")[0]
    spaces = _zoo_spaces(folder, model)
    if spaces is None:
        return None
    return {space: vocabulary(name, space) for space, name in spaces.items()}


def _zoo_spaces(folder: str, model: str) -> dict[str, str] | None:
    if folder == "ImageNetPretrained" or (folder == "COCO-Detection" and model.startswith("rpn_")):
        return {}
    for start, spaces in _ZOO_FOLDERS.items():
        if folder == start or (start.endswith("-") and folder.startswith(start)):
            return spaces
    # These folders mix kinds of model. Every yaml in them builds on Base-RCNN-FPN or Base-Panoptic-FPN, whose
    # DATASETS.TRAIN are coco_2017_train and its panoptic set; new_baselines takes configs/common/data/coco.py
    # (coco_2017_train); the one keypoint model names keypoints_coco_2017_train. A model of another kind is unknown.
    if folder in ("Misc", "Detectron1-Comparisons", "new_baselines"):
        for start, spaces in _ZOO_MODELS.items():
            if model.startswith(start):
                return spaces
    return None


_COCO = {"thing": "coco"}
_COCO_PANOPTIC = {"thing": "coco", "stuff": "coco"}
_COCO_PERSON = {"thing": "coco_keypoints", "keypoint": "coco_keypoints"}

_ZOO_FOLDERS: Mapping[str, dict[str, str]] = {
    "COCO-Detection": _COCO,
    "COCO-InstanceSegmentation": _COCO,
    "COCO-Keypoints": _COCO_PERSON,
    "COCO-PanopticSegmentation": _COCO_PANOPTIC,
    "LVISv0.5-": {"thing": "lvis_v0.5"},
    "LVISv1-": {"thing": "lvis_v1"},
    "PascalVOC-": {"thing": "voc"},
    "Cityscapes": {"thing": "cityscapes"},
}
_ZOO_MODELS: Mapping[str, dict[str, str]] = {
    "faster_rcnn_": _COCO,
    "mask_rcnn_": _COCO,
    "cascade_mask_rcnn_": _COCO,
    "scratch_mask_rcnn_": _COCO,
    "keypoint_rcnn_": _COCO_PERSON,
    "panoptic_fpn_": _COCO_PANOPTIC,
}


def _builtin(dataset: str, key: str) -> Names:
    # From detectron2's constants, not from MetadataCatalog: its entries can be removed and set anew by anyone who puts
    # their own json under a name like coco_2017_train.
    from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

    names: Names = _get_builtin_metadata(dataset)[key]
    return names


def _lvis(name: str) -> Names:
    from detectron2.data.datasets.lvis import get_lvis_instances_meta

    names: Names = get_lvis_instances_meta(name)["thing_classes"]
    return names


def _voc() -> Names:
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES

    names: Names = CLASS_NAMES
    return names


def _objects365() -> Names:
    return [row["name"] for row in _rows("objects365.csv")]


_VOCABULARIES: Mapping[str, Mapping[str, Callable[[], Names]]] = {
    "cityscapes": {
        "thing": lambda: _builtin("cityscapes", "thing_classes"),
        "stuff": lambda: _builtin("cityscapes", "stuff_classes"),
    },
    # The stuff of panoptic FPN: 53 names and, first, "things" for every pixel of a thing.
    "coco": {
        "thing": lambda: _builtin("coco", "thing_classes"),
        "stuff": lambda: _builtin("coco_panoptic_separated", "stuff_classes"),
        "keypoint": lambda: _builtin("coco_person", "keypoint_names"),
    },
    "coco_keypoints": {
        "thing": lambda: _builtin("coco_person", "thing_classes"),
        "keypoint": lambda: _builtin("coco_person", "keypoint_names"),
    },
    "coco_stuff": {"stuff": lambda: _builtin("coco_panoptic_separated", "stuff_classes")},
    "lvis_v0.5": {"thing": lambda: _lvis("lvis_v0.5")},
    "lvis_v1": {"thing": lambda: _lvis("lvis_v1")},
    "objects365": {"thing": _objects365},
    "voc": {"thing": _voc},
}


@cache
def _table(name: str, space: str) -> ClassTable:
    return ClassTable(_VOCABULARIES[name][space](), origin=f"vocabulary {name}")


def _vocabulary_key(name: str) -> str | None:
    return next((known for known in _VOCABULARIES if normalise(known) == normalise(name)), None)


def _vocabularies_with(space: str) -> list[str]:
    return [name for name in vocabulary_names() if space in _VOCABULARIES[name]]


@cache
def _lvis_groups(name: str) -> Mapping[str, Names]:
    """Map each normalised class name to all names of that class; its synonyms do not count as class names."""
    if name == "lvis_v1":
        from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
    else:
        from detectron2.data.datasets.lvis_v0_5_categories import LVIS_CATEGORIES
    return {normalise(category["synonyms"][0]): tuple(category["synonyms"]) for category in LVIS_CATEGORIES}


@cache
def _objects365_groups() -> Mapping[str, Names]:
    """Map each normalised name to both spellings: the published annotation files still have the old one."""
    groups: dict[str, Names] = {}
    for row in _rows("objects365.csv"):
        spellings = tuple(filter(None, (row["name"], row["old_name"])))
        groups.update((normalise(spelling), spellings) for spelling in spellings)
    return groups


def _others(name: str, group: Names) -> Names:
    return tuple(other for other in group if normalise(other) != normalise(name))


def _rows(file: str) -> list[dict[str, str]]:
    text = (resources.files(__package__) / file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
