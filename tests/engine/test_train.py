"""``Trainer`` and ``tools/train_net.py``: the tool that detectron2 users know, class by class."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import re
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectron2.engine.defaults
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser as stock_argument_parser
from helpers.commands import ROOT, fresh_loggers, python
from helpers.datasets import write_coco
from helpers.files import HEAD, logged, save_stock, texts
from helpers.models import model_of, names, stock_model, tiny_cfg
from torch import nn

import d2_headadapt.engine.train
from d2_headadapt import HeadAdaptCheckpointer, Trainer
from d2_headadapt.checkpoint.provenance import KEY
from d2_headadapt.cli.parser import main as cli
from d2_headadapt.engine.train import (
    build_evaluator,
    ddp_without_gpus,
    default_argument_parser,
    main,
    refuse_new_rows,
    setup,
)
from d2_headadapt.errors import ConfigError, DatasetError, PlanRefused, UsageError
from d2_headadapt.setup.yaml import load_config

TARGET = ["class 3", "zebra", "class 0"]
SOURCE = "MODEL.HEAD_ADAPT.SOURCE_CLASSES"
ALLOW = "MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL"


class Run:
    """A folder with a yaml, a tiny COCO dataset, and a stock checkpoint of five classes."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        write_coco(folder, TARGET, name="data")
        config = yaml.safe_load(tiny_cfg(masks=False).dump())
        entry = {"name": "d2ha_engine", "json": "data.json", "images": "data"}
        config["DATASETS"].update(TRAIN=["d2ha_engine"], TEST=["d2ha_engine"], REGISTER=[entry])
        config["INPUT"].update(MIN_SIZE_TRAIN=[64], MIN_SIZE_TEST=64, MAX_SIZE_TRAIN=64, MAX_SIZE_TEST=64)
        config["DATALOADER"].update(NUM_WORKERS=0)
        config["SOLVER"].update(IMS_PER_BATCH=2, BASE_LR=1e-4, MAX_ITER=2, STEPS=[], WARMUP_ITERS=0)
        config["SOLVER"]["CLIP_GRADIENTS"].update(ENABLED=True, CLIP_TYPE="norm", CLIP_VALUE=0.1)
        config["MODEL"]["WEIGHTS"] = str(weights)
        config["MODEL"]["HEAD_ADAPT"]["SOURCE_CLASSES"] = names(5)
        config["SEED"] = 3
        config["OUTPUT_DIR"] = str(self.output)
        self.config = folder / "c.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def args(self, *arguments: Any) -> argparse.Namespace:
        return default_argument_parser().parse_args(["--config-file", str(self.config), *map(str, arguments)])

    def main(self, *arguments: Any) -> Any:
        return main(self.args(*arguments))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_stock(stock_model(5, seed=21), tmp_path_factory.mktemp("w") / "old.pth"))


