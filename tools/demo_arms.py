"""Fine-tunes side by side: what ``tools/demo.py`` and ``tools/demo_real.py`` share.

An arm is one way to start a fine-tune. All arms of a comparison get the same command line, but for what makes the arm,
and :func:`same_batches` proves that they saw the same images, pixel for pixel and in the same order.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator, inference_context
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from tqdm import tqdm

from d2_headadapt import AdaptPlan, HeadAdaptError, Trainer, build_on_meta, load_config, plan_file, resolve_config
from d2_headadapt.engine import build_evaluator, default_argument_parser, setup
from d2_headadapt.errors import UsageError

EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "cv2": "opencv-python-headless"}
GROUPS = ("all classes", "carried classes", "new classes")

Metrics = Mapping[str, float]


class StockTrainer(DefaultTrainer):
    """``DefaultTrainer`` as detectron2's own ``tools/train_net.py`` completes it: with an evaluator."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)


@dataclass(frozen=True)
class Arm:
    """One way to start a fine-tune.

    Args:
        name: in tables and pictures.
        folder: of its files, under the comparison's folder.
        colour: of its curve.
        trainer: ``DefaultTrainer`` or a child of it.
        opts: ``KEY VALUE`` pairs that make this arm what it is.
    """

    name: str
    folder: str
    colour: str
    trainer: type[Any]
    opts: tuple[str, ...] = ()


STOCK = Arm("stock detectron2", "stock", "tab:red", StockTrainer, ("MODEL.ROI_HEADS.NAME", "StandardROIHeads"))
OURS = Arm("d2_headadapt", "ours", "tab:blue", Trainer, ("MODEL.HEAD_ADAPT.FIT.ENABLED", "False"))
FITTED = Arm("d2_headadapt, fitted", "fitted", "tab:green", Trainer, ("MODEL.HEAD_ADAPT.FIT.ENABLED", "True"))


@dataclass
class ArmResult:
    """What one arm did.

    Attributes:
        arm: which.
        curve: iteration and box metrics, iteration 0 first.
        batches: a fingerprint of each training batch: file names and a checksum of the pixels that the model got.
        pictures: predictions on the sample images, before the first iteration and after the last.
        seconds: of the fine-tune with its evaluations.
    """

    arm: Arm
    curve: list[tuple[int, Metrics]] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    pictures: list[list[Instances]] = field(default_factory=list)
    seconds: float = 0.0


