"""What the commands of :mod:`d2_headadapt.cli` do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from .checkpoint import HeadAdaptCheckpointer
from .configuring import load_config, registered_names, resolve_config
from .errors import UsageError
from .files import existing_output, write_checkpoint, write_text
from .loading import check_exists, plan_file, refuse_plan
from .provenance import KEY
from .report import plan_json, plan_table, summary_line
from .report_html import plan_html
from .settings import AdaptSettings, attach_settings


def plan(args: argparse.Namespace) -> int:
    """Print what loading would do. Reads names and shapes, not values."""
    cfg, settings = _configure(args)
    path = _weights(args, cfg)
    _not_an_input([args.json, args.html], path)
    made = plan_file(path, build_on_meta(cfg), settings)
    text = plan_table(made, every_tensor=args.all)
    if args.json == "-":
        print(plan_json(made), end="")
    else:
        print(text)
    if args.json and args.json != "-":
        write_text(args.json, plan_json(made))
    if args.html:
        notes = [f"Checkpoint: {path}", f"Config: {args.config_file or 'the defaults of detectron2'}"]
        write_text(args.html, plan_html(made, notes=notes))
    refuse_plan(made, settings.min_coverage, path)
    return 0


def _not_an_input(paths: Sequence[str | None], weights: str) -> None:
    """Refuse to write a report over the checkpoint that it is about."""
    for path in paths:
        if path and path != "-" and os.path.realpath(path) == os.path.realpath(weights.partition("?")[0]):
            raise UsageError(
                path, expected="an output that is not the checkpoint", found="the same file", fix="Name another output."
            )


def adapt(args: argparse.Namespace) -> int:
    """Write an adapted checkpoint: the model and its provenance."""
    cfg, settings = _configure(args)
    path = _weights(args, cfg)
    existing_output(args.output, force=args.force, inputs=[path.partition("?")[0]])
    # New rows are drawn by the model's constructor: the same command writes the same file.
    seed_all_rng(max(cfg.SEED, 0))
    with registered_names():
        model = build_model(cfg)
    attach_settings(model, settings)
    checkpointer = HeadAdaptCheckpointer(model)
    left = checkpointer.load(path, checkpointables=[])
    write_checkpoint(args.output, {"model": model.state_dict(), KEY: checkpointer.provenance().to_plain()})
    if checkpointer.plan is not None:
        print(summary_line(checkpointer.plan))
    left_out = sorted(set(left) - {"__author__", "matching_heuristics"})
    if left_out:
        print(f"left out: {', '.join(left_out)} (a new run starts at iteration 0 with a fresh optimizer)")
    print(f"wrote {args.output}")
    return 0


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model's names and shapes without its memory; on the CPU where a module does not build on the meta device."""
    on_meta = cfg.clone()
    on_meta.defrost()
    on_meta.MODEL.DEVICE = "meta"
    with registered_names():
        try:
            with torch.device("meta"):
                model: nn.Module = build_model(on_meta)
        except (NotImplementedError, RuntimeError):
            on_meta.MODEL.DEVICE = "cpu"
            model = build_model(on_meta)
    return model


def _configure(args: argparse.Namespace) -> tuple[CfgNode, AdaptSettings]:
    setup_logger(name="d2_headadapt")
    cfg = load_config(args.config_file, args.opts, args.imports)
    cfg.MODEL.DEVICE = "cpu"
    settings = resolve_config(cfg, reads_labels=False)
    return cfg, settings


def _weights(args: argparse.Namespace, cfg: CfgNode) -> str:
    path: str = args.weights or cfg.MODEL.WEIGHTS
    if not path:
        raise UsageError(
            "--weights", expected="a checkpoint", found="none, and MODEL.WEIGHTS is empty", fix="Add --weights FILE."
        )
    check_exists(path)
    return path
