#!/usr/bin/env python3
"""Run the training scripts of public projects, unmodified, under ``d2-headadapt run``: the table of docs/projects.md.

    D2HA_PROJECTS=/path/to/checkouts python tools/projects.py

looks for a folder of each project's name there, clones nothing, and leaves the checkouts as they are. Each model is the
project's own with few channels, on the CPU: a file of five classes is loaded for three, of which two are in it, and
trained for one iteration at learning rate 0, so that every row of ``model_final.pth`` is where the load put it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
OLD = [f"class {i}" for i in range(5)]
NEW = ["class 3", "zebra", "class 0"]
CLS = "roi_heads.box_predictor.cls_score.weight"
SMALL = shlex.split(
    "MODEL.DEVICE cpu MODEL.MASK_ON False MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 DATALOADER.NUM_WORKERS 0 "
    "SOLVER.MAX_ITER 1 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0 INPUT.MIN_SIZE_TRAIN (64,) "
    "INPUT.MIN_SIZE_TEST 64 DATASETS.TRAIN \"('mine',)\" DATASETS.TEST ()"
)
# Python removed these names from collections in 3.10.
COMPATIBLE = "import collections, collections.abc\ncollections.Mapping = collections.abc.Mapping\n"
BUILD = """
import sys
import torch
from d2_headadapt.setup.recipe import read_recipe
config, output, *rest = sys.argv[1:]
imports, opts = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
torch.manual_seed(1)
torch.save({"model": read_recipe(config, opts, imports).build().state_dict()}, output)
"""


@dataclass(frozen=True)
class Project:
    """A project and how its script is called.

    Args:
        name: of its folder.
        commit: that the table of docs/projects.md is about.
        script: its training script.
        config: a yaml of its own.
        imports: modules that register its components.
        opts: its options before ``KEY VALUE`` pairs, where ``{folder}`` holds the data.
        registers: its script registers the dataset itself.
        flags: lines that a user adds, as options of ``run``.
    """

    name: str
    commit: str
    script: str
    config: str
    imports: tuple[str, ...] = ()
    opts: str = ""
    registers: bool = False
    flags: str = ""


PROJECTS = (
    Project(
        "layout-model-training",
        "b9fad07",
        "tools/train_net.py",
        "configs/prima/fast_rcnn_R_50_FPN_3x.yaml",
        opts="--dataset_name mine --json_annotation_train {folder}/data.json --image_path_train {folder} "
        "--json_annotation_val {folder}/data.json --image_path_val {folder}",
        registers=True,
    ),
    Project(
        "CenterNet2",
        "bfc8b72",
        "train_net.py",
        "configs/CenterNet2-F_R50_1x.yaml",
        imports=("centernet.config", "centernet.modeling.meta_arch.centernet_detector"),
    ),
    Project(
        "few-shot-object-detection",
        "148a039",
        "tools/train_net.py",
        "configs/Base-RCNN-FPN.yaml",
        imports=("{folder}/compatible.py", "fsdet.config", "fsdet.modeling"),
        opts="--opts",
        flags="--import {folder}/compatible.py",
    ),
)


def draw(folder: Path) -> None:
    """Four images of noise, with two boxes each, of three classes."""
    generator = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(4):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        for k in range(2):
            box = {"bbox": [4 + 24 * k, 8, 20, 24], "area": 480, "iscrowd": 0, "category_id": (2 * i + k) % 3 + 1}
            boxes.append({"id": 2 * i + k + 1, "image_id": i, **box})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NEW)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))
    (folder / "compatible.py").write_text(COMPATIBLE)


def run(project: Project, checkout: Path, folder: Path) -> list[str]:
    """One row of the table: what was run, its exit code, and which rows are right."""
    draw(folder)
    config = str(checkout / project.config)
    paths = os.pathsep.join([str(ROOT), str(checkout), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    imports = [name.format(folder=folder) for name in project.imports]
    five = [*SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", "5", "DATASETS.TRAIN", "()", "MODEL.WEIGHTS", ""]
    build = [sys.executable, "-c", BUILD, config, str(folder / "old.pth"), *imports, "--", *five]
    made = subprocess.run(build, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if made.returncode:
        return [project.name, project.commit, "its model cannot be built here", last_line(made.stderr), ""]
    entry = [{"name": "mine", "json": str(folder / "data.json"), "images": str(folder)}]
    flags = ["--set", "MODEL.HEAD_ADAPT.SOURCE_CLASSES", repr(OLD), *shlex.split(project.flags.format(folder=folder))]
    flags += [] if project.registers else ["--set", "DATASETS.REGISTER", json.dumps(entry)]
    opts = shlex.split(project.opts.format(folder=folder))
    keys = [*SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.WEIGHTS", str(folder / "old.pth"), "OUTPUT_DIR", "out"]
    words = [str(checkout / project.script), "--config-file", config, *opts, *keys]
    command = [sys.executable, "-m", "d2_headadapt", "run", *flags, *words]
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode:
        return [project.name, project.commit, project.script, f"exit code {ran.returncode}", last_line(ran.stderr)]
    return [project.name, project.commit, project.script, "0", rows_in_words(folder)]


def last_line(text: str) -> str:
    """The last line of a traceback."""
    return (text.strip().splitlines() or [""])[-1][:160]


def rows_in_words(folder: Path) -> str:
    """Which rows of the classifier are those of their classes in the old file."""
    old = torch.load(folder / "old.pth", weights_only=True)["model"][CLS]
    new = torch.load(folder / "out" / "model_final.pth", weights_only=True)["model"][CLS]
    pairs = {name: (NEW.index(name), OLD.index(name)) for name in NEW if name in OLD}
    pairs["background"] = (len(new) - 1, len(old) - 1)
    right = [name for name, (i, k) in pairs.items() if torch.equal(new[i], old[k])]
    return f"{len(right)} of {len(pairs)} ({', '.join(right) or 'the head starts afresh'})"


def main() -> int:
    """Print the table; 1 where a project that is there did not run."""
    root = os.environ.get("D2HA_PROJECTS")
    if not root:
        print("Set D2HA_PROJECTS to a folder of checkouts.", file=sys.stderr)
        return 2
    rows = []
    for project in PROJECTS:
        checkout = Path(root).resolve() / project.name
        if not checkout.is_dir():
            rows.append([project.name, project.commit, "not there", "", ""])
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(project, checkout, Path(folder)))
    print(tabulate(rows, headers=("project", "commit", "script", "exit code", "rows right"), tablefmt="github"))
    return int(any(row[3] not in ("", "0") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
