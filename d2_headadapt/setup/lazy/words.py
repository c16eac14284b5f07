"""The names of a LazyConfig for keys that messages know by their yaml names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from ...errors import ConfigError, HeadAdaptError

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
# A yaml's switches; in a tree of calls a head is off without its features.
_SWITCHES = (
    (r"MODEL\.MASK_ON False", "model.roi_heads.mask_in_features null"),
    (r"MODEL\.KEYPOINT_ON False", "model.roi_heads.keypoint_in_features null"),
    (r"MODEL\.MASK_ON is True", "the model has a mask head"),
    (r"MODEL\.KEYPOINT_ON is True", "the model has a keypoint head"),
)
_LAZY = r"(?:head_adapt|train|optimizer|dataloader|model)\.[\w.]+"
_NO_VALUE = (
    "to|above|below|higher|lower|for|in|under|and|or|is|are|was|has|have|names|does|of|at|from|with|as|wins|which|that"
)
_GIVEN = re.compile(
    rf"((?:\b(?:[Ss]et|[Ww]rite|[Aa]dd|[Tt]ype:?|or) |<code>)(?:{_LAZY})):? "
    rf"(?!(?:{_NO_VALUE})(?:[\s,;]|$)|=)"
    r"(\"[^\"]*\"|&quot;.*?&quot;|\[[^]]*\]|\([^)]*\)|[^\s\[\]<]+?)(?=[.,;:)]*(?:\s|$|<))"
)
# In a fix a colon too stands before what is to be typed.
_SHOWN = re.compile(rf"(: {_LAZY}) (?!(?:{_NO_VALUE})(?:[\s,;]|$)|=)([^\s\[\]]+?)(?=[.,;:)]*(?:\s|$))")
_QUOTED = re.compile(rf"({_LAZY}) (\"[^\"]*\")")
# A list is a tuple in a yaml's command line, which Hydra's grammar has not.
_TUPLE = re.compile(rf"({_LAZY}=\"?)\(([^)]*?),?\)")
_TARGET = re.compile(r"(?<=_target_=)(?P<ours>HeadAdapt\w+|MultiTask\w+)|(?<=_target_=)(?P<stock>[A-Z]\w+)")
# The word alone: not the end of a file's name.
_YAML = re.compile(r"(?<![\w./\\'-])yaml\b")
_MAPPING = re.compile(r"(?:\b(?P<name>\w+): )?(?P<mapping>\{(?:[^{}]|\{[^{}]*\})*\})")


def in_lazy_words(text: str) -> str:
    """``text`` with every key as a LazyConfig calls it, and with values that are to be typed as ``key=value``."""
    for said, meant in _SWITCHES:
        text = re.sub(said, meant, text)
    text = _KEY.sub(lambda m: NAMED[m["other"]] if m["other"] else f"head_adapt{m['own'].lower()}", text)
    text = _TUPLE.sub(r"\1[\2]", _QUOTED.sub(r"\1=\2", _GIVEN.sub(r"\1=\2", text)))
    text = _TARGET.sub(lambda m: f"d2_headadapt.{m['ours']}" if m["ours"] else f"detectron2.modeling.{m[0]}", text)
    return _YAML.sub(".py", text)


def words_for(config_file: str) -> Callable[[str], str]:
    """What puts a text into the words of a config: those of a LazyConfig, or as it is."""
    return in_lazy_words if is_lazy_file(config_file) else str


def fix_in_lazy_words(text: str) -> str:
    """As :func:`in_lazy_words`, of what is to be typed: a mapping ``{on: box}`` is ``dict(on="box")`` in python."""

    def written(match: re.Match[str]) -> str:
        try:
            value = yaml.safe_load(match["mapping"])
        except yaml.YAMLError:
            return match[0]
        if not isinstance(value, dict) or None in value.values():
            return match[0]
        return f"{match['name']}={_python(value)}" if match["name"] else _python(value)

    return _MAPPING.sub(written, _SHOWN.sub(r"\1=\2", in_lazy_words(text)))


def _python(value: Any) -> str:
    if isinstance(value, dict):
        # A bare `on` is a truth value in YAML 1.1.
        pairs = (("on" if key is True else key, _python(inner)) for key, inner in value.items())
        return f"dict({', '.join(f'{key}={inner}' for key, inner in pairs)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def lazy_error(error: HeadAdaptError) -> HeadAdaptError:
    """The same error, of the same class, in the words of a LazyConfig."""
    expected, fix = fix_in_lazy_words(error.expected), fix_in_lazy_words(error.fix)
    return type(error)(in_lazy_words(error.where), expected=expected, found=in_lazy_words(error.found), fix=fix)


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
    except OmegaConfBaseException as error:
        raise unresolved(error, config_file) from error
    finally:
        logging.setLogRecordFactory(factory)


def unresolved(error: OmegaConfBaseException, config_file: str) -> ConfigError:
    """What an interpolation that leads nowhere, or a missing value, amounts to."""
    return ConfigError(
        str(error.full_key or config_file),
        expected="a value, or an interpolation of one that exists",
        found=str(error).splitlines()[0],
        fix="Correct it, or write the value itself.",
    )


def is_lazy_file(config_file: str) -> bool:
    """Whether a ``--config-file`` is a LazyConfig."""
    return config_file.endswith(".py")
