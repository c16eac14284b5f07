"""Random loads against an oracle that knows by construction which row belongs where, without any code of the package.

The suite judges a few and ``tools/soak.py`` a thousand. As a program it judges a range of seeds and prints one JSON
line for each: ``{"seed": 3, "kind": "cascade"}``, with ``"violation"`` where a tensor is not what the oracle says.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from detectron2.modeling import build_model
from helpers.models import tiny_cfg
from torch import nn

from d2_headadapt import AdaptSettings, HeadAdaptCheckpointer

WORDS = (
    "ant",
    "bee",
    "cat",
    "Dog",
    "e-mu",
    "f_o_x",
    "Gnu Calf",
    "hen",
    "i=j",
    "K9",
    "lynx",
    "-",
    "--",
    "10",
    "é",
    "#1",
)
KINDS = ("standard", "cascade", "c4", "retinanet", "keypoints", "semantic", "panoptic")
BOX_KEY, MASK_KEY = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK"
ANCHORS = 9


@dataclass(frozen=True)
class Side:
    """A model's classes by label space, and whether its boxes and masks serve all of them."""

    kind: str
    counts: tuple[tuple[str, int], ...]
    agnostic: bool


@lru_cache(maxsize=96)
def model_of(side: Side) -> nn.Module:
    """A stock model, built once; every load fills it with values of its own."""
    counts = dict(side.counts)
    roi = side.kind in ("standard", "cascade", "c4")
    kind = side.kind if roi else "standard"
    cfg = tiny_cfg(kind, num_classes=counts.get("thing", 2), masks=side.kind in ("standard", "panoptic"), ours=False)
    if kind != "cascade":
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = side.agnostic
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = side.agnostic
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = counts.get("stuff", 2)
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.NORM = 8, ""
    if side.kind == "retinanet":
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, x * 1.26, x * 1.6] for x in (16, 32, 64, 128, 256)]
        cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = counts["thing"], 1
    elif side.kind in ("semantic", "panoptic"):
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor" if side.kind == "semantic" else "PanopticFPN"
    elif side.kind == "keypoints":
        cfg.MODEL.KEYPOINT_ON = True
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = counts["keypoint"]
        cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [8]
    model: nn.Module = build_model(cfg)
    return model


