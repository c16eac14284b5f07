"""Config keys as values, and texts that name them as the config form in use does.

A key is ``MODEL.HEAD_ADAPT.MATCH`` in a yaml and ``head_adapt.match`` in a LazyConfig. A :class:`Key` inside an
f-string leaves both readings in the text; :func:`shown` keeps the one of the form in use (:func:`speaking`). Errors
hold texts with both readings, and everything that a person reads has one.

    >>> from d2_headadapt.key import MODEL, Form, shown
    >>> text = f"Set {MODEL.HEAD_ADAPT.MATCH.set('name')}."
    >>> shown(text)
    'Set MODEL.HEAD_ADAPT.MATCH name.'
    >>> shown(text, Form.LAZY)
    'Set head_adapt.match=name.'
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
"""Where a LazyConfig has a yaml's key, beside those under ``MODEL.HEAD_ADAPT``, which are under ``head_adapt``."""

SWITCHES: Mapping[str, tuple[str, str]] = {
    "MODEL.MASK_ON": ("model.roi_heads.mask_in_features", "the model has a mask head"),
    "MODEL.KEYPOINT_ON": ("model.roi_heads.keypoint_in_features", "the model has a keypoint head"),
}
"""A yaml's switches of heads: what of a LazyConfig is null where they are off, and what is meant where they are on."""

# Private use characters: no config, file name or sentence holds them.
_FIRST, _BETWEEN, _LAST = "\ue000", "\ue001", "\ue002"
_TOKEN = re.compile(f"{_FIRST}([^{_FIRST}-{_LAST}]*){_BETWEEN}([^{_FIRST}-{_LAST}]*){_LAST}")


class Form(enum.Enum):
    """The forms of a config file."""

    YAML = "yaml"
    LAZY = "lazy"


def form_of(config_file: str) -> Form:
    """Tell the form of a ``--config-file``; what is no ``.py`` is a yaml, also where there is none."""
    return Form.LAZY if config_file.endswith(".py") else Form.YAML


_in_use = Form.YAML


def form_in_use() -> Form:
    """Return the form of the config that the running command was given; a yaml's by default."""
    return _in_use


@contextmanager
def speaking(form: Form) -> Iterator[None]:
    """Let every text that is read meanwhile name keys as ``form`` does, in this process."""
    global _in_use
    before, _in_use = _in_use, form
    try:
        yield
    finally:
        _in_use = before


def shown(text: object, form: Form | None = None) -> str:
    """Render ``text`` as ``form`` names its keys; ``None``: as the form in use does."""
    group = 1 if (form or _in_use) is Form.YAML else 2
    return _TOKEN.sub(lambda match: match[group], f"{text}")


class Either:
    """Words that differ between the forms: both readings inside an f-string, that of the form in use as ``str``.

    Args:
        yaml, lazy: the two readings.
    """

    __slots__ = ("lazy", "yaml")

    def __init__(self, yaml: str, lazy: str) -> None:
        self.yaml, self.lazy = yaml, lazy

    def __format__(self, spec: str) -> str:
        return f"{_FIRST}{self.yaml}{_BETWEEN}{self.lazy}{_LAST}" if self.yaml != self.lazy else self.yaml

    def __str__(self) -> str:
        return self.yaml if _in_use is Form.YAML else self.lazy

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.yaml!r}, {self.lazy!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Either) and (self.yaml, self.lazy) == (other.yaml, other.lazy)

    def __hash__(self) -> int:
        return hash((self.yaml, self.lazy))


