"""Look up the classes of registered datasets; register datasets from a yaml; read tables that a user names.

A registered dataset answers from its metadata, else from the ``categories`` of its json, else by being loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..adapt.classes import ClassTable, did_you_mean, nearest
from ..adapt.vocabularies import has_vocabulary, vocabulary, vocabulary_names
from ..errors import ClassTableError, DatasetError
from ..key import DATASETS, YAML, Key, Words
from .categories import keypoint_names, read_categories, read_names
from .entry import DatasetEntry, checked_entry
from .entry import absolute_entries as absolute_entries
from .task_labels import TaskFacts, load_labelled, survey

logger = logging.getLogger(__name__)

SPACE_METADATA = {"thing": "thing_classes", "stuff": "stuff_classes", "keypoint": "keypoint_names"}
"""Label space -> the key of detectron2's metadata that holds its names."""


_registered: dict[str, tuple[DatasetEntry, Callable[[], Any]]] = {}
_loaded: dict[str, Callable[[], Any]] = {}
_facts: dict[str, dict[str, TaskFacts]] = {}


def register_datasets(entries: Sequence[Any], where: Key = DATASETS.REGISTER) -> None:
    """Register COCO json datasets as detectron2's ``register_coco_instances`` does, and csv files of image labels.

    All entries are checked before the first is registered. An entry that is registered already, by an earlier call of
    this function in this process, is left alone.

    Args:
        entries: mappings with ``name``, ``json`` and ``images`` (paths absolute by now), and where wanted
            ``thing_classes``, ``keypoint_names``, ``keypoint_flip_map`` (pairs of names), ``extra_keys`` (keys of
            each annotation that the dataset dicts keep) and ``tasks``; or with ``csv``, ``images``, ``file`` and
            ``tasks``, and where wanted ``missing``, ``separator`` and ``split``
            (see :class:`d2_headadapt.data.entry.DatasetEntry`).
        where: the config key, for messages.

    Raises:
        ConfigError: an entry that has an unknown key, lacks one, or holds a value of the wrong type.
        DatasetError: a file or folder that is not there, a name that another dataset has, ``thing_classes`` that
            are not those of the json, or labels of tasks that cannot be read.
    """
    new: dict[str, DatasetEntry] = {}
    facts: dict[str, dict[str, TaskFacts]] = {}
    for i, raw in enumerate(entries):
        entry = checked_entry(raw, where[i])
        place = f"{where[i]} ({entry.name!r})"
        if entry == new.get(entry.name) or _is_registered(entry):
            continue
        _check_name_is_free(entry, new, place)
        _check_content(entry, place)
        facts[entry.name] = survey(entry)
        new[entry.name] = entry
    for name, entry in new.items():
        load = partial(load_labelled, entry)
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**entry.metadata)
        _registered[name] = (entry, load)
        _facts[name] = facts[name]
        if facts[name]:
            set_task_labels(name, {})


def task_facts(name: str) -> Mapping[str, TaskFacts]:
    """Look up what the file of a dataset says of its tasks.

    Args:
        name: of a dataset that :func:`register_datasets` registered; for any other the answer is empty.

    Returns:
        Task -> its level, and the classes that the file shows.
    """
    entry, load = _registered.get(name, (None, None))
    ours = entry is not None and name in DatasetCatalog and DatasetCatalog[name] is load
    return _facts[name] if ours else {}


def set_task_labels(name: str, given: Mapping[str, tuple[Sequence[str], str]]) -> None:
    """Say what the labels of a dataset of :func:`register_datasets` mean from now on, in its metadata.

    Args:
        name: the dataset.
        given: task -> its class names and its kind; another task has the classes and the kind that the file shows.
    """
    facts = task_facts(name)
    own = {task: (one.classes, "multi" if one.multi else "single") for task, one in facts.items()}
    values = {task: given.get(task, own[task]) for task in facts}
    # Not by attribute: detectron2 refuses a second value, and another model of this process may have another list.
    vars(MetadataCatalog.get(name)).update(
        task_levels={task: one.level for task, one in facts.items()},
        task_classes={task: list(names) for task, (names, _) in values.items()},
        task_kinds={task: kind for task, (_, kind) in values.items()},
    )


def _is_registered(entry: DatasetEntry) -> bool:
    # The function is compared too: somebody may have removed our dataset and put another under its name.
    known, load = _registered.get(entry.name, (None, None))
    return known == entry and entry.name in DatasetCatalog and DatasetCatalog[entry.name] is load


