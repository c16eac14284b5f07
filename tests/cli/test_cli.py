"""``d2-headadapt plan`` and ``adapt``: exit codes, texts, and files that others read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import Ran, cli, python
from helpers.files import HEAD, content, save_stock, stock_warnings
from helpers.models import model_of, names, same_bits, stock_model, tiny_cfg

import d2_headadapt.adapt.plan
from d2_headadapt import AdaptPlan, HeadAdaptCheckpointer, __version__
from d2_headadapt.adapt.classes import ClassMap
from d2_headadapt.checkpoint.provenance import KEY

FIVE = names(5)
NEW = ["class 3", "zebra", "class 0", "class 4"]
ACTIONS = {"copied", "carried", "initialised", "kept", "dropped", "refused"}


class Workplace:
    """A folder with a yaml and a stock checkpoint of five classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = save_stock(stock_model(5, seed=21, masks=True), folder / "old.pth")
        self.config = folder / "tiny.yaml"
        self.config.write_text(tiny_cfg().dump())

    def run(
        self, command: str, *flags: Any, target: Any = NEW, source: Any = FIVE, weights: Any = None, opts: Any = ()
    ) -> Ran:
        keys = [
            *("MODEL.HEAD_ADAPT.TARGET_CLASSES", str(target)),
            *("MODEL.HEAD_ADAPT.SOURCE_CLASSES", str(source)),
        ]
        return cli(*(command, "--config-file", self.config, "--weights", weights or self.weights), *flags, *keys, *opts)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """For tests that write nothing into it."""
    return Workplace(tmp_path_factory.mktemp("shared"))


@pytest.fixture()
def own(tmp_path: Path, shared: Workplace) -> Workplace:
    """For tests that write."""
    made = object.__new__(Workplace)
    made.folder = tmp_path
    for name in ("old.pth", "tiny.yaml"):
        (tmp_path / name).write_bytes((shared.folder / name).read_bytes())
    made.weights, made.config = str(tmp_path / "old.pth"), tmp_path / "tiny.yaml"
    return made


# -------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_printed_and_changes_nothing(shared: Workplace) -> None:
    before = content(shared.folder)
    ran = shared.run("plan")
    assert ran.code == 0
    assert f"{HEAD}.cls_score.weight" in ran.out
    assert "3 of 4 thing classes carried from MODEL.HEAD_ADAPT.SOURCE_CLASSES (5), 1 new (zebra), 2 dropped" in ran.out
    assert "MODEL.ROI_HEADS.NUM_CLASSES was 5, is 4" in ran.out
    assert ran.complaint == ""
    assert content(shared.folder) == before


def test_the_json_of_a_plan_has_the_shape_that_others_read(own: Workplace) -> None:
    """Item 7 of the issue, key by key and type by type."""
    ran = own.run("plan", "--json", own.folder / "plan.json")
    assert ran.code == 0
    data = json.loads((own.folder / "plan.json").read_text())
    assert data.keys() >= {"version", "source", "target", "tensors", "summary"}
    assert data["version"] == 1
    assert data["source"] == {"thing": FIVE}
    assert data["target"] == {"thing": NEW}
    keys = ["name", "action", "space", "group", "source_shape", "target_shape", "carried", "new", "dropped"]
    keys += ["background", "verified", "cause", "facts", "reason"]
    for t in data["tensors"]:
        assert list(t) == keys
        assert t["action"] in ACTIONS
        assert isinstance(t["name"], str)
        assert isinstance(t["reason"], str)
        assert isinstance(t["background"], bool)
        assert isinstance(t["verified"], bool)
        assert all(t[k] is None or isinstance(t[k], str) for k in ("space", "group"))
        assert all(t[k] is None or all(type(n) is int for n in t[k]) for k in ("source_shape", "target_shape"))
        assert all(type(n) is int for k in ("new", "dropped") for n in t[k])
        assert all(len(pair) == 2 and all(type(n) is int for n in pair) for pair in t["carried"])
    by_name = {t["name"]: t for t in data["tensors"]}
    score = by_name[f"{HEAD}.cls_score.weight"]
    assert score["action"] == "carried"
    assert score["carried"] == [[0, 3], [2, 0], [3, 4]]
    assert score["new"] == [1]
    assert score["dropped"] == [1, 2]
    assert score["background"] is True
    assert (score["source_shape"], score["target_shape"]) == ([6, 24], [5, 24])
    boxes = by_name[f"{HEAD}.bbox_pred.weight"]
    assert (boxes["carried"], boxes["background"]) == (score["carried"], False), "class numbers, not tensor rows"
    assert data["summary"].keys() == {"actions", "groups", "classes"}
    assert set(data["summary"]["actions"]) == ACTIONS
    assert sum(data["summary"]["actions"].values()) == len(data["tensors"])
    assert data["summary"]["groups"] == {"roi_heads": {"carried": 6}}
    assert data["summary"]["classes"] == {"thing": {"carried": 3, "new": 1, "dropped": 2}}


