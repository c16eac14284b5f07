"""``tools/lazyconfig_train_net.py``: training, resume, evaluation, tasks and several processes from a LazyConfig."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog
from helpers.commands import ROOT, cli, fresh_loggers, python
from helpers.datasets import write_coco
from helpers.files import HEAD
from helpers.guides import script
from helpers.lazy import write_lazy, write_yaml
from helpers.models import model_of, same_bits
from omegaconf import OmegaConf
from PIL import Image

from d2_headadapt import HeadAdaptCheckpointer
from d2_headadapt.checkpoint.provenance import KEY
from d2_headadapt.engine.train import default_argument_parser
from d2_headadapt.engine.train import main as train_yaml
from d2_headadapt.engine.train_lazy import DEFAULTS, main
from d2_headadapt.errors import ConfigError, HeadAdaptError, PlanRefused, ResumeError, UsageError
from d2_headadapt.files import read_checkpoint

TOOL = ROOT / "tools" / "lazyconfig_train_net.py"
OLD = ["yak", "cat", "dog", "emu", "ant"]
NEW = ["emu", "fly", "cat"]
NO_FIT = 'head_adapt["fit"] = dict(enabled=False)\n'
OURS = "from d2_headadapt import HeadAdaptROIHeads\nmodel.roi_heads._target_ = HeadAdaptROIHeads\n"


@pytest.fixture(autouse=True)
def _fresh_loggers() -> Any:
    with fresh_loggers():
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    HeadAdaptCheckpointer(model_of(OLD, masks=True, seed=5), str(folder)).save("old", iteration=1)
    return folder / "old.pth"


def run(config: Path, *arguments: str) -> Any:
    return main(default_argument_parser().parse_args(["--config-file", str(config), *arguments]))


def state(path: Path) -> dict[str, Any]:
    return read_checkpoint(str(path), trust=False, verify=True)


def metrics(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.json").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def test_a_stock_config_trains_with_its_new_row_fitted_and_is_evaluated(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, NEW, body='head_adapt["fit"] = dict(images=4, parts=["box"])', images=6)
    run(config, f"train.init_checkpoint={weights}", "train.max_iter=3", "train.eval_period=3")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "model.roi_heads.num_classes was 80, is 3, the classes of lazy_data" in log
    assert "doctor: " in log and "fitted 1 of 1 new classes" in log and "MODEL." not in log.replace("MODEL.HEAD", "")
    saved = state(tmp_path / "out" / "model_final.pth")
    assert saved[KEY]["tables"]["thing"] == NEW and saved["iteration"] == 2
    found = metrics(tmp_path)
    assert {"total_loss", "bbox/AP", "head_adapt/coverage"} <= set(found)
    assert found["head_adapt/coverage"] == 1.0
    # The backbone is frozen and was copied; the head was carried, fitted and trained.
    old = state(weights)["model"]
    name = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(saved["model"][name], old[name])
    assert saved["model"][f"{HEAD}.cls_score.weight"].shape == (4, 24)
    assert "FitHook" in saved["trainer"]["hooks"] and saved["trainer"]["hooks"]["FitHook"]["solved"]


def test_evaluation_refuses_new_rows_and_takes_a_trained_file(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, NEW, body=NO_FIT)
    with pytest.raises(PlanRefused, match=r"fly.*head_adapt\.allow_new_rows_at_eval=True"):
        run(config, "--eval-only", f"train.init_checkpoint={weights}")
    allowed = run(config, "--eval-only", f"train.init_checkpoint={weights}", "head_adapt.allow_new_rows_at_eval=True")
    assert {"bbox", "segm"} <= set(allowed)
    run(config, f"train.init_checkpoint={weights}", "train.max_iter=1")
    again = run(config, "--eval-only", "--resume", "train.init_checkpoint=never_read.pth")
    assert {"bbox", "segm"} <= set(again)


def test_without_an_evaluator_node_the_dataset_says_how(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, ["cat", "dog"], body=f'{NO_FIT}dataloader.pop("evaluator")')
    found = run(config, "--eval-only", f"train.init_checkpoint={weights}")
    assert "bbox" in found and (tmp_path / "out" / "inference" / "coco_instances_results.json").is_file()


def test_a_run_goes_on_and_with_other_classes_only_where_it_is_asked_to(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, NEW, body=NO_FIT)
    run(config, f"train.init_checkpoint={weights}", "train.max_iter=2")
    before = state(tmp_path / "out" / "model_final.pth")
    run(config, "--resume", "train.init_checkpoint=another.pth", "train.max_iter=2")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Going on from" in log and "train.init_checkpoint=another.pth is not read" in log
    assert "Nothing is left to train: 2 of 2 iterations are done." in log
    write_coco(tmp_path, ["cat", "emu"], name="other")
    config.write_text(config.read_text().replace("lazy_data", "lazy_other").replace("data.json", "other.json"))
    with pytest.raises(ResumeError, match=r"Set head_adapt\.resume=adapt"):
        run(config, "--resume", "train.max_iter=4")
    run(config, "--resume", "train.max_iter=4", "head_adapt.resume=adapt")
    after = state(tmp_path / "out" / "model_final.pth")
    assert after["iteration"] == 3 and after[KEY]["tables"]["thing"] == ["cat", "emu"]
    assert after["model"][f"{HEAD}.cls_score.weight"].shape == (3, 24)
    assert before["model"][f"{HEAD}.cls_score.weight"].shape == (4, 24)
    moments = [m["momentum_buffer"].shape for m in after["trainer"]["optimizer"]["state"].values()]
    assert (3, 24) in moments and (4, 24) not in moments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["optimizer.params=null"], ConfigError, r"optimizer\.params: expected a node that training needs"),
        (["optimizer.params=3"], ConfigError, r"optimizer\.params: expected a node that training needs, found 3"),
        (["train.amp.enabled=True"], ConfigError, r"train\.amp\.enabled: expected False on a CPU"),
        (["train.max_iter=0"], ConfigError, r"HA122, train\.max_iter: expected at least 1 iteration"),
        (["optimizer.lr=90"], None, ""),
        (["head_adapt.freeze=['nothing.*']"], ConfigError, r"head_adapt\.freeze"),
        (
            ["train.init_checkpoint=gone.pth"],
            HeadAdaptError,
            r"gone\.pth: expected a checkpoint file, found no such file",
        ),
        (["dataloader.train.dataset.names=gone"], HeadAdaptError, "'gone'"),
        (
            ["dataloader.train.dataset.names=[]"],
            ConfigError,
            r"dataloader\.train\.dataset: .*get_detection_dataset_dicts",
        ),
        (["lr_multiplier=3"], ConfigError, r"lr_multiplier: expected a node that training needs, found 3"),
        (["train.seed=x"], ConfigError, r"train\.seed: expected a value like -1, found 'x'"),
        (["train.amp=True"], ConfigError, r"train\.amp: expected a value like dict\(enabled=False\), found True"),
        (["train.eval_period=null"], ConfigError, r"train\.eval_period: expected a value like 5000, found None"),
        (["train.init_checkpoint=3"], ConfigError, r"train\.init_checkpoint: expected a value like '', found 3"),
        (["train.device=gpu"], ConfigError, r"train\.device: expected cpu, cuda or cuda:N, found 'gpu'"),
        (
            ["dataloader.evaluator=COCO"],
            ConfigError,
            r"dataloader\.evaluator: expected a LazyCall, or a list of them",
        ),
        (["dataloader.test=3"], ConfigError, r"dataloader\.test: expected one LazyCall"),
    ],
)
def test_what_cannot_be_trained_says_which_node(tmp_path: Path, arguments: Any, error: Any, message: str) -> None:
    config = write_lazy(tmp_path, body=NO_FIT)
    if error is None:
        run(config, *arguments, "train.max_iter=1")
        assert "HA121 optimizer.lr: 90" in (tmp_path / "out" / "log.txt").read_text()
        return
    with pytest.raises(error, match=message):
        run(config, *arguments)


def test_classes_that_nobody_names_are_said_to_be_unknown(tmp_path: Path) -> None:
    own = "def own_dataset():\n    return __import__('detectron2.data').data.DatasetCatalog.get('lazy_data')\n"
    body = f'{NO_FIT}{own}dataloader.train.dataset = L(own_dataset)()\ndataloader.pop("test")'
    run(write_lazy(tmp_path, body=body), "train.max_iter=1")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "The classes are not known" in log and "head_adapt.target_classes" in log


def test_without_a_test_set_nothing_is_evaluated(tmp_path: Path) -> None:
    """Although detectron2's own evaluator interpolates its name."""
    run(write_lazy(tmp_path, body=f'{NO_FIT}dataloader.pop("test")'), "train.max_iter=1")
    assert "Nothing is evaluated: the config has no dataloader.test" in (tmp_path / "out" / "log.txt").read_text()


