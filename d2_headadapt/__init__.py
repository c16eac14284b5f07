"""d2_headadapt: keep every weight that still means something when a detectron2 model gets another class list."""

from __future__ import annotations

import importlib.util as _util

# A folder of that name, such as a clone in the working directory, is found too, but has no origin.
if getattr(_util.find_spec("detectron2"), "origin", None) is None:
    raise ImportError(
        "d2_headadapt needs detectron2, which is not on PyPI under that name: "
        "see https://detectron2.readthedocs.io/tutorials/install.html, or run tools/setup_env.sh of this project."
    )

from .checkpoint import HeadAdaptCheckpointer
from .classes import ClassMap, ClassTable
from .config import add_headadapt_config
from .engine import Trainer
from .errors import HeadAdaptError
from .layout_registry import layouts_of, register_head_layout
from .layouts import HeadLayout
from .matching import match_classes
from .own_loop import adapt_state_dict, fit_rows
from .plan import AdaptPlan, TensorPlan
from .planning import plan_adaptation
from .predictor import PREDICTOR_REGISTRY, HeadAdaptOutputLayers
from .roi_heads import HeadAdaptCascadeROIHeads, HeadAdaptRes5ROIHeads, HeadAdaptROIHeads
from .settings import AdaptSettings
from .tasks.backbones import build_conv_net_backbone
from .tasks.classifier import MultiTaskClassifier
from .text.predictor import HeadAdaptTextOutputLayers
from .version import __version__
from .vocabularies import vocabulary

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
    "MultiTaskClassifier",
    "TensorPlan",
    "Trainer",
    "__version__",
    "adapt_state_dict",
    "add_headadapt_config",
    "build_conv_net_backbone",
    "fit_rows",
    "layouts_of",
    "match_classes",
    "plan_adaptation",
    "register_head_layout",
    "vocabulary",
]
