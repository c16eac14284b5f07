"""``d2-headadapt run --plan``: a script runs up to its first load, and the plan for the model it built is printed."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from ...adapt.report import plan_table
from ...checkpoint.checkpointer import HeadAdaptCheckpointer
from ...checkpoint.load import check_exists, plan_file, refuse_plan
from ...config.settings import AdaptSettings, settings_of
from ...errors import UsageError
from ...key import MODEL


def adopt_planning() -> None:
    """Let the first load of any checkpointer, or a training without one, end the script."""
    for cls in (HeadAdaptCheckpointer, DetectionCheckpointer, Checkpointer):
        stop_at_load(cls)
    TrainerBase.train = _refuse_training


def stop_at_load(cls: type[Checkpointer]) -> None:
    """Replace the ``load`` of a class by one that prints the plan and ends the script."""
    cls.load = _print_plan


def _print_plan(self: Any, path: str, *args: Any, **kwargs: Any) -> NoReturn:
    if not path:
        raise UsageError(
            "d2-headadapt run --plan",
            expected="a checkpoint that the script loads",
            found="an empty path: the model starts as its constructors leave it",
            fix=f"Name a checkpoint in {MODEL.WEIGHTS}.",
        )
    settings = getattr(self, "settings", None) or settings_of(self.model) or AdaptSettings()
    own = bool(self.save_dir) and self.has_checkpoint() and path == self.get_checkpoint_file()
    check_exists(path, own_file=own)
    made = plan_file(path, self.model, settings, own=own)
    if comm.is_main_process():
        print(f"Plan of {path} for the {type(self.model).__name__} that the script built:\n{plan_table(made)}")
    refuse_plan(made, settings.min_coverage, path, as_stock=settings.as_stock)
    sys.stdout.flush()
    raise SystemExit(0)


def _refuse_training(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "d2-headadapt run --plan",
        expected="a load of detectron2's or fvcore's checkpointer before the training",
        found="none: the script starts a new model, or loads its weights itself",
        fix="Type d2-headadapt plan --config-file ..., or run the script without --plan.",
    )
