"""Read the labels of a context's datasets once, and answer what the checks ask of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray

from ..data.task_spec import checked_task
from ..setup.task_checks import WITH_ROI_HEADS
from .coco_json import Labels, labels_of_dicts, read_coco
from .finding import DoctorContext, Finding, PartMissing, finding_of

WITHOUT_BOXES = ("SemanticSegmentor", "PanopticDeepLab", "MultiTaskClassifier")
"""Meta-architectures that read no boxes."""

_read: WeakKeyDictionary[DoctorContext, dict[Any, Labels | Exception]] = WeakKeyDictionary()


def labels_of(context: DoctorContext, name: str) -> Labels | None:
    """Read the labels of a registered dataset, once; ``None`` where a quick run leaves them out.

    Raises:
        PartMissing: they cannot be read; part ``labels of NAME``.
    """
    if not context.small(name):
        return None
    kept = _read.setdefault(context, {})
    path = coco_path(context, name)
    key = path if path is not None else ("dicts", name)
    if key not in kept:
        try:
            kept[key] = read_coco(path) if path is not None else _from_catalog(context, name)
        except Exception as error:  # A user's own function may raise anything, and the check says what.
            kept[key] = error
    found = kept[key]
    if isinstance(found, Exception):
        cause = found.cause if isinstance(found, PartMissing) else found
        raise PartMissing(f"labels of {name}", cause, " ".join(str(found).split())) from found
    return found


def coco_path(context: DoctorContext, name: str) -> str | None:
    """Find the json that detectron2's own COCO loader reads for a dataset, else ``None``."""
    metadata = MetadataCatalog.get(name)
    return context.json_path(name) if metadata.get("evaluator_type") == "coco" else None


def _from_catalog(context: DoctorContext, name: str) -> Labels:
    dicts = context.dicts(name)
    return labels_of_dicts(name, dicts, MetadataCatalog.get(name).get("thing_classes") or ())


def readable(context: DoctorContext, names: Sequence[str] | None = None) -> Iterator[tuple[str, Labels]]:
    """Yield each dataset with its labels; those that cannot be read come last, as one :class:`PartMissing`."""
    missing: PartMissing | None = None
    for name in context.dataset_names if names is None else dict.fromkeys(names):
        try:
            labels = labels_of(context, name)
        except PartMissing as error:
            missing = missing or error
        else:
            if labels is not None:
                yield name, labels
    if missing is not None:
        raise missing


def from_json(context: DoctorContext, names: Sequence[str] | None = None) -> Iterator[tuple[str, Labels]]:
    """Yield, like :func:`readable`, the datasets that detectron2's COCO loader reads."""
    return ((name, labels) for name, labels in readable(context, names) if labels.from_json)


def detected(context: DoctorContext, names: Sequence[str] | None = None) -> Iterator[tuple[str, Labels]]:
    """Yield, like :func:`readable`, the datasets whose boxes this model reads."""
    if context.cfg.MODEL.META_ARCHITECTURE in WITHOUT_BOXES:
        return iter(())
    return ((name, labels) for name, labels in readable(context, names) if labels.labelled)


def has_roi_heads(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE in WITH_ROI_HEADS


def image_tasks(cfg: CfgNode) -> list[str]:
    """List the names of the tasks on images."""
    return [task for task, node in cfg.MODEL.get("TASKS", {}).items() if checked_task(task, node)["on"] == "image"]


def place(name: str, labels: Labels) -> str:
    return f"{labels.source}, dataset {name!r}" if labels.from_json else labels.source


def some(flags: NDArray[np.bool_], labels: Labels, most: int = 3) -> str:
    """Write ``17 of 800, such as annotation 4 of image 2 (b.jpg)``."""
    first = np.flatnonzero(flags)[:most]
    return f"{int(flags.sum())} of {len(flags)}, such as {'; '.join(labels.annotation(int(m)) for m in first)}"


def listed(values: Iterable[Any], most: int = 6) -> str:
    """Write the first few of ``values`` as a user wrote them, and how many more there are."""
    values = list(values)
    more = f", ... ({len(values) - most} more)" if len(values) > most else ""
    return ", ".join(repr(v) for v in values[:most]) + more


def unreadable(context: DoctorContext, code: str, name: str) -> Finding | None:
    """Make the finding for a dataset whose labels cannot be read."""
    try:
        labels_of(context, name)
    except PartMissing as missing:
        return finding_of(code, missing.cause or missing, where=f"dataset {name!r}")
    return None
