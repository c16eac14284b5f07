"""Fit inside a training loop: new rows before the first iteration, lookahead afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..data.task_datasets import every_training_dict
from ..data.task_mapper import Mapper, mapper_at_test_size
from ..key import HEAD_ADAPT, Words
from ..modeling.keep import keep_of
from .fit import fit_new_rows
from .images import FeatureCache
from .lookahead import EVERY, Lookahead, LookaheadSettings, forget_momentum
from .settings import FitReport, FitSettings

logger = logging.getLogger(__name__)
SKIP = HEAD_ADAPT.FIT.ENABLED.set(False)


def features_stand_still(model: Any) -> bool:
    """Tell whether what the new rows read never moves: added classes on an unmodified model's features."""
    keep = keep_of(getattr(model, "module", model))
    return keep is not None and all(keep.settings.packs[i].head == "shared" for i in keep.settings.trained)


class FitHook(HookBase):
    """A hook that fits new rows before iteration 1, then keeps the first iterations from undoing it.

    Fitted rows are several times as large as rows that training has just begun with (norm 1.9 against 0.3 after 400
    iterations of stock's), and so are the gradients, and their noise, that reach the features. Left alone, AP falls for
    200 iterations although the features get better: on bccd/val, 50 and 100 iterations after a fit, AP was 41.7 and
    37.9 with the weights as they were, and 44.0 and 44.1 with the rows solved again. Hence two things, both of
    :mod:`.lookahead`: averaged steps, and rows solved again at marks. A continued run stays calm; its rows
    are not solved again, because its classes may be others.

    Args:
        dataset: gives the training set, category ids contiguous.
        mapper: see :data:`d2_headadapt.fit.Mapper`.
        new: gives the new classes; asked when training starts, after the checkpoint was loaded.
        settings: of the fit.
        calm: of the iterations that follow.
        skip: what to type to train without it, for the log.

    Attributes:
        report: of the fit; ``None`` before it.
    """

    def __init__(
        self,
        dataset: Callable[[], Sequence[dict[str, Any]]],
        mapper: Mapper,
        new: Callable[[], Mapping[str, Sequence[int]]],
        settings: FitSettings,
        calm: LookaheadSettings | None = None,
        skip: Words = SKIP,
    ) -> None:
        self._dataset, self._mapper, self._new = dataset, mapper, new
        self._settings, self._calm, self._skip = settings, calm or LookaheadSettings(), skip
        self._solved: tuple[str, ...] = ()
        self._lookahead: Lookahead | None = None
        self._fitted: dict[str, Sequence[int]] = {}
        self._cache: FeatureCache | None = None
        self._seen: Sequence[dict[str, Any]] = []
        self.report: FitReport | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, new: Callable[[], Mapping[str, Sequence[int]]], skip: Words = SKIP) -> FitHook:
        """Make the hook for the training sets of a config.

        Args:
            cfg: with the keys under ``MODEL.HEAD_ADAPT.FIT``.
            new: gives the new classes, as :meth:`HeadAdaptCheckpointer.rows_to_fit`.
            skip: what to type to train without it, for the log.
        """
        fit, calm = FitSettings.from_config(cfg), LookaheadSettings.from_config(cfg)
        return cls(partial(every_training_dict, cfg), mapper_at_test_size(cfg), new, fit, calm, skip)

    def before_train(self) -> None:
        """Fit, unless this run continues an earlier one."""
        if self.trainer.start_iter == 0:
            self._fitted = {name: classes for name, classes in self._new().items() if len(classes)}
            if self._fitted:
                checkpointer = getattr(self.trainer, "checkpointer", None)
                # A file that is saved before the first iteration says what was fitted.
                noted = checkpointer.fitted_rows() if isinstance(checkpointer, HeadAdaptCheckpointer) else nullcontext()
                self._cache = FeatureCache(self._settings.cache_mb)
                dicts = self._dataset()
                with noted:
                    self.report = self._fit(dicts, self._settings)
                # Kept for the solutions to come; a whole training set would be read again each time.
                self._seen = [dicts[i] for i in self.report.chosen]
                self._solved = self.report.solved
        if features_stand_still(self.trainer.model):
            # Rows that are solved again on the same features are the rows of the first fit: training would be lost.
            self._calm = replace(self._calm, refits=())
        if self._solved and self.trainer.start_iter < self._calm.calm_iters:
            self._lookahead = Lookahead(self.trainer.model)

    def _fit(self, dicts: Sequence[dict[str, Any]], settings: FitSettings) -> FitReport:
        model, cache = self.trainer.model, self._cache
        backbone = getattr(getattr(model, "module", model), "backbone", None)
        if backbone is None or any(p.requires_grad for p in backbone.parameters()):
            cache = None  # Its features move.
        again = self.report is not None
        # A solution that is repeated has one line, of its iteration.
        return fit_new_rows(
            model,
            dicts,
            self._mapper,
            new=self._fitted,
            settings=settings,
            cache=cache,
            skip=self._skip,
            quiet=again,
        )

    def after_step(self) -> None:
        """Average the steps, and solve the rows again at marks."""
        done = self.trainer.iter + 1
        if self._lookahead is not None and done % EVERY == 0:
            self._lookahead.step()
        if done in self._calm.refits and self.report is not None and self._solved and done < self.trainer.max_iter:
            self._refit(done, self.report)
        if done >= self._calm.calm_iters:
            self._lookahead = None
        if done >= max(self._calm.refits, default=0):
            self._cache, self._seen = None, []

    def _refit(self, done: int, first: FitReport) -> None:
        parts = tuple(part for part in self._settings.parts if part in ("box", "dense", "task"))
        # Not those of masks, which are not solved again.
        classifiers = [part.penalties for part in first.parts if not part.part.endswith("mask_head.predictor")]
        chosen = {own[layer] for own in classifiers for layer in ("cls_score", "predictor") if layer in own}
        # What the held-out images chose for the classifier is kept: most of the time goes into that choice.
        penalties = tuple(sorted(chosen, reverse=True)) or self._settings.penalties
        model = self.trainer.model
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        report = self._fit(self._seen, replace(self._settings, parts=parts, penalties=penalties, mirror=False))
        forget_momentum(self.trainer.optimizer, model, before)
        logger.info("iteration %d: %s", done, report.line())
        if self._lookahead is not None:
            self._lookahead.restart()

    def state_dict(self) -> dict[str, Any]:
        """Write what a continued run needs to go on with lookahead; empty without a fit, as in a stock checkpoint."""
        return {"solved": list(self._solved)} if self._solved else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the fitted parts of the run that is continued, from ``state`` as :meth:`state_dict` wrote it."""
        self._solved = tuple(str(part) for part in state.get("solved", ()))