def test_the_json_comes_back_as_the_same_plan(shared: Workplace) -> None:
    ran = shared.run("plan", "--json", "-")
    assert AdaptPlan.from_json(ran.out).to_json() == json.loads(ran.out)
    assert "MODEL.ROI_HEADS.NUM_CLASSES was 5, is 4" in ran.err


def test_all_lists_every_tensor(shared: Workplace) -> None:
    few, every = shared.run("plan"), shared.run("plan", "--all")
    tensors = set(torch.load(shared.weights)["model"])
    assert tensors <= set(every.out.split())
    assert len(tensors & set(few.out.split())) < 12


def test_a_plan_needs_no_values(own: Workplace) -> None:
    """It is made from names and shapes: a damaged number shows when it is taken."""
    data = torch.load(own.weights)
    data["model"][f"{HEAD}.cls_score.weight"].fill_(float("nan"))
    torch.save(data, own.weights)
    assert own.run("plan").code == 0
    ran = own.run("adapt", "--output", own.folder / "new.pth")
    assert ran.code == 1
    assert "NaN or infinite" in ran.err
    assert not (own.folder / "new.pth").exists()


def test_a_refused_tensor_is_shown_and_is_exit_code_1(shared: Workplace) -> None:
    ran = shared.run("plan", source=names(7))
    assert ran.code == 1
    assert "refused" in ran.out
    assert ran.complaint.count("\n") == 1
    assert "holds 5 classes" in ran.err
    assert "names 7: correct MODEL.HEAD_ADAPT.SOURCE_CLASSES" in ran.err


def test_initialised_kept_and_dropped_rows_are_no_failure(own: Workplace) -> None:
    data = torch.load(own.weights)
    del data["model"]["proposal_generator.rpn_head.conv.bias"]
    data["model"]["somebody.elses.weight"] = torch.zeros(2)
    torch.save(data, own.weights)
    ran = own.run("plan", "--json", own.folder / "p.json", source="none")
    assert ran.code == 0
    actions = json.loads((own.folder / "p.json").read_text())["summary"]["actions"]
    assert (actions["initialised"], actions["kept"], actions["dropped"]) == (6, 1, 1)


