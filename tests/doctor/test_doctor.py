"""The doctor as a command and before training: reports, exit codes, and that it neither crashes nor costs anything."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT, cli
from helpers.datasets import write_coco
from helpers.files import logged, texts
from helpers.models import tiny_cfg
from helpers.streams import random_streams

from d2_headadapt import Trainer
from d2_headadapt.doctor.finding import CHECKS, Check, DoctorContext, Finding, PartMissing, check
from d2_headadapt.doctor.running import (
    Report,
    as_error,
    checks_markdown,
    examine,
    examine_before_training,
    report_json,
    report_text,
    run_checks,
    verdict,
)
from d2_headadapt.errors import ConfigError, DatasetError
from d2_headadapt.setup.yaml import resolve_config

DOCS = ROOT / "docs" / "doctor.md"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of a detector for three classes, with which nothing is wrong."""
    write_coco(tmp_path, ["a", "b", "c"], name="train")
    path = tmp_path / "c.yaml"
    path.write_text(
        "VERSION: 2\nMODEL: {WEIGHTS: '', ROI_HEADS: {NAME: HeadAdaptRes5ROIHeads}}\n"
        f"OUTPUT_DIR: {tmp_path / 'out'}\nDATASETS:\n  TRAIN: [train]\n"
        "  REGISTER: [{name: train, json: train.json, images: train}]\n"
    )
    return path


@pytest.fixture
def scratch() -> Iterator[dict[str, Check]]:
    """A registry of checks that forgets what a test adds."""
    before = dict(CHECKS)
    yield CHECKS
    CHECKS.clear()
    CHECKS.update(before)


def test_nothing_wrong_exits_with_0(config: Path) -> None:
    ran = cli("doctor", "--config-file", config)
    assert ran.code == 0, ran.out
    assert " 0 errors" not in ran.out and "error HA" not in ran.out
    assert ran.out.splitlines()[-1].startswith("doctor: ")


