"""Options, configs and commands in the wrong place: the hint is a whole command line, and argparse reads it."""

from __future__ import annotations

import argparse
import shlex

import pytest
from helpers.commands import cli

from d2_headadapt.cli.misplaced import refuse_misplaced
from d2_headadapt.cli.parser import build_parser


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("plan c.yaml", "plan --config-file c.yaml"),
        ("c.yaml", "doctor --config-file c.yaml"),
        ("--config-file c.yaml plan", "plan --config-file c.yaml"),
        ("plan SEED 1 --weights 'my w.pth'", "plan --weights 'my w.pth' SEED 1"),
        ("adapt --weights w SEED 1 --output=o.pth --force", "adapt --weights w --output=o.pth --force SEED 1"),
        ("plan --config-file c.py train.amp=1 --weights w", "plan --config-file c.py --weights w train.amp=1"),
        ("train c.yaml --num-gpus 2 SEED 1", "train --config-file c.yaml --num-gpus 2 SEED 1"),
        ("doctor --config-file c.yaml SEED 1 --all-images", "doctor --config-file c.yaml --all-images SEED 1"),
    ],
)  # fmt: skip
def test_the_whole_line_is_put_right(line: str, right: str, parser: argparse.ArgumentParser) -> None:
    ran = cli(*shlex.split(line))
    assert ran.code == 2 and ran.out == ""
    said = "expected the command, then its options, a config behind --config-file, and KEY VALUE pairs last"
    assert ran.err == f"error: command line: {said}, found d2-headadapt {line}. Type: d2-headadapt {right}\n"
    refuse_misplaced(shlex.split(right), parser)
    args = parser.parse_args(shlex.split(right))
    assert not any(word.startswith("-") or word.endswith((".yaml", ".py")) for word in args.opts)


@pytest.mark.parametrize(
    "line",
    [
        "plan --config-file c.yaml --weights w SOLVER.BASE_LR -1.0",
        "predict --config-file c.yaml --images a b.yaml --output o SEED 1",
        "plan --weights w MODEL.WEIGHTS c.yaml",
        "run train.py --config-file c.yaml plan",
        "explain plan c.yaml --weights",
        "doctor --list",
        "--version",
    ],
)
def test_what_argparse_reads_is_left_alone(line: str, parser: argparse.ArgumentParser) -> None:
    refuse_misplaced(shlex.split(line), parser)
