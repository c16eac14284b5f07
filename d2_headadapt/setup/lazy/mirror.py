"""Mirror a LazyConfig as a yaml config, for everything in this package that reads keys.

Only the keys that ``from_config`` methods, the doctor and the evaluators read are set; no model is built from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf

from ...adapt.classes import did_you_mean
from ...config.keys import add_headadapt_config
from ...config.settings import NUM_CLASSES_KEYS
from ...data.task_spec import checked_task, complete_tasks
from ...errors import ConfigError
from ...key import DATASETS, MIRRORED, TASKS, Form, Key, speaking
from ...modeling.predictor import PREDICTOR_REGISTRY
from ..yaml import merge
from .counts import find_counts
from .loading import NODE
from .tree import calls, names_in, select, target_of

BESIDE: Mapping[str, Key] = {"register": DATASETS.REGISTER, "tasks": TASKS}
"""Keys of the node whose yaml keys are not under ``MODEL.HEAD_ADAPT``."""


@speaking(Form.LAZY)
def mirror_of(lazy: DictConfig) -> CfgNode:
    """Make the yaml config that ``lazy`` amounts to; not frozen, and nothing in it is resolved.

    The keys of ``head_adapt`` are those that :mod:`d2_headadapt.config.keys` declares, in lower case.

    Raises:
        ConfigError: a key of ``head_adapt`` that does not exist, or a value of another type than its key's.
    """
    cfg = get_cfg()
    add_headadapt_config(cfg)
    for key, place in MIRRORED.items():
        value = select(lazy, place)
        if value is not None:
            Key(key).put(cfg, value)
    cfg.DATASETS.TRAIN = names_in(select(lazy, "dataloader.train"))
    cfg.DATASETS.TEST = names_in(select(lazy, "dataloader.test"))
    _mirror_model(cfg, lazy.model)
    _mirror_input(cfg, lazy)
    _read_node(cfg, lazy.get(NODE))
    return cfg


def _mirror_model(cfg: CfgNode, model: DictConfig) -> None:
    cfg.MODEL.META_ARCHITECTURE = getattr(target_of(model), "__name__", str(target_of(model)))
    heads = model.get("roi_heads")
    cfg.MODEL.MASK_ON = _has_head(heads, "mask")
    cfg.MODEL.KEYPOINT_ON = _has_head(heads, "keypoint")
    if target_of(heads) is not None:
        cfg.MODEL.ROI_HEADS.NAME = target_of(heads).__name__
    for _, call in calls(heads):
        name = getattr(target_of(call), "__name__", "")
        if name in PREDICTOR_REGISTRY and target_of(call) is PREDICTOR_REGISTRY.get(name) and "bundle" not in call:
            cfg.MODEL.HEAD_ADAPT.PREDICTOR = name
    counts = find_counts(model)
    for space, key in NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, NUM_CLASSES_KEYS["PanopticFPN"]):
        found = [count.value for count in counts if count.space == space]
        if found and key.of(cfg) is not None:
            key.put(cfg, found[0])


def _has_head(heads: Any, kind: str) -> bool:
    """Tell whether ROI heads have one of masks or keypoints: ``in_features`` of ``None`` switch it off."""
    if not isinstance(heads, DictConfig) or heads.get(f"{kind}_head") is None:
        return False
    return f"{kind}_in_features" not in heads or heads[f"{kind}_in_features"] is not None


def _mirror_input(cfg: CfgNode, lazy: DictConfig) -> None:
    flips = [
        call
        for _, call in calls(select(lazy, "dataloader.train"))
        if isinstance(target_of(call), type) and issubclass(target_of(call), T.RandomFlip)
    ]
    # As its constructor: horizontal unless it says otherwise.
    mirrored = any(call.get("horizontal", True) and not call.get("vertical", False) for call in flips)
    cfg.INPUT.RANDOM_FLIP = "horizontal" if mirrored else "vertical" if flips else "none"
    for _, call in calls(select(lazy, "dataloader.test")):
        if target_of(call) is T.ResizeShortestEdge:
            size, most = select(call, "short_edge_length"), select(call, "max_size")
            size = size[0] if isinstance(size, list) and size else size
            # Anything else is refused by its own constructor.
            cfg.INPUT.MIN_SIZE_TEST = size if isinstance(size, int) else cfg.INPUT.MIN_SIZE_TEST
            cfg.INPUT.MAX_SIZE_TEST = most if isinstance(most, int) else cfg.INPUT.MAX_SIZE_TEST


def _read_node(cfg: CfgNode, node: Any) -> None:
    if node is None:
        complete_tasks(cfg)
        return
    if not isinstance(node, DictConfig):
        raise ConfigError(
            NODE, expected="a dict of keys", found=repr(node), fix=f'Write {NODE} = dict(source_classes="coco").'
        )
    values = cast("dict[Any, Any]", OmegaConf.to_container(node, resolve=True))
    beside = {key: values.pop(key) for key in BESIDE if key in values}
    known = dict(_known(cfg.MODEL.HEAD_ADAPT))
    own = _upper(values, known, NODE, [*known, *BESIDE])
    merge(cfg, NODE, lambda: cfg.merge_from_other_cfg(CfgNode({"MODEL": {"HEAD_ADAPT": own}})))
    _read_beside(cfg, beside)
    complete_tasks(cfg)


def _read_beside(cfg: CfgNode, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value is None:
            continue
        kind, example = (list, "[dict(name=...)]") if key == "register" else (dict, 'dict(colour=dict(on="box"))')
        if not isinstance(value, kind):
            raise ConfigError(
                f"{NODE}.{key}", expected=f"a {kind.__name__}", found=repr(value), fix=f"Write {key}={example}."
            )
        if isinstance(value, dict):
            for name, task in value.items():
                checked_task(name, task)
            value = CfgNode(value, new_allowed=True)
        BESIDE[key].put(cfg, value)


def _known(node: CfgNode) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield key.lower(), value


def _upper(values: Mapping[Any, Any], known: Mapping[str, Any], place: str, names: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{place}.{key}",
                expected="a key that exists",
                found=repr(key),
                fix=f"Correct or remove it.{did_you_mean(str(key), names) or ' The keys: ' + ', '.join(names) + '.'}",
            )
        default = known[key]
        if isinstance(default, CfgNode):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{place}.{key}", expected="a dict of keys", found=repr(value), fix=f"Write {key}=dict(...)."
                )
            inner = dict(_known(default))
            value = _upper(value, inner, f"{place}.{key}", list(inner))
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        elif type(value) is not type(default) if default is not None else isinstance(value, Mapping):
            raise ConfigError(
                f"{place}.{key}",
                expected=f"a value like {default!r} ({type(default).__name__})" if default is not None else "no dict",
                found=f"{value!r} ({type(value).__name__})",
                fix="Correct it, or leave the key out for its default.",
            )
        made[str(key).upper()] = value
    return made
