"""``d2-headadapt``: parse, call, print, exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ..engine.launch import add_import_argument, default_argument_parser
from ..engine.stopping import INTERRUPTED
from ..errors import HeadAdaptError
from ..export import ENDINGS
from ..files import is_full, unwritable
from ..setup.lazy.words import lazy_words
from ..version import __version__
from .commands import adapt, doctor, explain, export, fit, plan, predict, run_existing, train
from .misplaced import refuse_misplaced

DESCRIPTION = "Move a detectron2 checkpoint to another list of classes, class by class."
EPILOG = "Exit codes: 0 done, 1 refused or nothing to load, 2 the command line is wrong."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words, script = split_script(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        refuse_misplaced(words, parser)
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    args = parser.parse_args(words, argparse.Namespace(script=script))
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with lazy_words(getattr(args, "config_file", "")):
            return run(args)
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        output = getattr(args, "output", None)
        print(f"stopped; {output} was not written" if output else "stopped", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not is_full(error):
            raise
        refused = unwritable(str(error.filename or getattr(args, "output", None) or "."), error)
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code


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
    """The parser of every command."""
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
    command.set_defaults(run=plan)

    command = commands.add_parser(
        "adapt", help="write a checkpoint that stock detectron2 loads without a mismatch", epilog=EPILOG
    )
    _add_common(command)
    _add_output(command)
    command.set_defaults(run=adapt)

    command = commands.add_parser(
        "fit", help="adapt, and solve the rows of new classes on the images of DATASETS.TRAIN", epilog=EPILOG
    )
    _add_common(command)
    _add_output(command)
    command.add_argument("--json", metavar="FILE", help="also write the fit's report as JSON; - for standard output")
    command.set_defaults(run=fit)

    stock = default_argument_parser()
    command = commands.add_parser(
        "train",
        help="train or evaluate, as tools/train_net.py does",
        parents=[stock],
        add_help=False,
        epilog="The options are those of detectron2's own train_net.py.",
    )
    command.set_defaults(run=train)

    command = commands.add_parser(
        "doctor",
        help="find mistakes in config, datasets, weights and model before any training; changes nothing",
        epilog="Exit codes: 0 no error stands, 1 one does, 2 the command line is wrong.",
    )
    _add_common(command)
    command.add_argument("--json", metavar="FILE", help="also write the findings as JSON; - for standard output")
    command.add_argument("--all-images", action="store_true", help="open every image rather than a sample")
    command.add_argument("--list", action="store_true", help="print every check and stop")
    command.set_defaults(run=doctor)

    command = commands.add_parser(
        "explain", help="say what an error of torch or detectron2 means, and what to type", epilog=EPILOG
    )
    command.add_argument("text", nargs="+", metavar="TEXT", help="the error or a whole log; - reads standard input")
    command.set_defaults(run=explain)

    command = commands.add_parser(
        "predict", help="boxes, names and tasks of images, as JSON and as pictures; names come from the checkpoint"
    )
    _add_common(command)
    command.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="images, or folders of images")
    command.add_argument("--output", required=True, metavar="FOLDER", help="for predictions.json and the pictures")
    command.add_argument("--least-score", type=score, default=0.5, metavar="SCORE", help="of a box that is kept (0.5)")
    command.set_defaults(run=predict)

    command = commands.add_parser(
        "export", help="write the model as TorchScript or ONNX, once its outputs were compared", epilog=EPILOG
    )
    _add_common(command)
    command.add_argument(
        "--format", required=True, choices=list(ENDINGS), help="TorchScript by tracing or by scripting, or ONNX"
    )
    command.add_argument("--output", metavar="FILE", required=True, help="the new file, .ts, .pt or .onnx")
    command.add_argument("--force", action="store_true", help="replace an existing output")
    command.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, or folders of images, to compare on; drawn ones are always compared too",
    )
    command.set_defaults(run=export)

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
    command.add_argument(
        "--set",
        dest="opts",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="a default of the script's config, such as MODEL.HEAD_ADAPT.SOURCE_CLASSES coco; repeatable",
    )
    command.set_defaults(run=run_existing)
    return parser


def score(text: str) -> float:
    """A number from 0 to 1 of the command line."""
    value = float(text)
    if not 0 <= value <= 1:  # not a number is neither
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text}")
    return value


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="FILE", required=True, help="the new checkpoint, .pth or .safetensors")
    command.add_argument("--force", action="store_true", help="replace an existing output")


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config-file", default="", metavar="FILE", help="a detectron2 yaml or LazyConfig")
    command.add_argument("--weights", metavar="FILE", help="the checkpoint; MODEL.WEIGHTS by default")
    add_import_argument(command)
    command.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides; key=value of a LazyConfig"
    )
