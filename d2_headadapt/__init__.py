"""d2_headadapt: keep every weight that still means something when a detectron2 model gets another class list."""

from __future__ import annotations

import importlib.util as _util

# A folder of that name, such as a clone in the working directory, is found too, but has no origin.
if getattr(_util.find_spec("detectron2"), "origin", None) is None:
    raise ImportError(
        "d2_headadapt needs detectron2, which is not on PyPI under that name: "
        "see https://detectron2.readthedocs.io/tutorials/install.html, or run tools/setup_env.sh of this project."
    )

from .adapt.classes import ClassMap, ClassTable
from .adapt.layouts import HeadLayout
from .adapt.matching import match_classes
from .adapt.plan import AdaptPlan, TensorPlan
from .adapt.planner import plan_adaptation
from .adapt.registry import layouts_of, register_head_layout
from .adapt.vocabularies import vocabulary
from .checkpoint.checkpointer import HeadAdaptCheckpointer
from .config.keep import KeepSettings, PackSpec
from .config.keys import add_headadapt_config
from .config.settings import AdaptSettings
from .engine.own_loop import adapt_state_dict, fit_rows
from .engine.train import Trainer
from .errors import HeadAdaptError
from .modeling.backbone import build_conv_net_backbone
from .modeling.classifier import MultiTaskClassifier
from .modeling.keep_model import attach_keep
from .modeling.predictor import PREDICTOR_REGISTRY, HeadAdaptOutputLayers
from .modeling.roi_heads import HeadAdaptCascadeROIHeads, HeadAdaptRes5ROIHeads, HeadAdaptROIHeads
from .modeling.text.predictor import HeadAdaptTextOutputLayers
from .version import __version__

__all__ = [
    "PREDICTOR_REGISTRY",
    "AdaptPlan",
    "AdaptSettings",
    "ClassMap",
    "ClassTable",
    "HeadAdaptCascadeROIHeads",
    "HeadAdaptCheckpointer",
    "HeadAdaptError",
    "HeadAdaptOutputLayers",
    "HeadAdaptROIHeads",
    "HeadAdaptRes5ROIHeads",
    "HeadAdaptTextOutputLayers",
    "HeadLayout",
    "KeepSettings",
    "MultiTaskClassifier",
    "PackSpec",
    "TensorPlan",
    "Trainer",
    "__version__",
    "adapt_state_dict",
    "add_headadapt_config",
    "attach_keep",
    "build_conv_net_backbone",
    "fit_rows",
    "layouts_of",
    "match_classes",
    "plan_adaptation",
    "register_head_layout",
    "vocabulary",
]