def _check_name_is_free(entry: DatasetEntry, new: Mapping[str, DatasetEntry], place: str) -> None:
    if entry.name in new:
        taken = f"another entry of that name, with {new[entry.name].labels}"
    elif entry.name in DatasetCatalog:
        left = MetadataCatalog.get(entry.name)
        file = left.get("json_file") or left.get("csv_file")
        taken = f"a dataset registered under it already{f', with {file}' if file else ''}"
    else:
        left = MetadataCatalog.get(entry.name)
        wrong = [key for key, value in entry.metadata.items() if left.get(key) not in (None, value)]
        if not wrong:
            return
        taken = f"metadata of another dataset under it: {wrong[0]} is {left.get(wrong[0])!r}"
    raise DatasetError(
        place,
        expected="a name that no other dataset has",
        found=taken,
        fix=f"Give this entry a name of its own, and use that name in {DATASETS.TRAIN} and {DATASETS.TEST}.",
    )


def _check_content(entry: DatasetEntry, place: str) -> None:
    for key, path, exists in (
        ("json" if entry.csv is None else "csv", entry.labels, PathManager.isfile),
        ("images", entry.images, PathManager.isdir),
    ):
        if "://" not in path and not exists(path):
            raise DatasetError(
                f"{place}.{key}",
                expected="a folder" if key == "images" else "a file",
                found=f"{path}, which is not there" if not PathManager.exists(path) else f"{path}, which is none",
                fix=f"Correct the path; a relative one starts at the folder of the {YAML} that holds the entry.",
            )
    # Metadata may be there first; loading sets thing_classes again, and detectron2 asserts that they agree.
    names = entry.thing_classes or MetadataCatalog.get(entry.name).get("thing_classes")
    if names and entry.json is not None:
        where = f"{place}.thing_classes" if entry.thing_classes else f"MetadataCatalog, {entry.name!r}"
        in_file = ClassTable([c["name"] for c in read_categories(entry.json)], origin=entry.json)
        _refuse_difference(ClassTable(names, origin=where), in_file, place, "Correct thing_classes, or leave them out.")


def dataset_table(name: str, space: str = "thing") -> ClassTable | None:
    """Look up a registered dataset's classes: its metadata, else its json's categories by id, else what loading sets.

    Args:
        name: a dataset of detectron2's ``DatasetCatalog``.
        space: ``thing``, ``stuff``, ``keypoint`` or the name of a task.

    Returns:
        ClassTable or None: ``None`` where the dataset has no classes in that space.

    Raises:
        DatasetError: the dataset is not registered, or its files are missing or damaged.
        ClassTableError: its names cannot make a table (see :class:`ClassTable`).
    """
    if name not in DatasetCatalog:
        raise DatasetError(
            f"dataset {name!r}",
            expected="a registered dataset",
            found="none of that name",
            fix=f"Register it under {DATASETS.REGISTER}, or in a module given with --import."
            + did_you_mean(name, DatasetCatalog.list()),
        )
    key = SPACE_METADATA.get(space)
    if key is None:
        names = MetadataCatalog.get(name).get("task_classes", {}).get(space)
        return ClassTable(names, origin=name) if names else None
    names = MetadataCatalog.get(name).get(key) or _names_without_metadata(name, key, space)
    return ClassTable(names, origin=name) if names else None


def _names_without_metadata(name: str, key: str, space: str) -> Sequence[str] | None:
    metadata = MetadataCatalog.get(name)
    has_names = any(metadata.get(other) for other in SPACE_METADATA.values())
    json_file, evaluator = metadata.get("json_file"), metadata.get("evaluator_type")
    # detectron2's COCO loader reads the names from the json, so this is what loading would give. Other loaders need
    # not: LVIS names are the first synonyms, and somebody's own json_file may be of any format.
    if json_file is not None and evaluator == "coco":
        path = os.fspath(json_file)
        if space == "thing":
            return [c["name"] for c in read_categories(path)]
        # coco_2017_train has its things in its metadata, and nobody needs its files to plan.
        if space != "keypoint" or (has_names and not PathManager.exists(path)):
            return None
        return keypoint_names(read_categories(path), path)
    # Metadata is set as a whole: ade20k_sem_seg_train, which has stuff, will have no things after minutes of loading.
    if has_names or evaluator == "tasks":
        return None
    load = DatasetCatalog[name]
    if _loaded.get(name) is not load:
        logger.info("Loading dataset %r to learn its classes: its metadata has no %s.", name, key)
        try:
            load()
        except OSError as error:
            raise DatasetError(
                f"dataset {name!r}", expected="files that can be read", found=str(error), fix="Correct its paths."
            ) from error
        _loaded[name] = load
    names: Sequence[str] | None = MetadataCatalog.get(name).get(key)
    return names


