"""Keys in both config forms: what is typed, what is read when, and that no message spells a key itself."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import get_cfg

import d2_headadapt
from d2_headadapt import add_headadapt_config
from d2_headadapt.errors import ConfigError, Finding
from d2_headadapt.key import (
    DATASETS,
    HEAD_ADAPT,
    MODEL,
    NAMED,
    OUTPUT_DIR,
    SOLVER,
    SWITCHES,
    TASKS,
    TEST,
    YAML,
    Either,
    Form,
    Key,
    form_in_use,
    form_of,
    pairs,
    shown,
    speaking,
)

PACKAGE = Path(d2_headadapt.__file__).parent
DECLARATIONS = {"key.py", "config/keys.py"}
"""Where keys are declared, and named for both forms."""
ELSEWHERE = {"MODEL.POINT_HEAD", "MODEL.FCOS", "MODEL.CLIP"}
"""Sections that projects of detectron2's and RegionCLIP declare."""


@pytest.mark.parametrize(
    ("text", "yaml", "lazy"),
    [
        (f"Set {HEAD_ADAPT.RESUME.set('adapt')} to go on: x", "Set MODEL.HEAD_ADAPT.RESUME adapt to go on: x",
         "Set head_adapt.resume=adapt to go on: x"),
        (f"set {OUTPUT_DIR} to a new folder", "set OUTPUT_DIR to a new folder", "set train.output_dir to a new folder"),
        (f"Write {SOLVER.BASE_LR.write(0.005)}.", "Write SOLVER.BASE_LR: 0.005.", "Write optimizer.lr=0.005."),
        (f"{TASKS['colour'].on}", "MODEL.TASKS.colour.on", "head_adapt.tasks.colour.on"),
        (f"{DATASETS.REGISTER[0].name}", "DATASETS.REGISTER[0].name", "head_adapt.register[0].name"),
        (f"{DATASETS.TEST} and {DATASETS.TRAIN}", "DATASETS.TEST and DATASETS.TRAIN",
         "dataloader.test.dataset.names and dataloader.train.dataset.names"),
        (f"{MODEL.WEIGHTSX}, {HEAD_ADAPT}", "MODEL.WEIGHTSX, MODEL.HEAD_ADAPT", "MODEL.WEIGHTSX, head_adapt"),
        (f"in the {YAML} or yamls", "in the yaml or yamls", "in the .py or yamls"),
        (f"add {DATASETS.TRAIN.set(('my_train',))}.", "add DATASETS.TRAIN \"('my_train',)\".",
         "add dataloader.train.dataset.names=\"['my_train']\"."),
        (f"Set {HEAD_ADAPT.ALIASES.set(['a=b'])}.", "Set MODEL.HEAD_ADAPT.ALIASES \"['a=b']\".",
         "Set head_adapt.aliases=\"['a=b']\"."),
        (f"Set {MODEL.MASK_ON.set(False)}.", "Set MODEL.MASK_ON False.", "Set model.roi_heads.mask_in_features=null."),
        (f"because {MODEL.MASK_ON.is_on()}", "because MODEL.MASK_ON is True", "because the model has a mask head"),
        (f"Set {MODEL.ROI_HEADS.NAME.set('HeadAdaptROIHeads')}.", "Set MODEL.ROI_HEADS.NAME HeadAdaptROIHeads.",
         "Set model.roi_heads._target_=d2_headadapt.HeadAdaptROIHeads."),
        (f"Set {MODEL.META_ARCHITECTURE.set('GeneralizedRCNN')}.", "Set MODEL.META_ARCHITECTURE GeneralizedRCNN.",
         "Set model._target_=detectron2.modeling.GeneralizedRCNN."),
        (f"{pairs({'on': 'image'})} or {pairs({'on': 'box'})}", "{on: image} or {on: box}",
         'dict(on="image") or dict(on="box")'),
        (f"Write {pairs({'held_out': 0.25, 'seed': 0})}, not {{this}}.", "Write {held_out: 0.25, seed: 0}, not {this}.",
         "Write dict(held_out=0.25, seed=0), not {this}."),
        (f"tasks: {pairs({'classes': ['a', 'b']}, 'colour')}", "tasks: colour: {classes: [a, b]}",
         'tasks: colour=dict(classes=["a", "b"])'),
        (f"{TASKS.write({'colour': {'on': 'box'}})}", "MODEL.TASKS: {colour: {on: box}}",
         'head_adapt.tasks=dict(colour=dict(on="box"))'),
        ("a class called MODEL.WEIGHTS, typed by a user", *["a class called MODEL.WEIGHTS, typed by a user"] * 2),
    ],
)  # fmt: skip
def test_a_text_reads_as_the_form_has_its_keys(text: str, yaml: str, lazy: str) -> None:
    assert (shown(text), shown(text, Form.YAML), shown(text, Form.LAZY)) == (yaml, yaml, lazy)
    with speaking(Form.LAZY):
        assert shown(text) == lazy and form_in_use() is Form.LAZY
    assert shown(text) == yaml and shown(shown(text)) == yaml