def test_a_run_s_saved_config_is_told_from_a_yaml_and_can_be_run_again(tmp_path: Path, weights: Path) -> None:
    run(write_lazy(tmp_path, body=NO_FIT), f"train.init_checkpoint={weights}", "train.max_iter=1")
    saved = tmp_path / "out" / "config.yaml"
    ran = cli("plan", "--config-file", saved, "--weights", weights)
    assert ran.code == 1 and "found a LazyConfig, as a run of one saves it" in ran.err, ran.err
    lines = re.findall(r"(from detectron2\.config import LazyConfig), and (globals.*\))\.$", ran.err, re.MULTILINE)
    (tmp_path / "again.py").write_text("\n".join(lines[0]))
    run(tmp_path / "again.py", "--resume", "train.max_iter=2")
    assert state(tmp_path / "out" / "model_final.pth")["iteration"] == 1


def test_two_iterations_train_the_same_bits_as_from_a_yaml(tmp_path: Path, weights: Path) -> None:
    """Same seed, same data, flips included: the two trainers draw the same random numbers in the same order."""
    # One size to choose from in both: a number alone is two for detectron2, and takes a draw.
    sizes = "dataloader.train.mapper.augmentations[0].short_edge_length = [64]\n"
    config = write_lazy(tmp_path, NEW, body=NO_FIT + sizes, images=6)
    run(config, f"train.init_checkpoint={weights}", "train.max_iter=2", "lr_multiplier.warmup_length=0")
    args = ["--config-file", str(write_yaml(tmp_path, FIT={"ENABLED": False}))]
    keys = {
        "MODEL.WEIGHTS": weights, "OUTPUT_DIR": tmp_path / "yaml", "SOLVER.MAX_ITER": 2, "SOLVER.BASE_LR": 0.0005,
        "SOLVER.WARMUP_ITERS": 0, "SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MAX_SIZE_TRAIN": 96, "DATALOADER.NUM_WORKERS": 0, "DATASETS.TEST": "()",
    }  # fmt: skip
    train_yaml(default_argument_parser().parse_args([*args, *(str(word) for pair in keys.items() for word in pair)]))
    ours, theirs = (state(tmp_path / folder / "model_final.pth")["model"] for folder in ("out", "yaml"))
    assert same_bits(ours, theirs)
    assert not torch.equal(
        ours[f"{HEAD}.bbox_pred.weight"][:4], state(weights)["model"][f"{HEAD}.bbox_pred.weight"][12:16]
    )


