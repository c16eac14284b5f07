"""The checkpointer: stock detectron2's, with a plan between the file and the model."""

from __future__ import annotations

import copy
import logging
import os
import shlex
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from ..adapt.causes import Cause
from ..adapt.classes import ClassTable, shorten
from ..adapt.layouts import HeadLayout
from ..adapt.plan import AdaptPlan
from ..adapt.registry import layouts_of
from ..adapt.report import plan_json, plan_notices, plan_table, summary_line
from ..adapt.unknown_heads import know_heads
from ..config.settings import AdaptSettings, discovery_of, settings_of
from ..errors import CheckpointFileError, HeadAdaptError, RankError
from ..files import shapes_of, write_checkpoint, write_text
from ..key import OUTPUT_DIR
from ..modeling.text.predictor import FACTS, text_facts
from ..said import be_heard
from .kept import KeptGuard, with_packs
from .load import (
    LoadRequest,
    PreparedLoad,
    check_exists,
    has_foreign_hooks,
    not_fetched,
    prepare_load,
    read_local,
    say_unused,
)
from .optimizer import find_optimizer
from .provenance import KEY, UNTRAINED_ROWS, Provenance, optimizer_names
from .ranks import agree, compare, everywhere, readable_everywhere, share_new_rows
from .run_folder import unnoted
from .source_keys import UnusedKey, applied_keys
from .untrained import projections, unchanged_classes, untrained_classes, untrained_rows

logger = logging.getLogger(__name__)
PLAN_FILE = "head_adapt_plan.json"
"""Beside a run's checkpoints: what its last load did."""


class HeadAdaptCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that moves every class-dependent row by class name.

    Saved files carry the class tables they were made with, and stock detectron2 loads them.

    Attributes:
        settings: target and source tables, match rule and all other keys, as given or as attached to the model.
        plan: what the last load did; ``None`` before the first.
        untrained: class names by label space of which some row was neither carried, fitted nor trained.
        logger: of this package, where the parent has fvcore's.
        last_file: the checkpoint that this run wrote last, or goes on with; empty before the first.
        logger: this package's, which is heard in any script.

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
        be_heard()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        # fvcore's logger has no handler in a script that only sets up detectron2's.
        self.logger = logger
        self.begin(settings)

    def begin(self, settings: AdaptSettings | None) -> None:
        """Do what the constructor does beyond the parent's; for subclasses that call another constructor.

        Args:
            settings: as for the constructor.
        """
        found = settings if settings is not None else settings_of(self.model)
        self.settings = found if found is not None else AdaptSettings()
        self._told = found is not None
        self.settings = with_packs(self.settings, self.model)
        self._kept = KeptGuard(self.model)
        self.plan: AdaptPlan | None = None
        self.last_file = ""
        self.untrained: dict[str, tuple[str, ...]] = {}
        self._untrained_rows: dict[str, tuple[str, ...]] = {}
        self._known = Provenance()
        self._assumed: tuple[str, ...] = ()
        self._request = LoadRequest("", self.settings)
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
        resumes = frozenset(self.checkpointables if checkpointables is None else checkpointables)
        self._request, self._agreed = LoadRequest(path, self.settings, resumes, own), False
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
        """Load like the parent; raise if only some ranks have ``last_checkpoint``: the others would wait forever.

        Args:
            path: weights for a new run, a file or an address.
            resume: go on with the run of ``save_dir`` where it has one; ``path`` is not read then.

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
                fix=f"Copy last_checkpoint and the file that it names to every machine, or use a shared {OUTPUT_DIR}.",
            )
        if resume and comm.is_main_process():
            self._say_what_is_unnoted(path)
        return dict(super().resume_or_load(path, resume=resume))

    def get_checkpoint_file(self) -> str:
        """Find the file like the parent; where it is gone, take the one of its name in the folder, which was moved."""
        found: str = super().get_checkpoint_file()
        here = os.path.join(self.save_dir, os.path.basename(found))
        if found and "://" not in self.save_dir and not os.path.isfile(found) and os.path.isfile(here):
            self.logger.info("%s, which last_checkpoint names, is not there: taking %s.", found, here)
            return here
        return found

    def _say_what_is_unnoted(self, path: str) -> None:
        """Warn of checkpoints that a run wrote and could not note in ``last_checkpoint`` any more."""
        last = self.get_checkpoint_file() if self.has_checkpoint() else ""
        names = unnoted(self.save_dir, last)
        if names:
            note = os.path.join(self.save_dir, "last_checkpoint")
            found = f"names {os.path.basename(last)}" if last else "is not there"
            start = last or path or "the model's initial values"
            self.logger.warning(
                "%s %s, but %s lies beside it: that run was stopped before it was noted. Starting from %s; "
                "to go on from it instead, type: printf %s > %s",
                *(note, found, names[-1], start, names[-1], shlex.quote(note)),
            )

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Put model and checkpointables back where something fails after the first of them was written to."""
        # A copy of the model costs as much memory as the model, so it is made only where something may fail after the
        # model was written to: other state to load, other ranks to agree with, or a loading hook of somebody else's.
        needed = bool(self._request.resumes) or comm.get_world_size() > 1 or has_foreign_hooks(self.model)
        tensors = {name: value for name, value in self.model.state_dict().items() if torch.is_tensor(value)}
        model = {name: value.clone() for name, value in tensors.items()} if needed else {}
        others = {
            n: copy.deepcopy(v.state_dict()) for n, v in self.checkpointables.items() if n in self._request.resumes
        }
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
        return {**read_local(filename, self._request.path, trust=self.settings.trust_file), "__path__": filename}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        prepared, error = PreparedLoad(OrderedDict(), AdaptPlan(()), Provenance()), None
        try:
            prepared = self._prepare(checkpoint, checkpoint.pop("__path__", self._request.path))
            state, plan, known = prepared.state, prepared.plan, prepared.known
            self._kept.check_load(state, plan, known, self._request.path, resumes=self._request.own)
        except HeadAdaptError as exc:
            error = exc
        self._agree(error)
        plan, known = prepared.plan, prepared.known
        self._write_plan(plan)
        # Asked before the model is written to, because asking may fail.
        untrained, rows = untrained_classes(plan, known), untrained_rows(plan, known)
        self.model.load_state_dict(prepared.state)
        self._kept.after_load(self.model, known, self._request.path)
        share_new_rows(plan, self.model.state_dict())
        compare(self.model.state_dict(), self._request.path)
        self._remember(plan, known)
        self.last_file = self._request.path if self._request.own else self.last_file
        self.untrained, self._untrained_rows = untrained, rows
        return _IncompatibleKeys(
            missing_keys=[t.name for t in plan.by_action("kept", "initialised")],
            unexpected_keys=[t.name for t in plan.by_action("dropped")],
            incorrect_shapes=[],
        )

    def _agree(self, error: HeadAdaptError | None) -> None:
        """Ask all ranks once per load, whatever it meets: a rank that does not ask would leave the others waiting."""
        if not self._agreed:
            self._agreed = True
            agree(error, self._request.path)

    def adapted(
        self, checkpoint: dict[str, Any], path: str, origin: str = ""
    ) -> tuple[dict[str, torch.Tensor], AdaptPlan]:
        """Compute what loading a checkpoint would make of the model's state; nothing is written to.

        Args:
            checkpoint: in stock detectron2's form, ``{"model": {name: values}, ...}``; it loses what is used.
            path: the file that its values are views of, or what it is called in messages.
            origin: the address that the file was fetched from.

        Raises:
            HeadAdaptError: the checkpoint or the plan is refused.
        """
        self._request = LoadRequest(origin or path, self.settings)
        prepared = self._prepare(checkpoint, path)
        return dict(prepared.state), prepared.plan

    def _prepare(self, checkpoint: dict[str, Any], file: str) -> PreparedLoad:
        if self._request.own and KEY in checkpoint:
            self._kept.check_resume(Provenance.from_plain(checkpoint[KEY], self._request.path), self._request.path)
        return prepare_load(self._request, checkpoint, file, self.model, self.checkpointables, self._say)

    def _remember(self, plan: AdaptPlan, known: Provenance) -> None:
        self.plan, self._known = plan, known
        by_shape = {t.space for t in plan.tensors if t.cause is Cause.SHAPES_AGREE and t.space in plan.target}
        self._assumed = tuple(sorted({*plan.assumed, *filter(None, by_shape)}))
        for module in self.model.modules():
            if hasattr(module, "class_table") and "thing" in plan.target:
                module.class_table = plan.target["thing"]

    def _say(self, plan: AdaptPlan, unused: tuple[UnusedKey, ...]) -> None:
        """Log what will happen, before anything does."""
        if not self._told:
            self.logger.info("No class tables are attached to the model: heads are loaded as stock detectron2 does.")
        say_unused(unused)
        self.logger.info("Plan of %s:\n%s", self._request.path, plan_table(plan, summary=False))
        for notice in plan_notices(plan):
            if notice.code != "refused":
                self.logger.warning("%s", notice.line())
        drawn = [t.name for t in plan.by_action("kept") if t.target_shape and not t.cause.meant and not t.cause.by_user]
        if drawn:
            # Stock warns of parameters that are not in the file, and of shapes that differ.
            self.logger.warning("%d tensors keep the model's initial values: %s", len(drawn), shorten(drawn, 3))
        self.logger.info("%s", summary_line(plan))

    def _write_plan(self, plan: AdaptPlan) -> None:
        if self.save_to_disk and os.path.isdir(self.save_dir):
            try:
                write_text(os.path.join(self.save_dir, PLAN_FILE), plan_json(plan))
            except CheckpointFileError as exc:
                # A folder that cannot be written to is no reason not to evaluate a model.
                self.logger.warning("The plan was not stored: %s", exc)

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        """Log nothing: the plan's table has said it already."""

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
            self.untrained, self._untrained_rows, self._assumed = {}, {}, ()
        data[KEY] = self.provenance().to_plain()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        if "://" in self.save_dir:
            with self.path_manager.open(path, "wb") as f:
                torch.save(data, f)
        else:
            write_checkpoint(path, data)
        self.tag_last_checkpoint(f"{name}.pth")
        self.last_file = path

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write ``last_checkpoint`` atomically, so that a run that is killed meanwhile can be resumed."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
        else:
            write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    @contextmanager
    def fitted_rows(self) -> Iterator[None]:
        """Count new rows that change inside as fitted; ``untrained`` keeps classes of which some row did not."""
        plan = self.plan if self.plan is not None else AdaptPlan(())
        new, state = self.rows_to_fit(), self.model.state_dict()
        before = {name: state[name].clone() for name in [*new, *projections(plan, new)] if name in state}
        yield
        left = unchanged_classes(plan, new, before, self.model.state_dict())
        self._untrained_rows = {name: names for name, names in left.items() if names}
        waiting = {(plan.space_of(name), entry) for name, names in self._untrained_rows.items() for entry in names}
        both = {space: tuple(n for n in names if (space, n) in waiting) for space, names in self.untrained.items()}
        self.untrained = {space: names for space, names in both.items() if names}

    def rows_to_fit(self) -> dict[str, tuple[int, ...]]:
        """List the classes without a trained row, tensor by tensor: a file may have a class's boxes, not its masks.

        Rows that were carried count too where the file says that nobody trained them.
        """
        plan = self.plan if self.plan is not None else AdaptPlan(())
        return {
            name: tuple(sorted(plan.target[plan.space_of(name)].names.index(entry) for entry in names))
            for name, names in self._untrained_rows.items()
        }

    def _layouts(self, targets: Mapping[str, ClassTable]) -> tuple[HeadLayout, ...]:
        """Return the model's layouts; those found by building too, where a class table has none that is declared."""
        declared = layouts_of(self.model)
        if self.plan is not None and {x.tensor for x in self.plan.layouts} > {x.tensor for x in declared}:
            return self.plan.layouts
        if targets.keys() <= {x.space for x in declared}:
            return declared
        return know_heads(self.model, declared, discovery_of(self.model), {}, targets, {}).layouts

    def provenance(self) -> Provenance:
        """Describe the class tables, layouts and optimizer order that a file saved now carries."""
        targets = dict(self.plan.target if self.plan is not None else self.settings.target)
        layouts = self._layouts(targets)
        state = shapes_of(self.model.state_dict())
        # Of a model whose heads nobody knows, the tables are all that can be said.
        nobody = not any(x.space in targets for x in layouts)
        fitting = {
            space: table
            for space, table in targets.items()
            if (nobody or any(x.space == space for x in layouts))
            and all(x.fits(state[x.tensor], len(table)) for x in layouts if x.space == space)
        }
        optimizer = find_optimizer(self.checkpointables)
        names = optimizer_names(optimizer, dict(self.model.named_parameters())) if optimizer is not None else ()
        rows = {name: list(classes) for name, classes in self._untrained_rows.items()}
        extra: dict[str, Any] = {UNTRAINED_ROWS: rows} if rows else {}
        facts = text_facts(self.model)
        if facts:
            extra[FACTS] = facts
        extra.update(self._kept.facts(self.model.state_dict(), self.save_dir or "the model"))
        applied = applied_keys(self.settings, self._known)
        assumed = tuple(space for space in self._assumed if space in fitting)
        return Provenance(fitting, layouts, names, self.untrained, applied, assumed, extra)
