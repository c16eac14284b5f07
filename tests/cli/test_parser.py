"""The command line before and around the commands: what it imports, says first, and keeps from the terminal."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser
from helpers.commands import ROOT, cli, python

from d2_headadapt.cli import quiet
from d2_headadapt.cli.parser import build_parser
from d2_headadapt.setup.arguments import add_training_arguments

LIGHT = {
    "version": (["--version"], 0, "0."),
    "help": (["--help"], 0, "COMMAND"),
    "help of a heavy command": (["train", "--help"], 0, "--eval-only"),
    "no command": ([], 2, "the following arguments are required: COMMAND"),
    "an unknown option": (["plan", "--nothing"], 2, "unrecognized arguments: --nothing"),
    "an unknown format": (["export", "--format", "tflite", "--output", "x"], 2, "'traced', 'scripted', 'onnx'"),
    "no script": (["run"], 2, "expected a script, found none"),
    "a script that is not there": (["run", "nothing.py"], 2, "found no file 'nothing.py'"),
    "a known error": (["explain", "Dataset 'mine' is not registered! Available datasets are: x"], 0, "cause:"),
    "an error that needs names": (
        ["explain", "KeyError: \"No object named 'StandardROIHead' found in 'ROI_HEADS' registry!\""],
        0,
        "'StandardROIHeads'",
    ),
    "an unknown error": (["explain", "nothing"], 1, "not known"),
}
RUN = """
import sys
from d2_headadapt.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
loaded = {name.split(".")[0] for name in sys.modules}
print("HEAVY", sorted(loaded & {"torch", "torchvision", "detectron2", "numpy", "omegaconf", "yaml"}))
sys.exit(code)
"""


@pytest.mark.parametrize("name", LIGHT)
def test_what_needs_no_model_imports_nothing_heavy(name: str) -> None:
    words, code, says = LIGHT[name]
    ran = python("-c", RUN, *words)
    assert ran.code == code and says in ran.out + ran.err, ran.out + ran.err
    assert ran.out.endswith("HEAVY []\n")


def test_mutation_a_heavy_command_is_seen() -> None:
    assert "'torch'" in python("-c", RUN, "doctor", "--list").out.splitlines()[-1]


def test_python_m_is_the_command() -> None:
    ran = python("-m", "d2_headadapt", "--version")
    assert ran.code == 0 and ran.out == python("-c", RUN, "--version").out.partition("HEAVY")[0]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["plan", "--config-file", "my.yaml"], "reading my.yaml ..."),
        (["doctor"], "reading the defaults of detectron2 ..."),
        (["train", "--config-file", "my.py"], "reading my.py ..."),
        (["run", "-m", "some.module", "x"], "reading -m some.module ..."),
    ],
)
def test_a_heavy_command_speaks_before_it_imports(words: list[str], first: str) -> None:
    """Where torch cannot be imported, the word is there all the same."""
    code = "import sys\nsys.modules['torch'] = None\nfrom d2_headadapt.cli import main\nmain(sys.argv[1:])"
    ran = python("-c", code, *words)
    assert ran.err.splitlines()[0] == first and ran.out == ""
    assert "import of torch halted" in ran.err
    others = python("-c", code, *words, env={"RANK": "1"})
    assert first not in others.err


def options(parser: argparse.ArgumentParser) -> dict[str, tuple[object, ...]]:
    """By destination, what decides how words are read."""
    return {
        a.dest: (tuple(a.option_strings), a.nargs, a.type, a.default, type(a).__name__, a.required)
        for a in parser._actions
    }


def test_train_takes_what_detectron2_takes() -> None:
    ours = argparse.ArgumentParser()
    add_training_arguments(ours)
    assert options(ours) == options(default_argument_parser())
    [commands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    train = options(commands.choices["train"])
    assert {name: train[name] for name in options(ours)} == options(ours)


# ------------------------------------------------------------------------------------------------- what is kept quiet


def test_warnings_of_other_projects_are_silent_in_our_commands_only() -> None:
    shown = {"PYTHONWARNINGS": "default"}
    ran = python("-m", "d2_headadapt", "doctor", "--list", env=shown)
    assert ran.code == 0 and "Warning" not in ran.err and "HA101" in ran.out
    library = python(
        "-c", "import d2_headadapt\nprint(*[f for f in __import__('warnings').filters if f[1]])", env=shown
    )
    assert library.code == 0 and not any(message.split()[0] in library.out for message, _ in quiet.THIRD_PARTY)


def warn(message: str, module: str) -> None:
    warnings.warn_explicit(message, FutureWarning, "somewhere.py", 1, module=module, registry={})


@pytest.mark.parametrize(("message", "module"), quiet.THIRD_PARTY)
def test_only_these_are_silent_here_and_in_processes_to_come(message: str, module: str) -> None:
    before = os.environ.get("PYTHONWARNINGS")
    child = f"import warnings; warnings.warn_explicit({message + ' x'!r}, FutureWarning, 'f.py', 1, module={module!r})"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet.without_warnings():
            warn(f"{message} and more", module)
            ran = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, cwd=ROOT, check=True)
            # As catch_warnings(record=True) inside would have it: the filters alone decide.
            warnings.showwarning = lambda *args, **kwargs: seen.append(args[0])  # type: ignore[arg-type]
            warn("another message", module)
            warn(f"{message} and more", "somebody.else")
    assert ran.stderr == ""
    assert [str(warning) for warning in seen] == ["another message", f"{message} and more"]
    assert os.environ.get("PYTHONWARNINGS") == before


def test_json_on_standard_output_is_alone(tmp_path: Path) -> None:
    """Whatever is printed or logged meanwhile goes to standard error; also the log, which detectron2 puts on output."""
    config = tmp_path / "c.yaml"
    config.write_text("OUTPUT_DIR: nowhere\nMODEL: {WEIGHTS: ''}\n")
    ran = cli("doctor", "--config-file", config, "--json", "-")
    assert json.loads(ran.out)["version"] == 1
    code = "from d2_headadapt.cli import quiet\nfrom detectron2.utils.logger import setup_logger\n"
    code += "with quiet.json_alone(True):\n    setup_logger(name='x').warning('logged')\n    quiet.print_json('{}')"
    told = python("-c", code)
    assert told.out == "{}" and "logged" in told.err


def test_mutation_print_json_without_json_alone_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    quiet.print_json("{}")
    with quiet.json_alone(True):
        print("a line")
        quiet.print_json("{}")
    assert capsys.readouterr() == ("{}{}", "a line\n")
