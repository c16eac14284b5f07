"""A value of another type than its key: what is said works when it is typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from d2_headadapt.errors import ConfigError, UsageError
from d2_headadapt.setup.yaml import load_config


@pytest.mark.parametrize(
    ("key", "value", "typed"),
    [
        ("DATASETS.TRAIN", "street_train", "['street_train']"),
        ("DATASETS.TEST", "a,b", "['a', 'b']"),
        ("MODEL.HEAD_ADAPT.ALIASES", "lorry=truck", "['lorry=truck']"),
        ("MODEL.HEAD_ADAPT.ALIASES", "driver's=truck", '["driver\'s=truck"]'),
        ("MODEL.HEAD_ADAPT.EXCLUDE", 'a"b$c', "['a\"b$c']"),
        ("SOLVER.STEPS", "5", "[5]"),
        ("INPUT.MIN_SIZE_TRAIN", "640", "[640]"),
        ("SOLVER.BASE_LR", "1", "1.0"),
        ("SOLVER.MAX_ITER", "1e3", "1000"),
        ("MODEL.MASK_ON", "1", "True"),
        ("MODEL.MASK_ON", "no", "False"),
        ("MODEL.WEIGHTS", "17", "'17'"),
        ("MODEL.DEVICE", "0", "'0'"),
    ],
)
def test_the_hint_of_the_command_line_can_be_typed(key: str, value: str, typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("", [key, value])
    assert caught.value.where == "command line" and key in caught.value.found
    words = shlex.split(caught.value.fix.removeprefix("Type ").removesuffix(" instead."))
    assert words == [key, typed]
    load_config("", words)


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("DATASETS: {TRAIN: street_train}", "Write DATASETS.TRAIN: [street_train] there."),
        ("SOLVER: {BASE_LR: 1}", "Write SOLVER.BASE_LR: 1.0 there."),
        ("SOLVER: {MAX_ITER: 1e3}", "Write SOLVER.MAX_ITER: 1000 there."),
        ("MODEL: {WEIGHTS: 17}", "Write MODEL.WEIGHTS: \"'17'\" there."),
        ("MODEL: {MASK_ON: 1}", "Write MODEL.MASK_ON: true there."),
        ("MODEL: {HEAD_ADAPT: {ALIASES: a=b}}", "Write MODEL.HEAD_ADAPT.ALIASES: [a=b] there."),
    ],
)
def test_the_hint_of_a_yaml_can_be_written(line: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{line}\nVERSION: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert caught.value.fix == fix
    key, value = re.fullmatch(r"Write (\S+): (.*) there\.", fix).groups()
    names = key.split(".")
    nested = "".join("  " * i + f"{name}:\n" for i, name in enumerate(names))[:-1] + f" {value}\n"
    path.write_text(f"{nested}VERSION: 2\n")
    load_config(str(path))


@pytest.mark.parametrize(
    ("opts", "fix"),
    [
        (["c.yaml"], "Type --config-file c.yaml instead."),
        (["SEED", "1", "--weights", "w"], "Move --weights and what belongs to it in front of SEED."),
        (["SEED=3"], "Type SEED 3 instead."),
        (["SEED"], "Type the value behind SEED."),
    ],
)
def test_words_that_are_no_pairs(opts: list[str], fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config("", opts)
    assert caught.value.fix == fix
