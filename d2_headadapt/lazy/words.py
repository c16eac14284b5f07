"""The names of a LazyConfig for keys that messages know by their yaml names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import HeadAdaptError

MIRRORED: Mapping[str, str] = {
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "SEED": "train.seed",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.KEYPOINT_OKS_SIGMAS": "dataloader.evaluator.kpt_oks_sigmas",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": "dataloader.train.dataset.min_keypoints",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
}
"""Keys of detectron2's yaml whose value a LazyConfig has too, and where detectron2's own configs have it."""

NAMED: Mapping[str, str] = {
    **MIRRORED,
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATASETS.REGISTER": "head_adapt.register",
    "MODEL.TASKS": "head_adapt.tasks",
    "MODEL.META_ARCHITECTURE": "model._target_",
    "MODEL.ROI_HEADS.NAME": "model.roi_heads._target_",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.POINT_HEAD.NUM_CLASSES": "model.roi_heads.mask_head.point_head.num_classes",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "model.roi_heads.keypoint_head.num_keypoints",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.FCOS.NUM_CLASSES": "model.num_classes",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "model.sem_seg_head.num_classes",
    "MODEL.CLASSIFIER.IN_FEATURE": "model.in_feature",
    "MODEL.CLASSIFIER.INPUT_SIZE": "model.input_size",
    "MODEL.CLASSIFIER.POOLING": "model.pooling",
}
_LONGEST_FIRST = "|".join(re.escape(key) for key in sorted(NAMED, key=len, reverse=True))
# What stands in quotes was typed by the user.
_KEY = re.compile(
    rf"(?<![\w.'])(?:MODEL\.HEAD_ADAPT(?P<own>(?:\.[A-Z][A-Z_]*)*)|(?P<other>{_LONGEST_FIRST})(?![A-Z_]))"
)
_LAZY = r"(?:head_adapt|train|optimizer|dataloader|model)\.[\w.]+"
_GIVEN = re.compile(
    rf"\b([Ss]et|[Ww]rite|[Aa]dd|type:|Type:) ({_LAZY}):? "
    r"(?!(?:to|above|below|higher|lower|for|in|under|and|or)\b)(\"[^\"]*\"|\[[^]]*\]|[^\s\[\]]+?)(?=[.,;:)]*(?:\s|$))"
)


def in_lazy_words(text: str) -> str:
    """``text`` with every key as a LazyConfig calls it, and with values that are to be typed as ``key=value``."""
    text = _KEY.sub(lambda m: NAMED[m["other"]] if m["other"] else f"head_adapt{m['own'].lower()}", text)
    return re.sub(r"\byaml\b", ".py", _GIVEN.sub(r"\1 \2=\3", text))


def lazy_error(error: HeadAdaptError) -> HeadAdaptError:
    """The same error, of the same class, in the words of a LazyConfig."""
    fields = {name: in_lazy_words(getattr(error, name)) for name in ("expected", "found", "fix")}
    return type(error)(in_lazy_words(error.where), **fields)


@contextmanager
def lazy_words(config_file: str) -> Iterator[None]:
    """Let errors and log lines speak of a LazyConfig's keys where ``config_file`` is one."""
    if not is_lazy_file(config_file):
        yield
        return
    factory = logging.getLogRecordFactory()

    def translated(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        # The checkpointer logs as fvcore's.
        if record.name.startswith(("d2_headadapt", "fvcore")):
            record.msg, record.args = in_lazy_words(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(translated)
    try:
        yield
    except HeadAdaptError as error:
        raise lazy_error(error) from error
    finally:
        logging.setLogRecordFactory(factory)


def is_lazy_file(config_file: str) -> bool:
    """Whether a ``--config-file`` is a LazyConfig."""
    return config_file.endswith(".py")
