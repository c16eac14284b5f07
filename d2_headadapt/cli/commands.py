"""Run the commands of :mod:`d2_headadapt.cli.parser`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..adapt.report import plan_json, plan_table, summary_line
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.load import check_exists, plan_file, refuse_plan
from ..checkpoint.provenance import KEY, Provenance
from ..doctor.running import checks_markdown, examine, report_json, report_text
from ..engine.predict import Predictor, image_files, name_classes, predict_files, provenance_of
from ..engine.train import command, refuse_new_rows
from ..engine.train import main as train_yaml
from ..engine.train_lazy import main as train_lazy
from ..errors import UsageError
from ..export import ENDINGS, export_lines, export_predictor, write_bytes
from ..files import existing_output, is_same_file, write_checkpoint, write_text
from ..fit import FitReport, FitSettings, fit_json, fit_lines, fit_new_rows
from ..key import MODEL, Form, form_of
from ..setup.recipe import Recipe, no_training_set, read_recipe
from .keep_commands import add as add
from .keep_commands import extend as extend
from .keep_commands import pack as pack
from .keep_commands import remove as remove
from .plan_html import plan_html
from .quiet import print_json
from .run import Adoption, run_script


def plan(args: argparse.Namespace) -> int:
    """Print what loading would do, from names and shapes alone."""
    recipe = _configure(args)
    path, settings = _weights(args, recipe.config), recipe.settings
    _check_reports(args, [path, *_files_of(recipe)])
    made = plan_file(path, recipe.build_on_meta(), settings)
    _print_or_write(plan_table(made, every_tensor=args.all), plan_json(made), args)
    if args.html:
        notes = [f"Checkpoint: {path}", f"Config: {args.config_file or 'the defaults of detectron2'}"]
        notes += made.found
        write_text(args.html, plan_html(made, notes=notes), exclusive=not args.force)
    refuse_plan(made, settings.min_coverage, path)
    return 0


def _check_reports(args: argparse.Namespace, inputs: Sequence[str], output: str | None = None) -> None:
    """Refuse to write a report over a file that the command reads or writes, or over any other without ``--force``."""
    known = {os.path.realpath(name.partition("?")[0]) for name in (*inputs, args.config_file, output or "") if name}
    for path in filter(None, (args.json, getattr(args, "html", None))):
        if path == "-":
            continue
        folder = os.path.dirname(path) or "."
        if os.path.realpath(path) in known or any(is_same_file(name, path) for name in known):
            expected, found = "an output that is not the checkpoint, nor another input or output", "the same file"
            raise UsageError(path, expected=expected, found=found, fix="Name another output.")
        if not os.path.isdir(folder):
            expected, found = "an existing folder", f"no folder {folder!r}"
            raise UsageError(path, expected=expected, found=found, fix=f"Type: mkdir -p {shlex.quote(folder)}")
        if os.path.lexists(path) and not args.force:
            expected, found = "an output that does not exist yet", "a folder" if os.path.isdir(path) else "a file"
            raise UsageError(path, expected=expected, found=found, fix="Name another output, or add --force.")
        known.add(os.path.realpath(path))


def _files_of(recipe: Recipe) -> list[str]:
    """List every file that a config names: datasets, class lists, embeddings."""
    found: list[str] = []
    # A settled config holds the names that were read from a class list, and no longer its path.
    tables = (*recipe.settings.target.values(), *recipe.settings.source.values())
    waiting: list[Any] = [recipe.config, [table.origin for table in tables]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and os.path.isfile(value):
            found.append(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return found


def _print_or_write(text: str, as_json: str, args: argparse.Namespace) -> None:
    """Print ``text``, or its JSON where ``--json`` is a dash; the JSON goes to any other file that it names."""
    if args.json == "-":
        print_json(as_json)
        return
    print(text)
    if args.json:
        write_text(args.json, as_json, exclusive=not args.force)


def adapt(args: argparse.Namespace) -> int:
    """Write an adapted checkpoint: the model and its provenance."""
    checkpointer, left_out = _load(args, _configure(args))
    _write(args, checkpointer, left_out)
    return 0


def fit(args: argparse.Namespace) -> int:
    """Write an adapted checkpoint whose new rows are solved on the training images, on ``MODEL.DEVICE``."""
    recipe = _configure(args, reads_labels=True)
    how = FitSettings.from_config(recipe.config)
    _check_reports(args, [_weights(args, recipe.config), *_files_of(recipe)], args.output)
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
    _print_or_write(text, fit_json(report, tables, checkpointer.untrained), args)
    _write(args, checkpointer, left_out)
    return 0


def train(args: argparse.Namespace) -> int:
    """Train like ``tools/train_net.py``, and with a ``.py`` config like ``tools/lazyconfig_train_net.py``."""
    return command(train_lazy if form_of(args.config_file) is Form.LAZY else train_yaml, args)


def doctor(args: argparse.Namespace) -> int:
    """Print what is wrong with config, datasets, weights and model, or every check there is with ``--list``."""
    if args.list:
        print(checks_markdown(), end="")
        return 0
    _check_reports(args, [args.weights or "", *filter(os.path.isfile, args.opts)])
    report = examine(args.config_file, args.opts, args.imports, args.weights, args.all_images)
    _print_or_write(report_text(report).rstrip("\n"), report_json(report), args)
    return report.exit_code


def _load(args: argparse.Namespace, recipe: Recipe) -> tuple[HeadAdaptCheckpointer, list[str]]:
    """Load the checkpoint into the config's model; return what of the file has no place in an output too."""
    path = _weights(args, recipe.config)
    inputs = [path.partition("?")[0], args.config_file, *_files_of(recipe)]
    existing_output(args.output, force=args.force, inputs=inputs)
    # New rows are drawn by the model's constructor: the same command writes the same file.
    seed_all_rng(max(recipe.config.SEED, 0))
    model = recipe.build()
    checkpointer = HeadAdaptCheckpointer(model)
    left = checkpointer.load(path, checkpointables=[])
    if checkpointer.plan is not None:
        print(summary_line(checkpointer.plan))
    return checkpointer, sorted(set(left) - {"__author__", "matching_heuristics"})


