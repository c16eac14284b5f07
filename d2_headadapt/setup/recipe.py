"""Recipes: a settled config from a yaml or a LazyConfig, and how to build models and loaders from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..adapt.classes import ClassTable
from ..config.keep import KeepSettings
from ..config.settings import AdaptSettings, apply_num_classes, attach_settings
from ..data.task_datasets import every_training_dict
from ..data.task_mapper import Mapper, mapper_at_test_size
from ..errors import ConfigError, UsageError
from ..key import DATASETS, INPUT, YAML, Form, form_of
from ..modeling.keep_model import attach_keep
from .build import build_on_meta, building
from .components import builder_of, import_components
from .lazy.loading import load_lazy_config
from .lazy.mirror import mirror_of
from .lazy.preparing import prepare
from .lazy.tree import built, calls, select, target_of
from .yaml import load_config, resolve_config


def no_training_set() -> UsageError:
    """Make the error for a fit without images."""
    return UsageError(
        DATASETS.TRAIN,
        expected="a dataset to fit new rows on",
        found="none",
        fix=f"Name one in the {YAML}, or add {DATASETS.TRAIN.set(('my_train',))}.",
    )


@dataclass(frozen=True)
class Recipe:
    """A settled yaml config, and how to build models and loaders from it.

    Args:
        config: resolved and frozen.
        settings: of the config.
        builder: makes the model of a config; a project may have its own.
    """

    config: CfgNode
    settings: AdaptSettings
    builder: Callable[[CfgNode], nn.Module] = field(default=build_model, kw_only=True)

    def build(self) -> nn.Module:
        """Build the model on ``MODEL.DEVICE``, as its constructors leave it, with the settings attached."""
        return attach_keep(self.build_base(), KeepSettings.from_config(self.config))

    def build_base(self) -> nn.Module:
        """Build the model without the classes that ``MODEL.HEAD_ADAPT.KEEP`` adds."""
        with building():
            model: nn.Module = self.builder(self.config)
        attach_settings(model, self.settings)
        return model

    def build_on_meta(self) -> nn.Module:
        """Build the model's names and shapes; on the CPU where a module does not build on the meta device."""
        return build_on_meta(self.config, self.builder)

    def build_small(self) -> nn.Module:
        """Build the model on the CPU with few detections and no threshold; no random stream moves."""
        cfg = self.config.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        # Everything is a detection, and few of them: each head is called, and soon done.
        cfg.TEST.DETECTIONS_PER_IMAGE = 3
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 8
        for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.get("FCOS", {})):
            if "SCORE_THRESH_TEST" in node:
                node.SCORE_THRESH_TEST = 0.0
        with building(), torch.random.fork_rng(devices=[]):
            model: nn.Module = self.builder(cfg)
        return model

    def training_dicts(self) -> list[dict[str, Any]]:
        """Load the training dicts; see :func:`d2_headadapt.data.task_datasets.every_training_dict`."""
        return every_training_dict(self.config)

    def mapper_at_test_size(self) -> Mapper:
        """Make the mapper; see :func:`d2_headadapt.data.task_mapper.mapper_at_test_size`."""
        return mapper_at_test_size(self.config)

    def test_augmentations(self) -> list[Any]:
        """List what a test image goes through."""
        size = self.config.INPUT.MIN_SIZE_TEST
        if size < 0:
            raise ConfigError(
                INPUT.MIN_SIZE_TEST,
                expected="the pixels of an image's shorter side, or 0 to leave it",
                found=str(size),
                fix=f"Write the size that the model was trained with, such as {INPUT.MIN_SIZE_TEST.set(800)}.",
            )
        return [T.ResizeShortestEdge([size, size], self.config.INPUT.MAX_SIZE_TEST)] if size else []

    def with_tables(self, tables: Mapping[str, ClassTable]) -> Recipe:
        """Return this recipe with tables for label spaces that the config leaves open and a checkpoint knows."""
        target = {**tables, **self.settings.target}
        cfg = self.config.clone()
        cfg.defrost()
        apply_num_classes(cfg, target)
        cfg.freeze()
        return replace(self, config=cfg, settings=replace(self.settings, target=target))