def training_table(names: str | Sequence[str], space: str = "thing", *, required: bool = True) -> ClassTable | None:
    """Join the tables of several training datasets to one; those without classes in ``space`` do not count.

    Args:
        names: of ``DATASETS.TRAIN``; one string is one dataset, as for detectron2's loaders.
        space: label space.
        required: raise for a dataset that is not registered or cannot be read; else there is no table then.

    Raises:
        DatasetError: two of the datasets differ in names or order; see :func:`dataset_table` for more.
    """
    first: ClassTable | None = None
    for name in (names,) if isinstance(names, str) else names:
        try:
            table = dataset_table(name, space)
        except DatasetError:
            if required:
                raise
            return None
        if table is not None and first is not None:
            _refuse_difference(first, table, DATASETS.TRAIN, "Train on datasets with one and the same list of classes.")
        first = first or table
    return first


def check_same_classes(expected: ClassTable, dataset: str, space: str = "thing", where: Key = DATASETS.TEST) -> None:
    """Refuse a dataset whose classes in ``space`` are not ``expected``, name by name and in that order.

    A dataset without classes in ``space`` passes.

    Raises:
        DatasetError: the lists differ; see :func:`dataset_table` for more.
    """
    table = dataset_table(dataset, space)
    if table is not None:
        _refuse_difference(
            expected,
            table,
            where,
            "Make the two lists the same; the order of a json's classes is that of its category ids.",
        )


def _refuse_difference(expected: ClassTable, found: ClassTable, where: Words, fix: str) -> None:
    if expected.names == found.names:
        return
    pairs = zip(expected.names, found.names, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    kind = "the same names in another order" if sorted(expected.names) == sorted(found.names) else "another list"
    names = [repr(table.names[first]) if first < len(table) else "missing" for table in (expected, found)]
    raise DatasetError(
        where,
        expected=f"the {len(expected)} classes of {expected.origin}",
        found=f"{kind} in {found.origin} ({len(found)} classes); the first difference is class {first}: "
        f"{names[0]} in {expected.origin}, {names[1]} in {found.origin}",
        fix=fix,
    )


def resolve_table(value: Any, *, key: Key, space: str = "thing") -> ClassTable | None:
    """Read the table that a user named under a ``..._CLASSES`` key.

    Args:
        value: ``None``, a list of names, or a string: a registered dataset, a built-in vocabulary or a file, whichever
            is found first. A file is a .json (a list of names, ``{"names": [...]}`` or a COCO json) or a .txt (one name
            a line; empty lines and lines that start with ``#`` do not count, ``\\#`` begins a name with ``#``).
        key: the config key, for messages.
        space: label space of the table.

    Raises:
        ClassTableError: nothing of that name, a value of another type, or names that cannot make a table.
        DatasetError: a dataset that has no classes in ``space``, or whose files are missing or damaged.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return ClassTable(value, origin=str(key))
    if not isinstance(value, str) or not value.strip():
        text = f"\"'{value}'\""
        quoted = f"Put it in quotes: {key.set(text)}, or as a name of a list {key.set([str(value)])}."
        raise ClassTableError(
            key,
            expected="a dataset, a vocabulary, a file or a list of names",
            found=f"{value!r} ({type(value).__name__})",
            fix=quoted if isinstance(value, (int, float)) else "Name one of these, or leave the key out.",
        )
    if value in DatasetCatalog:
        table = dataset_table(value, space)
        if table is None:
            raise DatasetError(
                key,
                expected=f"a dataset with {SPACE_METADATA.get(space, space)}",
                found=f"{value!r}, which has none",
                fix=f"Name another dataset, or list the names: {key.set(['first', 'second'])}.",
            )
        return table
    if has_vocabulary(value):
        return vocabulary(value, space)
    path = os.path.expanduser(value)
    if "://" in path or PathManager.isfile(path):
        return ClassTable(read_names(path, space, key), origin=value)
    missing = "a file that is not there" if path.lower().endswith((".json", ".txt")) else "none of these"
    names = [part.strip() for part in value.split(",")]
    raise ClassTableError(
        key,
        expected="a registered dataset, a vocabulary, a file or a list of names",
        found=f"{value!r}, which is {missing}",
        fix=f"Nearest datasets: {', '.join(nearest(value, DatasetCatalog.list())) or 'none'}. Vocabularies: "
        f"{', '.join(nearest(value, vocabulary_names()) or vocabulary_names())}. Names are written as a list: "
        f"{key.set(names)}.",
    )
