"""What the commands of :mod:`d2_headadapt.cli.parser` do."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..adapt.report import plan_json, plan_table, summary_line
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.load import check_exists, plan_file, refuse_plan
from ..checkpoint.provenance import KEY, Provenance
from ..doctor.explain import explanation_text
from ..doctor.running import checks_markdown, examine, report_json, report_text
from ..engine.predict import Predictor, image_files, name_classes, predict_files, provenance_of
from ..engine.train import command, refuse_new_rows
from ..engine.train import main as train_yaml
from ..engine.train_lazy import main as train_lazy
from ..errors import UsageError
from ..export import ENDINGS, export_lines, export_predictor, write_bytes
from ..files import existing_output, write_checkpoint, write_text
from ..fit import FitReport, FitSettings, fit_json, fit_lines, fit_new_rows
from ..setup.lazy.words import is_lazy_file, words_for
from ..setup.recipe import Recipe, no_training_set, read_recipe
from .plan_html import plan_html
from .run import Adoption, run_script


def plan(args: argparse.Namespace) -> int:
    """Print what loading would do. Reads names and shapes, not values."""
    recipe = _configure(args)
    path, settings = _weights(args, recipe.config), recipe.settings
    _check_reports([args.json, args.html], [path])
    made = plan_file(path, recipe.build_on_meta(), settings)
    say = words_for(args.config_file)
    _print_or_write(say(plan_table(made, every_tensor=args.all)), plan_json(made), args.json)
    if args.html:
        notes = [f"Checkpoint: {path}", f"Config: {args.config_file or 'the defaults of detectron2'}"]
        write_text(args.html, say(plan_html(made, notes=notes)))
    refuse_plan(made, settings.min_coverage, path)
    return 0


def explain(args: argparse.Namespace) -> int:
    """Print what a pasted error means; 1 where it is not known."""
    text, is_known = explanation_text(sys.stdin.read() if args.text == ["-"] else " ".join(args.text))
    print(text)
    return 0 if is_known else 1


def _check_reports(paths: Sequence[str | None], checkpoints: Sequence[str]) -> None:
    """Refuse to write a report over a checkpoint that it is about, or where nothing can be written."""
    known = {os.path.realpath(name.partition("?")[0]) for name in checkpoints}
    for path in paths:
        if path and path != "-" and os.path.realpath(path) in known:
            raise UsageError(
                path, expected="an output that is not the checkpoint", found="the same file", fix="Name another output."
            )
        folder = os.path.dirname(path or "") or "."
        if not os.path.isdir(folder):
            raise UsageError(
                str(path),
                expected="an existing folder",
                found=f"no folder {folder!r}",
                fix=f"Type: mkdir -p {shlex.quote(folder)}",
            )


def _print_or_write(text: str, as_json: str, path: str | None) -> None:
    """Print ``text``, or its JSON where ``path`` is a dash; the JSON goes to any other ``path``."""
    print(as_json if path == "-" else f"{text}\n", end="")
    if path and path != "-":
        write_text(path, as_json)


def adapt(args: argparse.Namespace) -> int:
    """Write an adapted checkpoint: the model and its provenance."""
    checkpointer, left_out = _load(args, _configure(args))
    _write(args.output, checkpointer, left_out)
    return 0


def fit(args: argparse.Namespace) -> int:
    """Write an adapted checkpoint whose new rows are solved on the training images, on ``MODEL.DEVICE``."""
    recipe = _configure(args, reads_labels=True)
    how = FitSettings.from_config(recipe.config)
    _check_reports([args.json], [_weights(args, recipe.config), args.output])
    checkpointer, left_out = _load(args, recipe)
    made = checkpointer.plan
    tables, new = made.target if made is not None else {}, checkpointer.rows_to_fit()
    report, text = FitReport(), "no row is new: nothing to fit"
    if new:
        with checkpointer.fitted_rows():
            report = fit_new_rows(
                checkpointer.model, recipe.training_dicts(), recipe.mapper_at_test_size(), new=new, settings=how
            )
        text = fit_lines(report, tables)
    _print_or_write(text, fit_json(report, tables, checkpointer.untrained), args.json)
    _write(args.output, checkpointer, left_out)
    return 0


def train(args: argparse.Namespace) -> int:
    """What ``tools/train_net.py`` does, and with a ``.py`` config ``tools/lazyconfig_train_net.py``."""
    return command(train_lazy if is_lazy_file(args.config_file) else train_yaml, args)


def doctor(args: argparse.Namespace) -> int:
    """Print what is wrong with config, datasets, weights and model, or every check there is with ``--list``."""
    if args.list:
        print(checks_markdown(), end="")
        return 0
    _check_reports([args.json], [args.weights] if args.weights else [])
    report = examine(args.config_file, args.opts, args.imports, args.weights, args.all_images)
    _print_or_write(report_text(report, words_for(args.config_file)).rstrip("\n"), report_json(report), args.json)
    return report.exit_code


def _load(args: argparse.Namespace, recipe: Recipe) -> tuple[HeadAdaptCheckpointer, list[str]]:
    """The model of a config with the checkpoint loaded into it, and what of the file has no place in an output."""
    path = _weights(args, recipe.config)
    existing_output(args.output, force=args.force, inputs=[path.partition("?")[0]])
    # New rows are drawn by the model's constructor: the same command writes the same file.
    seed_all_rng(max(recipe.config.SEED, 0))
    model = recipe.build()
    checkpointer = HeadAdaptCheckpointer(model)
    left = checkpointer.load(path, checkpointables=[])
    if checkpointer.plan is not None:
        print(words_for(args.config_file)(summary_line(checkpointer.plan)))
    return checkpointer, sorted(set(left) - {"__author__", "matching_heuristics"})


def _write(output: str, checkpointer: HeadAdaptCheckpointer, left_out: Sequence[str]) -> None:
    # A file of a GPU's tensors would load on no machine without one.
    model = checkpointer.model.cpu()
    write_checkpoint(output, {"model": model.state_dict(), KEY: checkpointer.provenance().to_plain()})
    if left_out:
        print(f"left out: {', '.join(left_out)} (a new run starts at iteration 0 with a fresh optimizer)")
    print(f"wrote {output}")


def _configure(args: argparse.Namespace, *, reads_labels: bool = False) -> Recipe:
    """The recipe of a config; who reads the labels of ``DATASETS.TRAIN`` also runs the model, on its device."""
    setup_logger(name="d2_headadapt")

    def change(cfg: CfgNode) -> None:
        if not reads_labels:
            cfg.MODEL.DEVICE = "cpu"
        elif not cfg.DATASETS.TRAIN and not is_lazy_file(args.config_file):
            raise no_training_set()
        else:
            # Nothing is evaluated, so test sets need not be there.
            cfg.DATASETS.TEST = ()

    return read_recipe(args.config_file, args.opts, args.imports, reads_labels=reads_labels, change=change)


def _weights(args: argparse.Namespace, cfg: CfgNode) -> str:
    path: str = args.weights or cfg.MODEL.WEIGHTS
    if not path:
        raise UsageError(
            "--weights", expected="a checkpoint", found="none, and MODEL.WEIGHTS is empty", fix="Add --weights FILE."
        )
    check_exists(path)
    return path


def predict(args: argparse.Namespace) -> int:
    """Write what a model says of images: ``predictions.json`` and a picture for each."""
    setup_logger(name="d2_headadapt")
    files = image_files(args.images)
    predictor, _ = _predictor(args)
    for line in predict_files(predictor, files, Path(args.output), args.least_score):
        print(line)
    print(f"wrote {args.output}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a TorchScript or ONNX file whose outputs were compared with the model's."""
    setup_logger(name="d2_headadapt")
    files = image_files(args.image)

    def check(path: str) -> None:
        inputs = [path.partition("?")[0], *map(str, files)]
        existing_output(args.output, force=args.force, inputs=inputs, endings=ENDINGS[args.format])

    predictor, path = _predictor(args, check, device="cpu")
    print(f"exporting {type(predictor.model).__name__} as {args.format}, and comparing it with eager")
    made = export_predictor(predictor, args.format, files)
    print(export_lines(made, checkpoint_bytes=os.path.getsize(PathManager.get_local_path(path.partition("?")[0]))))
    write_bytes(args.output, made.content)
    print(f"wrote {args.output}")
    return 0


def _predictor(
    args: argparse.Namespace, check: Callable[[str], None] = lambda path: None, device: str | None = None
) -> tuple[Predictor, str]:
    """A model whose classes its checkpoint names, and that checkpoint, which ``check`` may refuse before it is read."""
    found: list[tuple[str, Provenance]] = []

    def change(cfg: CfgNode) -> None:
        path = _weights(args, cfg)
        check(path)
        found.append((path, provenance_of(path, cfg.MODEL.HEAD_ADAPT.TRUST_FILE)))
        name_classes(cfg, found[0][1])
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE

    predictor = Predictor(read_recipe(args.config_file, args.opts, args.imports, change=change), *found[0])
    refuse_new_rows(predictor.checkpointer, predictor.cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL, found[0][0])
    return predictor, found[0][0]


def run_existing(args: argparse.Namespace) -> int:
    """Run somebody's own script with this package in place."""
    if not args.script or args.script == ["-m"]:
        raise UsageError(
            "d2-headadapt run",
            expected="a script",
            found="none",
            fix="Type: d2-headadapt run train_net.py ...",
        )
    opts = [word for pair in args.opts for word in pair]
    run_script(args.script, Adoption(tuple(opts), tuple(args.imports), args.fit, args.heads))
    return 0