def test_frozen_parameters_stay(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, ["cat", "dog"], body=NO_FIT + 'head_adapt["freeze"] = ["proposal_generator.*"]')
    run(config, f"train.init_checkpoint={weights}", "train.max_iter=1")
    old, new = state(weights)["model"], state(tmp_path / "out" / "model_final.pth")["model"]
    same = {name: torch.equal(old[name], new[name]) for name in old if old[name].shape == new[name].shape}
    assert all(value for name, value in same.items() if name.startswith("proposal_generator."))
    assert not all(value for name, value in same.items() if name.startswith("roi_heads.box_head"))


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_tasks_on_boxes_need_one_line_beside_their_keys(tmp_path: Path) -> None:
    config = write_lazy(tmp_path, body=NO_FIT + OURS, images=4)
    data = json.loads((tmp_path / "data.json").read_text())
    for i, box in enumerate(data["annotations"]):
        box["attributes"] = {"parity": ["odd", "even"][i % 2]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    body = config.read_text().replace('images="data")', 'images="data", tasks=dict(parity=dict(on="box")))')
    without_masks = '[model.roi_heads.pop(f"mask_{x}") for x in ("head", "pooler", "in_features")]'
    config.write_text(f'{body}\nhead_adapt["tasks"] = dict(parity=dict(on="box"))\n{without_masks}\n')
    run(config, "train.max_iter=2")
    found = metrics(tmp_path)
    assert {"loss_task_parity", "tasks/parity/coverage", "bbox/AP"} <= set(found)
    saved = state(tmp_path / "out" / "model_final.pth")
    assert saved[KEY]["tables"]["parity"] == ["even", "odd"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "dataloader.train.mapper is a TaskMapper now, for the labels of parity" in log
    # With stock's heads the same keys would train nothing: refused, with what to type.
    with pytest.raises(ConfigError, match=r"Set model\.roi_heads\._target_=d2_headadapt\.HeadAdaptROIHeads"):
        run(config, "model.roi_heads._target_=detectron2.modeling.roi_heads.StandardROIHeads")


CLASSIFIER = """
from detectron2.config import LazyCall as L
from detectron2 import model_zoo
from detectron2.layers import ShapeSpec
import detectron2.data.transforms as T
from detectron2.data import DatasetMapper
from d2_headadapt import MultiTaskClassifier
from d2_headadapt.modeling.backbone import ConvNet
from d2_headadapt.modeling.classifier import MeanPooling
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
model = L(MultiTaskClassifier)(
    backbone=L(ConvNet)(in_channels=3, channels=[4, 8]), pooling=L(MeanPooling)(),
    pixel_mean=[0.0, 0.0, 0.0], pixel_std=[1.0, 1.0, 1.0],
)
head_adapt = dict(
    register=[dict(name="lazy_csv", csv="labels.csv", images="images", file="{id}.png", tasks=dict(colour="colour"))],
    tasks=dict(colour=dict(on="image")), fit=dict(enabled=False),
)
train = dict(device="cpu", max_iter=2, eval_period=0, log_period=1)
optimizer.lr = 0.001
for which in ("train", "test"):
    dataloader[which].num_workers = 0
    dataloader[which].dataset.names = "lazy_csv"
    dataloader[which].mapper.augmentations = []
dataloader.train.mapper.use_instance_mask = False
dataloader.train.total_batch_size = 2
dataloader.pop("evaluator")
"""


def test_a_classifier_of_images_trains_from_a_csv(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = ["id,colour"]
    for i, colour in enumerate(["red", "blue", "red", "blue"]):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "images" / f"{i}.png")
        rows.append(f"{i},{colour}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    config = tmp_path / "config.py"
    config.write_text(f"{CLASSIFIER}\ntrain['output_dir'] = {str(tmp_path / 'out')!r}\n")
    run(config)
    # One loss is the total.
    assert {"total_loss", "tasks/colour/top1", "tasks/colour/macro_f1"} <= set(metrics(tmp_path))
    assert state(tmp_path / "out" / "model_final.pth")[KEY]["tables"]["colour"] == ["blue", "red"]


def test_what_train_may_leave_out_has_detectron2_s_values() -> None:
    stock = OmegaConf.to_container(model_zoo.get_config("common/train.py").train)
    stock.pop("max_iter")
    assert stock == DEFAULTS


# -- the tool ----------------------------------------------------------------------------------------------------------


def test_two_processes_on_cpus_end_with_one_model(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, NEW, body='head_adapt["fit"] = dict(images=4, parts=["box"])', images=6)
    ran = python(
        TOOL, "--config-file", config, "--num-gpus", "2", "--dist-url", "auto", f"train.init_checkpoint={weights}"
    )
    assert ran.code == 0, ran.err[-3000:]
    assert state(tmp_path / "out" / "model_final.pth")["iteration"] == 1
    assert "fitted 1 of 1 new classes" in (tmp_path / "out" / "log.txt").read_text()


def test_the_tool_says_a_mistake_in_one_line_with_its_exit_code(tmp_path: Path) -> None:
    ran = script([str(TOOL), "--config-file", str(write_lazy(tmp_path)), "SOLVER.MAX_ITER", "3"])
    assert ran.code == 2, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: command line, 'SOLVER.MAX_ITER': expected key=value") and "Traceback" not in ran.err
    with pytest.raises(UsageError, match=r"tools/train_net\.py"):
        run(tmp_path / "config.yaml")


# -- real material -----------------------------------------------------------------------------------------------------

REAL_CONFIG = ROOT / "configs" / "lazy_blood_cells.py"


@pytest.mark.real
def test_the_real_model_s_rows_are_the_file_s_as_from_a_yaml(tmp_path: Path, real: Path) -> None:
    """COCO's 80 classes to twelve of them and two others, through both kinds of config: bit for bit the same."""
    data = json.loads((real / "coco128" / "val.json").read_text())
    by_name = {c["name"]: c["id"] for c in data["categories"]}
    target = ["cup", "helmet", "bus", "person", "tv", "dining table", "laptop", "car", "kite", "chair", "bed", "clock"]
    data["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(target)]
    ids = {by_name[name]: i + 1 for i, name in enumerate(target) if name in by_name}
    kept = [a for a in data["annotations"] if a["category_id"] in ids]
    data["annotations"] = [{**a, "category_id": ids[a["category_id"]]} for a in kept]
    (tmp_path / "subset.json").write_text(json.dumps(data))
    entry = f"{{name: lazy_coco, json: {tmp_path / 'subset.json'}, images: {real / 'coco128' / 'val'}}}"
    weights, module = real / "models" / "fbnet_c4_coco.pth", real / "models" / "fbnet_c4.py"
    common = ["--import", module, "--weights", weights]
    lazy = [f"head_adapt.register=[{entry}]", "dataloader.train.dataset.names=lazy_coco"]
    ran = cli("adapt", "--config-file", REAL_CONFIG, *common, "--output", tmp_path / "lazy.pth", *lazy,
              "dataloader.test.dataset.names=lazy_coco")  # fmt: skip
    assert ran.code == 0, ran.err
    config = ROOT / "configs" / "blood_cells.yaml"
    plain = {"name": "lazy_coco", "json": str(tmp_path / "subset.json"), "images": str(real / "coco128" / "val")}
    yaml = ["DATASETS.REGISTER", repr([plain]), "DATASETS.TRAIN", "('lazy_coco',)", "DATASETS.TEST", "()"]
    ran = cli("adapt", "--config-file", config, *common, "--output", tmp_path / "yaml.pth", *yaml)
    assert ran.code == 0, ran.err
    ours, theirs, file = (state(path)["model"] for path in (tmp_path / "lazy.pth", tmp_path / "yaml.pth", weights))
    assert list(ours) == list(theirs)
    carried = [i for i, name in enumerate(target) if name in by_name]
    coco = sorted(by_name, key=lambda name: by_name[name])
    sources = [coco.index(target[i]) for i in carried]
    for leaf in ("cls_score.weight", "cls_score.bias"):
        assert torch.equal(ours[f"{HEAD}.{leaf}"][carried], file[f"{HEAD}.{leaf}"][sources])
        assert torch.equal(ours[f"{HEAD}.{leaf}"][carried], theirs[f"{HEAD}.{leaf}"][carried])
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.real
def test_the_real_config_trains_and_evaluates(tmp_path: Path, real: Path) -> None:
    data = json.loads((real / "bccd" / "test.json").read_text())
    data["images"] = data["images"][:16]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    (tmp_path / "test.json").write_text(json.dumps(data))
    files = {"train": real / "bccd" / "train.json", "test": tmp_path / "test.json"}
    entries = ",".join(
        f"{{name: lazy_bccd_{n}, json: {path}, images: {real / 'bccd' / n}}}" for n, path in files.items()
    )
    found = run(
        REAL_CONFIG, "--import", str(real / "models" / "fbnet_c4.py"), f"head_adapt.register=[{entries}]",
        "dataloader.train.dataset.names=lazy_bccd_train", "dataloader.test.dataset.names=lazy_bccd_test",
        f"train.init_checkpoint={real / 'models' / 'fbnet_c4_coco.pth'}", f"train.output_dir={tmp_path / 'out'}",
        "train.max_iter=2", "train.eval_period=0", "head_adapt.fit.images=8",
    )  # fmt: skip
    assert found is None and "lazy_bccd_train" in DatasetCatalog
    # Two iterations train nothing to speak of: what is detected comes from the fit. Stock's AP here is 0.
    assert metrics(tmp_path)["bbox/AP"] > 10
    assert np.isfinite(metrics(tmp_path)["total_loss"])


def test_configs_that_name_nothing_real_load(tmp_path: Path) -> None:
    """The example for users: everything but its data and its weights is there."""
    text = (ROOT / "configs" / "lazy_mask_rcnn_R_50_FPN.py").read_text()
    write_coco(tmp_path, ["cat", "gnu"], name="train")
    write_coco(tmp_path, ["cat", "gnu"], name="val")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "example.py").write_text(text.replace("../data/", "../"))
    config = ["--config-file", tmp_path / "c" / "example.py"]
    ran = cli("doctor", *config, "--json", tmp_path / "r.json", "train.device=cpu")
    report = json.loads((tmp_path / "r.json").read_text())
    assert [f["code"] for f in report["findings"] if f["severity"] == "error"] == [], ran.out
