"""Parse the command line ``d2-headadapt``: parser, call, exit code.

Parsing needs the standard library only. What a command does is imported once the command line is known to be right,
because torch and detectron2 take seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import INTERRUPTED, HeadAdaptError, UsageError
from ..export import ENDINGS
from ..key import DATASETS, HEAD_ADAPT, MODEL
from ..setup.arguments import add_import_argument, add_training_arguments
from ..version import __version__
from .misplaced import refuse_misplaced
from .quiet import json_alone, without_warnings

DESCRIPTION = "Move a detectron2 checkpoint to another list of classes, class by class."
EPILOG = "Exit codes: 0 done, 1 refused or nothing to load, 2 the command line is wrong."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words, script = split_script(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        refuse_misplaced(words, parser)
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    args = with_home(parser.parse_args(words, argparse.Namespace(script=script)))
    if args.run == "explain":
        return explain(args)
    try:
        if args.run == "run_existing":
            check_script(script)
        with without_warnings(), json_alone(getattr(args, "json", None) == "-"):
            return _run(args)
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        output = getattr(args, "output", None)
        print(f"stopped; {output} was not written" if output else "stopped", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        from ..files import is_full, unwritable

        if not is_full(error):
            raise
        refused = unwritable(str(error.filename or getattr(args, "output", None) or "."), error)
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code


def _run(args: argparse.Namespace) -> int:
    """Import the commands and run the one of ``args``, after a word that something is going on."""
    if os.environ.get("RANK", "0") == "0":  # Of torchrun's processes one is enough.
        source = " ".join(args.script[: 1 + (args.script[:1] == ["-m"])]) or getattr(args, "config_file", "")
        print(f"reading {source or 'the defaults of detectron2'} ...", file=sys.stderr, flush=True)
    from ..setup.lazy.loading import in_words_of
    from . import commands

    run: Callable[[argparse.Namespace], int] = getattr(commands, args.run)
    with in_words_of(getattr(args, "config_file", "")):
        return run(args)


def explain(args: argparse.Namespace) -> int:
    """Print what a pasted error means; 1 where it is not known."""
    from ..doctor.explain import explanation_text

    text, is_known = explanation_text(sys.stdin.read() if args.text == ["-"] else " ".join(args.text))
    print(text)
    return 0 if is_known else 1


def check_script(script: Sequence[str]) -> None:
    """Refuse ``run`` without a script that is there, or without the name of a module behind ``-m``.

    Raises:
        UsageError: there is none.
    """
    if not script or list(script) == ["-m"]:
        raise UsageError(
            "d2-headadapt run", expected="a script", found="none", fix="Type: d2-headadapt run train_net.py ..."
        )
    if script[0] != "-m" and not os.path.isfile(script[0]):
        raise UsageError(
            "d2-headadapt run", expected="a Python script", found=f"no file {script[0]!r}", fix="Correct the path."
        )


def with_home(args: argparse.Namespace) -> argparse.Namespace:
    """Expand ``~`` in the paths of a command line: a shell does so in ``--weights ~/x``, not in ``--weights=~/x``."""
    for name in ("config_file", "weights", "output", "json", "html", "images", "image", "opts"):
        value = getattr(args, name, None)
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(args, name, [_expanded(word) if isinstance(word, str) else word for word in value])
    return args


def _expanded(word: str) -> str:
    # key=~/x of a LazyConfig
    key, equal, value = word.partition("=")
    return f"{key}={os.path.expanduser(value)}" if equal and value.startswith("~") else os.path.expanduser(word)


def split_script(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words of ``run`` before the script, or its ``-m``; argparse would look for options behind it too.

    Returns:
        What the parser of the command reads, and the script with its arguments; empty for other commands.
    """
    words = list(argv)
    if words[:1] != ["run"]:
        return words, []
    taken = {"--import": 1, "--set": 2}
    i = 1
    while i < len(words) and words[i].startswith("-") and words[i] != "-m":
        i += 1 + taken.get(words[i], 0)
    return words[:i], words[i:]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command."""
    parser = argparse.ArgumentParser("d2-headadapt", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "plan", help="show what loading a checkpoint would do; changes nothing", epilog=EPILOG
    )
    _add_common(command)
    command.add_argument("--json", metavar="FILE", help="also write the plan as JSON; - for standard output")
    command.add_argument("--html", metavar="FILE", help="also write it as one page with the class map as a picture")
    command.add_argument("--all", action="store_true", help="list every tensor, not only those of heads")
    _add_force(command)
    command.set_defaults(run="plan")

    command = commands.add_parser(
        "adapt", help="write a checkpoint that stock detectron2 loads without a mismatch", epilog=EPILOG
    )
    _add_common(command)
    _add_output(command)
    command.set_defaults(run="adapt")

    command = commands.add_parser(
        "fit", help=f"adapt, and solve the rows of new classes on the images of {DATASETS.TRAIN!s}", epilog=EPILOG
    )
    _add_common(command)
    _add_output(command)
    command.add_argument("--json", metavar="FILE", help="also write the fit's report as JSON; - for standard output")
    command.set_defaults(run="fit")

    _add_keep(commands)

    command = commands.add_parser(
        "train",
        help="train or evaluate, as tools/train_net.py does",
        epilog="The options are those of detectron2's own train_net.py.",
    )
    add_training_arguments(command)
    add_import_argument(command)
    command.set_defaults(run="train")

    command = commands.add_parser(
        "doctor",
        help="find mistakes in config, datasets, weights and model before any training; changes nothing",
        epilog="Exit codes: 0 no error stands, 1 one does, 2 the command line is wrong.",
    )
    _add_common(command)
    command.add_argument("--json", metavar="FILE", help="also write the findings as JSON; - for standard output")
    command.add_argument("--all-images", action="store_true", help="open every image rather than a sample")
    command.add_argument("--list", action="store_true", help="print every check and stop")
    _add_force(command)
    command.set_defaults(run="doctor")

    command = commands.add_parser(
        "explain", help="say what an error of torch or detectron2 means, and what to type", epilog=EPILOG
    )
    command.add_argument("text", nargs="+", metavar="TEXT", help="the error or a whole log; - reads standard input")
    command.set_defaults(run="explain")

    command = commands.add_parser(
        "predict", help="boxes, names and tasks of images, as JSON and as pictures; names come from the checkpoint"
    )
    _add_common(command)
    command.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="images, or folders of images")
    command.add_argument("--output", required=True, metavar="FOLDER", help="for predictions.json and the pictures")
    command.add_argument("--least-score", type=score, default=0.5, metavar="SCORE", help="of a box that is kept (0.5)")
    command.set_defaults(run="predict")

    command = commands.add_parser(
        "export", help="write the model as TorchScript or ONNX, once its outputs were compared", epilog=EPILOG
    )
    _add_common(command)
    command.add_argument(
        "--format", required=True, choices=list(ENDINGS), help="TorchScript by tracing or by scripting, or ONNX"
    )
    command.add_argument("--output", metavar="FILE", required=True, help="the new file, .ts, .pt or .onnx")
    _add_force(command)
    command.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, or folders of images, to compare on; drawn ones are always compared too",
    )
    command.set_defaults(run="export")

    command = commands.add_parser(
        "run",
        help="run an existing detectron2 script, unmodified, with class-by-class loading",
        usage="d2-headadapt run [options] SCRIPT ARGS... | d2-headadapt run [options] -m MODULE ARGS...",
        epilog="Options stand before SCRIPT; everything after it is the script's.",
        allow_abbrev=False,
    )
    add_import_argument(command)
    command.add_argument("--fit", action="store_true", help="DefaultTrainer solves new rows before its first iteration")
    command.add_argument("--heads", action="store_true", help="this package's ROI heads where the config names stock's")
    command.add_argument("--plan", action="store_true", help="end at the first load, and print what it would do")
    command.add_argument(
        "--set",
        dest="opts",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help=f"a default of the script's config, such as {HEAD_ADAPT.SOURCE_CLASSES!s} coco; repeatable",
    )
    command.set_defaults(run="run_existing")
    return parser


def score(text: str) -> float:
    """Read a number from 0 to 1 from the command line."""
    value = float(text)
    if not 0 <= value <= 1:  # not a number is neither
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text}")
    return value


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="FILE", required=True, help="the new checkpoint, .pth or .safetensors")
    _add_force(command)


def _add_force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="replace an existing output")


def _add_keep(commands: Any) -> None:
    """Enter the commands of classes behind an unmodified model."""
    command = commands.add_parser(
        "extend", help="add new classes behind an unmodified model, whose detections stay bit for bit", epilog=EPILOG
    )
    _add_common(command)
    _add_output(command)
    command.add_argument(
        "--images", type=int, default=20, metavar="N", help="images on which old detections are compared (20)"
    )
    command.set_defaults(run="extend")

    command = commands.add_parser("pack", help="write added classes as a small file of their own", epilog=EPILOG)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint with added classes")
    command.add_argument("--class", dest="name", default="", metavar="NAME", help="one of the classes of a session")
    command.add_argument("--output", metavar="FILE", required=True, help="the new file, .pack")
    command.add_argument("--force", action="store_true", help="replace an existing output")
    command.set_defaults(run="pack")

    command = commands.add_parser("add", help="put class packs behind the base they were made for", epilog=EPILOG)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="the base, with or without added classes")
    command.add_argument("packs", nargs="+", metavar="PACK", help="files of d2-headadapt pack")
    _add_output(command)
    command.set_defaults(run="add")

    command = commands.add_parser("remove", help="take added classes out of a checkpoint again", epilog=EPILOG)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint with added classes")
    command.add_argument("--class", dest="name", required=True, metavar="NAME", help="one of the classes of a session")
    _add_output(command)
    command.set_defaults(run="remove")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config-file", default="", metavar="FILE", help="a detectron2 yaml or LazyConfig")
    command.add_argument("--weights", metavar="FILE", help=f"the checkpoint; {MODEL.WEIGHTS!s} by default")
    add_import_argument(command)
    command.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides; key=value of a LazyConfig"
    )