def test_an_error_exits_with_1_and_a_warning_with_0(config: Path) -> None:
    ran = cli("doctor", "--config-file", config, "SOLVER.MAX_ITER", "0")
    assert ran.code == 1
    assert "error HA122  SOLVER.MAX_ITER" in ran.out and "at least 1 iteration" in ran.out
    ran = cli("doctor", "--config-file", config, "TEST.EVAL_PERIOD", "10")
    assert ran.code == 0 and "warning HA124  TEST.EVAL_PERIOD" in ran.out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MODEL: {ROI_HEADS: {NUM_CLASES: 3}}\nVERSION: 2\n", "Nearest: 'MODEL.ROI_HEADS.NUM_CLASSES'"),
        ("MODEL: [\n", "a yaml file of KEY: value lines"),
        ("just text\n", "HA101"),
        ("_BASE_: far.yaml\n", "base files that can be read"),
        (None, "Correct the path"),
    ],
)
def test_a_config_that_does_not_load_is_a_finding(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    ran = cli("doctor", "--config-file", path)
    assert ran.code == 1 and ran.complaint == ""
    assert "error HA101" in ran.out and says in " ".join(ran.out.split())
    assert "config: " in ran.out.partition("not run:")[2]


def test_an_import_that_fails_is_a_finding(config: Path, tmp_path: Path) -> None:
    ran = cli("doctor", "--config-file", config, "--import", tmp_path / "none.py")
    assert ran.code == 1 and "no such file" in ran.out


def test_json_is_what_the_text_says(config: Path, tmp_path: Path) -> None:
    arguments = ("doctor", "--config-file", config, "--json")
    plain = json.loads(cli(*arguments, "-", "SOLVER.MAX_ITER", "0").out)
    [found] = [one for one in plain["findings"] if one["severity"] == "error"]
    assert found == {
        "code": "HA122",
        "severity": "error",
        "where": "SOLVER.MAX_ITER",
        "found": "0",
        "expected": "at least 1 iteration",
        "fix": "Write SOLVER.MAX_ITER: 1000, or what your training needs.",
    }
    assert plain["exit_code"] == 1 and plain["checks"] > 20 and plain["not_run"]["HA302"].startswith("weights: ")
    file = tmp_path / "r.json"
    ran = cli(*arguments, file)
    assert ran.code == 0 and json.loads(file.read_text())["exit_code"] == 0 and "doctor: " in ran.out


def test_the_json_is_not_written_over_the_checkpoint(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(b"weights")
    assert cli("doctor", "--config-file", config, "--weights", file, "--json", file).code == 2
    assert file.read_bytes() == b"weights"


def test_the_list_is_the_table_of_the_docs() -> None:
    """`d2-headadapt doctor --list` writes it."""
    ran = cli("doctor", "--list")
    assert ran.code == 0 and ran.out == checks_markdown()
    assert ran.out in DOCS.read_text(encoding="utf-8")


def test_codes_are_one_series_per_subject() -> None:
    assert all(re.fullmatch(r"HA[1-5]\d\d", code) for code in CHECKS)
    assert len({one.title for one in CHECKS.values()}) == len(CHECKS)


def test_a_code_is_used_once(scratch: dict[str, Check]) -> None:
    with pytest.raises(ValueError, match="HA101"):
        check("HA101", "another")(lambda context: [])
    assert scratch["HA101"].title != "another"


def test_a_check_that_raises_stops_no_other(scratch: dict[str, Check], config: Path) -> None:
    @check("HA199", "broken on purpose", needs=())
    def broken(context: DoctorContext) -> list[Finding]:
        raise ZeroDivisionError("by zero")

    report = examine(str(config))
    [found] = [one for one in report.findings if one.code == "HA100"]
    assert found.severity == "warning" and "HA199" in found.where and found.found == "ZeroDivisionError: by zero"
    assert report.checks + len(report.not_run) == len(scratch) - 1


def test_parts_are_made_once_and_a_missing_part_names_its_cause(tmp_path: Path, monkeypatch: Any) -> None:
    calls = []
    real = DoctorContext._config
    monkeypatch.setattr(DoctorContext, "_config", lambda self: (calls.append(1), real(self))[1])
    context = DoctorContext(opts=["SOLVER.BASE_LRR", "1"])
    for part in ("config", "model", "config"):
        with pytest.raises(PartMissing) as raised:
            context.part(part)
        assert raised.value.part == "config"
    assert isinstance(context.failure("config"), ConfigError) and context.failure("model") is None
    assert calls == [1]


def test_a_test_set_of_other_classes_hides_nothing_of_the_model(config: Path, tmp_path: Path) -> None:
    write_coco(tmp_path, ["b", "a", "c"], name="mixed")
    config.write_text(
        config.read_text()
        .replace("REGISTER: [", "REGISTER: [{name: mixed, json: mixed.json, images: mixed}, ")
        .replace("TRAIN: [train]", "TRAIN: [train]\n  TEST: [mixed]")
    )
    report = examine(str(config))
    assert "HA105" in [one.code for one in report.of("error")]
    assert not [reason for reason in report.not_run.values() if reason.startswith(("resolved", "model"))]


def test_findings_are_ordered_and_counted() -> None:
    wrong = DatasetError("w", expected="e", found="f", fix="Do.")
    made = [Finding("HA2", "note", wrong), Finding("HA1", "error", wrong)]
    report = Report(tuple(made), {"HA302": "weights: none"}, 7, 0.25)
    assert verdict(report) == "doctor: 7 checks in 0.2 s, 1 not run: 1 error, 1 note"
    assert verdict(Report((), {}, 7, 0.0)) == "doctor: 7 checks in 0.0 s: all is well"
    assert report.exit_code == 1 and Report(tuple(made[:1])).exit_code == 0
    assert "HA302" in report_text(report) and json.loads(report_json(report))["not_run"] == report.not_run
    raised = as_error(Finding("HA201", "error", wrong))
    assert isinstance(raised, DatasetError) and str(raised) == "HA201, w: expected e, found f. Do."


# -- before training ---------------------------------------------------------------------------------------------------


def trainer_cfg(tmp_path: Path, classes: int = 3, **solver: Any) -> Any:
    write_coco(tmp_path, ["a", "b", "c"][:classes], name="train")
    cfg = tiny_cfg("standard", masks=False)
    cfg.DATASETS.REGISTER = [{"name": "train", "json": str(tmp_path / "train.json"), "images": str(tmp_path / "train")}]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("train",), (), str(tmp_path / "out")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    cfg.DATALOADER.NUM_WORKERS = cfg.SOLVER.WARMUP_ITERS = 0
    resolve_config(cfg)
    cfg.defrost()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def test_the_trainer_says_one_line_when_all_is_well(tmp_path: Path) -> None:
    with logged("d2_headadapt") as records:
        examine_before_training(trainer_cfg(tmp_path))
    lines = [record for record in records if record.name.startswith("d2_headadapt.doctor")]
    assert [record.levelno for record in lines] == [logging.INFO]
    assert re.fullmatch(r"doctor: \d+ checks in \d\.\d s: (all is well|\d notes?)", lines[0].getMessage())


def test_the_trainer_lists_warnings_and_goes_on(tmp_path: Path) -> None:
    with logged("d2_headadapt") as records:
        Trainer(trainer_cfg(tmp_path, BASE_LR=0.5))
    assert "HA121 SOLVER.BASE_LR: 0.5 with SOLVER.IMS_PER_BATCH 2" in texts(records)


def test_the_trainer_stops_before_it_builds(tmp_path: Path, monkeypatch: Any) -> None:
    """`base_lr = "1e-3"` in a script is found after the model was built, else."""
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("the model was built"))
    cfg = trainer_cfg(tmp_path)
    vars_of_solver = cfg.SOLVER
    vars_of_solver["BASE_LR"] = "1e-3"
    with pytest.raises(ConfigError, match=r"HA109, SOLVER.BASE_LR.*Write SOLVER.BASE_LR: 0.001"):
        Trainer(cfg)


def test_the_key_switches_it_off(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("d2_headadapt.engine.train.examine_before_training", lambda cfg: pytest.fail("the doctor ran"))
    cfg = trainer_cfg(tmp_path)
    with pytest.raises(pytest.fail.Exception):
        Trainer(cfg)
    cfg.MODEL.HEAD_ADAPT.DOCTOR = False
    Trainer(cfg)


def test_before_training_it_reads_no_image_and_changes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    cfg = trainer_cfg(tmp_path)
    monkeypatch.setattr("PIL.Image.open", lambda *a, **k: pytest.fail("an image was opened"))
    before, states = cfg.dump(), random_streams()
    examine_before_training(cfg)
    assert cfg.dump() == before
    assert random_streams() == states


def test_large_annotation_files_are_left_to_the_command(tmp_path: Path, monkeypatch: Any) -> None:
    context = DoctorContext(ready=trainer_cfg(tmp_path), quick=True)
    assert context.small("train")
    monkeypatch.setattr("d2_headadapt.doctor.context.QUICK_BYTES", 10)
    assert not context.small("train")
    assert DoctorContext(ready=context.cfg).small("train")
    report = run_checks(context, [one for one in CHECKS.values() if one.quick])
    assert not any(key[0] in ("json", "dicts") for key in context._made if isinstance(key, tuple)), report


def test_the_table_of_pains_is_whole_and_names_checks_that_exist() -> None:
    text = (ROOT / "docs" / "pains.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .+ \| (solved|part|no) \| .+ \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert set(re.findall(r"HA\d{3}", text)) <= CHECKS.keys()
    assert set(re.findall(r"HA\d{3}", DOCS.read_text(encoding="utf-8"))) == CHECKS.keys() | {"HA100"}
