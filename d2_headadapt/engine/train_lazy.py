"""Train and evaluate from a LazyConfig: what ``tools/lazyconfig_train_net.py`` runs."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..adapt.classes import shorten
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.keys import freeze
from ..data.task_spec import task_specs
from ..doctor.running import examine_before_training
from ..errors import ConfigError, UsageError
from ..evaluation.keep import judged_by_name
from ..evaluation.truth import complete_truth
from ..fit.hook import FitHook
from ..fit.lookahead import LookaheadSettings
from ..fit.settings import FitSettings
from ..key import DATASETS, Form, form_of, pairs
from ..setup.lazy.loading import in_words_of, load_lazy_config
from ..setup.lazy.preparing import prepare
from ..setup.lazy.tree import built, names_in, select, target_of
from ..setup.recipe import LazyRecipe
from .gradient_watch import UntrainedHeads
from .launch import log_to
from .stopping import in_one_line
from .train import OwnFolder, build_evaluator, record_plan, refuse_new_rows, say_what_is_left, say_what_is_read

logger = logging.getLogger(__name__)

DEFAULTS = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
}
"""What ``train`` may leave out; the values of detectron2's ``configs/common/train.py``."""


def setup(args: argparse.Namespace) -> LazyRecipe:
    """Read the LazyConfig that the command line names, settle its classes in place, and set up logging and seeds.

    Args:
        args: of :func:`d2_headadapt.engine.launch.default_argument_parser`; ``opts`` are ``key=value``.

    Raises:
        HeadAdaptError: what cannot be read or used.
    """
    if form_of(args.config_file) is not Form.LAZY:
        raise UsageError(
            "--config-file",
            expected="a LazyConfig, a .py file",
            found=repr(args.config_file),
            fix="For a yaml, use tools/train_net.py.",
        )
    lazy = load_lazy_config(args.config_file, args.opts, args.imports)
    _complete(lazy)
    _check_evaluation(lazy)
    # What is settled is said, and before the config is dumped.
    log_to(lazy.train.output_dir)
    made = prepare(lazy)
    default_setup(lazy, args)
    return LazyRecipe(made.config, made.settings, lazy)


def _complete(lazy: DictConfig) -> None:
    """Write what ``train`` leaves out, in place."""
    given = lazy.get("train") or {}
    for key, default in {**DEFAULTS, "seed": -1}.items():
        value = given.get(key) if key in given else None
        if key not in given or (value is None and default == ""):
            given[key] = default
        elif not isinstance(value, DictConfig if isinstance(default, dict) else type(default)):
            raise ConfigError(
                f"train.{key}",
                expected=f"a value like {pairs(default) if isinstance(default, dict) else repr(default)}",
                found=f"{value!r} ({type(value).__name__})",
                fix="Correct it, or leave it out for this value.",
            )
    # Also the keys inside `amp` and its like.
    lazy.train = OmegaConf.merge(OmegaConf.create(DEFAULTS, flags={"allow_objects": True}), given)


def _check_evaluation(lazy: DictConfig) -> None:
    """Raise for what an evaluation would stumble over: it comes after the training."""
    if select(lazy, "dataloader.test") is None:
        if select(lazy, "dataloader") is not None:
            # detectron2's own takes its dataset from there, so a config with it alone could not even be saved.
            lazy.dataloader.pop("evaluator", None)
        return
    evaluator = select(lazy, "dataloader.evaluator")
    several = isinstance(evaluator, ListConfig)
    for key, found in (
        ("dataloader.test", [lazy.dataloader.test]),
        ("dataloader.evaluator", list(evaluator) if several else [] if evaluator is None else [evaluator]),
    ):
        if not all(target_of(one) for one in found):
            raise ConfigError(
                key,
                expected="one LazyCall" if key.endswith("test") else "a LazyCall, or a list of them",
                found=", ".join(type(one).__name__ for one in found) or "an empty list",
                fix="Evaluate on one dataset in a run, and on another with --eval-only and another config."
                if key.endswith("test")
                else "Write dataloader.evaluator = L(COCOEvaluator)(dataset_name=...), or leave it out.",
            )


