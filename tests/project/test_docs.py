"""The documentation: links lead somewhere, keys and options exist, and the guides do what they say."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import ROOT, cli
from helpers.guides import Shell, blocks, script, shows

from d2_headadapt.cli.parser import build_parser, split_script
from d2_headadapt.config.keys import add_headadapt_config
from d2_headadapt.engine.train import default_argument_parser
from d2_headadapt.errors import ConfigError
from d2_headadapt.setup.yaml import load_config

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = sorted((DOCS / "guides").glob("*.md"))
RUNNABLE = [page for page in PAGES if any(b.mark == "run" for b in blocks(page))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def ids(paths: Sequence[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def without_code(text: str) -> str:
    """Headings and links inside fences are none."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(without_code(page.read_text(encoding="utf-8"))):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", bare).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files that are not there, or to headings that a page has not."""
    broken = []
    for link in (a or b for a, b in LINK.findall(without_code(text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        good = target.exists() and (not anchor or (target.suffix == ".md" and anchor in anchors(target)))
        if not good:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text", ["[a](nowhere.md)", "[a](fit.md#no-such-heading)", "![a](nowhere.png)", "[a](#nothing-here)"]
)
def test_mutation_a_broken_link_is_seen(text: str) -> None:
    assert broken_links(DOCS / "fit.md", text)
    assert not broken_links(
        DOCS / "fit.md", "[a](tasks.md#data), [b](#what-it-shows), ![c](fit_curves.png), <https://x.org>"
    )


def test_every_page_is_reached_from_the_readme() -> None:
    """Through the index, in as many steps as it takes."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        links = (a.partition("#")[0] for a, _ in LINK.findall(without_code(page.read_text(encoding="utf-8"))))
        waiting += [(page.parent / link).resolve() for link in links if link and ":" not in link]
    assert set(PAGES) <= reached


def yaml_blocks() -> list[Any]:
    """The yamls of every page that are whole configs: those that begin with a key of detectron2 in capitals."""
    return [
        pytest.param(block, id=block.where)
        for page in PAGES
        for block in blocks(page)
        if block.language == "yaml" and re.match(r"(_BASE_|[A-Z]+):", block.text)
    ]