def test_the_form_is_that_of_the_file() -> None:
    assert [form_of(name) for name in ("a.yaml", "", "b.py", "http://x/c.yaml")] == [
        Form.YAML, Form.YAML, Form.LAZY, Form.YAML,
    ]  # fmt: skip


def test_a_key_is_text_when_it_is_logged_and_both_readings_when_it_is_written_into_a_text() -> None:
    with speaking(Form.LAZY):
        assert "%s" % HEAD_ADAPT.MATCH == str(HEAD_ADAPT.MATCH) == "head_adapt.match"  # noqa: UP031
    assert str(HEAD_ADAPT.MATCH) == f"{HEAD_ADAPT.MATCH!s}" == "MODEL.HEAD_ADAPT.MATCH"
    assert f"{HEAD_ADAPT.MATCH}" not in ("MODEL.HEAD_ADAPT.MATCH", "head_adapt.match")


def test_speaking_ends_where_something_is_raised() -> None:
    with pytest.raises(RuntimeError), speaking(Form.LAZY):
        raise RuntimeError
    assert form_in_use() is Form.YAML


def test_an_error_keeps_the_words_of_the_command_that_met_it() -> None:
    def met() -> ConfigError:
        return ConfigError(HEAD_ADAPT.MATCH, expected="x", found=repr("y"), fix=f"Set {HEAD_ADAPT.MATCH.set('name')}.")

    with speaking(Form.LAZY):
        lazy = met()
    for error, where, fix in (
        (met(), "MODEL.HEAD_ADAPT.MATCH", "Set MODEL.HEAD_ADAPT.MATCH name."),
        (lazy, "head_adapt.match", "Set head_adapt.match=name."),
    ):
        for one in (error, pickle.loads(pickle.dumps(error))):
            assert (one.where, one.expected, one.found, one.fix) == (where, "x", "'y'", fix)
            assert str(one) == f"{where}: expected x, found 'y'. {fix}"
            assert one.is_at(HEAD_ADAPT.FREEZE, HEAD_ADAPT.MATCH) and not one.is_at(HEAD_ADAPT.FREEZE)
            assert Finding("HA104", "error", one).to_json() == {
                "code": "HA104", "severity": "error", "where": where, "found": "'y'", "expected": "x", "fix": fix,
            }  # fmt: skip


def test_findings_that_say_the_same_are_equal() -> None:
    one, other = (
        Finding("HA1", "note", ConfigError(MODEL.WEIGHTS, expected="a", found="b", fix="C.")) for _ in range(2)
    )
    assert one == other and len({one, other}) == 1 and one.error != other.error
    assert one != Finding("HA1", "error", one.error) and str(one) == "note HA1: MODEL.WEIGHTS: expected a, found b. C."


def test_an_entry_of_a_key_is_at_that_key() -> None:
    assert ConfigError(f"{HEAD_ADAPT.ALIASES}, 'a'", expected="x", found="y", fix="Z.").is_at(HEAD_ADAPT.ALIASES)
    assert not ConfigError("file.pth", expected="x", found="y", fix="Z.").is_at(HEAD_ADAPT.ALIASES)


def test_a_key_reads_and_writes_its_place_in_a_config() -> None:
    cfg = get_cfg()
    assert MODEL.ROI_HEADS.NUM_CLASSES.of(cfg) == 80 and TEST.EVAL_PERIOD.of(cfg) == 0
    assert MODEL.GONE.NAME.of(cfg) is None and MODEL.WEIGHTS.GONE.of(cfg, 3) == 3
    MODEL.ROI_HEADS.NUM_CLASSES.put(cfg, 5)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
    with pytest.raises(KeyError):
        MODEL.GONE.NAME.put(cfg, 5)


def test_keys_are_values() -> None:
    assert MODEL.HEAD_ADAPT == HEAD_ADAPT == Key("MODEL.HEAD_ADAPT") != MODEL.TASKS
    assert len({HEAD_ADAPT.MATCH, Key("MODEL.HEAD_ADAPT.MATCH"), HEAD_ADAPT.FREEZE}) == 2
    assert pickle.loads(pickle.dumps(HEAD_ADAPT)) == HEAD_ADAPT
    assert Either("a", "b") != Either("a", "c")
    with pytest.raises(TypeError, match="MODEL is one key"):
        list(MODEL)


def test_every_key_of_this_package_has_a_lazy_name() -> None:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    names = {Key(name).lazy for name in _keys(cfg.MODEL.HEAD_ADAPT, "MODEL.HEAD_ADAPT")}
    assert len(names) > 40 and all(re.fullmatch(r"head_adapt(\.[a-z_]+)+", name) for name in names)


