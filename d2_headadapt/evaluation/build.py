"""Build the evaluators that a dataset and a config ask for."""

from __future__ import annotations

import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..data.task_datasets import settle_tasks
from ..data.task_spec import task_specs
from ..errors import ConfigError, DatasetError
from ..key import TASKS
from .keep import judged_by_name
from .truth import complete_truth


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """Build the evaluator that a dataset's ``evaluator_type`` asks for, and one for the tasks of the config.

    Args:
        cfg: with ``MODEL.TASKS``, where there are any.
        dataset_name: a registered dataset.
        output_folder: where results are written; ``inference`` in ``OUTPUT_DIR`` by default.

    Raises:
        DatasetError: the dataset names no type, or one that neither detectron2 nor this package has an evaluator for.
        ConfigError: the dataset has labels of tasks alone, and ``MODEL.TASKS`` is empty.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    judge_tasks = _task_evaluators(cfg, dataset_name, folder)
    sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    build: dict[str, Callable[[], list[DatasetEvaluator]]] = {
        "coco": lambda: [COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)],
        "sem_seg": lambda: [SemSegEvaluator(dataset_name, output_dir=folder)],
        "coco_panoptic_seg": lambda: [
            SemSegEvaluator(dataset_name, output_dir=folder),
            COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas),
            COCOPanopticEvaluator(dataset_name, folder),
        ],
        "cityscapes_instance": lambda: [CityscapesInstanceEvaluator(dataset_name)],
        "cityscapes_sem_seg": lambda: [CityscapesSemSegEvaluator(dataset_name)],
        "pascal_voc": lambda: [PascalVOCDetectionEvaluator(dataset_name)],
        "lvis": lambda: [LVISEvaluator(dataset_name, output_dir=folder)],
        "tasks": list,
    }
    if kind not in build:
        raise DatasetError(
            f"dataset {dataset_name!r}",
            expected=f"evaluator_type, one of {', '.join(build)}",
            found=repr(kind),
            fix=f"MetadataCatalog.get({dataset_name!r}).set(evaluator_type='coco', json_file=..., image_root=...)",
        )
    if kind == "tasks" and not judge_tasks:
        raise ConfigError(
            TASKS,
            expected=f"a task to evaluate on dataset {dataset_name!r}, which has labels of tasks alone",
            found="none",
            fix=f"Declare one: {TASKS.write({'colour': {'on': 'image'}})}.",
        )
    # A model of whole images has no detections for the others.
    images_alone = cfg.MODEL.META_ARCHITECTURE == "MultiTaskClassifier"
    evaluators = judge_tasks if images_alone else build[kind]() + judge_tasks
    judge = evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
    return judged_by_name(cfg, dataset_name, complete_truth(judge))


def _task_evaluators(cfg: CfgNode, dataset_name: str, folder: str) -> list[DatasetEvaluator]:
    if not cfg.MODEL.get("TASKS"):
        return []
    # Here, because scikit-learn takes two seconds to import, which nobody without tasks should wait for.
    from .task_evaluator import TaskEvaluator

    settle_tasks(cfg, also=[dataset_name])
    specs = task_specs(cfg)
    return [TaskEvaluator(dataset_name, specs, folder)] if specs else []