class Key(Either):
    """A config key.

    Attributes and items are the keys under it: ``MODEL.ROI_HEADS.NAME``, ``MODEL.TASKS[name].classes``; an index is
    an entry of a list, ``DATASETS.REGISTER[0]``.

    Args:
        yaml: its yaml name.
    """

    __slots__ = ()

    def __init__(self, yaml: str) -> None:
        super().__init__(yaml, _lazy_name(yaml))

    def __getattr__(self, name: str) -> Key:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str | int) -> Key:
        return Key(f"{self.yaml}[{name}]" if isinstance(name, int) else f"{self.yaml}.{name}")

    def __iter__(self) -> Iterator[Key]:
        # Items alone would make Python try 0, 1, 2 and so on without end.
        raise TypeError(f"{self.yaml} is one key")

    def __reduce__(self) -> tuple[object, ...]:
        return (Key, (self.yaml,))

    def set(self, value: object) -> Either:
        """Write the key with a value, as a command line has it: ``KEY value``, or ``key=value``."""
        return Either(f"{self.yaml} {_typed(value, Form.YAML)}", self._lazy_setting(value))

    def write(self, value: object) -> Either:
        """Write the key with a value, as a file has it: ``KEY: value``; in a LazyConfig's form ``key=value``."""
        return Either(f"{self.yaml}: {shown(_flow(value), Form.YAML)}", self._lazy_setting(value))

    def is_on(self) -> Either:
        """Write the key as a switch that is on."""
        return Either(f"{self.yaml} is True", SWITCHES[self.yaml][1])

    def _lazy_setting(self, value: object) -> str:
        if self.yaml in SWITCHES and value is False:
            return f"{SWITCHES[self.yaml][0]}=null"
        if self.lazy.endswith("._target_"):
            ours = str(value).startswith(("HeadAdapt", "MultiTask"))
            return f"{self.lazy}={'d2_headadapt' if ours else 'detectron2.modeling'}.{value}"
        return f"{self.lazy}={_typed(value, Form.LAZY)}"

    def of(self, cfg: Mapping[str, Any], default: Any = None) -> Any:
        """Look up the value under this key in a yaml config, ``default`` where there is no such key."""
        node: Any = cfg
        for name in self.yaml.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return default
            node = node[name]
        return node

    def put(self, cfg: Any, value: object) -> None:
        """Write the value under this key of a yaml config; the nodes above it are there."""
        *above, last = self.yaml.split(".")
        for name in above:
            cfg = cfg[name]
        cfg[last] = value


Words = str | Either
"""A text, or words that differ between the forms."""


def _lazy_name(yaml: str) -> str:
    if yaml == "MODEL.HEAD_ADAPT" or yaml.startswith("MODEL.HEAD_ADAPT."):
        return f"head_adapt{yaml.removeprefix('MODEL.HEAD_ADAPT').lower()}"
    known = re.match(r"[A-Z0-9_]+(?:\.[A-Z0-9_]+)*", yaml)
    for name in (yaml, known[0] if known else yaml, "MODEL.TASKS"):
        if name in NAMED and (yaml == name or yaml.startswith((f"{name}.", f"{name}["))):
            return f"{NAMED[name]}{yaml.removeprefix(name)}"
    return yaml


def _typed(value: object, form: Form) -> str:
    """Quote a value as it is typed behind a key in a shell; a text is taken as it is."""
    if isinstance(value, Mapping):
        return shown(f"{pairs(value)}", form)
    if isinstance(value, (list, tuple)):
        return f'"{value!r}"' if form is Form.YAML else f'"{list(value)!r}"'
    return shown(f"{value}", form)


def pairs(value: Mapping[str, object], name: str = "") -> Either:
    """Write a mapping as a file holds it: ``{on: box}`` in a yaml, ``dict(on="box")`` in a LazyConfig.

    Args:
        value: text, numbers, truth values, lists and mappings of them.
        name: the key that holds it: ``name: {...}``, or ``name=dict(...)``.
    """
    yaml, lazy = _flow(value), _python(value)
    return Either(f"{name}: {yaml}", f"{name}={lazy}") if name else Either(yaml, lazy)


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return str(value) if not isinstance(value, bool) else str(value).lower()


def _python(value: object) -> str:
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={_python(inner)}' for key, inner in value.items())})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_python, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


MODEL = Key("MODEL")
HEAD_ADAPT = MODEL.HEAD_ADAPT
TASKS = MODEL.TASKS
DATASETS = Key("DATASETS")
DATALOADER = Key("DATALOADER")
INPUT = Key("INPUT")
SOLVER = Key("SOLVER")
TEST = Key("TEST")
OUTPUT_DIR = Key("OUTPUT_DIR")
YAML = Either("yaml", ".py")
"""What kind of file a config is, in a sentence."""