def test_every_key_with_a_lazy_name_exists() -> None:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    for name in (*NAMED, *SWITCHES):
        assert Key(name).of(cfg) is not None or name.startswith(tuple(ELSEWHERE)), name


def _keys(node: object, path: str) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{path}.{key}"
        yield from _keys(value, f"{path}.{key}")


# -- the package itself ------------------------------------------------------------------------------------------------

NAME = re.compile(r"\b(?:MODEL|SOLVER|DATASETS|INPUT|TEST|DATALOADER)\.[A-Z]|\bOUTPUT_DIR\b")
ROOTS = {
    name: getattr(d2_headadapt.key, name).yaml
    for name in ("DATALOADER", "DATASETS", "HEAD_ADAPT", "INPUT", "MODEL", "OUTPUT_DIR", "SOLVER", "TASKS", "TEST")
}


def named_in_letters(source: str) -> list[tuple[int, str]]:
    """Texts of a module, docstrings aside, that name a config key themselves: line, text."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    docs |= {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") == "__doc__"
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        if NAME.search(node.value)
    ]


def keys_named(source: str) -> set[str]:
    """The yaml names of the keys that a module writes as ``MODEL.A.B``, without methods such as ``set`` and ``of``."""
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[-1] == "key"
        for alias in node.names
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in imported & ROOTS.keys():
            upper = [part for part in parts if part.isupper() or ("_" in part and part.upper() == part)]
            found.add(".".join([ROOTS[node.id], *upper]))
    return found


def unknown_keys(source: str) -> set[str]:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    known = set(_keys(cfg, ""))
    return {name for name in keys_named(source) if f".{name}" not in known and not name.startswith(tuple(ELSEWHERE))}


def said_unread(source: str) -> list[str]:
    """f-strings with a key in them, both readings, that are printed, logged or shown as help as they are."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or not (
            name == "print" or re.search(r"logger\.|add_parser$|add_argument$", name)
        ):
            continue
        for given in (*node.args, *(keyword.value for keyword in node.keywords)):
            for part in ast.walk(given):
                if isinstance(part, ast.FormattedValue) and part.conversion == -1:
                    roots = {inner.id for inner in ast.walk(part.value) if isinstance(inner, ast.Name)}
                    found += [ast.unparse(part)] if roots & ROOTS.keys() else []
    return found


def modules() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in DECLARATIONS:
            yield name, path.read_text(encoding="utf-8")


def test_no_text_names_a_key_in_letters() -> None:
    assert [(name, *found) for name, source in modules() for found in named_in_letters(source)] == []


def test_what_is_printed_and_logged_has_one_reading() -> None:
    assert [(name, *found) for name, source in modules() for found in said_unread(source)] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('print(f"wrote {OUTPUT_DIR}")', True),
        ('self.logger.info(f"See {MODEL.WEIGHTS.set(x)}")', True),
        ('p.add_argument("--w", help=f"{MODEL.WEIGHTS} by default")', True),
        ('p.add_argument("--w", help=f"{MODEL.WEIGHTS!s} by default")', False),
        ('logger.info("See %s", MODEL.WEIGHTS)', False),
        ('ConfigError(f"{MODEL.WEIGHTS}, x", expected="a", found="b", fix="C.")', False),
    ],
)
def test_mutation_both_readings_in_a_log_are_seen(line: str, found: bool) -> None:
    assert bool(said_unread(line)) is found


def test_every_key_that_a_text_names_exists() -> None:
    named = {name: unknown_keys(source) for name, source in modules()}
    assert {name: unknown for name, unknown in named.items() if unknown} == {}
    assert sum(len(keys_named(source)) for _, source in modules()) > 100


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('raise ConfigError("MODEL.WEIGHTS", expected="a", found="b", fix="C.")', True),
        ('fix = f"Set MODEL.HEAD_ADAPT.{name} x."', True),
        ('logger.info("In OUTPUT_DIR lies %s", name)', True),
        ('logger.info("In %s lies %s", OUTPUT_DIR, name)', False),
        ('"""The value of MODEL.WEIGHTS."""', False),
        ('fix = "Read the MODEL."', False),
    ],
)
def test_mutation_a_key_in_letters_is_seen(line: str, found: bool) -> None:
    assert bool(named_in_letters(line)) is found


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("HEAD_ADAPT.SOURCE_CLASES", {"MODEL.HEAD_ADAPT.SOURCE_CLASES"}),
        ("f\"Set {MODEL.WEIGHT.set('x')}.\"", {"MODEL.WEIGHT"}),
        ("MODEL.WEIGHTS.set('x')", set()),
        ("DATASETS.TRAIN.of(cfg)", set()),
    ],
)
def test_mutation_a_misspelt_key_is_seen(line: str, unknown: set[str]) -> None:
    source = f"from .key import DATASETS, HEAD_ADAPT, MODEL\nx = {line}\n"
    assert unknown_keys(source) == unknown
