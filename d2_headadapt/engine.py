"""Training and evaluation: detectron2's trainer, with the adaptive checkpointer and an evaluator for each dataset."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import detectron2.engine.defaults
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, default_setup
from detectron2.engine import default_argument_parser as stock_argument_parser
from detectron2.engine import launch as stock_launch
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import HeadAdaptCheckpointer
from .classes import shorten
from .configuring import load_config, registered_names, resolve_config
from .doctor.running import examine_before_training
from .errors import ConfigError, DatasetError, HeadAdaptError, PlanRefused
from .fit.training import FitHook
from .report import plan_markdown
from .selecting import freeze
from .settings import AdaptSettings, attach_settings, with_keys
from .tasks.data import settle_tasks
from .tasks.mapper import build_task_test_loader, build_task_train_loader
from .tasks.spec import task_specs
from .tasks.watching import UntrainedHeads

logger = logging.getLogger(__name__)


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """detectron2's parser with ``--import``."""
    parser: argparse.ArgumentParser = stock_argument_parser(epilog)
    add_import_argument(parser)
    return parser


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """``--import MODULE_OR_FILE.py``, as often as needed."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE.py",
        help="a module or file that registers your own components; repeatable",
    )


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config that the command line names, settle its classes, freeze it, and set up logging and seeds.

    Args:
        args: of :func:`default_argument_parser`.

    Returns:
        A frozen config whose class counts are those of its class tables.
    """
    cfg = load_config(args.config_file, args.opts, getattr(args, "imports", []))
    # What is settled is said, and before the config is dumped.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_headadapt")
    resolve_config(cfg)
    default_setup(cfg, args)
    return cfg


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that loads class by class, and evaluates by the dataset's ``evaluator_type``.

    Several processes also work on CPUs. Before anything is built, the doctor looks at the config
    (``MODEL.HEAD_ADAPT.DOCTOR``).
    """

    def __init__(self, cfg: CfgNode) -> None:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_headadapt")
        if with_keys(cfg).MODEL.HEAD_ADAPT.DOCTOR:
            examine_before_training(cfg)
        with ddp_without_gpus(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with registered_names():
            model: nn.Module = super().build_model(cfg)
        attach_settings(model, AdaptSettings.from_config(cfg))
        frozen = freeze(model, with_keys(cfg).MODEL.HEAD_ADAPT.FREEZE)
        if frozen:
            logger.info("%d parameters are frozen: %s", len(frozen), shorten(frozen, 3))
        return model

    def build_hooks(self) -> list[HookBase | None]:
        # Here rather than after __init__, because the stock hooks keep a reference to the checkpointer.
        self.checkpointer = HeadAdaptCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        hooks: list[HookBase | None] = super().build_hooks()
        cfg = with_keys(self.cfg)
        if cfg.MODEL.HEAD_ADAPT.FIT.ENABLED:
            hooks.insert(0, FitHook.from_config(cfg, lambda: self.checkpointer.rows_to_fit()))
        # Before all others, because an evaluation calls the model too.
        hooks.insert(0, UntrainedHeads(task_specs(cfg, registered_only=True)))
        return hooks

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Stock's loader; where ``MODEL.TASKS`` is not empty, one that carries the labels of tasks."""
        return build_task_train_loader(cfg) if cfg.MODEL.get("TASKS") else super().build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Stock's loader; where ``MODEL.TASKS`` is not empty, one that carries the labels of tasks."""
        if cfg.MODEL.get("TASKS"):
            return build_task_test_loader(cfg, dataset_name)
        return super().build_test_loader(cfg, dataset_name)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load ``last_checkpoint`` where ``resume`` and there is one, else ``MODEL.WEIGHTS``, and say what is left.

        Args:
            resume: go on with the run of ``OUTPUT_DIR``, its iteration, optimizer and scheduler.
        """
        weights, last = self.cfg.MODEL.WEIGHTS, self.checkpointer.get_checkpoint_file() if resume else ""
        if last and weights and weights != last:
            logger.info(
                "Going on from %s, the last checkpoint of OUTPUT_DIR; MODEL.WEIGHTS %s is not read.", last, weights
            )
        super().resume_or_load(resume)
        if self.start_iter >= self.max_iter:
            logger.warning(
                "Nothing is left to train: %d of SOLVER.MAX_ITER %d iterations are done. Set SOLVER.MAX_ITER higher.",
                self.start_iter,
                self.max_iter,
            )

    def before_train(self) -> None:
        super().before_train()
        plan = self.checkpointer.plan
        if plan is not None and comm.is_main_process():
            # What happened to the weights belongs to the run's record, where people look at its curves.
            self.storage.put_scalar("head_adapt/coverage", plan.coverage, smoothing_hint=False)
            with SummaryWriter(self.cfg.OUTPUT_DIR) as writer:
                writer.add_text("head_adapt/plan", plan_markdown(plan), self.start_iter)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, as ``TEST.AUG`` says; results get the suffix ``_TTA``."""
        logger.info("Running inference with test-time augmentation ...")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """The evaluator that a dataset's metadata asks for with ``evaluator_type``, and one for the tasks of the config.

    Raises:
        DatasetError: the dataset names no type, or one that neither detectron2 nor this package has an evaluator for.
        ConfigError: the dataset has labels of tasks alone, and ``MODEL.TASKS`` is empty.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    judge_tasks = _task_evaluators(cfg, dataset_name, folder)
    sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    build: dict[str, Callable[[], list[DatasetEvaluator]]] = {
        "coco": lambda: [COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)],
        "sem_seg": lambda: [SemSegEvaluator(dataset_name, output_dir=folder)],
        "coco_panoptic_seg": lambda: [
            SemSegEvaluator(dataset_name, output_dir=folder),
            COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas),
            COCOPanopticEvaluator(dataset_name, folder),
        ],
        "cityscapes_instance": lambda: [CityscapesInstanceEvaluator(dataset_name)],
        "cityscapes_sem_seg": lambda: [CityscapesSemSegEvaluator(dataset_name)],
        "pascal_voc": lambda: [PascalVOCDetectionEvaluator(dataset_name)],
        "lvis": lambda: [LVISEvaluator(dataset_name, output_dir=folder)],
        "tasks": list,
    }
    if kind not in build:
        raise DatasetError(
            f"dataset {dataset_name!r}",
            expected=f"evaluator_type, one of {', '.join(build)}",
            found=repr(kind),
            fix=f"MetadataCatalog.get({dataset_name!r}).set(evaluator_type='coco', json_file=..., image_root=...)",
        )
    if kind == "tasks" and not judge_tasks:
        raise ConfigError(
            "MODEL.TASKS",
            expected=f"a task to evaluate on dataset {dataset_name!r}, which has labels of tasks alone",
            found="none",
            fix='Declare one: MODEL: {TASKS: {colour: {"on": image}}}.',
        )
    # A model of whole images has no detections for the others.
    images_alone = cfg.MODEL.META_ARCHITECTURE == "MultiTaskClassifier"
    evaluators = judge_tasks if images_alone else build[kind]() + judge_tasks
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _task_evaluators(cfg: CfgNode, dataset_name: str, folder: str) -> list[DatasetEvaluator]:
    if not cfg.MODEL.get("TASKS"):
        return []
    # Here, because scikit-learn takes two seconds to import, which nobody without tasks should wait for.
    from .tasks.evaluation import TaskEvaluator

    settle_tasks(cfg, also=[dataset_name], registered_only=True)
    specs = task_specs(cfg, registered_only=True)
    return [TaskEvaluator(dataset_name, specs, folder)] if specs else []


@contextmanager
def ddp_without_gpus(device: str) -> Iterator[None]:
    """Let stock code wrap CPU models for several processes: it passes ``device_ids``, which DDP refuses there."""
    if device != "cpu":
        yield
        return

    def on_cpu(model: nn.Module, **kwargs: Any) -> nn.Module:
        wrapped: nn.Module = create_ddp_model(model, device_ids=None, **kwargs)
        return wrapped

    stock = detectron2.engine.defaults.create_ddp_model
    detectron2.engine.defaults.create_ddp_model = on_cpu
    try:
        yield
    finally:
        detectron2.engine.defaults.create_ddp_model = stock


def refuse_new_rows(checkpointer: HeadAdaptCheckpointer, allowed: bool) -> None:
    """Raise where a model is to be evaluated although rows of it are as the constructor drew them.

    Raises:
        PlanRefused: names the classes and the key that allows it.
    """
    if allowed or (checkpointer.plan is not None and not checkpointer.untrained):
        return
    names = "; ".join(f"{space}: {shorten(classes)}" for space, classes in checkpointer.untrained.items())
    names = names or "every class, because MODEL.WEIGHTS is empty"
    raise PlanRefused(
        "--eval-only",
        expected="every class carried, fitted or trained",
        found=f"random rows for {names}",
        fix="Train first, name the right file in MODEL.WEIGHTS, or set MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL True.",
    )


def main(args: argparse.Namespace) -> Any:
    """What ``tools/train_net.py`` runs in every process: train, or evaluate with ``--eval-only``."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = HeadAdaptCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        refuse_new_rows(checkpointer, cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks([EvalHook(0, lambda: Trainer.test_with_TTA(cfg, trainer.model))])
    return trainer.train()


def command(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """:func:`launch`, with a user's mistake as one line on standard error and its exit code.

    Returns:
        The exit code: 0, or that of the error, also where it was met in a process that this one started.
    """
    try:
        launch(partial(_said, run), args)
    except HeadAdaptError as error:
        return error.exit_code
    except ProcessExitedException as exc:
        return exc.exit_code
    return 0


def _said(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    try:
        run(args)
    except HeadAdaptError as error:
        several = comm.get_world_size() > 1
        print(f"{f'rank {comm.get_rank()}: ' if several else ''}error: {error}", file=sys.stderr, flush=True)
        if several:
            # A traceback from every process would bury the line.
            sys.exit(error.exit_code)
        raise


def launch(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run ``run(args)`` in every process that the command line asks for, also where torchrun started this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _in_torchrun(run, args)
    return stock_launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _in_torchrun(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        result = run(args)
        # Nobody tears the group down while another process still talks in it.
        comm.synchronize()
        return result
    finally:
        torch.distributed.destroy_process_group()