@dataclass(frozen=True)
class LazyRecipe(Recipe):
    """A settled LazyConfig, and how to build from it; ``config`` is the yaml that it amounts to.

    Args:
        lazy: as :func:`d2_headadapt.setup.lazy.prepare` leaves it.
    """

    lazy: DictConfig

    def build_base(self) -> nn.Module:
        model: nn.Module = built(self.lazy.model, "model")
        return model.to(self.config.MODEL.DEVICE)

    def build_on_meta(self) -> nn.Module:
        try:
            with torch.device("meta"):
                model: nn.Module = built(self.lazy.model, "model")
        except (NotImplementedError, RuntimeError):
            model = built(self.lazy.model, "model")
        return model

    def build_small(self) -> nn.Module:
        tree = copy.deepcopy(self.lazy.model)
        for _, node in calls(tree):
            for key, value in (("test_score_thresh", 0.0), ("test_topk_per_image", 3), ("max_detections_per_image", 3)):
                if key in node:
                    node[key] = value
            if "post_nms_topk" in node:
                node.post_nms_topk = (8, 8)
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = built(tree, "model")
        return model

    def training_dicts(self) -> list[dict[str, Any]]:
        if self.config.DATASETS.TRAIN:
            return every_training_dict(self.config)
        # A function of the user's own knows its dataset itself.
        if target_of(select(self.lazy, "dataloader.train.dataset")) in (None, get_detection_dataset_dicts):
            raise no_training_set()
        dicts: list[dict[str, Any]] = built(self.lazy.dataloader.train.dataset, "dataloader.train.dataset")
        return dicts

    def mapper_at_test_size(self) -> Mapper:
        """Make the training mapper with the augmentations of the test mapper."""
        node = select(self.lazy, "dataloader.train.mapper")
        target = target_of(node)
        if not (isinstance(target, type) and issubclass(target, DatasetMapper)) or "augmentations" not in node:
            return mapper_at_test_size(self.config)
        node = copy.deepcopy(node)
        node.augmentations = copy.deepcopy(select(self.lazy, "dataloader.test.mapper", {}).get("augmentations", []))
        mapper: Mapper = built(node, "dataloader.train.mapper")
        return mapper

    def test_augmentations(self) -> list[Any]:
        mapper = select(self.lazy, "dataloader.test.mapper")
        found = mapper.get("augmentations") if isinstance(mapper, DictConfig) else None
        return (
            list(built(found, "dataloader.test.mapper.augmentations"))
            if found is not None
            else super().test_augmentations()
        )

    def with_tables(self, tables: Mapping[str, ClassTable]) -> LazyRecipe:
        cfg = self.config.clone()
        cfg.defrost()
        made = prepare(self.lazy, reads_labels=False, required=False, mirror=cfg, known=tables)
        return LazyRecipe(made.config, made.settings, made.lazy)


def read_recipe(
    config_file: str,
    opts: Sequence[str] = (),
    imports: Sequence[str] = (),
    *,
    reads_labels: bool = False,
    change: Callable[[CfgNode], None] = lambda cfg: None,
) -> Recipe:
    """Read and resolve what ``--config-file`` names.

    Args:
        config_file: a yaml, a LazyConfig's ``.py``, or empty for detectron2's defaults.
        opts: overrides: ``KEY VALUE`` pairs, or ``key=value`` for a LazyConfig.
        imports: modules or files that register components.
        reads_labels: see :func:`d2_headadapt.setup.yaml.resolve_config`.
        change: changes the config, or a LazyConfig's mirror, before it is resolved.

    Raises:
        HeadAdaptError: what cannot be read or used.
    """
    builder = builder_of(import_components(imports))
    lazy = load_lazy_config(config_file, opts, imports) if form_of(config_file) is Form.LAZY else None
    cfg = load_config(config_file, opts, imports) if lazy is None else mirror_of(lazy)
    change(cfg)
    return resolved_recipe(cfg, lazy, reads_labels=reads_labels, builder=builder)


def resolved_recipe(
    cfg: CfgNode,
    lazy: DictConfig | None,
    *,
    reads_labels: bool = True,
    builder: Callable[[CfgNode], nn.Module] = build_model,
) -> Recipe:
    """Resolve a config that was read, in place; with ``lazy`` it is the mirror of that."""
    if lazy is None:
        return Recipe(cfg, resolve_config(cfg, reads_labels=reads_labels), builder=builder)
    made = prepare(lazy, reads_labels=reads_labels, mirror=cfg)
    return LazyRecipe(made.config, made.settings, made.lazy)
