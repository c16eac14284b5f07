"""Evaluate tasks: predictions beside the labels of the dataset, per image and on matched boxes."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from PIL import Image

from ..adapt.classes import shorten
from ..data.task_mapper import label_tensor
from ..data.task_spec import TaskSpec
from ..errors import DatasetError
from ..key import DATASETS
from .metric_files import confusion_picture, file_stem, metrics_json, metrics_markdown
from .metrics import TaskMetrics, multi_label_metrics, single_label_metrics

logger = logging.getLogger(__name__)
Array = NDArray[Any]


class TaskEvaluator(DatasetEvaluator):
    """Evaluator of tasks: top-1 accuracy, macro F1, confusion matrix; mean average precision of multi-label ones.

    Labels come from the dataset, whatever the loader left of them; what has no label counts nowhere. Of detections,
    the tasks are judged on boxes that were found: each box of the dataset is matched to the detection of the highest
    score whose IoU with it is high enough, whatever its class, and the share of boxes that have one is the coverage
    beside the numbers. Crowd regions are left out.

    With an output folder, ``<dataset>_tasks.json`` and ``.md`` hold everything, with a table of each task's classes,
    and ``<dataset>_confusion_<task>.png`` its confusion matrix, which during training TensorBoard shows too.

    Args:
        dataset: a registered dataset, see ``docs/tasks.md`` for its ``tasks``.
        specs: the tasks that the model predicts.
        output_dir: where files go; ``None`` writes none.
        iou: least IoU of a box and its detection.
        distributed: gather the predictions of all ranks; otherwise each rank judges its own.
    """

    def __init__(
        self,
        dataset: str,
        specs: Sequence[TaskSpec],
        output_dir: str | None = None,
        *,
        iou: float = 0.5,
        distributed: bool = True,
    ) -> None:
        self._dataset, self._specs = dataset, tuple(specs)
        self._output_dir, self._iou, self._distributed = output_dir, iou, distributed
        self._labels: dict[Any, dict[str, Any]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every prediction."""
        self._rows: dict[str, list[tuple[Array, ...]]] = {spec.name: [] for spec in self._specs}
        self._unmatched = dict.fromkeys(self._rows, 0)
        self._lacking: dict[str, str] = {}

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take the predictions of some images.

        Args:
            inputs: with ``image_id``, or with ``file_name`` where the dataset has no ids.
            outputs: of the model. For images ``pred_<task>`` and ``scores_<task>``, for boxes an ``instances`` with
                fields of these names, in pixels of the image as it is on disk.

        Raises:
            DatasetError: an image that the dataset lacks, a label that the task lacks, or other classes.
        """
        for given, output in zip(inputs, outputs, strict=True):
            truth = self._truth(given)
            for spec in self._specs:
                if spec.on == "image":
                    self._take_image(spec, truth, output)
            boxes = [spec for spec in self._specs if spec.on == "box"]
            if "instances" in output:
                self._take_boxes(boxes, truth, output["instances"])
            else:
                self._lacking.update(dict.fromkeys((spec.name for spec in boxes), ", ".join(output)))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Judge what was taken, and write the files.

        Returns:
            ``{"tasks": {"<task>/<metric>": percent}}``, NaN where there was nothing to measure; empty on ranks other
            than the main one.
        """
        gathered = [(self._rows, self._unmatched, self._lacking)]
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(gathered[0], dst=0)
            if not comm.is_main_process():
                return OrderedDict()
        lacking = {name: found for part in gathered for name, found in part[2].items()}
        for name, found in lacking.items():
            logger.warning(
                "The model does not predict task %s, so it is not evaluated: its output has %s. A box task needs "
                "one of the ROI heads of d2_headadapt; test-time augmentation leaves tasks out.",
                name,
                found,
            )
        results: dict[str, float] = {}
        metrics: list[TaskMetrics] = []
        coverage: dict[str, float] = {}
        for spec in self._specs:
            rows = [row for part in gathered for row in part[0][spec.name]]
            unmatched = sum(part[1][spec.name] for part in gathered)
            if not rows and spec.name in lacking:
                continue
            measured = _measure(spec, rows)
            metrics.append(measured)
            results.update({f"{spec.name}/{name}": value for name, value in measured.summary.items()})
            if spec.on == "box":
                boxes = len(rows) + unmatched
                coverage[spec.name] = 100 * len(rows) / boxes if boxes else float("nan")
                results[f"{spec.name}/coverage"] = coverage[spec.name]
            if not measured.labelled:
                what = "no image with a label" if spec.on == "image" else "no labelled box that was detected"
                logger.warning("Task %s has %s in %s: nothing to measure.", spec.name, what, self._dataset)
        if metrics:
            self._write(metrics, coverage)
        return OrderedDict(tasks=results) if results else OrderedDict()

    def _truth(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if self._labels is None:
            self._check_classes()
            # Once, and of each image only what is asked for: a dataset may be large.
            self._labels = {_key(entry): _labels_of(entry) for entry in DatasetCatalog.get(self._dataset)}
        truth = self._labels.get(_key(given))
        if truth is None:
            raise DatasetError(
                f"dataset {self._dataset!r}",
                expected="every image that is evaluated",
                found=f"none with {'image_id' if 'image_id' in given else 'file_name'} {_key(given)!r}",
                fix="Evaluate with the loader of this dataset, and give each of its images an image_id of its own.",
            )
        return truth

    def _check_classes(self) -> None:
        for spec in self._specs:
            names = MetadataCatalog.get(self._dataset).get("task_classes", {}).get(spec.name)
            if names and tuple(names) != spec.table.names:
                raise DatasetError(
                    f"dataset {self._dataset!r}, task {spec.name}",
                    expected=f"the {len(spec.table)} classes of {spec.table.origin}, in their order",
                    found=f"{len(names)}: {shorten(names)}",
                    fix=f"Label it with the model's classes; those of {DATASETS.REGISTER} are, by "
                    "engine.build_evaluator.",
                )

    def _take_image(self, spec: TaskSpec, truth: dict[str, Any], output: Mapping[str, Any]) -> None:
        label = truth["tasks"].get(spec.name)
        if f"scores_{spec.name}" not in output:
            self._lacking[spec.name] = ", ".join(output)
        elif label is not None:
            predicted = label_tensor(output[f"pred_{spec.name}"], spec, "predictions")
            self._take(spec, label, predicted, output[f"scores_{spec.name}"])

    def _take_boxes(self, specs: Sequence[TaskSpec], truth: dict[str, Any], instances: Instances) -> None:
        instances = instances.to(torch.device("cpu"))
        matched = match_boxes(truth["boxes"], instances, self._iou).tolist()
        for spec in specs:
            if len(instances) and not instances.has(f"scores_{spec.name}"):
                self._lacking[spec.name] = "detections with " + ", ".join(instances.get_fields())
                continue
            for labels, i in zip(truth["labels"], matched, strict=True):
                label = labels.get(spec.name)
                if label is not None and i < 0:
                    self._unmatched[spec.name] += 1
                elif label is not None:
                    fields = (instances.get(f"{field}_{spec.name}")[i] for field in ("pred", "scores"))
                    self._take(spec, label, *fields)

    def _take(self, spec: TaskSpec, label: Any, predicted: torch.Tensor, scores: torch.Tensor) -> None:
        known = label_tensor(label, spec, f"dataset {self._dataset!r}")
        row = (x.detach().cpu().numpy() for x in (known, predicted, scores))
        self._rows[spec.name].append(tuple(row))

    def _write(self, metrics: Sequence[TaskMetrics], coverage: Mapping[str, float]) -> None:
        # The classes' tables may have hundreds of rows: the log gets the first one.
        text = metrics_markdown(self._dataset, metrics, coverage)
        logger.info("Tasks on %s, in percent:\n%s", self._dataset, text.split("\n\n")[1])
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            for ending, content in (("md", text), ("json", metrics_json(self._dataset, metrics, coverage))):
                with PathManager.open(self._path(self._output_dir, f"tasks.{ending}"), "w") as file:
                    file.write(content)
        if not self._output_dir and not has_event_storage():
            return
        for measured in metrics:
            picture = confusion_picture(measured)
            if self._output_dir:
                with PathManager.open(
                    self._path(self._output_dir, f"confusion_{file_stem(measured.spec.name)}.png"), "wb"
                ) as file:
                    Image.fromarray(picture).save(file, format="PNG")
            if has_event_storage():
                name = f"confusion/{self._dataset}/{measured.spec.name}"
                get_event_storage().put_image(name, picture.transpose(2, 0, 1))

    def _path(self, folder: str, name: str) -> str:
        return os.path.join(folder, f"{file_stem(self._dataset)}_{name}")


def match_boxes(boxes: Array, instances: Instances, iou: float) -> torch.Tensor:
    """Find for each box the detection of the highest score that covers it; one detection may serve two boxes.

    Args:
        boxes: (N, 4), corners in pixels.
        instances: n detections with ``pred_boxes`` and ``scores``.
        iou: least IoU.

    Returns:
        (N,) index of a detection, -1 where there is none.
    """
    if not len(instances) or not len(boxes):
        return torch.full((len(boxes),), -1)
    covers = pairwise_iou(Boxes(torch.as_tensor(boxes, dtype=torch.float32)), instances.pred_boxes) >= iou
    scores = torch.where(covers, instances.scores.float()[None], -1.0)
    best = scores.argmax(dim=1)
    return torch.where(covers.any(dim=1), best, -1)


def _measure(spec: TaskSpec, rows: Sequence[tuple[Array, ...]]) -> TaskMetrics:
    shape = (len(rows), len(spec.table)) if spec.multi else (len(rows),)
    labels, predicted = (np.array([row[i] for row in rows], dtype=np.int64).reshape(shape) for i in (0, 1))
    if not spec.multi:
        return single_label_metrics(spec, labels, predicted)
    scores = np.array([row[2] for row in rows], dtype=np.float64).reshape(shape)
    return multi_label_metrics(spec, labels, predicted, scores)


def _key(entry: Mapping[str, Any]) -> Any:
    return entry["image_id"] if "image_id" in entry else entry.get("file_name")


def _labels_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read the labels of an image and of its boxes, with the boxes as corners (N, 4)."""
    objects = [a for a in entry.get("annotations", ()) if not a.get("iscrowd", 0) and a.get("tasks")]
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return {
        "tasks": entry.get("tasks") or {},
        "boxes": np.asarray(corners, dtype=np.float32).reshape(-1, 4),
        "labels": [a["tasks"] for a in objects],
    }