class Watch(HookBase):
    """Observes a trainer: evaluates before the first iteration, keeps every evaluation, shows a progress bar.

    Registered last, so that what another hook does before the first iteration, such as a fit, is evaluated too.
    """

    def __init__(self, result: ArmResult, samples: Sequence[dict[str, Any]]) -> None:
        self.result = result
        self.samples = samples
        self._seen: Any = None

    def before_train(self) -> None:
        trainer = self.trainer
        self._bar = tqdm(total=trainer.max_iter, desc=self.result.arm.name, unit="it", mininterval=0.5)
        self._bar.set_postfix_str("evaluating")
        with same_random_state():
            self._keep(0, trainer.test(trainer.cfg, trainer.model))
            self.result.pictures.append(predict(trainer.model, self.samples))
        self._hook = trainer.model.register_forward_pre_hook(self._fingerprint)

    def after_step(self) -> None:
        # The evaluation hook ran before this one.
        results = getattr(self.trainer, "_last_eval_results", None)
        if results is not None and results is not self._seen:
            self._seen = results
            self._keep(self.trainer.iter + 1, results)
        self._bar.update()

    def after_train(self) -> None:
        self._hook.remove()
        # detectron2 comes here after a failure too.
        if self.trainer.iter >= self.trainer.max_iter:
            self._keep(self.trainer.max_iter, self.trainer._last_eval_results)
            self.result.pictures.append(predict(self.trainer.model, self.samples))
        self._bar.close()

    def _keep(self, iteration: int, results: Mapping[str, Metrics]) -> None:
        self.result.curve.append((iteration, results["bbox"]))
        self._bar.set_postfix_str(f"AP {results['bbox']['AP']:.1f}")

    def _fingerprint(self, model: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if model.training:
            parts = [(os.path.basename(d["file_name"]), zlib.crc32(d["image"].numpy().tobytes())) for d in args[0]]
            self.result.batches.append(" ".join(f"{name}:{crc:08x}" for name, crc in parts))


def plan_of(argv: Sequence[str], log: TextIO) -> AdaptPlan:
    """What loading will do, told before anything is touched, as ``d2-headadapt plan`` does it."""
    args = default_argument_parser().parse_args(argv)
    with quiet(log):
        cfg = load_config(args.config_file, args.opts, args.imports)
        settings = resolve_config(cfg)
        return plan_file(cfg.MODEL.WEIGHTS, build_on_meta(cfg), settings)


def load_arm(arm: Arm, argv: Sequence[str], output: Path, log: TextIO) -> Any:
    """Build an arm's trainer and load its weights, as ``d2_headadapt.engine.main`` does.

    Args:
        arm: which.
        argv: arguments of ``tools/train_net.py`` that all arms share.
        output: the arm's folder is made in it.
        log: gets what detectron2 has to say.

    Returns:
        The trainer; call :func:`train_arm` next, because both draw from the random streams that were seeded here.
    """
    args = default_argument_parser().parse_args([*argv, *arm_options(arm, output)])
    with quiet(log):
        cfg = setup(args)
        trainer = arm.trainer(cfg)
        trainer.resume_or_load(resume=False)
    return trainer


def arm_options(arm: Arm, output: Path) -> list[str]:
    """What an arm adds to the shared command line."""
    return ["OUTPUT_DIR", (output / arm.folder).as_posix(), *arm.opts]


def shown_command(arm: Arm, argv: Sequence[str]) -> str:
    """What to type to run one of our own arms alone."""
    return f"python tools/train_net.py {shlex.join([*argv, *arm.opts])}"


def train_arm(arm: Arm, trainer: Any, log: TextIO, samples: Sequence[dict[str, Any]] = ()) -> ArmResult:
    """Evaluate, fine-tune, and evaluate every ``TEST.EVAL_PERIOD`` iterations."""
    result = ArmResult(arm)
    start = time.perf_counter()
    with quiet(log):
        trainer.register_hooks([Watch(result, samples)])
        trainer.train()
    result.seconds = time.perf_counter() - start
    return result


def same_batches(results: Sequence[ArmResult]) -> int:
    """The number of training batches that all arms saw.

    Raises:
        RuntimeError: two arms saw different images, so their curves cannot be compared.
    """
    first, *others = results
    for other in others:
        if other.batches != first.batches:
            pairs = zip(first.batches, other.batches, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first.batches), len(other.batches)))
            raise RuntimeError(f"{first.arm.name} and {other.arm.name} saw different images from iteration {at} on")
    return len(first.batches)