def fill(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random values for every floating tensor of a model, in place; returns a copy of its state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
    return {name: value.clone() for name, value in model.state_dict().items()}


def spelled(word: str, rng: random.Random) -> str:
    """Another spelling of the same name."""
    if not any(c.isalpha() for c in word):
        return word
    return rng.choice([word, word.upper(), word.replace("_", " ").replace("-", "_"), f" {word}", word.lower()])


Pairs = dict[str, list["int | None"]]


def expected_tensor(
    name: str, old: torch.Tensor | None, base: torch.Tensor, rows: Pairs, source: Side, target: Side, says: bool
) -> torch.Tensor:
    """What a tensor of the model must be after the load, worked out row by row.

    Args:
        name: of the tensor.
        old, base: the file's and the model's values.
        rows: for each class of the model, by label space, the file's class or none.
        source, target: both sides.
        says: the file says of itself how its classes lie.
    """
    counts_old, counts_new = dict(source.counts), dict(target.counts)
    if old is None:
        return base
    axis, groups, per_class, extra, space = 0, 1, 1, 0, ""
    if name.endswith(("cls_score.weight", "cls_score.bias")):
        space = "thing"
        if source.kind == "retinanet":
            groups = ANCHORS
        else:
            extra = 1
    elif "box_predictor" in name and "bbox_pred" in name:
        space, per_class = "thing", 4
    elif "mask_head.predictor" in name:
        space = "thing"
    elif "score_lowres" in name:
        space, axis = "keypoint", 1 if name.endswith("weight") else 0
    elif name.startswith("sem_seg_head.predictor"):
        space = "stuff"
    if not space:
        return old
    before, after = counts_old[space], counts_new[space]
    pairs = rows[space]
    if space == "thing" and not extra and groups == 1:
        old_serves_all, new_serves_all = (side.agnostic or side.kind == "cascade" for side in (source, target))
        if "mask" in name:
            old_serves_all, new_serves_all = source.agnostic, target.agnostic
        if before > 1 and old_serves_all:
            return old  # The other side serves all as well, or has one class.
        if after > 1 and new_serves_all:
            return old
        if before == 1 and after == 1 and (new_serves_all or (says and old_serves_all)):
            return old
    out, source_rows = base.clone().movedim(axis, 0), old.movedim(axis, 0)
    for group in range(groups):
        for k, s in enumerate(pairs):
            for row in range(per_class if s is not None else 0):
                to = (group * after + k) * per_class + row
                out[to] = source_rows[(group * before + s) * per_class + row]  # type: ignore[operator]
    for row in range(extra):
        out[after * per_class * groups + row] = source_rows[before * per_class * groups + row]
    return out.movedim(0, axis)


def judge(seed: int, folder: str) -> dict[str, Any]:
    """Make a file and a model from a seed, load the one into the other, and compare every tensor with the oracle."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    spaces = {"semantic": ("stuff",), "panoptic": ("thing", "stuff"), "keypoints": ("thing", "keypoint")}
    names_old: dict[str, list[str]] = {}
    names_new: dict[str, list[str]] = {}
    rows: Pairs = {}
    aliases: list[str] = []
    for space in spaces.get(kind, ("thing",)):
        words = rng.sample(WORDS, rng.randint(1, 5))
        kept = rng.sample(range(len(words)), rng.randint(0, len(words)))
        target: list[tuple[str, int | None]] = []
        for s in kept:
            if rng.random() < 0.25:
                target.append((f"{space} alias {s}", s))
                aliases.append(f"{space} alias {s}={words[s]}")
            else:
                target.append((spelled(words[s], rng), s))
        target += [(f"{space} new {i}", None) for i in range(rng.randint(0 if target else 1, 2))]
        rng.shuffle(target)
        names_old[space], names_new[space] = words, [name for name, _ in target]
        rows[space] = [s for _, s in target]
    many = all(len(names.get("thing", ["one"])) > 1 for names in (names_old, names_new))
    agnostic = rng.random() < 0.5
    sides = [
        Side(kind, tuple((s, len(n)) for s, n in names.items()), flag)
        for names, flag in ((names_old, agnostic), (names_new, agnostic if many else rng.random() < 0.5))
    ]
    form = rng.choice(["own", "plain", "bare", "pickle", "module.", "_orig_mod."])
    old_model, new_model = model_of(sides[0]), model_of(sides[1])
    old = fill(old_model, 2 * seed)
    known = [frozenset({BOX_KEY, MASK_KEY} if side.agnostic else ()) for side in sides]
    path = os.path.join(folder, f"{seed}.{'pkl' if form == 'pickle' else 'pth'}")
    for module in old_model.modules():
        module.__dict__.pop("cls_agnostic", None)
    if form == "own":
        settings = AdaptSettings.of(names_old, agnostic=known[0])
        # Both attach what the config knows, as building from a config does.
        _attach(old_model, settings)
        HeadAdaptCheckpointer(old_model, folder, settings=settings, save_to_disk=True).save(str(seed))
    elif form == "pickle":
        arrays = {name: value.numpy() for name, value in old.items()}
        Path(path).write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    else:
        prefix = form if form.endswith(".") else ""
        named = {prefix + name: value for name, value in old.items()}
        torch.save(named if form == "bare" else {"model": named}, path)
    base = fill(new_model, 2 * seed + 1)
    for module in new_model.modules():
        module.__dict__.pop("cls_agnostic", None)
    source = None if form == "own" else names_old
    settings = AdaptSettings.of(names_new, source, aliases=aliases, agnostic=known[1])
    HeadAdaptCheckpointer(new_model, settings=settings).load(path)
    os.unlink(path)
    for name, value in new_model.state_dict().items():
        expected = expected_tensor(name, old.get(name), base[name], rows, *sides, says=form == "own")
        if not torch.equal(value, expected):
            said = f"{name} of {names_old} as {names_new}, {form}, agnostic {[side.agnostic for side in sides]}"
            return {"seed": seed, "kind": kind, "violation": said}
    return {"seed": seed, "kind": kind}


def _attach(model: nn.Module, settings: AdaptSettings) -> None:
    from d2_headadapt.config.settings import attach_settings

    attach_settings(model, settings)


def main(first: int, count: int, folder: str) -> None:
    """Judge ``count`` seeds from ``first`` on."""
    for seed in range(first, first + count):
        try:
            found = judge(seed, folder)
        except Exception as exc:  # Whatever it is, it is not what the oracle says.
            found = {"seed": seed, "violation": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(int(sys.argv[1]), int(sys.argv[2]), place)
