"""Fine-tune a detectron2 checkpoint on another class list: weights move to the right row by class name.

Names are imported when they are first asked for, so that ``import d2_headadapt`` costs next to nothing; the components
that configs name are registered with detectron2 all the same (:mod:`d2_headadapt.deferred`).
"""

from __future__ import annotations

import importlib.util as _util
from typing import TYPE_CHECKING

# A folder of that name, such as a clone in the working directory, is found too, but has no origin.
if getattr(_util.find_spec("detectron2"), "origin", None) is None:
    raise ImportError(
        "d2_headadapt needs detectron2, which is not on PyPI under that name: "
        "see https://detectron2.readthedocs.io/tutorials/install.html, or run tools/setup_env.sh of this project."
    )

from .deferred import lazy_names as _lazy_names
from .deferred import register_components as _register_components
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapt.causes import Cause as Cause
    from .adapt.causes import Why as Why
    from .adapt.classes import ClassMap as ClassMap
    from .adapt.classes import ClassTable as ClassTable
    from .adapt.detectron2_heads import layouts_of as layouts_of
    from .adapt.detectron2_heads import register_head_layout as register_head_layout
    from .adapt.layouts import HeadLayout as HeadLayout
    from .adapt.matching import match_classes as match_classes
    from .adapt.plan import AdaptPlan as AdaptPlan
    from .adapt.plan import TensorPlan as TensorPlan
    from .adapt.planner import match_tables as match_tables
    from .adapt.planner import plan_adaptation as plan_adaptation
    from .adapt.report import plan_table as plan_table
    from .adapt.vocabularies import vocabulary as vocabulary
    from .checkpoint.checkpointer import HeadAdaptCheckpointer as HeadAdaptCheckpointer
    from .checkpoint.load import plan_file as plan_file
    from .config.keep import KeepSettings as KeepSettings
    from .config.keep import PackSpec as PackSpec
    from .config.keys import add_headadapt_config as add_headadapt_config
    from .config.settings import AdaptSettings as AdaptSettings
    from .engine.own_loop import adapt_state_dict as adapt_state_dict
    from .engine.own_loop import fit_rows as fit_rows
    from .engine.train import Trainer as Trainer
    from .errors import HeadAdaptError as HeadAdaptError
    from .evaluation.drawing import draw_tasks as draw_tasks
    from .files import read_checkpoint as read_checkpoint
    from .modeling.classifier import POOLING_REGISTRY as POOLING_REGISTRY
    from .modeling.classifier import MultiTaskClassifier as MultiTaskClassifier
    from .modeling.keep_model import attach_keep as attach_keep
    from .modeling.predictor import PREDICTOR_REGISTRY as PREDICTOR_REGISTRY
    from .modeling.predictor import HeadAdaptOutputLayers as HeadAdaptOutputLayers
    from .modeling.roi_heads import HeadAdaptCascadeROIHeads as HeadAdaptCascadeROIHeads
    from .modeling.roi_heads import HeadAdaptRes5ROIHeads as HeadAdaptRes5ROIHeads
    from .modeling.roi_heads import HeadAdaptROIHeads as HeadAdaptROIHeads
    from .modeling.text.bundle import TextBundle as TextBundle
    from .modeling.text.bundle import read_bundle as read_bundle
    from .modeling.text.nearest import plan_nearest as plan_nearest
    from .modeling.text.predictor import HeadAdaptTextOutputLayers as HeadAdaptTextOutputLayers
    from .setup.build import build_on_meta as build_on_meta
    from .setup.lazy import load_lazy_config as load_lazy_config
    from .setup.lazy import prepare as prepare_lazy_config  # noqa: F401
    from .setup.yaml import load_config as load_config
    from .setup.yaml import resolve_config as resolve_config

_HOMES = {
    "POOLING_REGISTRY": "modeling.classifier",
    "PREDICTOR_REGISTRY": "modeling.predictor",
    "AdaptPlan": "adapt.plan",
    "AdaptSettings": "config.settings",
    "Cause": "adapt.causes",
    "ClassMap": "adapt.classes",
    "ClassTable": "adapt.classes",
    "HeadAdaptCascadeROIHeads": "modeling.roi_heads",
    "HeadAdaptCheckpointer": "checkpoint.checkpointer",
    "HeadAdaptError": "errors",
    "HeadAdaptOutputLayers": "modeling.predictor",
    "HeadAdaptROIHeads": "modeling.roi_heads",
    "HeadAdaptRes5ROIHeads": "modeling.roi_heads",
    "HeadAdaptTextOutputLayers": "modeling.text.predictor",
    "HeadLayout": "adapt.layouts",
    "KeepSettings": "config.keep",
    "MultiTaskClassifier": "modeling.classifier",
    "PackSpec": "config.keep",
    "TensorPlan": "adapt.plan",
    "TextBundle": "modeling.text.bundle",
    "Trainer": "engine.train",
    "Why": "adapt.causes",
    "adapt_state_dict": "engine.own_loop",
    "add_headadapt_config": "config.keys",
    "attach_keep": "modeling.keep_model",
    "build_on_meta": "setup.build",
    "draw_tasks": "evaluation.drawing",
    "fit_rows": "engine.own_loop",
    "layouts_of": "adapt.detectron2_heads",
    "load_config": "setup.yaml",
    "load_lazy_config": "setup.lazy",
    "match_classes": "adapt.matching",
    "match_tables": "adapt.planner",
    "plan_adaptation": "adapt.planner",
    "plan_file": "checkpoint.load",
    "plan_nearest": "modeling.text.nearest",
    "plan_table": "adapt.report",
    "prepare_lazy_config": "setup.lazy:prepare",
    "read_bundle": "modeling.text.bundle",
    "read_checkpoint": "files",
    "register_head_layout": "adapt.detectron2_heads",
    "resolve_config": "setup.yaml",
    "vocabulary": "adapt.vocabularies",
}
__all__ = [*_HOMES, "__version__"]
__getattr__, __dir__ = _lazy_names(__name__, _HOMES, ("data", "engine", "errors", "export", "fit"))

_register_components()
