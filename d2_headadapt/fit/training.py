"""The fit inside a training loop: before the first iteration, and calm features afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.engine import HookBase

from ..plan import AdaptPlan
from .entry import fit_new_rows
from .images import Mapper
from .options import FitReport, FitSettings


def new_rows_of(plan: AdaptPlan) -> dict[str, tuple[int, ...]]:
    """The classes without a trained row, tensor by tensor: a file may have the boxes of a class and not its masks."""
    return {t.name: t.new for t in plan.by_action("carried", "initialised") if t.new}


def mapper_at_test_size(cfg: CfgNode) -> Mapper:
    """Images as the model will see them when it predicts, with their labels, and without any augmentation."""
    size = cfg.INPUT.MIN_SIZE_TEST
    mapper: Mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(size, cfg.INPUT.MAX_SIZE_TEST)] if size else [],
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
    )
    return mapper


class FitHook(HookBase):
    """Fits new rows before iteration 1, then slows everything below the fitted layers.

    Fitted rows are several times as large as rows that training has just begun with (norm 1.6 against 0.3 after 400
    iterations of stock's), so the gradients that reach the features are too, and their curvature grows with the
    square. Slowing the features makes the fall after the first iterations smaller (bccd/val, one seed: from 42.7 to
    33.8 at its lowest at full speed, to 40.4 at 0.3); it does not remove it (bccd/test, one seed: 41.5 to 36.9).

    Args:
        dataset: gives the training set, category ids contiguous.
        mapper: see :data:`d2_headadapt.fit.images.Mapper`.
        new: gives the new classes; asked when training starts, after the checkpoint was loaded.
        settings: of the fit.
        feature_rate: factor on the gradient of every parameter that is not of a fitted layer; 1 changes nothing.
    """

    def __init__(
        self,
        dataset: Callable[[], Sequence[dict[str, Any]]],
        mapper: Mapper,
        new: Callable[[], Mapping[str, Sequence[int]]],
        settings: FitSettings,
        feature_rate: float = 0.3,
    ) -> None:
        self._dataset, self._mapper, self._new = dataset, mapper, new
        self._settings, self._rate = settings, feature_rate
        self._solved: tuple[str, ...] = ()
        self.report: FitReport | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, new: Callable[[], Mapping[str, Sequence[int]]]) -> FitHook:
        """The hook for the training sets of a config, with the keys under ``MODEL.HEAD_ADAPT.FIT``."""

        def dataset() -> Sequence[dict[str, Any]]:
            dicts: list[dict[str, Any]] = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
            return dicts

        node = cfg.MODEL.HEAD_ADAPT.FIT
        return cls(dataset, mapper_at_test_size(cfg), new, FitSettings.from_config(cfg), float(node.FEATURE_RATE))

    def before_train(self) -> None:
        """Fit, unless this run continues an earlier one."""
        if self.trainer.start_iter > 0:
            return
        new = {name: classes for name, classes in self._new().items() if len(classes)}
        if new:
            model = self.trainer.model
            self.report = fit_new_rows(model, self._dataset(), self._mapper, new=new, settings=self._settings)
            self._solved = self.report.solved

    def after_backward(self) -> None:
        """Scale the gradients of what lies below the fitted layers."""
        if not self._solved or self._rate == 1:
            return
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.grad is not None and not self._is_solved(name.removeprefix("module.")):
                parameter.grad.mul_(self._rate)

    def _is_solved(self, name: str) -> bool:
        last_layers = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred", "predictor")
        return name.split(".")[-2] in last_layers and any(name.startswith(f"{part}.") for part in self._solved)

    def state_dict(self) -> dict[str, Any]:
        """A continued run stays calm. Empty without a fit, so that a checkpoint holds nothing that stock lacks."""
        return {"solved": list(self._solved)} if self._solved else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the fitted parts of the run that is continued."""
        self._solved = tuple(str(part) for part in state.get("solved", ()))