def sample_inputs(cfg: CfgNode, dataset: str, count: int) -> list[dict[str, Any]]:
    """``count`` images of a dataset that can be read in a small picture, as the model takes them, with ground truth.

    Three classes or more come first, then few boxes, then large ones.
    """

    def order(record: dict[str, Any]) -> tuple[int, int, float]:
        found = record["annotations"]
        smallest = min((a["bbox"][2] * a["bbox"][3] for a in found), default=0.0)
        return -min(len({a["category_id"] for a in found}), 3), len(found), -smallest

    records: list[dict[str, Any]] = sorted(DatasetCatalog.get(dataset), key=order)
    mapper = DatasetMapper(cfg, is_train=False)
    with same_random_state():
        return [{**mapper(record), "annotations": record["annotations"]} for record in records[:count]]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Give back the random states, so that what is looked at here changes nothing of the run of ``train_net.py``.

    A data loader draws a seed whenever it is iterated, and the resizing of an image draws a size, be there but one.
    """
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def predict(model: torch.nn.Module, samples: Sequence[dict[str, Any]]) -> list[Instances]:
    """Predictions on each sample; the model is in its own mode again afterwards."""
    with inference_context(model), torch.no_grad():
        return [model([sample])[0]["instances"].to("cpu") for sample in samples]


def group_ap(metrics: Metrics, classes: Sequence[str]) -> float:
    """Mean AP over some classes; those without ground truth do not count."""
    values = [metrics[f"AP-{name}"] for name in classes]
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def grouped_curve(result: ArmResult, carried: Sequence[str], new: Sequence[str]) -> list[dict[str, float]]:
    """Iteration, AP50, and AP by group of classes, for every evaluation."""
    return [
        {
            "iteration": iteration,
            "AP50": metrics["AP50"],
            **dict(zip(GROUPS, (metrics["AP"], group_ap(metrics, carried), group_ap(metrics, new)), strict=True)),
        }
        for iteration, metrics in result.curve
    ]


def ap_table(results: Sequence[ArmResult], carried: Sequence[str], new: Sequence[str]) -> str:
    """First and last evaluation of each arm; groups of classes without ground truth are left out."""
    curves = [(result.arm, grouped_curve(result, carried, new)) for result in results]
    groups = groups_with_truth([curve for _, curve in curves])
    rows = []
    for end in (0, -1):
        for arm, curve in curves:
            point = curve[end]
            rows.append([int(point["iteration"]), arm.name, *(f"{point[group]:.1f}" for group in (*groups, "AP50"))])
    headers = ["iteration", "arm", *(f"AP, {group}" for group in groups), "AP50, all classes"]
    align = ("right", "left", *["right"] * (len(groups) + 1))
    return tabulate(rows, headers=headers, colalign=align, disable_numparse=True)


def groups_with_truth(curves: Sequence[Sequence[Metrics]]) -> list[str]:
    """The groups of classes with ground truth; the first only where it is more than one of the others."""
    parts = [group for group in GROUPS[1:] if not all(np.isnan(point[group]) for curve in curves for point in curve)]
    return [*GROUPS[:1], *parts] if len(parts) > 1 else parts


def write_results(
    path: Path, results: Sequence[ArmResult], carried: Sequence[str], new: Sequence[str], **more: Any
) -> None:
    """Every evaluation of every arm as JSON; what has no ground truth is ``null``."""
    arms = {
        result.arm.name: {
            "seconds": round(result.seconds, 1),
            "curve": [
                {key: None if np.isnan(value) else round(value, 3) for key, value in point.items()}
                for point in grouped_curve(result, carried, new)
            ],
        }
        for result in results
    }
    text = json.dumps({"carried": list(carried), "new": list(new), "arms": arms, **more}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def check_extras() -> None:
    """Raise where a package is missing that only the demonstrations need.

    Raises:
        UsageError: says how to get it.
    """
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            "demo",
            expected=f"the packages {', '.join(EXTRAS.values())}",
            found=f"no {' and no '.join(missing)}",
            fix="Type: pip install 'd2_headadapt[demo]'",
        )


@contextmanager
def fresh_output(folder: Path) -> Iterator[TextIO]:
    """Empty ``folder`` and open its ``log.txt``, for :func:`quiet`."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    # Loggers keep the file as their stream, and detectron2 closes nothing before the interpreter ends.
    with (folder / "log.txt").open("w", encoding="utf-8", buffering=1) as log:
        try:
            yield log
        finally:
            forget_handlers()


@contextmanager
def quiet(log: TextIO) -> Iterator[None]:
    """Send what is printed, logged and warned of to a file. Progress bars write to stderr and stay."""
    forget_handlers()

    def to_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        log.write(warnings.formatwarning(message, category, filename, lineno, line))

    # torch has a handler of its own, which writes to stderr.
    of_torch = logging.getLogger("torch")
    handlers, of_torch.handlers = of_torch.handlers, [logging.StreamHandler(log)]
    try:
        with redirect_stdout(log), warnings.catch_warnings():
            warnings.showwarning = to_log
            yield
    finally:
        of_torch.handlers = handlers


def forget_handlers() -> None:
    """Take detectron2's handlers from its loggers: each ``setup_logger`` adds some, and all would write every line."""
    for name in ("detectron2", "fvcore", "d2_headadapt"):
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()


def run_as_command(run: Callable[[], object], description: str | None) -> int:
    """Run a demo from the project's folder; a user's mistake is one line and its exit code."""
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    try:
        run()
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