@pytest.fixture()
def run(tmp_path: Path, weights: Path) -> Iterator[Run]:
    benchmark = torch.backends.cudnn.benchmark
    with fresh_loggers():
        yield Run(tmp_path, weights)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[tuple[Run, str]]:
    """A run of two iterations with an evaluation after each, and everything that was logged."""
    made = Run(tmp_path_factory.mktemp("trained"), weights)
    with fresh_loggers():
        made.main("TEST.EVAL_PERIOD", 1, "MODEL.DEVICE", "cpu")
    DatasetCatalog.remove("d2ha_engine")
    MetadataCatalog.remove("d2ha_engine")
    yield made, (made.output / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------------------- training


def test_training_says_in_one_line_what_was_carried_and_what_is_new(trained: tuple[Run, str]) -> None:
    lines = [line for line in trained[1].splitlines() if "INFO: 2 of 3 thing classes carried" in line]
    assert len(lines) == 1
    assert "1 new (zebra)" in lines[0]
    assert "MODEL.ROI_HEADS.NUM_CLASSES was 5, is 3, the classes of d2ha_engine" in trained[1]


def test_its_own_evaluation_during_training_is_never_refused(trained: tuple[Run, str]) -> None:
    """Two evaluations ran although ``zebra`` began as random rows."""
    assert trained[1].count("Evaluation results for bbox") >= 2 or trained[1].count("copypaste: Task: bbox") >= 2
    metrics = [json.loads(line) for line in (trained[0].output / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in metrics)


def test_the_run_is_recorded_as_detectron2_does(trained: tuple[Run, str]) -> None:
    output = trained[0].output
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "last_checkpoint"} <= {
        path.name for path in output.iterdir()
    }
    assert list(output.glob("events.out.tfevents.*"))
    dumped = load_config(str(output / "config.yaml"))
    assert dumped.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert dumped.DATASETS.REGISTER[0]["json"] == str(trained[0].folder / "data.json"), "absolute in the dump"


def test_a_trained_file_has_its_classes_and_no_untrained_row(trained: tuple[Run, str]) -> None:
    stored = torch.load(trained[0].output / "model_final.pth", weights_only=True)
    assert stored[KEY]["tables"] == {"thing": TARGET}
    assert "untrained" not in stored[KEY]["extra"]
    assert stored["iteration"] == 1
    assert sum(map(len, stored[KEY]["optimizer"])) == len(stored["trainer"]["_trainer"]["optimizer"]["state"])


def test_a_run_goes_on_at_its_iteration_with_its_momentum(trained: tuple[Run, str], run: Run) -> None:
    """Resumed in a copy of the output folder."""
    run.output.mkdir()
    for name in ("model_final.pth", "last_checkpoint"):
        (run.output / name).write_bytes((trained[0].output / name).read_bytes())
    cfg = setup(run.args("SOLVER.MAX_ITER", 3))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    stored = torch.load(run.output / "model_final.pth")
    saved = stored["trainer"]["_trainer"]["optimizer"]["state"]
    live = trainer._trainer.optimizer.state_dict()["state"]
    assert saved.keys() == live.keys()
    assert len(saved) > 50
    assert all(torch.equal(saved[i]["momentum_buffer"], live[i]["momentum_buffer"]) for i in saved)
    assert any(saved[i]["momentum_buffer"].abs().sum() > 0 for i in saved)
    trainer.train()
    assert trainer.iter == 3 or trainer.iter == 2
    assert torch.load(run.output / "model_final.pth")["iteration"] == 2


def test_without_resume_the_run_starts_anew(trained: tuple[Run, str], run: Run) -> None:
    """MODEL.WEIGHTS gives weights only."""
    cfg = setup(run.args("MODEL.WEIGHTS", trained[0].output / "model_final.pth"))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0
    assert not trainer._trainer.optimizer.state_dict()["state"]
    assert isinstance(trainer.checkpointer, HeadAdaptCheckpointer)
    assert trainer.checkpointer.untrained == {}


def test_every_hook_saves_with_our_checkpointer(run: Run) -> None:
    """The stock hooks keep the checkpointer that they were given, so replacing it later would be too late."""
    trainer = Trainer(setup(run.args()))
    assert isinstance(trainer.checkpointer, HeadAdaptCheckpointer)
    savers = [hook for hook in trainer._hooks if hasattr(hook, "checkpointer")]
    assert savers
    assert all(hook.checkpointer is trainer.checkpointer for hook in savers)


# -------------------------------------------------------------------------------------------------------- evaluation


def test_eval_only_with_new_rows_is_refused_with_the_key_that_allows_it(run: Run) -> None:
    with pytest.raises(PlanRefused, match=rf"--eval-only: .*random rows for thing: zebra.*{ALLOW} True"):
        run.main("--eval-only")
    assert run.main("--eval-only", ALLOW, "True")["bbox"]["AP"] < 50


def test_mutation_without_the_memory_of_new_rows_nothing_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2_headadapt.checkpoint.checkpointer.untrained_classes", lambda plan, known: {})
    assert "bbox" in run.main("--eval-only")


def test_eval_only_of_a_trained_file_is_never_refused(trained: tuple[Run, str], run: Run) -> None:
    assert "bbox" in run.main("--eval-only", "MODEL.WEIGHTS", trained[0].output / "model_final.pth")


def test_eval_only_without_weights_is_refused(run: Run) -> None:
    """Every row is random then, which is no better than one."""
    with pytest.raises(PlanRefused, match=rf"--eval-only: .*every class.*MODEL.WEIGHTS is empty.*{ALLOW} True"):
        run.main("--eval-only", "MODEL.WEIGHTS", "")


def test_eval_only_with_random_parameters_is_refused(run: Run) -> None:
    with pytest.raises(PlanRefused, match=rf"none of its shape for proposal_generator.rpn_head.conv.*{ALLOW} True"):
        run.main(
            "--eval-only",
            "MODEL.HEAD_ADAPT.TARGET_CLASSES",
            str(names(5)),
            "MODEL.RPN.CONV_DIMS",
            "[4]",
            "DATASETS.TRAIN",
            "()",
            "DATASETS.TEST",
            "()",
        )


def test_eval_only_without_a_test_set_says_that_nothing_happens(run: Run) -> None:
    with logged("d2_headadapt") as said:
        run.main("--eval-only", ALLOW, "True", "DATASETS.TEST", "()")
    assert "Nothing is evaluated: DATASETS.TEST is empty." in texts(said)


def test_training_without_a_dataset_is_one_line(run: Run) -> None:
    with pytest.raises(UsageError, match=r"DATASETS.TRAIN: expected a dataset to train on"):
        run.main("DATASETS.TRAIN", "()")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_is_one_line(name: str, run: Run) -> None:
    (run.folder / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR: expected a folder"):
        run.main("OUTPUT_DIR", run.folder / name)


def test_a_model_that_cannot_be_built_names_the_line(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"config: .*KeyError: 'p9' \(line \d+ of .*rpn\.py\)"):
        run.main("MODEL.RPN.IN_FEATURES", "['p9']")


def test_new_rows_are_refused_only_where_they_are(weights: Path) -> None:
    model = model_of(["class 1", "class 0"], SOURCE_CLASSES=names(5))
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(str(weights))
    refuse_new_rows(checkpointer, allowed=False)
    checkpointer.untrained = {"thing": ("x",)}
    refuse_new_rows(checkpointer, allowed=True)
    with pytest.raises(PlanRefused):
        refuse_new_rows(checkpointer, allowed=False)


def test_a_test_set_with_other_classes_is_an_error_before_anything_is_built(run: Run) -> None:
    write_coco(run.folder, TARGET[::-1], name="other")
    entries = [
        {"name": f"d2ha_{name}", "json": str(run.folder / f"{name}.json"), "images": str(run.folder / name)}
        for name in ("data", "other")
    ]
    keys = ["DATASETS.TRAIN", "('d2ha_data',)", "DATASETS.TEST", "('d2ha_other',)"]
    with pytest.raises(DatasetError, match=r"DATASETS.TEST: expected the 3 classes of d2ha_data.*another order"):
        run.main(*keys, "DATASETS.REGISTER", str(entries))
    assert not (run.output / "config.yaml").exists()


def test_an_evaluator_is_chosen_by_the_dataset(run: Run) -> None:
    cfg = setup(run.args())
    assert type(build_evaluator(cfg, "d2ha_engine")).__name__ == "COCOEvaluator"
    MetadataCatalog.get("d2ha_voc").set(
        evaluator_type="pascal_voc", dirname="x", split="test", year=2007, thing_classes=["a"]
    )
    assert type(build_evaluator(cfg, "d2ha_voc")).__name__ == "PascalVOCDetectionEvaluator"
    MetadataCatalog.get("d2ha_kind").set(evaluator_type="mine")
    with pytest.raises(DatasetError, match=r"dataset 'd2ha_kind': expected evaluator_type, one of coco.*found 'mine'"):
        build_evaluator(cfg, "d2ha_kind")
    with pytest.raises(DatasetError, match="found None"):
        build_evaluator(cfg, "d2ha_nothing_was_set")


# ---------------------------------------------------------------------------------------------------------- the tool


def test_the_tool_takes_what_detectron2s_takes_and_imports() -> None:
    ours = {a.dest: a.default for a in default_argument_parser()._actions if a.dest != "dist_url"}
    stock = {a.dest: a.default for a in stock_argument_parser()._actions if a.dest != "dist_url"}
    assert ours == {**stock, "imports": []}


def test_the_tool_prints_one_line_and_the_exit_code_of_the_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = str(ROOT / "tools" / "train_net.py")
    monkeypatch.setattr(sys, "argv", [tool, "--config-file", str(run.config), "--eval-only"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(tool, run_name="__main__")
    assert stop.value.code == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(err) == 1
    assert ALLOW in err[0]


def test_the_command_trains_and_evaluates_as_the_tool(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config-file", str(run.config)]
    assert cli([*words, "--eval-only"]) == 1
    assert ALLOW in capsys.readouterr().err
    assert cli([*words, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]) == 0
    assert torch.load(run.output / "model_final.pth")[KEY]["tables"] == {"thing": TARGET}


def test_ddp_is_put_back_whatever_happens() -> None:
    stock = detectron2.engine.defaults.create_ddp_model
    with pytest.raises(RuntimeError, match="inside"), ddp_without_gpus("cpu"):
        assert detectron2.engine.defaults.create_ddp_model is not stock
        raise RuntimeError("inside")
    assert detectron2.engine.defaults.create_ddp_model is stock
    with ddp_without_gpus("cuda"):
        assert detectron2.engine.defaults.create_ddp_model is stock


PROBE = '''
"""A user's module: a box head of its own, a key of its own, and a note of what every process ended with."""

import os
import sys

import torch
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.utils import comm

from d2_headadapt import Trainer
from d2_headadapt.checkpoint.ranks import digest

assert sys.modules["d2ha_probe"].__file__ == __file__


@ROI_BOX_HEAD_REGISTRY.register()
class ProbeHead(FastRCNNConvFCHead):
    pass


def add_probe_config(cfg):
    cfg.MODEL.PROBE = "here"


after_train = Trainer.after_train


def note(self):
    after_train(self)
    model = getattr(self.model, "module", self.model)
    hashes = "".join(digest(value) for value in model.state_dict().values())
    with open(os.path.join(self.cfg.OUTPUT_DIR, f"rank{comm.get_rank()}.txt"), "w") as file:
        wrapped = type(self.model).__name__
        file.write(f"{self.iter} {self.cfg.MODEL.PROBE} {wrapped} {type(model.roi_heads.box_head).__name__} {hashes}")


Trainer.after_train = note
'''


def test_two_cpu_processes_train_and_end_with_equal_weights(run: Run) -> None:
    """The tool in processes of its own: ``--import`` in each of them, CUDA asked for and not there, new rows drawn
    with other seeds. Stock's DDP would pass ``device_ids`` and raise.
    """
    (run.folder / "d2ha_probe.py").write_text(PROBE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran = python(
        *(ROOT / "tools" / "train_net.py", "--config-file", run.config, "--num-gpus", 2),
        *("--dist-url", f"tcp://127.0.0.1:{port}", "--import", run.folder / "d2ha_probe.py"),
        *("MODEL.DEVICE", "cuda", "MODEL.ROI_BOX_HEAD.NAME", "ProbeHead", "DATASETS.TEST", "()"),
        cwd=run.folder,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.code == 0, ran.err[-3000:]
    one, other = ((run.output / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert one == other
    assert one.split()[1:4] == ["here", "DistributedDataParallel", "ProbeHead"]
    line = "MODEL.DEVICE is cuda, but this machine has no CUDA: running on the CPU."
    assert (run.output / "log.txt").read_text().count(line) == 1
    stored = torch.load(run.output / "model_final.pth")
    assert stored["iteration"] == 1
    assert stored[KEY]["tables"] == {"thing": TARGET}
    assert f"{HEAD}.cls_score.weight" in stored["model"], "no prefix of the wrapper"


def test_settings_of_the_config_are_on_the_model_whatever_built_it(run: Run) -> None:
    """Another architecture than ours has no head that could carry them."""
    cfg = setup(run.args("MODEL.ROI_HEADS.NAME", "StandardROIHeads"))
    model = Trainer.build_model(cfg)
    assert isinstance(model, nn.Module)
    checkpointer = HeadAdaptCheckpointer(model)
    with logged("d2_headadapt") as said:
        checkpointer.load(cfg.MODEL.WEIGHTS)
    assert "No class tables are attached" not in texts(said)
    assert checkpointer.untrained == {"thing": ("zebra",)}
    assert [r for r in said if r.levelno >= logging.WARNING] == []


def test_a_module_given_twice_or_set_up_twice_registers_once(run: Run) -> None:
    """Notebooks call ``setup`` again and again."""
    (run.folder / "d2ha_twice.py").write_text(
        "from detectron2.modeling import ROI_BOX_HEAD_REGISTRY\n"
        "@ROI_BOX_HEAD_REGISTRY.register()\nclass D2haTwice:\n    pass\n"
    )
    try:
        for _ in range(2):
            args = run.args("--import", run.folder / "d2ha_twice.py", "--import", run.folder / "d2ha_twice.py")
            assert setup(args).MODEL.ROI_HEADS.NUM_CLASSES == 3
    finally:
        sys.modules.pop("d2ha_twice", None)
        d2_headadapt.engine.train.logger.handlers.clear()


# ------------------------------------------------------------------------------------------- ended before its time


def interrupted(*unused: Any, **also: Any) -> Any:
    raise KeyboardInterrupt


def full(*unused: Any, **also: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def errors_of(capsys: Any) -> str:
    """Standard error without the first sign of life, and without what torch says of the machine, once a process."""
    lines = capsys.readouterr().err.splitlines(True)
    return "".join(line for line in lines if not re.match(r"W\d{4} |reading .* \.\.\.$", line))


def ended(run: Run, capsys: Any, *more: Any) -> tuple[int, str, str]:
    """Exit code, standard error and the run's log of ``d2-headadapt train``."""
    code = cli(["train", "--config-file", str(run.config), *map(str, more)])
    log = run.output / "log.txt"
    return code, errors_of(capsys), log.read_text() if log.exists() else ""


def stop_at(iteration: int, how: Any) -> Any:
    stock = Trainer.run_step
    return lambda self: how() if self.iter == iteration else stock(self)


def test_ctrl_c_is_one_line_that_says_how_to_go_on(run: Run, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Trainer, "run_step", stop_at(1, interrupted))
    code, err, log = ended(run, capsys, "SOLVER.CHECKPOINT_PERIOD", 1, "MODEL.HEAD_ADAPT.FIT.ENABLED", False)
    last = run.output / "model_0000000.pth"
    assert (code, err) == (
        130,
        f"stopped at iteration 1; last checkpoint {last}; go on with the same command and --resume\n",
    )
    assert "Traceback" not in log
    monkeypatch.undo()
    code, err, log = ended(run, capsys, "--resume", "MODEL.HEAD_ADAPT.FIT.ENABLED", False)
    assert code == 0 and (run.output / "model_final.pth").exists()
    # The whole run's checkpoint is what a resume that is stopped at once can go on with.
    monkeypatch.setattr(Trainer, "run_step", stop_at(2, interrupted))
    code, err, log = ended(run, capsys, "--resume", "MODEL.HEAD_ADAPT.FIT.ENABLED", False, "SOLVER.MAX_ITER", 4)
    last = run.output / "model_final.pth"
    assert err == f"stopped at iteration 2; last checkpoint {last}; go on with the same command and --resume\n"


@pytest.mark.parametrize("place", ["fit.hook.fit_new_rows", "engine.train.Trainer.run_step"])
def test_ctrl_c_before_the_first_checkpoint(place: str, run: Run, capsys: Any, monkeypatch: Any) -> None:
    """An older run's checkpoint in the folder is not this run's."""
    monkeypatch.setattr(f"d2_headadapt.{place}", interrupted)
    run.output.mkdir()
    (run.output / "last_checkpoint").write_text("model_final.pth")
    code, err, log = ended(run, capsys)
    assert (code, err) == (130, "stopped before the end of iteration 1: no checkpoint was written; start again\n")
    assert "Traceback" not in log and not list(run.output.glob("*.pth"))


def test_a_stopped_trainer_of_a_script_says_the_same(run: Run, monkeypatch: Any) -> None:
    trainer = Trainer(setup(run.args("MODEL.HEAD_ADAPT.FIT.ENABLED", False)))
    trainer.resume_or_load(resume=False)
    monkeypatch.setattr(Trainer, "run_step", stop_at(1, interrupted))
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 1: no checkpoint was written yet"):
        trainer.train()


@pytest.mark.parametrize("place", ["torch.save", "detectron2.utils.events.JSONWriter.write"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(place: str, run: Run, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(place, full)
    code, err, log = ended(run, capsys, "MODEL.HEAD_ADAPT.FIT.ENABLED", False)
    named = run.output / "model_final.pth" if place == "torch.save" else run.output
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(
        f"error: {named}: expected space for the file, found No space left on device, the disk of {run.output}: it was "
        "not written. Nothing was changed. Free some space there ("
    )
    assert "Traceback" not in log and "Exception during training" not in log
    # The writers come after the checkpoint, which is whole.
    left = [path.name for path in run.output.iterdir() if path.suffix in (".pth", ".tmp")]
    assert left == ([] if place == "torch.save" else ["model_final.pth"])


def test_another_exception_keeps_its_traceback(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(Trainer, "run_step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError), logged("detectron2") as said:
        run.main("MODEL.HEAD_ADAPT.FIT.ENABLED", False)
    assert "Exception during training" in texts(said)


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (interrupted, 130, "stopped; {output} was not written\n"),
        (
            full,
            1,
            "error: {output}: expected space for the file, found No space left on device, the disk of {folder}: ",
        ),
    ],
)
def test_a_command_that_ends_before_its_time(
    how: Any, code: int, said: str, run: Run, capsys: Any, monkeypatch: Any
) -> None:
    output = run.folder / "new.pth"
    monkeypatch.setattr("torch.save", how)
    assert cli(["adapt", "--config-file", str(run.config), "--output", str(output)]) == code
    err = errors_of(capsys)
    assert err.startswith(said.format(output=output, folder=run.folder)) and err.count("\n") == 1
    assert not output.exists() and not list(run.folder.glob(".*"))


def test_the_run_s_own_checkpoint_with_source_classes_left_in_the_yaml_is_no_surprise(trained: tuple[Run, str]) -> None:
    """As the guide says to do it: predict with the yaml of the training."""
    run, final = trained[0], str(trained[0].output / "model_final.pth")
    images, output = str(run.folder / "data"), str(run.folder / "predicted")
    for more in (["--weights", final], ["MODEL.WEIGHTS", final]):
        options, pairs = (more, []) if more[0].startswith("--") else ([], more)
        line = ["predict", "--config-file", str(run.config), *options, "--images", images, "--output", output, *pairs]
        with fresh_loggers(), logged("d2_headadapt") as said:
            assert cli(line) == 0
        assert [record.getMessage() for record in said if record.levelno >= logging.WARNING] == []
