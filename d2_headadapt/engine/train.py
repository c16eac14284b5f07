"""Train and evaluate: detectron2's trainer, with the adaptive checkpointer and an evaluator for each dataset."""

from __future__ import annotations

import argparse
import logging
import os
import weakref
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, HookBase, default_setup
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    DatasetEvaluator,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ..adapt.classes import shorten
from ..adapt.report import plan_markdown
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.keys import freeze
from ..checkpoint.ranks import agree
from ..checkpoint.run_folder import claim, release, set_aside, unnoted
from ..config.keep import KeepSettings
from ..config.settings import AdaptSettings, attach_discovery, attach_settings, with_keys
from ..data.dicts import Needs, checked_dicts
from ..data.negatives import negative_images, with_negatives
from ..data.task_mapper import build_task_test_loader, build_task_train_loader
from ..data.task_spec import task_specs
from ..doctor.reading import WITHOUT_BOXES
from ..doctor.running import examine_before_training
from ..errors import ConfigError, PlanRefused, UsageError
from ..evaluation.build import build_evaluator as build_evaluator
from ..evaluation.keep import keep_table
from ..fit.hook import FitHook
from ..key import DATASETS, HEAD_ADAPT, MODEL, OUTPUT_DIR, SOLVER, YAML
from ..modeling.keep_model import attach_keep
from ..setup.build import building
from ..setup.count_keys import discover_yaml
from ..setup.yaml import load_config, resolve_config
from .gradient_watch import UntrainedHeads
from .launch import command as command
from .launch import ddp_without_gpus, log_to
from .launch import default_argument_parser as default_argument_parser
from .launch import launch as launch
from .stopping import in_one_line

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config that the command line names, settle its classes, freeze it, and set up logging and seeds.

    Args:
        args: of :func:`default_argument_parser`.

    Returns:
        A frozen config whose class counts are those of its class tables.
    """
    cfg = load_config(args.config_file, args.opts, getattr(args, "imports", []))
    # What is settled is said, and before the config is dumped.
    log_to(cfg.OUTPUT_DIR)
    resolve_config(cfg)
    default_setup(cfg, args)
    return cfg


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that loads class by class, and evaluates by the dataset's ``evaluator_type``.

    Several processes also work on CPUs. Before anything is built, the doctor looks at the config
    (``MODEL.HEAD_ADAPT.DOCTOR``).

    Args:
        cfg: of :func:`setup`, or any config with this package's keys.

    Raises:
        HeadAdaptError: the first error that the doctor finds, or what building the model and its data meets.
    """

    def __init__(self, cfg: CfgNode) -> None:
        log_to(cfg.OUTPUT_DIR)
        if with_keys(cfg).MODEL.HEAD_ADAPT.DOCTOR:
            examine_before_training(cfg)
        with ddp_without_gpus(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, attach its class tables, and freeze what ``MODEL.HEAD_ADAPT.FREEZE`` names."""
        with building():
            model: nn.Module = super().build_model(cfg)
        attach_settings(model, AdaptSettings.from_config(cfg, required=True))
        attach_keep(model, KeepSettings.from_config(cfg))
        attach_discovery(model, partial(discover_yaml, cfg.clone()))
        frozen = freeze(model, with_keys(cfg).MODEL.HEAD_ADAPT.FREEZE)
        if frozen:
            logger.info("%d parameters are frozen: %s", len(frozen), shorten(frozen, 3))
        return model

    def build_hooks(self) -> list[HookBase | None]:
        """Make stock's hooks on the adaptive checkpointer, with the fit and the watch over heads before them."""
        # Here rather than after __init__, because the stock hooks keep a reference to the checkpointer.
        self.checkpointer = HeadAdaptCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        hooks: list[HookBase | None] = super().build_hooks()
        cfg = with_keys(self.cfg)
        if cfg.MODEL.HEAD_ADAPT.FIT.ENABLED:
            hooks.insert(0, FitHook.from_config(cfg, lambda: self.checkpointer.rows_to_fit()))
        # Before all others, because an evaluation calls the model too.
        hooks.insert(0, UntrainedHeads(task_specs(cfg)))
        hooks.insert(0, OwnFolder(self.checkpointer))
        return hooks

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build stock's loader, with the labels of ``MODEL.TASKS`` and the photos of ``KEEP_NEGATIVES`` where asked.

        Raises:
            DatasetError: a dict of a dataset lacks what detectron2 reads.
        """
        with checked_dicts(Needs(boxes=cfg.MODEL.META_ARCHITECTURE not in WITHOUT_BOXES)):
            if cfg.MODEL.get("TASKS"):
                return build_task_train_loader(cfg)
            keep = KeepSettings.from_config(cfg)
            negatives = negative_images(keep.negatives) if keep is not None else []
            if not negatives:
                return super().build_train_loader(cfg)
            own = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
            return build_detection_train_loader(cfg, dataset=with_negatives(own, negatives))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build stock's loader; where ``MODEL.TASKS`` is not empty, one that carries the labels of tasks."""
        if cfg.MODEL.get("TASKS"):
            return build_task_test_loader(cfg, dataset_name)
        return super().build_test_loader(cfg, dataset_name)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load ``last_checkpoint`` where ``resume`` and there is one, else ``MODEL.WEIGHTS``, and say what is left.

        Args:
            resume: go on with the run of ``OUTPUT_DIR``, its iteration, optimizer and scheduler.
        """
        say_what_is_read(self.checkpointer, self.cfg.MODEL.WEIGHTS, resume)
        super().resume_or_load(resume)
        say_what_is_left(self.start_iter, self.max_iter)

    def train(self) -> Any:
        """Train the model; Ctrl-C and a full disk end it with one line that says how to go on.

        Raises:
            Stopped: Ctrl-C.
            CheckpointFileError: the disk is full.
        """
        with in_one_line(self, self.checkpointer):
            return super().train()

    def before_train(self) -> None:
        """Start like the parent, and put the plan into the run's record."""
        super().before_train()
        record_plan(self.checkpointer, self.storage, self.start_iter)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, as ``TEST.AUG`` says.

        Args:
            cfg: its ``DATASETS.TEST`` are evaluated on.
            model: with its weights.

        Returns:
            Results by kind, with the suffix ``_TTA``.
        """
        logger.info("Running inference with test-time augmentation ...")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """Build what :func:`build_evaluator` builds."""
        return build_evaluator(cfg, dataset_name, output_folder)


def say_old_and_new(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Log the table of old and new classes, where the model has added ones."""
    sets = results if len(cfg.DATASETS.TEST) != 1 else {cfg.DATASETS.TEST[0]: results}
    table = keep_table(sets) if comm.is_main_process() else ""
    if table:
        logger.info("Old and new classes:\n%s", table)


def say_what_is_read(checkpointer: HeadAdaptCheckpointer, weights: str, resume: bool) -> None:
    """Log where a run goes on from its own checkpoint and the config names another file."""
    last = checkpointer.get_checkpoint_file() if resume and checkpointer.has_checkpoint() else ""
    if last and weights and weights != last:
        logger.info(
            "Going on from %s, the last checkpoint of %s; %s is not read.", last, OUTPUT_DIR, MODEL.WEIGHTS.set(weights)
        )


class OwnFolder(HookBase):
    """While a run trains, ``OUTPUT_DIR`` is its own; checkpoints of earlier runs that it would overwrite are kept."""

    def __init__(self, checkpointer: HeadAdaptCheckpointer) -> None:
        self._checkpointer = checkpointer

    def before_train(self) -> None:
        """Claim the folder, and move what this run did not start from into a folder inside it.

        Raises:
            ConfigError: another process trains there.
        """
        folder, error = self._checkpointer.save_dir, None
        if comm.is_main_process() and folder:
            try:
                claim(folder)
            except ConfigError as exc:
                error = exc
        agree(error, folder)
        if comm.is_main_process() and folder:
            noted = self.trainer.start_iter and self._checkpointer.has_checkpoint()
            last = self._checkpointer.get_checkpoint_file() if noted else ""
            names = unnoted(folder, last)
            if names:
                place = set_aside(folder, names, note=not last)
                logger.warning("%s of an earlier run would be overwritten: now in %s.", shorten(names, 3), place)

    def after_train(self) -> None:
        release(self._checkpointer.save_dir)


def say_what_is_left(done: int, wanted: int) -> None:
    """Log where a run has done its iterations already."""
    if done >= wanted:
        logger.warning(
            "Nothing is left to train: %d of %d iterations are done. Set %s higher.", done, wanted, SOLVER.MAX_ITER
        )


def record_plan(checkpointer: HeadAdaptCheckpointer, storage: EventStorage, iteration: int) -> None:
    """Put what happened to the weights into the run's record, where people look at its curves."""
    plan = checkpointer.plan
    if plan is not None and comm.is_main_process():
        storage.put_scalar("head_adapt/coverage", plan.coverage, smoothing_hint=False)
        carried, total = plan.class_coverage
        if total:
            storage.put_scalar("head_adapt/class_coverage", carried / total, smoothing_hint=False)
        with SummaryWriter(checkpointer.save_dir) as writer:
            writer.add_text("head_adapt/plan", plan_markdown(plan), iteration)


def refuse_new_rows(checkpointer: HeadAdaptCheckpointer, allowed: bool, where: str = "--eval-only") -> None:
    """Raise where a model is to be used although rows or parameters of it are as the constructor drew them.

    Args:
        checkpointer: after its load.
        allowed: ``MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL``.
        where: for the message.

    Raises:
        PlanRefused: names the classes, or the parameters, and the key that allows it.
    """
    plan = checkpointer.plan
    if allowed:
        return
    if plan is not None and not checkpointer.untrained:
        learnt = dict(checkpointer.model.named_parameters())
        drawn = [t.name for t in plan.by_action("kept") if t.name in learnt and not t.cause.meant]
        if drawn:
            raise PlanRefused(
                where,
                expected="every parameter of the model in the file",
                found=f"none of its shape for {shorten(drawn, 3)}",
                fix="Use the config that the file was made with, or set "
                f"{HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL.set(True)}.",
            )
        return
    names = "; ".join(f"{space}: {shorten(classes)}" for space, classes in checkpointer.untrained.items())
    names = names or f"every class, because {MODEL.WEIGHTS} is empty"
    raise PlanRefused(
        where,
        expected="every class carried, fitted or trained",
        found=f"random rows for {names}",
        fix=f"Train first, name the right file in {MODEL.WEIGHTS}, or set "
        f"{HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL.set(True)}.",
    )


def main(args: argparse.Namespace) -> Any:
    """Train, or evaluate with ``--eval-only``: what ``tools/train_net.py`` runs in every process.

    Args:
        args: of :func:`default_argument_parser`.

    Returns:
        The results of the evaluation, by dataset or by kind.

    Raises:
        UsageError: nothing to train on.
        HeadAdaptError: whatever else is refused.
    """
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = HeadAdaptCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        refuse_new_rows(checkpointer, cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL)
        if not cfg.DATASETS.TEST:
            logger.warning("Nothing is evaluated: %s is empty.", DATASETS.TEST)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        say_old_and_new(cfg, results)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    if not cfg.DATASETS.TRAIN:
        raise UsageError(
            DATASETS.TRAIN,
            expected="a dataset to train on",
            found="none",
            fix=f"Name one in the {YAML}, or add {DATASETS.TRAIN.set(('my_train',))}.",
        )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks([EvalHook(0, lambda: Trainer.test_with_TTA(cfg, trainer.model))])
    return trainer.train()