def _write(args: argparse.Namespace, checkpointer: HeadAdaptCheckpointer, left_out: Sequence[str]) -> None:
    # A file of a GPU's tensors would load on no machine without one.
    model = checkpointer.model.cpu()
    content = {"model": model.state_dict(), KEY: checkpointer.provenance().to_plain()}
    write_checkpoint(args.output, content, exclusive=not args.force)
    if left_out:
        print(f"left out: {', '.join(left_out)} (a new run starts at iteration 0 with a fresh optimizer)")
    print(f"wrote {args.output}")


def _configure(args: argparse.Namespace, *, reads_labels: bool = False) -> Recipe:
    """Read the recipe of a config; a command that reads the labels of ``DATASETS.TRAIN`` runs on its device."""
    setup_logger(name="d2_headadapt")

    def change(cfg: CfgNode) -> None:
        if cfg.MODEL.HEAD_ADAPT.KEEP:
            # Its classes are those of the file.
            cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
        if not reads_labels:
            cfg.MODEL.DEVICE = "cpu"
        elif not cfg.DATASETS.TRAIN and form_of(args.config_file) is not Form.LAZY:
            raise no_training_set()
        else:
            # Nothing is evaluated, so test sets need not be there.
            cfg.DATASETS.TEST = ()

    return read_recipe(args.config_file, args.opts, args.imports, reads_labels=reads_labels, change=change)


def _weights(args: argparse.Namespace, cfg: CfgNode) -> str:
    path: str = os.path.expanduser(args.weights or cfg.MODEL.WEIGHTS)
    if not path:
        raise UsageError(
            "--weights", expected="a checkpoint", found=f"none, and {MODEL.WEIGHTS} is empty", fix="Add --weights FILE."
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
        inputs = [path.partition("?")[0], args.config_file, *map(str, files)]
        existing_output(args.output, force=args.force, inputs=inputs, endings=ENDINGS[args.format])

    predictor, path = _predictor(args, check, device="cpu")
    print(f"exporting {type(predictor.model).__name__} as {args.format}, and comparing it with eager")
    made = export_predictor(predictor, args.format, files)
    print(export_lines(made, checkpoint_bytes=os.path.getsize(PathManager.get_local_path(path.partition("?")[0]))))
    write_bytes(args.output, made.content, exclusive=not args.force)
    print(f"wrote {args.output}")
    return 0


def _predictor(
    args: argparse.Namespace, check: Callable[[str], None] = lambda path: None, device: str | None = None
) -> tuple[Predictor, str]:
    """Make a predictor whose classes its checkpoint names, and that checkpoint, which ``check`` may refuse first."""
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
    """Run an existing script with this package in place."""
    opts = [word for pair in args.opts for word in pair]
    run_script(args.script, Adoption(tuple(opts), tuple(args.imports), args.fit, args.heads, args.plan))
    return 0