def test_a_table_for_a_space_that_the_model_lacks_is_one_line(shared: Workplace) -> None:
    ran = shared.run("plan", opts=["MODEL.HEAD_ADAPT.SOURCE_CLASSES_KEYPOINT", "coco"])
    assert ran.code == 0
    lines = [line for line in ran.out.splitlines() if "keypoint" in line]
    assert len(lines) == 1
    unused = "MODEL.HEAD_ADAPT.SOURCE_CLASSES_KEYPOINT is set and not used: the model has no keypoint head."
    assert lines[0].endswith(f"{unused} It reads MODEL.HEAD_ADAPT.SOURCE_CLASSES.")


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_report_is_never_written_over_the_checkpoint(flag: str, own: Workplace) -> None:
    (own.folder / "link").symlink_to(own.weights)
    before = content(own.folder)
    for name in ("old.pth", "link"):
        ran = own.run("plan", flag, own.folder / name)
        assert ran.code == 2
        assert "expected an output that is not the checkpoint" in ran.err
        assert content(own.folder) == before


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_report_replaces_no_file_without_force_and_no_input_with_it(flag: str, own: Workplace) -> None:
    classes = own.folder / "names.json"
    classes.write_text(json.dumps(NEW))
    precious = own.folder / "precious"
    precious.write_text("of somebody else")
    os.link(own.config, own.folder / "link.yaml")
    before = content(own.folder)
    for name, words in {
        "precious": "expected an output that does not exist yet, found a file. Name another output, or add --force.",
        "names.json": "expected an output that is not the checkpoint, nor another input or output",
        "tiny.yaml": "expected an output that is not the checkpoint, nor another input or output",
        "link.yaml": "expected an output that is not the checkpoint, nor another input or output",
        "old.pth": "expected an output that is not the checkpoint, nor another input or output",
    }.items():
        for force in ([], ["--force"]) if name != "precious" else ([],):
            ran = own.run("plan", flag, own.folder / name, *force, target=classes)
            assert ran.code == 2 and words in ran.err
            assert content(own.folder) == before
    assert own.run("plan", flag, precious, "--force").code == 0
    assert precious.read_text() != "of somebody else"


def test_two_reports_need_two_files(own: Workplace) -> None:
    ran = own.run("plan", "--json", own.folder / "x", "--html", own.folder / "x")
    assert ran.code == 2 and "nor another input or output" in ran.err and not (own.folder / "x").exists()


def test_a_tilde_is_the_home_folder_in_every_path(own: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own.folder))
    (own.folder / "names.json").write_text(json.dumps(NEW))
    keys = ["MODEL.HEAD_ADAPT.SOURCE_CLASSES", FIVE, "MODEL.HEAD_ADAPT.TARGET_CLASSES", "~/names.json"]
    common = ["--config-file=~/tiny.yaml", "--weights=~/old.pth"]
    assert cli("plan", *common, "--json=~/plan.json", "--html=~/plan.html", *keys).code == 0
    assert cli("adapt", *common, "--output=~/new.pth", *keys).code == 0
    assert cli("doctor", *common, "--json=~/doctor.json", *keys).code == 0
    assert cli("plan", common[0], *keys, "MODEL.WEIGHTS", "~/old.pth").code == 0
    own.config.write_text(own.config.read_text().replace("  WEIGHTS: ''", "  WEIGHTS: ~/old.pth"))
    assert cli("plan", common[0], *keys).code == 0
    assert {"plan.json", "plan.html", "new.pth", "doctor.json"} <= set(os.listdir(own.folder))


# ------------------------------------------------------------------------------------------------------------- adapt