def main(args: argparse.Namespace) -> Any:
    """Train, or evaluate with ``--eval-only``, in every process."""
    with in_words_of(args.config_file):
        recipe = setup(args)
        return evaluate_only(recipe, args.resume) if args.eval_only else train(recipe, args.resume)


def evaluate_only(recipe: LazyRecipe, resume: bool) -> dict[str, Any]:
    """Load ``train.init_checkpoint``, or with ``resume`` the run's last checkpoint, and evaluate."""
    cfg = recipe.config
    model = recipe.build()
    checkpointer = HeadAdaptCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    refuse_new_rows(checkpointer, cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL)
    return evaluate(recipe, model)


def evaluate(recipe: LazyRecipe, model: nn.Module) -> dict[str, Any]:
    """Evaluate on ``dataloader.test`` with ``dataloader.evaluator``; empty on ranks other than the main one.

    Without that node the dataset's ``evaluator_type`` decides, as it does for a yaml. Tasks have an evaluator of their
    own, unless the node has one.
    """
    loader = select(recipe.lazy, "dataloader.test")
    # Not before the loader is there: the evaluator of detectron2's own configs takes its dataset from it.
    evaluator = None if loader is None else _evaluator(recipe)
    if evaluator is None:
        logger.info("Nothing is evaluated: the config has no dataloader.test.")
        return {}
    results: dict[str, Any] = inference_on_dataset(model, built(loader, "dataloader.test"), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _evaluator(recipe: LazyRecipe) -> DatasetEvaluator | list[DatasetEvaluator] | None:
    node, names = select(recipe.lazy, "dataloader.evaluator"), names_in(select(recipe.lazy, "dataloader.test"))
    node = recipe.lazy.dataloader.evaluator if node is not None else None
    if node is None:
        return build_evaluator(recipe.config, _only(names)) if names else None
    made = built(node, "dataloader.evaluator")
    evaluators: list[DatasetEvaluator] = [made] if isinstance(made, DatasetEvaluator) else list(made)
    for one in evaluators:
        complete_truth(one)
    specs = task_specs(recipe.config)
    if specs:
        # Here, because scikit-learn takes two seconds to import, which nobody without tasks should wait for.
        from ..evaluation.task_evaluator import TaskEvaluator

        if not any(isinstance(one, TaskEvaluator) for one in evaluators):
            folder = os.path.join(recipe.config.OUTPUT_DIR, "inference")
            evaluators.append(TaskEvaluator(_only(names), specs, folder))
    if recipe.config.MODEL.HEAD_ADAPT.KEEP:
        return judged_by_name(recipe.config, _only(names), DatasetEvaluators(evaluators))
    return evaluators


def _only(names: tuple[str, ...]) -> str:
    if len(names) != 1:
        raise ConfigError(
            DATASETS.TEST,
            expected="one dataset, or a node dataloader.evaluator for several",
            found=repr(list(names)),
            fix="Name one, or write dataloader.evaluator = [L(COCOEvaluator)(...), ...].",
        )
    return names[0]


def train(recipe: LazyRecipe, resume: bool) -> None:
    """Build everything that the config names, load, and train ``train.max_iter`` iterations."""
    lazy, cfg = recipe.lazy, recipe.config
    _require(lazy)
    if cfg.MODEL.HEAD_ADAPT.DOCTOR:
        examine_before_training(cfg, lazy)
    if not recipe.settings.target:
        logger.warning(
            "The classes are not known, so class counts stay as they are written and no class is moved by its name: "
            "dataloader.train names no dataset. Name the classes in head_adapt.target_classes."
        )
    model = recipe.build()
    frozen = freeze(model, cfg.MODEL.HEAD_ADAPT.FREEZE)
    if frozen:
        logger.info("%d parameters are frozen: %s", len(frozen), shorten(frozen, 3))
    logger.info("Model:\n%s", model)
    lazy.optimizer.params.model = model
    optimizer = built(lazy.optimizer, "optimizer")
    loader = built(lazy.dataloader.train, "dataloader.train")
    # Stock passes device_ids, which DDP refuses for models on CPUs.
    on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
    wrapped: nn.Module = create_ddp_model(model, **lazy.train.ddp, **on_cpu)
    trainer = (AMPTrainer if lazy.train.amp.enabled else SimpleTrainer)(wrapped, loader, optimizer)
    checkpointer = HeadAdaptCheckpointer(wrapped, cfg.OUTPUT_DIR, trainer=trainer)
    # Where hooks look for it, as in DefaultTrainer.
    trainer.checkpointer = checkpointer
    trainer.register_hooks(_hooks(recipe, wrapped, checkpointer))
    say_what_is_read(checkpointer, cfg.MODEL.WEIGHTS, resume)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    say_what_is_left(start, lazy.train.max_iter)
    with in_one_line(trainer, checkpointer):
        trainer.train(start, lazy.train.max_iter)


class _PlanInRecord(HookBase):
    """A hook that puts what happened to the weights beside the curves."""

    def before_train(self) -> None:
        record_plan(self.trainer.checkpointer, self.trainer.storage, self.trainer.start_iter)


def _hooks(recipe: LazyRecipe, model: nn.Module, checkpointer: HeadAdaptCheckpointer) -> list[HookBase | None]:
    """List the hooks of detectron2's lazyconfig_train_net.py, with what ``Trainer`` adds in front."""
    lazy, cfg, main_process = recipe.lazy, recipe.config, comm.is_main_process()
    found: list[HookBase | None] = [OwnFolder(checkpointer), UntrainedHeads(task_specs(cfg))]
    if cfg.MODEL.HEAD_ADAPT.FIT.ENABLED:
        fit, lookahead = FitSettings.from_config(cfg), LookaheadSettings.from_config(cfg)
        rows = checkpointer.rows_to_fit
        found.append(FitHook(recipe.training_dicts, recipe.mapper_at_test_size(), rows, fit, lookahead))
    found += [hooks.IterationTimer(), hooks.LRScheduler(scheduler=built(lazy.lr_multiplier, "lr_multiplier"))]
    if main_process:
        found.append(hooks.PeriodicCheckpointer(checkpointer, **lazy.train.checkpointer))
    found.append(hooks.EvalHook(lazy.train.eval_period, _evaluation(recipe, model)))
    if main_process:
        writers = default_writers(cfg.OUTPUT_DIR, lazy.train.max_iter)
        found += [_PlanInRecord(), hooks.PeriodicWriter(writers, period=lazy.train.log_period)]
    return found


def _evaluation(recipe: LazyRecipe, model: nn.Module) -> Callable[[], dict[str, Any]]:
    return lambda: evaluate(recipe, model)


def _require(lazy: DictConfig) -> None:
    """Raise for a node that training needs and a config lacks."""
    for key, example in (
        ("train.max_iter", "train.max_iter = 1000"),
        ("dataloader.train", "from detectron2's configs: model_zoo.get_config('common/data/coco.py').dataloader"),
        ("optimizer.params", "optimizer = model_zoo.get_config('common/optim.py').SGD"),
        ("lr_multiplier", "lr_multiplier = model_zoo.get_config('common/coco_schedule.py').lr_multiplier_1x"),
    ):
        found = OmegaConf.select(lazy, key)
        if found is None or (key != "train.max_iter" and target_of(found) is None):
            raise ConfigError(
                key, expected="a node that training needs", found=repr(found), fix=f"Write it: {example}."
            )
    if lazy.train.amp.enabled and lazy.train.device == "cpu":
        raise ConfigError(
            "train.amp.enabled",
            expected="False on a CPU: mixed precision needs a GPU",
            found="True",
            fix="Set train.amp.enabled=False.",
        )
