"""The checkpointer: stock detectron2's, with a plan between the file and the model."""

from __future__ import annotations

import copy
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from ..adapt.plan import AdaptPlan
from ..adapt.registry import layouts_of
from ..adapt.report import plan_json, plan_notices, plan_table, summary_line
from ..config.settings import AdaptSettings, settings_of
from ..errors import CheckpointFileError, HeadAdaptError, RankError
from ..files import read_checkpoint, shapes_of, verify_tensors, write_checkpoint, write_text
from ..modeling.text.nearest import NearestRows, plan_nearest
from ..modeling.text.predictor import FACTS, refuse_other_text, text_facts
from .kept import KeptGuard, with_packs
from .load import (
    asks_heuristics,
    check_exists,
    has_foreign_hooks,
    not_fetched,
    plan_load,
    refuse_plan,
    settle_checkpoint,
)
from .optimizer import adapt_averages, adapt_resume, find_optimizer
from .provenance import KEY, Provenance, optimizer_names
from .ranks import agree, compare, everywhere, readable_everywhere, share_new_rows
from .untrained import OPEN_ROWS, open_rows, projections, unchanged_classes, untrained_classes

logger = logging.getLogger(__name__)
PLAN_FILE = "head_adapt_plan.json"
"""Beside a run's checkpoints: what its last load did."""


class HeadAdaptCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that moves every class-dependent row by class name.

    Saved files carry the class tables they were made with, and stock detectron2 loads them.

    Attributes:
        plan: what the last load did; ``None`` before the first.
        untrained: class names by label space of which some row was neither carried, fitted nor trained.

    Example:
        >>> import tempfile
        >>> from detectron2.layers import ShapeSpec
        >>> from detectron2.modeling.box_regression import Box2BoxTransform
        >>> from detectron2.modeling.roi_heads import FastRCNNOutputLayers
        >>> from torch import nn
        >>> from d2_headadapt import AdaptSettings, HeadAdaptCheckpointer
        >>> def head(classes):  # stands for a whole model
        ...     transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
        ...     layers = FastRCNNOutputLayers(ShapeSpec(channels=4), box2box_transform=transform, num_classes=classes)
        ...     return nn.ModuleDict({"box_predictor": layers})
        >>> folder = tempfile.TemporaryDirectory()
        >>> HeadAdaptCheckpointer(head(3), folder.name, settings=AdaptSettings.of(["ant", "bee", "cat"])).save("old")
        >>> checkpointer = HeadAdaptCheckpointer(head(2), settings=AdaptSettings.of(["gnu", "cat"]))
        >>> rest = checkpointer.load(f"{folder.name}/old.pth")  # which says its classes
        >>> checkpointer.plan.class_map("thing").carried, checkpointer.untrained
        (((1, 2),), {'thing': ('gnu',)})
        >>> folder.cleanup()
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        settings: AdaptSettings | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: any detectron2 model, wrapped or not.
            save_dir: folder of this run's checkpoints.
            settings: target and source tables, match rule; by default what is attached to the model, and where
                nothing is, heads are loaded as stock detectron2 loads them, which is said.
            save_to_disk, checkpointables: as in ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        found = settings if settings is not None else settings_of(self.model)
        self.settings = found if found is not None else AdaptSettings()
        self._told = found is not None
        self.settings = with_packs(self.settings, self.model)
        self._kept = KeptGuard(self.model)
        self.plan: AdaptPlan | None = None
        self.untrained: dict[str, tuple[str, ...]] = {}
        self._open: dict[str, tuple[str, ...]] = {}
        self._origin = ""
        self._resumes: set[str] = set()
        self._own_file = False
        self._agreed = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint, class by class.

        Args:
            path: file, ``detectron2://`` or http address, with ``?matching_heuristics=True`` where wanted; nothing is
                loaded where it is empty.
            checkpointables: what to load beside the model; ``None`` for everything (a resume).

        Returns:
            What the file holds beside the model and the checkpointables.

        Raises:
            HeadAdaptError: the file or the plan is refused; the model and the checkpointables are as they were.
        """
        if not path:
            return dict(super().load(path, checkpointables) or {})
        local = "://" not in path
        file, _, query = path.partition("?")
        own = bool(self.save_dir) and self.has_checkpoint() and path == self.get_checkpoint_file()
        if comm.get_world_size() == 1:
            check_exists(path, own_file=own)
        self._origin = path
        self._resumes = set(self.checkpointables if checkpointables is None else checkpointables)
        self._agreed = False
        self._own_file = own
        try:
            with readable_everywhere(file, not local or os.path.isfile(file)) as readable, self._as_it_was():
                return dict(super().load(f"{readable}?{query}" if query else readable, checkpointables))
        except HeadAdaptError as exc:
            self._agree(exc)
            raise
        except (OSError, AssertionError) as exc:
            self._agree(not_fetched(path, exc))
            raise
        finally:
            # Stock resets this only after a load that worked, and asserts on it in the next one.
            self._parsed_url_during_load = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As stock's, and refused where only some processes have a run to go on with: the others would wait forever.

        Raises:
            RankError: names the ranks without ``last_checkpoint``.
        """
        there = everywhere(resume and self.has_checkpoint())
        if any(there) and not all(there):
            ranks = ", ".join(str(rank) for rank, found in enumerate(there) if not found)
            raise RankError(
                os.path.join(self.save_dir, "last_checkpoint"),
                expected="a run to go on with on every rank, or on none",
                found=f"none on rank {ranks}",
                fix="Copy last_checkpoint and the file that it names to every machine, or use a shared OUTPUT_DIR.",
            )
        return dict(super().resume_or_load(path, resume=resume))

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Put model and checkpointables back where something fails after the first of them was written to."""
        # A copy of the model costs as much memory as the model, so it is made only where something may fail after the
        # model was written to: other state to load, other ranks to agree with, or a loading hook of somebody else's.
        needed = bool(self._resumes) or comm.get_world_size() > 1 or has_foreign_hooks(self.model)
        tensors = {name: value for name, value in self.model.state_dict().items() if torch.is_tensor(value)}
        model = {name: value.clone() for name, value in tensors.items()} if needed else {}
        others = {n: copy.deepcopy(v.state_dict()) for n, v in self.checkpointables.items() if n in self._resumes}
        try:
            yield
        except BaseException:
            # Not by load_state_dict: a hook of a user's module may be what failed.
            for name, value in model.items():
                tensors[name].copy_(value)
            for name, state in others.items():
                self.checkpointables[name].load_state_dict(state)
            raise

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Only what the plan takes is verified, once the plan is there.
        checkpoint = read_checkpoint(filename, trust=self.settings.trust_file, verify=False)
        if asks_heuristics(self._origin):
            checkpoint["matching_heuristics"] = True
        checkpoint["__path__"] = filename
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        path = checkpoint.pop("__path__", self._origin)
        state, plan, known, error = OrderedDict[str, torch.Tensor](), AdaptPlan(()), Provenance(), None
        try:
            state, plan, known = self._prepare(checkpoint, path)
            self._kept.check_load(state, plan, known, self._origin, resumes=self._own_file)
        except HeadAdaptError as exc:
            error = exc
        self._agree(error)
        self._write_plan(plan)
        untrained, still_open = untrained_classes(plan, known), open_rows(plan, known)
        self.model.load_state_dict(state)
        self._kept.after_load(self.model, known, self._origin)
        share_new_rows(plan, self.model.state_dict())
        compare(self.model.state_dict(), self._origin)
        self._remember(plan, untrained)
        self._open = still_open
        return _IncompatibleKeys(
            missing_keys=[t.name for t in plan.by_action("kept", "initialised")],
            unexpected_keys=[t.name for t in plan.by_action("dropped")],
            incorrect_shapes=[],
        )

    def _agree(self, error: HeadAdaptError | None) -> None:
        """Once per load, whatever it meets: a rank that does not ask would leave the others waiting."""
        if not self._agreed:
            self._agreed = True
            agree(error, self._origin)

    def adapted(
        self, checkpoint: dict[str, Any], path: str, origin: str = ""
    ) -> tuple[dict[str, torch.Tensor], AdaptPlan]:
        """What loading a checkpoint would make of the model's state; nothing is written to.

        Args:
            checkpoint: in stock detectron2's form, ``{"model": {name: values}, ...}``; it loses what is used.
            path: the file that its values are views of, or what it is called in messages.
            origin: the address that the file was fetched from.

        Raises:
            HeadAdaptError: the checkpoint or the plan is refused.
        """
        self._origin, self._resumes = origin or path, set()
        state, plan, _ = self._prepare(checkpoint, path)
        return dict(state), plan

    def _prepare(
        self, checkpoint: dict[str, Any], path: str
    ) -> tuple[OrderedDict[str, torch.Tensor], AdaptPlan, Provenance]:
        """Everything that can fail, before anything is written to; ``checkpoint`` loses what is used."""
        provenance = checkpoint.pop(KEY, None)
        known = Provenance() if provenance is None else Provenance.from_plain(provenance, self._origin)
        if self._own_file:
            self._kept.check_resume(known, self._origin)
        stored = checkpoint.pop("model")
        model_state = self.model.state_dict()
        settings = self.settings
        if self._own_file:
            # What the user said of MODEL.WEIGHTS is not about this run's own checkpoint.
            settings = replace(settings, source={}, initialise=frozenset(), include=(), exclude=(), rename=())
        settled = settle_checkpoint(stored, model_state, checkpoint, settings)
        plan = plan_load(settled, self.model, settings, known, self._origin)
        nearest = NearestRows(plan, {})
        if settings.new_rows == "nearest":
            nearest = plan_nearest(plan, settings.text_file, settings.text_names)
        plan = nearest.plan
        self._say(plan)
        if nearest.neighbours:
            self.logger.info("%s", nearest.line())
        refuse_plan(plan, settings.min_coverage, self._origin)
        refuse_other_text(self.model, plan, settled.tensors, known.extra.get(FACTS), self._origin)
        resumed = {key: checkpoint[key] for key in sorted(self._resumes & checkpoint.keys())}
        if resumed:
            if settings.verify_file:
                verify_tensors(path, resumed)
            # An optimizer keeps the tensors it is given, and these are views of a file that may change under it.
            checkpoint.update(copy.deepcopy(resumed))
            adapt_resume(checkpoint, plan, known, self.model, self.checkpointables, settings.resume, self._origin)
        if self.settings.verify_file:
            verify_tensors(path, {t.name: settled.tensors[t.name] for t in plan.by_action("copied", "carried")})
        state = OrderedDict(nearest.apply(plan.apply(settled.tensors, model_state)))
        # What a module keeps beside its tensors (`_extra_state`) has no classes.
        state.update({n: v for n, v in settled.tensors.items() if n in state and not torch.is_tensor(v)})
        adapt_averages(checkpoint, plan, state)
        if hasattr(stored, "_metadata"):
            # Modules convert old formats by the version numbers in it.
            state._metadata = stored._metadata  # type: ignore[attr-defined]
        return state, plan, known

    def _remember(self, plan: AdaptPlan, untrained: dict[str, tuple[str, ...]]) -> None:
        self.plan = plan
        self.untrained = untrained
        for module in self.model.modules():
            if hasattr(module, "class_table") and "thing" in plan.target:
                module.class_table = plan.target["thing"]

    def _say(self, plan: AdaptPlan) -> None:
        """What will happen, before anything does."""
        if not self._told:
            self.logger.info("No class tables are attached to the model: heads are loaded as stock detectron2 does.")
        self.logger.info("Plan of %s:\n%s", self._origin, plan_table(plan, summary=False))
        for notice in plan_notices(plan):
            if notice.level == "unverified":
                self.logger.warning("unverified: %s: %s; type: %s", notice.what, notice.why, notice.type_this)
        self.logger.info("%s", summary_line(plan))

    def _write_plan(self, plan: AdaptPlan) -> None:
        if self.save_to_disk and os.path.isdir(self.save_dir):
            try:
                write_text(os.path.join(self.save_dir, PLAN_FILE), plan_json(plan))
            except CheckpointFileError as exc:
                # A folder that cannot be written to is no reason not to evaluate a model.
                self.logger.warning("The plan was not stored: %s", exc)

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        """The plan's table has said it already."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` whole or not at all, with the class tables beside the model.

        Args:
            name: file name without its ending.
            kwargs: more to store, as in ``Checkpointer.save``; an ``iteration`` says that every row was trained.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        for key, value in self.checkpointables.items():
            data[key] = value.state_dict()
        data.update(kwargs)
        if "iteration" in kwargs:
            self.untrained, self._open = {}, {}
        data[KEY] = self.provenance().to_plain()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        if "://" in self.save_dir:
            with self.path_manager.open(path, "wb") as f:
                torch.save(data, f)
        else:
            write_checkpoint(path, data)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
        else:
            write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    @contextmanager
    def fitted_rows(self) -> Iterator[None]:
        """New rows that change inside count as fitted: ``untrained`` keeps the classes of which some row did not."""
        plan = self.plan if self.plan is not None else AdaptPlan(())
        new, state = self.rows_to_fit(), self.model.state_dict()
        before = {name: state[name].clone() for name in [*new, *projections(plan, new)] if name in state}
        yield
        left = unchanged_classes(plan, new, before, self.model.state_dict())
        self._open = {name: names for name, names in left.items() if names}
        waiting = {(plan.space_of(name), entry) for name, names in self._open.items() for entry in names}
        both = {space: tuple(n for n in names if (space, n) in waiting) for space, names in self.untrained.items()}
        self.untrained = {space: names for space, names in both.items() if names}

    def rows_to_fit(self) -> dict[str, tuple[int, ...]]:
        """The classes without a trained row, tensor by tensor: a file may have the boxes of a class and not its masks.

        Rows that were carried count too where the file says that nobody trained them.
        """
        plan = self.plan if self.plan is not None else AdaptPlan(())
        return {
            name: tuple(sorted(plan.target[plan.space_of(name)].names.index(entry) for entry in names))
            for name, names in self._open.items()
        }

    def provenance(self) -> Provenance:
        """The class tables, layouts and optimizer order that a file saved now carries."""
        targets = dict(self.plan.target if self.plan is not None else self.settings.target)
        layouts = layouts_of(self.model)
        state = shapes_of(self.model.state_dict())
        fitting = {
            space: table
            for space, table in targets.items()
            if any(x.space == space for x in layouts)
            and all(x.fits(state[x.tensor], len(table)) for x in layouts if x.space == space)
        }
        optimizer = find_optimizer(self.checkpointables)
        names = optimizer_names(optimizer, dict(self.model.named_parameters())) if optimizer is not None else ()
        rows = {name: list(classes) for name, classes in self._open.items()}
        extra: dict[str, Any] = {OPEN_ROWS: rows} if rows else {}
        facts = text_facts(self.model)
        if facts:
            extra[FACTS] = facts
        extra.update(self._kept.facts(self.model.state_dict(), self.save_dir or "the model"))
        return Provenance(fitting, layouts, names, self.untrained, extra)