@pytest.mark.parametrize("block", yaml_blocks())
def test_every_key_of_every_yaml_exists(block: Any, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    content.pop("_BASE_", None)
    path = tmp_path / "page.yaml"
    path.write_text("\n".join(line for line in block.text.splitlines() if not line.startswith("_BASE_")))
    cfg = load_config(str(path))
    assert content and set(content) <= set(cfg)


def test_there_are_yamls_and_a_wrong_key_is_seen(tmp_path: Path) -> None:
    assert len(yaml_blocks()) >= 10
    path = tmp_path / "page.yaml"
    path.write_text("MODEL:\n  HEAD_ADAPT:\n    TARGET_CLASES: [cat]\n")
    with pytest.raises(ConfigError, match="TARGET_CLASSES"):
        load_config(str(path))


def command_lines() -> list[Any]:
    """Commands of ours on every page: in fences, in indented blocks and in sentences."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = [block for block in blocks(page) if block.language in ("bash", "sh")]
        lines = [words for block in shell for words in block.commands() if words]
        indented = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"(?:^    .*\n)+", without_code(text), re.MULTILINE)))
        lines += [line.split() for line in indented.splitlines() if not line.strip().startswith("#")]
        inline = re.findall(r"`((?:d2-headadapt|python tools/train_net\.py)\s[^`]+)`", without_code(text))
        lines += [line.split() for line in inline]
        for words in lines:
            ours = ours_in(words)
            if ours:
                found.append(pytest.param(ours, id=f"{page.name}: {' '.join(ours)[:60]}"))
    return found


def ours_in(words: Sequence[str]) -> list[str]:
    """``d2-headadapt ...`` or ``tools/<file>.py ...`` inside a command line; empty where there is none."""
    for i, word in enumerate(words):
        if word == "d2-headadapt" or re.fullmatch(r"tools/\w+\.py", word):
            end = next((j for j, w in enumerate(words) if j > i and w in ("|", ">", ";", "&&")), len(words))
            return list(words[i:end])
    return []


def parse(words: Sequence[str]) -> None:
    """Read a command line with the parser that will read it; wrong options exit.

    ``...`` at its end stands for the rest.
    """
    given = [word.strip("'") for word in words[1:]]
    given = given[:-1] if given[-1:] == ["..."] else given
    if words[0] == "d2-headadapt":
        # What must be given may be left out of a sentence; what is given must exist.
        parser = build_parser()
        relax(parser)
        parser.parse_args(split_script(given)[0])
    elif words[0] == "tools/train_net.py" or words[0] == "tools/lazyconfig_train_net.py":
        default_argument_parser().parse_args(given)
    else:
        path = ROOT / words[0]
        assert path.is_file(), words[0]
        source = path.read_text(encoding="utf-8")
        for option in (word for word in given if word.startswith("--") and word != "--"):
            assert f'"{option}"' in source, f"{words[0]} has no {option}"


def relax(parser: argparse.ArgumentParser) -> None:
    """Nothing is required."""
    for action in parser._actions:
        action.required = False
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                relax(command)
        elif action.nargs == "+" and not action.option_strings:
            action.nargs = "*"


@pytest.mark.parametrize("words", command_lines())
def test_every_command_line_is_one_that_the_parser_reads(words: list[str]) -> None:
    parse(words)


def test_there_are_command_lines_and_a_wrong_one_is_seen() -> None:
    lines = [param.values[0] for param in command_lines()]
    assert len(lines) >= 30
    assert {words[1] for words in lines if words[0] == "d2-headadapt"} >= {
        *("plan", "adapt", "fit", "doctor", "explain", "predict", "run")
    }
    for wrong in ("d2-headadapt plan --jsn FILE", "d2-headadapt plann", "tools/practice.py --nothing"):
        with pytest.raises((SystemExit, AssertionError)):
            parse(wrong.split())


def test_every_command_has_its_line() -> None:
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert [name for name in commands.choices if f"| `d2-headadapt {name}" not in text] == []


def test_every_test_that_the_docs_name_exists() -> None:
    """``test_x.py::test_y`` and ``tests/test_x.py``, wherever they stand."""
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    named = missing = 0
    for page in PAGES:
        for file, _, name in re.findall(r"(?:tests/)?(test_\w+\.py)(::(\w+))?", page.read_text(encoding="utf-8")):
            named += 1
            functions = {n.name for n in ast.walk(ast.parse(files[file].read_text())) if isinstance(n, ast.FunctionDef)}
            missing += bool(name) and name not in functions
    assert named > 40 and not missing


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``tools/practice.py`` makes, with less training; ``D2HA_PRACTICE`` names a folder that it made before."""
    folder = tmp_path_factory.mktemp("practice") / "practice"
    made = os.environ.get("D2HA_PRACTICE")
    if made:
        return Path(made)
    ran = script([str(ROOT / "tools/practice.py"), "--output", str(folder), "--iterations", "10"])
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture
def project(practice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader of the guides types in."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(practice, tmp_path / "practice")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short_training(words: Sequence[str]) -> Sequence[str]:
    """A guide trains as long as its yaml says; a test need not."""
    more: list[str] = []
    trains = words[0] == "python" and words[1] in ("tools/train_net.py", "train_mine.py")
    if trains:
        more += ["SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2"]
        more += [] if "SOLVER.MAX_ITER" in words else ["SOLVER.MAX_ITER", "2"]
    if trains or "fit" in words:
        more += ["MODEL.HEAD_ADAPT.FIT.IMAGES", "8", "MODEL.HEAD_ADAPT.FIT.MIRROR", "False"]
    return more


def already_there(words: Sequence[str]) -> str | None:
    return "" if words[:2] == ["python", "tools/practice.py"] else None


# What a guide quotes, what is changed in its yaml, and the command that then says it.
QUOTED = [
    (
        "own_dataset",
        "DATASETS.REGISTER[0] ('my_train').json: expected a file, found ... which is not there",
        ("practice/train.json", "practice/trian.json"),
        ["d2-headadapt", "plan"],
    ),
    (
        "own_dataset",
        "expected a config key that exists, found MODEL.HEAD_ADPT",
        ("MODEL:", "MODEL:\n  HEAD_ADPT: {MATCH: name}"),
        ["d2-headadapt", "plan"],
    ),
    (
        "own_dataset",
        "DATASETS.TEST: expected the 3 classes of my_train, found another list in my_val",
        ("practice/val.json", "practice/more.json"),
        ["python", "tools/train_net.py"],
    ),
    (
        "more_classes",
        "expected different names, found 'star' twice",
        ("", ""),
        ["d2-headadapt", "plan", "MODEL.HEAD_ADAPT.TARGET_CLASSES", "['star', 'star']"],
    ),
    (
        "several_tasks",
        "MODEL.TASKS: expected different names, found 'colour' in lines 5 and 6",
        ("    colour:", '    colour: {"on": image}\n    colour:'),
        ["d2-headadapt", "plan"],
    ),
    (
        "text_classifier",
        "expected a row for each of the 2 classes ... found none for rabbit among its 7 rows",
        ("", ""),
        ["d2-headadapt", "plan", "MODEL.HEAD_ADAPT.TARGET_CLASSES", "['disc', 'rabbit']"],
    ),
    (
        "keep",
        "expected a name that the base does not have in another spelling",
        ("", ""),
        ["d2-headadapt", "extend", "--output", "x.pth", "MODEL.HEAD_ADAPT.TARGET_CLASSES", "['Disc', 'moon']"],
    ),
    (
        "other_names",
        "MODEL.HEAD_ADAPT.ALIASES, 'circle=dics': expected a class of the source table ... Nearest: 'disc'",
        ("", ""),
        [
            *("d2-headadapt", "plan", "--weights", "practice/old.pth"),
            *("MODEL.HEAD_ADAPT.TARGET_CLASSES", "['circle']", "MODEL.HEAD_ADAPT.ALIASES", "['circle=dics']"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("name", "message", "change", "command"), QUOTED, ids=[f"{name} {message[:30]}" for name, message, *_ in QUOTED]
)
def test_a_message_that_a_guide_quotes_is_what_is_said(
    name: str, message: str, change: tuple[str, str], command: list[str], project: Path
) -> None:
    page = DOCS / "guides" / f"{name}.md"
    assert f"| `{message}` |" in page.read_text(encoding="utf-8")
    yamls = [block.text for block in blocks(page) if block.mark == "file"]
    text = yamls[0] if yamls else "_BASE_: practice/base.yaml\n"
    assert change[0] in text
    Path("wrong.yaml").write_text(text.replace(*change, 1) if change[0] else text)
    words = [*command[:2], "--config-file", "wrong.yaml", *command[2:]]
    ran = cli(*words[1:]) if words[0] == "d2-headadapt" else script(words[1:])
    assert ran.code in (1, 3)
    assert shows(ran.err, message), ran.err
    assert ran.err.count(": expected ") == 1  # no message inside a message


@pytest.mark.parametrize("page", RUNNABLE, ids=ids(RUNNABLE))
def test_a_guide_does_what_it_says(page: Path, project: Path) -> None:
    torch.manual_seed(0)
    executed = Shell(short_training, already_there).run(page)
    assert executed


def test_the_guides_that_must_run_do() -> None:
    names = {page.stem for page in RUNNABLE}
    assert {"own_dataset", "fewer_classes", "more_classes", "other_names", "resume", "python", "report"} <= names
    assert sum(block.mark == "shows" for page in RUNNABLE for block in blocks(page)) >= 20


def test_mutation_another_output_is_seen(project: Path) -> None:
    page = project / "page.md"
    page.write_text("<!-- run -->\n```python\nprint('one row')\n```\n\n<!-- shows -->\n```text\ntwo rows\n```\n")
    with pytest.raises(AssertionError, match="two rows"):
        Shell().run(page)
    page.write_text("<!-- run -->\n```bash\nd2-headadapt plan --config-file nowhere.yaml\n```\n")
    with pytest.raises(AssertionError, match=r"nowhere\.yaml"):
        Shell().run(page)
    assert shows("a\n[11/22 10:50:26 d2.x]: one   row\nb", "one row\n") and not shows("one row", "two rows\n")


def test_the_keys_that_prose_names_exist() -> None:
    """``MODEL.HEAD_ADAPT...`` in backticks, on every page."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_headadapt_config(cfg)
    for page in PAGES:
        for key in re.findall(r"`(MODEL\.HEAD_ADAPT(?:\.[A-Z_]+)+)", page.read_text(encoding="utf-8")):
            node = cfg
            for part in key.split(".") if not key.endswith("_") else ():
                assert part in node, f"{page.name}: {key}"
                node = node[part]
