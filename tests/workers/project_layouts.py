"""Discover the class axes of a public project's model in a process of its own; prints them as JSON.

Usage: python tests/workers/project_layouts.py PROJECT FOLDER CONFIG

What a project imports besides detectron2 and needs for other things than its model is stood in for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision

STOOD_IN_FOR = (
    *("timm", "panopticapi", "fairscale", "einops", "lvis", "clip", "nltk", "ftfy", "shapely", "Polygon", "rapidfuzz"),
    *(
        "editdistance",
        "cityscapesscripts",
        "MultiScaleDeformableAttention",
        "adet._C",
        "detrex._C",
        "skimage",
        "wandb",
        "hydra",
    ),
)


class StandIn(types.ModuleType):
    """A module that has every name, each a class that does nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, *args: None})


class StandsIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds those modules."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if any(name == known or name.startswith(f"{known}.") for known in STOOD_IN_FOR):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main(project: str, folder: Path, config: str) -> None:
    sys.meta_path.insert(0, StandsIn())
    # Names that numpy and torchvision had when these projects were written.
    for name, kind in (("int", int), ("float", float), ("bool", bool), ("object", object)):
        if name not in vars(np):
            setattr(np, name, kind)
    torchvision.ops._new_empty_tensor = torchvision.ops.misc._output_size = None
    inner = {"SparseR-CNN": "projects/SparseRCNN"}.get(project, ".")
    sys.path.insert(0, str(folder / inner))

    from detectron2.config import LazyConfig, get_cfg
    from detectron2.modeling import build_model

    from d2_headadapt.setup.count_keys import discover_lazy, discover_yaml

    if project == "detrex":
        found = discover_lazy(LazyConfig.load(str(folder / config)).model)
        print(json.dumps(found.to_json()))
        return
    cfg, build = get_cfg(), build_model
    if project == "AdelaiDet":
        import adet.modeling  # noqa: F401  only registration
        from adet.config import get_cfg as own

        cfg = own()
    elif project == "YOLOF":
        import yolof  # noqa: F401  only registration
        from yolof.config import get_cfg as own

        cfg = own()
    elif project == "MaskFormer":
        from detectron2.projects.deeplab import add_deeplab_config
        from mask_former import add_mask_former_config

        add_deeplab_config(cfg)
        add_mask_former_config(cfg)
    elif project == "SparseR-CNN":
        from sparsercnn import add_sparsercnn_config

        add_sparsercnn_config(cfg)
    elif project == "few-shot-object-detection":
        from fsdet.config import get_cfg as own
        from fsdet.modeling import build_model as build

        cfg = own()
    elif project in ("CenterNet2", "Detic"):
        if project == "Detic":
            sys.path.insert(0, str(folder.parent / "CenterNet2"))
            from detic.config import add_detic_config
        from centernet.config import add_centernet_config

        add_centernet_config(cfg)
        if project == "Detic":
            import detic  # noqa: F401  only registration

            add_detic_config(cfg)
    cfg.merge_from_file(str(folder / config))
    if project == "SparseR-CNN":
        cfg.MODEL.SparseRCNN.USE_FOCAL = False
    if project != "Detic":
        print(json.dumps(discover_yaml(cfg, build).to_json()))
        return
    # Its own backbone needs timm, and its files are downloads.
    cfg.MODEL.BACKBONE.NAME = "build_p67_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    with tempfile.TemporaryDirectory() as place:
        rows, counts = os.path.join(place, "rows.npy"), os.path.join(place, "counts.json")
        np.save(rows, torch.rand(1203, 512).numpy())
        Path(counts).write_text(json.dumps([{"id": i + 1, "image_count": i + 1} for i in range(1203)]))
        cfg.MODEL.ROI_BOX_HEAD.ZEROSHOT_WEIGHT_PATH, cfg.MODEL.ROI_BOX_HEAD.CAT_FREQ_PATH = rows, counts
        print(json.dumps(discover_yaml(cfg).to_json()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute(), sys.argv[3])
