"""Declare options that several command lines share, without importing torch or detectron2."""

from __future__ import annotations

import argparse
import os
import sys

from ..key import DATASETS, OUTPUT_DIR


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--import MODULE_OR_FILE.py``, as often as needed."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE.py",
        help="a module or file that registers your own components; its code runs; repeatable",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``detectron2.engine.default_argument_parser``, which a test compares them with."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="a detectron2 yaml or LazyConfig")
    parser.add_argument("--resume", action="store_true", help=f"go on from the last checkpoint of {OUTPUT_DIR!s}")
    parser.add_argument("--eval-only", action="store_true", help=f"evaluate on {DATASETS.TEST!s} and stop")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs (or CPU processes) of each machine (1)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in all (1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    # As detectron2 chooses it: a port that stays the same, so that a process left behind is noticed.
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    parser.add_argument(
        "--dist-url", default=f"tcp://127.0.0.1:{port}", metavar="URL", help="where the processes meet (this machine)"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides; key=value of a LazyConfig"
    )
