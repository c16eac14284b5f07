"""A yaml of somebody else's architecture, from plan and doctor to an adapted file: its keys, its heads, its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import foreign_heads as heads
from helpers.commands import cli

from d2_headadapt import AdaptSettings, HeadAdaptCheckpointer, Trainer, load_config
from d2_headadapt.cli.run.models import Architecture
from d2_headadapt.config.settings import discovery_of
from d2_headadapt.doctor.finding import CHECKS, DoctorContext
from d2_headadapt.doctor.running import run_checks
from d2_headadapt.setup.recipe import resolved_recipe

OLD = ["ant", "bee", "cat", "dog", "emu"]
NEW = ["dog", "gnu", "ant"]

MODULE = """
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import foreign_heads as heads


def add_config(cfg):
    cfg.MODEL.FOREIGN = CfgNode({"NUM_CLASSES": 80, "KIND": "fcos"})


@META_ARCH_REGISTRY.register()
def ForeignDetector(cfg):
    return getattr(heads, cfg.MODEL.FOREIGN.KIND)(cfg.MODEL.FOREIGN.NUM_CLASSES)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("foreign")
    (made / "foreign_project.py").write_text(MODULE)
    (made / "model.yaml").write_text("MODEL:\n  META_ARCHITECTURE: ForeignDetector\n  DEVICE: cpu\n")
    return made


def command(place: Path, what: str, kind: str, *more: object) -> tuple[int, str]:
    torch.manual_seed(3)
    old = place / f"{kind}.pth"
    if not old.exists():
        torch.save({"model": getattr(heads, kind)(len(OLD)).state_dict()}, old)
    options = ["--config-file", place / "model.yaml", "--import", place / "foreign_project.py"]
    keys = ["MODEL.FOREIGN.KIND", kind, "MODEL.HEAD_ADAPT.SOURCE_CLASSES", json.dumps(OLD)]
    keys += ["MODEL.HEAD_ADAPT.TARGET_CLASSES", json.dumps(NEW), "MODEL.WEIGHTS", old]
    ran = cli(what, *options, *more, *keys)
    return ran.code, ran.out + ran.err


def test_plan_writes_the_key_that_is_read_and_says_what_was_found(place: Path) -> None:
    code, text = command(place, "plan", "fcos")
    assert code == 0, text
    assert "found by building with 3, 4 and 13 classes (MODEL.FOREIGN.NUM_CLASSES)" in text
    assert "2 of 3 thing classes carried" in text


def test_adapt_moves_the_rows_by_name(place: Path) -> None:
    code, text = command(place, "adapt", "fcos", "--output", place / "new.pth")
    assert code == 0, text
    name = "proposal_generator.fcos_head.cls_logits.weight"
    new, old = (torch.load(place / f, weights_only=True)["model"][name] for f in ("new.pth", "fcos.pth"))
    assert len(new) == 3 and torch.equal(new[0], old[3]) and torch.equal(new[2], old[0])


@pytest.mark.parametrize("what", ["plan", "adapt"])
def test_two_meanings_are_exit_code_1_with_the_line_and_the_key(place: Path, what: str) -> None:
    more = ["--output", place / "refused.pth"] if what == "adapt" else []
    code, text = command(place, what, "blendmask", *more)
    assert code == 1 and "register_head_layout('basis_module.seg_head.3.weight'" in text
    assert "MODEL.HEAD_ADAPT.UNKNOWN_HEADS reinitialise" in text
    assert not (place / "refused.pth").exists()


def own_config(place: Path) -> CfgNode:
    command(place, "plan", "fcos")  # Imports the project.
    opts = ["MODEL.FOREIGN.KIND", "fcos", "MODEL.HEAD_ADAPT.TARGET_CLASSES", json.dumps(NEW)]
    return load_config(str(place / "model.yaml"), opts, [str(place / "foreign_project.py")])


@pytest.mark.parametrize("way", ["recipe", "meta", "trainer", "run"])
def test_whoever_builds_a_model_leaves_how_to_build_it_again(way: str, place: Path) -> None:
    cfg = own_config(place)
    if way == "run":
        cfg.freeze()
        model = Architecture(META_ARCH_REGISTRY.get("ForeignDetector"))(cfg)
    else:
        recipe = resolved_recipe(cfg, None, reads_labels=False)
        ways = {
            "recipe": recipe.build,
            "meta": recipe.build_on_meta,
            "trainer": lambda: Trainer.build_model(recipe.config),
        }
        model = ways[way]()
    found = discovery_of(model)
    assert found is not None and [family.keys for family in found.families] == [("MODEL.FOREIGN.NUM_CLASSES",)]
    settings = AdaptSettings.of(NEW, OLD)
    plan = HeadAdaptCheckpointer(model, settings=settings).adapted(
        {"model": {k: torch.zeros(v.shape) for k, v in heads.fcos(len(OLD)).state_dict().items()}}, "old.pth"
    )[1]
    moved = plan.tensor("proposal_generator.fcos_head.cls_logits.weight")
    assert moved is not None and moved.carried == ((0, 3), (2, 0))


@pytest.mark.parametrize(("kind", "codes"), [("fcos", [("HA304", "note")]), ("blendmask", [("HA302", "error")])])
def test_the_doctor_asks_what_the_plan_does(kind: str, codes: list[tuple[str, str]], place: Path) -> None:
    """The same number of classes in another order: moved by name, or refused; never a word of what does not happen."""
    command(place, "plan", kind)
    opts = ["MODEL.FOREIGN.KIND", kind, "MODEL.HEAD_ADAPT.TARGET_CLASSES", json.dumps(OLD[::-1])]
    opts += ["MODEL.HEAD_ADAPT.SOURCE_CLASSES", json.dumps(OLD), "MODEL.WEIGHTS", str(place / f"{kind}.pth")]
    context = DoctorContext(str(place / "model.yaml"), opts, [str(place / "foreign_project.py")])
    report = run_checks(context, [CHECKS["HA302"], CHECKS["HA304"]])
    assert [(f.code, f.severity) for f in report.findings] == codes