def test_of_two_commands_with_one_new_output_the_second_is_refused(
    own: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = own.folder / "new.pth"
    load = HeadAdaptCheckpointer.load

    def while_another_writes(*args: Any, **kwargs: Any) -> Any:
        out.write_text("of the other command")
        return load(*args, **kwargs)

    monkeypatch.setattr(HeadAdaptCheckpointer, "load", while_another_writes)
    ran = own.run("adapt", "--output", out)
    assert ran.code == 1 and "found a file, written since this command began" in ran.err and "--force" in ran.err
    assert out.read_text() == "of the other command" and not list(own.folder.glob(".*.tmp"))


def test_stock_loads_an_adapted_file_without_a_word(own: Workplace) -> None:
    out = own.folder / "new.pth"
    ran = own.run("adapt", "--output", out)
    assert ran.code == 0
    assert f"wrote {out}" in ran.out
    stock = stock_model(4, seed=3, masks=True)
    assert stock_warnings(stock, str(out)) == []
    old = torch.load(own.weights)["model"]
    score = stock.state_dict()[f"{HEAD}.cls_score.weight"]
    assert torch.equal(score[[0, 2, 3, 4]], old[f"{HEAD}.cls_score.weight"][[3, 0, 4, 5]])
    assert torch.load(out)[KEY]["tables"] == {"thing": NEW}


def test_safetensors_come_out_the_same(own: Workplace) -> None:
    assert own.run("adapt", "--output", own.folder / "a.pth").code == 0
    assert own.run("adapt", "--output", own.folder / "a.safetensors").code == 0
    one, other = (model_of(NEW, seed=s, masks=True) for s in (1, 2))
    HeadAdaptCheckpointer(one).load(str(own.folder / "a.pth"))
    HeadAdaptCheckpointer(other).load(str(own.folder / "a.safetensors"))
    assert same_bits(one.state_dict(), other.state_dict())


def there_and_back(own: Workplace) -> bool:
    """Adapt to a permutation and back to the first list: whether every tensor is what it was."""
    permuted = ["class 4", "class 2", "class 0", "class 1", "class 3"]
    assert own.run("adapt", "--output", own.folder / "there.pth", target=permuted).code == 0
    back = own.run(
        "adapt", "--output", own.folder / "back.pth", target=FIVE, source=None, weights=own.folder / "there.pth"
    )
    assert back.code == 0
    there, back = (torch.load(own.folder / f"{name}.pth")["model"] for name in ("there", "back"))
    old = torch.load(own.weights)["model"]
    assert not same_bits(there, old)
    return same_bits(dict(old), dict(back))


def test_there_and_back_again_is_the_identity(own: Workplace) -> None:
    assert there_and_back(own)


def test_mutation_a_shifted_row_map_does_not_come_back(own: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: ClassMap) -> tuple[tuple[int, int], ...]:
        return tuple((t, (s + 1) % len(self.source)) for t, s in enumerate(self.rows) if s is not None)

    move = d2_headadapt.adapt.plan.move_rows

    def wrong(*arguments: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(ClassMap, "carried", property(shifted))
            return move(*arguments)

    monkeypatch.setattr(d2_headadapt.adapt.plan, "move_rows", wrong)
    assert not there_and_back(own)


def test_the_same_command_writes_the_same_tensors(own: Workplace) -> None:
    """New rows are drawn with seed 0, or with the user's."""
    for name, opts in (("a", ()), ("b", ()), ("c", ("SEED", "0")), ("d", ("SEED", "7"))):
        torch.rand(3)  # whatever ran before
        assert own.run("adapt", "--output", own.folder / f"{name}.pth", opts=opts).code == 0
    a, b, c, d = (dict(torch.load(own.folder / f"{name}.pth")["model"]) for name in "abcd")
    assert same_bits(a, b)
    assert same_bits(a, c)
    assert not same_bits(a, d)
    assert (own.folder / "a.pth").read_bytes() == (own.folder / "b.pth").read_bytes()


def test_what_was_left_out_is_said(own: Workplace) -> None:
    data = torch.load(own.weights)
    torch.save({**data, "optimizer": {"state": {}}, "iteration": 5, "scheduler": {}}, own.weights)
    ran = own.run("adapt", "--output", own.folder / "new.pth")
    assert ran.code == 0
    lines = [line for line in ran.out.splitlines() if line.startswith("left out:")]
    assert lines == [
        "left out: iteration, optimizer, scheduler (a new run starts at iteration 0 with a fresh optimizer)"
    ]
    assert set(torch.load(own.folder / "new.pth")) == {"model", KEY}


def test_an_existing_output_needs_force(own: Workplace) -> None:
    out = own.folder / "new.pth"
    out.write_text("precious")
    ran = own.run("adapt", "--output", out)
    assert ran.code == 1
    assert "expected an output that does not exist yet" in ran.err
    assert "--force" in ran.err
    assert out.read_text() == "precious"
    assert own.run("adapt", "--output", out, "--force").code == 0
    assert KEY in torch.load(out)


@pytest.mark.parametrize("way", ["same path", "relative", "symlink", "hard link", "linked folder", "with a query"])
def test_the_input_is_never_the_output_whatever_it_is_called(
    way: str, own: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    out: Any = own.weights
    weights: Any = own.weights
    if way == "relative":
        monkeypatch.chdir(own.folder)
        out = "old.pth"
    elif way == "symlink":
        out = own.folder / "link.pth"
        out.symlink_to(own.weights)
    elif way == "hard link":
        out = own.folder / "link.pth"
        os.link(own.weights, out)
    elif way == "linked folder":
        (own.folder / "same").symlink_to(own.folder)
        out = own.folder / "same" / "old.pth"
    elif way == "with a query":
        weights = f"{own.weights}?matching_heuristics=True"
    before = content(own.folder)
    ran = own.run("adapt", "--output", out, "--force", weights=weights)
    assert ran.code == 1
    assert "expected an output that is not the input" in ran.err
    assert content(own.folder) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("new.pkl", "ends in .pth or .safetensors"),
        ("no/such/folder/new.pth", "an existing output folder"),
        ("new", "ends in .pth or .safetensors"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(name: str, words: str, own: Workplace) -> None:
    before = content(own.folder)
    ran = own.run("adapt", "--output", own.folder / name)
    assert ran.code == 1
    assert words in ran.err
    assert content(own.folder) == before


def test_an_adapted_file_remembers_which_rows_are_random(own: Workplace) -> None:
    own.run("adapt", "--output", own.folder / "new.pth")
    assert torch.load(own.folder / "new.pth")[KEY]["extra"]["untrained"] == {"thing": ["zebra"]}


# ------------------------------------------------------------------------------------------------- the command itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["plot"], "invalid choice: 'plot'"),
        (["adapt", "--weights", "x.pth"], "--output"),
        (["plan"], "--weights: expected a checkpoint, found none, and MODEL.WEIGHTS is empty"),
        (["plan", "--weights"], "expected one argument"),
        (["plan", "--import", "nowhere.py", "--weights", "x.pth"], "--import nowhere.py"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], words: str) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert words in ran.err


def test_help_and_version_are_0() -> None:
    assert cli("--version").out == f"{__version__}\n"
    ran = cli("--help")
    assert ran.code == 0
    assert "Exit codes: 0 done, 1 refused or nothing to load, 2 the command line is wrong." in ran.out
    assert "``" not in ran.out, "a docstring is no help text"
    assert cli("adapt", "--help").code == cli("fit", "--help").code == 0


def test_weights_come_from_the_config_where_no_flag_names_them(shared: Workplace) -> None:
    ran = cli(
        *("plan", "--config-file", shared.config, "MODEL.WEIGHTS", shared.weights),
        *("MODEL.HEAD_ADAPT.TARGET_CLASSES", str(NEW)),
    )
    assert ran.code == 0


def test_a_config_for_a_gpu_plans_and_adapts_without_one(own: Workplace) -> None:
    ran = own.run("adapt", "--output", own.folder / "g.pth", opts=["MODEL.DEVICE", "cuda"])
    assert ran.code == 0
    assert all(v.device.type == "cpu" for v in torch.load(own.folder / "g.pth")["model"].values())


def test_another_architecture_plans_by_its_own_keys(own: Workplace) -> None:
    """RetinaNet reads another NUM_CLASSES key, and has anchors in front of its classes."""
    cfg = tiny_cfg(masks=False, ours=False)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    from helpers.models import build_seeded

    old = build_seeded(cfg)
    own.weights = save_stock(old, own.folder / "retina.pth")
    own.config.write_text(yaml.safe_dump(yaml.safe_load(cfg.dump())))
    ran = own.run("adapt", "--output", own.folder / "new.pth")
    assert ran.code == 0
    assert "MODEL.RETINANET.NUM_CLASSES was 5, is 4" in ran.out
    new = torch.load(own.folder / "new.pth")["model"]["head.cls_score.weight"]
    anchors = old.head.cls_score.out_channels // 5
    assert torch.equal(
        new.view(anchors, 4, -1)[:, [0, 2, 3]], old.head.cls_score.weight.view(anchors, 5, -1)[:, [3, 0, 4]]
    )


def test_the_module_is_the_command(shared: Workplace) -> None:
    """``python -m d2_headadapt`` in an interpreter of its own."""
    ran = python(
        *("-m", "d2_headadapt", "plan", "--config-file", shared.config, "--weights", shared.folder / "nothere.pth")
    )
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith(f"error: {shared.folder / 'nothere.pth'}: expected a checkpoint file")
    assert "Traceback" not in ran.err
