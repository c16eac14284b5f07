"""Find heads that never train, in the first iteration: a head that is declared and never called is silent."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..adapt.classes import shorten
from ..data.task_spec import TaskSpec
from ..key import MODEL, shown
from ..modeling.task_heads import TaskHead

logger = logging.getLogger(__name__)

RECHECK = 100
"""After so many iterations whoever still has no gradient is named again."""

BODY = "backbone."
"""Not watched: what detectron2's models call the part that is no head."""

NEVER_CALLED = "nothing calls it in forward, so it never trains: call it and return its loss, or remove it"
NO_LOSS = "it is called, but no loss depends on what it returns"
NO_LABEL = "its gradient is zero: the batches so far have no label of it, or predict each to the last bit"
ZERO_WEIGHT = "its loss_weight is 0"
ZERO = "its gradient is zero: nothing in the batches so far trains it, or its loss has weight 0"
NO_HEAD = (
    "the model has no head for it: tasks on boxes need one of the ROI heads of d2_headadapt, such as "
    f"{MODEL.ROI_HEADS.NAME.set('HeadAdaptROIHeads')}, tasks on images "
    f"{MODEL.META_ARCHITECTURE.set('MultiTaskClassifier')}"
)
WITH_DDP = (
    'DistributedDataParallel stops at the next iteration because of it ("Expected to have finished reduction in the '
    'prior iteration")'
)


@dataclass(frozen=True)
class Untrained:
    """A head without a gradient.

    Args:
        head: the name of its module, or of its task.
        parameters: names of those that got none; empty where there is no head at all.
        reason: as far as it can be known.
        later: another batch may train it.
        unused: some parameter is in no graph, which DDP does not bear.
    """

    head: str
    parameters: tuple[str, ...]
    reason: str
    later: bool = False
    unused: bool = False

    def line(self, iteration: int, checked_until: int, processes: int) -> str:
        """Say what is wrong with it.

        Args:
            iteration: how many were done.
            checked_until: how many will have been done when it is looked at for the last time.
            processes: of the job.
        """
        text = f"{self.head} got no gradient in iteration {iteration}: {self.reason}."
        if self.parameters:
            text += f" Parameters: {shorten(self.parameters, 12)}."
        if self.later:
            text += f" It is looked at again until iteration {checked_until}."
        if self.unused and processes > 1:
            text += f" {WITH_DDP}."
        return text


class UntrainedHeads(HookBase):
    """A hook that names, after the first iteration, every parameter outside the backbone without a gradient.

    That is one whose gradient is ``None`` or all zeros. Parameters that were frozen on purpose (``requires_grad``
    False) are left alone. What another batch may mend (a task without a label in the first one) is looked at again,
    alone, until it has a gradient or ``recheck`` iterations are done; then there is nothing left to do.

    Args:
        specs: the tasks that the config declares.
        recheck: iterations of this run.
    """

    def __init__(self, specs: Sequence[TaskSpec] = (), recheck: int = RECHECK) -> None:
        self._specs, self._recheck = tuple(specs), recheck
        self._pending: dict[str, nn.Parameter] | None = None
        self._promised: set[str] = set()
        self._called: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._steps = 0

    def before_step(self) -> None:
        """Listen, before the first iteration, to which modules are called."""
        if self._pending is not None:
            return
        model = self._model()
        self._pending = {
            name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(BODY)
        }
        watched = {prefix for name in self._pending for prefix in _prefixes(name)}
        for name, module in model.named_modules():
            if name in watched:
                # The name is bound now; a hook is called with the module alone.
                self._handles.append(module.register_forward_hook(lambda *_, name=name: self._called.add(name)))

    def after_step(self) -> None:
        """Look at the gradients, which live until the next backward pass."""
        if not self._pending:
            return
        self._steps += 1
        trained = [n for n, p in self._pending.items() if p.grad is not None and bool(p.grad.any())]
        for name in trained:
            del self._pending[name]
        if self._steps == 1:
            self._stop_listening()
            self._say_first(self._pending)
        elif self._promised.intersection(trained):
            now = sorted(self._promised.intersection(trained))
            logger.info("First gradient in iteration %d: %s", self.trainer.iter + 1, shorten(now, 12))
        if self._steps >= self._recheck:
            self._say_last(self._pending)

    def after_train(self) -> None:
        """Say what is left also where training ends earlier."""
        self._stop_listening()
        if self._pending and self._steps > 1 and self.trainer.iter >= self.trainer.max_iter:
            self._say_last(self._pending)

    def _model(self) -> nn.Module:
        model: nn.Module = self.trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _say_first(self, pending: Mapping[str, nn.Parameter]) -> None:
        last = min(self.trainer.iter + self._recheck, self.trainer.max_iter)
        for found in find_untrained(self._model(), pending, self._called, self._specs):
            if found.later:
                self._promised.update(found.parameters)
            logger.warning("%s", found.line(self.trainer.iter + 1, last, comm.get_world_size()))

    def _say_last(self, pending: Mapping[str, nn.Parameter]) -> None:
        left = {name: p for name, p in pending.items() if name in self._promised}
        for found in find_untrained(self._model(), left, self._called, ()):
            logger.warning(
                "%s got no gradient in %d iterations: %s. Parameters: %s.",
                found.head,
                self._steps,
                found.reason,
                shorten(found.parameters, 12),
            )
        self._pending = {}


def find_untrained(
    model: nn.Module, pending: Mapping[str, nn.Parameter], called: Collection[str], specs: Sequence[TaskSpec]
) -> list[Untrained]:
    """Find the heads of parameters that got no gradient, each with its reason.

    Args:
        model: not wrapped.
        pending: its parameters without a gradient.
        called: names of the modules whose ``forward`` ran.
        specs: tasks that there should be heads for.
    """
    modules = dict(model.named_modules())
    alive = {prefix for name in called for prefix in (*_prefixes(name), name)}
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, parameter in pending.items():
        owners = _prefixes(name)
        task = next((prefix for prefix in owners if isinstance(modules[prefix], TaskHead)), None)
        dead = next((prefix for prefix in owners if prefix not in alive), None)
        reason = ZERO if parameter.grad is not None else NO_LOSS if dead is None else NEVER_CALLED
        head = task or (dead if reason == NEVER_CALLED else None) or (owners or [name])[-1]
        grouped.setdefault((head, reason), []).append(name)
    found = []
    for (head, reason), names in grouped.items():
        unused = reason != ZERO
        own = modules.get(head)
        if isinstance(own, TaskHead):
            if reason == ZERO and len(names) == sum(p.requires_grad for p in own.parameters()):
                reason = NO_LABEL if own.spec.loss_weight else ZERO_WEIGHT
            head = f"Task {own.spec.name} ({head})"
        found.append(Untrained(head, tuple(names), reason, reason in (ZERO, NO_LABEL), unused))
    there = {module.spec.name for module in modules.values() if isinstance(module, TaskHead)}
    missing = (spec.name for spec in specs if spec.name not in there)
    return [*found, *(Untrained(f"Task {name}", (), shown(NO_HEAD)) for name in missing)]


def _prefixes(name: str) -> list[str]:
    """List the modules around a parameter or module, outermost first: ``a.b.weight`` is in ``a`` and ``a.b``."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
