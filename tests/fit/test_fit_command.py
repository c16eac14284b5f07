"""``d2-headadapt fit``: what it writes, what it says, what it refuses, and what a later training makes of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import Ran, cli, fresh_loggers
from helpers.datasets import write_coco
from helpers.files import HEAD, content, save_stock
from helpers.models import names, same_bits, state_of, stock_model, tiny_cfg
from helpers.resume import writers_are_closed

from d2_headadapt import ClassTable, HeadAdaptCheckpointer
from d2_headadapt.checkpoint.provenance import KEY
from d2_headadapt.engine.train import Trainer, default_argument_parser, setup
from d2_headadapt.fit import FitHook, FitReport, PartReport, fit_json, fit_lines

__all__ = ["writers_are_closed"]

TARGET = ["class 3", "zebra", "class 0", "yak"]
NEW_ROWS = {f"{HEAD}.cls_score": [1, 3], f"{HEAD}.bbox_pred": [4, 5, 6, 7, 12, 13, 14, 15]}


class Workplace:
    """A folder with a yaml, photographs of noise with boxes and masks, and a stock checkpoint of five classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = save_stock(stock_model(5, seed=21, masks=True), folder / "old.pth")
        self.labels = write_coco(folder, TARGET)
        config = yaml.safe_load(tiny_cfg().dump())
        entry = {"name": "d2ha_fit", "json": "data.json", "images": "data"}
        config["DATASETS"].update(TRAIN=["d2ha_fit"], TEST=["never_registered"], REGISTER=[entry])
        config["INPUT"].update(MIN_SIZE_TRAIN=[64], MIN_SIZE_TEST=64, MAX_SIZE_TRAIN=64, MAX_SIZE_TEST=64)
        config["DATALOADER"].update(NUM_WORKERS=0)
        config["SOLVER"].update(IMS_PER_BATCH=2, BASE_LR=1e-4, MAX_ITER=1, STEPS=[], WARMUP_ITERS=0)
        config["MODEL"]["HEAD_ADAPT"]["SOURCE_CLASSES"] = names(5)
        # Whether an RPN is solved is not the matter here.
        config["MODEL"]["HEAD_ADAPT"]["FIT"]["RPN"] = "never"
        config["OUTPUT_DIR"] = str(folder / "out")
        self.config = folder / "c.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def run(self, command: str, *flags: Any, opts: Any = (), weights: Any = None) -> Ran:
        return cli(command, "--config-file", self.config, "--weights", weights or self.weights, *flags, *opts)

    def fit(self, *flags: Any, opts: Any = ()) -> dict[str, Any]:
        """The file that ``fit`` writes."""
        ran = self.run("fit", "--output", self.folder / "fitted.pth", *flags, opts=opts)
        assert ran.code == 0, ran.err
        loaded: dict[str, Any] = torch.load(self.folder / "fitted.pth")
        return loaded

    def take_away(self, name: str) -> None:
        """Remove every box of a class."""
        data = json.loads(self.labels.read_text())
        gone = next(c["id"] for c in data["categories"] if c["name"] == name)
        data["annotations"] = [a for a in data["annotations"] if a["category_id"] != gone]
        self.labels.write_text(json.dumps(data))

    def trainer(self, *opts: Any) -> Trainer:
        """A training with the fit asked for, loaded and stopped before its first iteration."""
        test = ["DATASETS.TEST", "()", "MODEL.DEVICE", "cpu", "MODEL.HEAD_ADAPT.FIT.ENABLED", "True"]
        args = default_argument_parser().parse_args(["--config-file", str(self.config), *test, *map(str, opts)])
        with fresh_loggers():
            trainer = Trainer(setup(args))
            trainer.resume_or_load(resume=False)
        return trainer


@pytest.fixture()
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def hook_of(trainer: Trainer) -> FitHook:
    (hook,) = (hook for hook in trainer._hooks if isinstance(hook, FitHook))
    return hook


# ----------------------------------------------------------------------------------------------------- what it writes


def test_new_rows_are_solved_and_everything_else_is_what_adapt_writes(place: Workplace) -> None:
    assert place.run("adapt", "--output", place.folder / "adapted.pth").code == 0
    adapted = torch.load(place.folder / "adapted.pth")
    ran = place.run("fit", "--output", place.folder / "fitted.pth", "--json", place.folder / "report.json")
    assert ran.code == 0
    fitted = torch.load(place.folder / "fitted.pth")
    assert list(fitted["model"]) == list(adapted["model"])
    for name, value in fitted["model"].items():
        part = name.rpartition(".")[0]
        rows = NEW_ROWS.get(part, [1, 3] if part == "roi_heads.mask_head.predictor" else [])
        changed = (value != adapted["model"][name]).reshape(len(value) if value.dim() else 1, -1).any(1)
        assert changed.nonzero().flatten().tolist() == rows, name
    assert adapted[KEY]["extra"]["untrained"] == {"thing": ["yak", "zebra"]}
    assert {*adapted[KEY]["extra"]["untrained_rows"]} == {
        f"{part}.{leaf}" for part in (*NEW_ROWS, "roi_heads.mask_head.predictor") for leaf in ("weight", "bias")
    }
    extra = {key: value for key, value in adapted[KEY]["extra"].items() if not key.startswith("untrained")}
    assert fitted[KEY] == {**adapted[KEY], "extra": extra} and {*extra} == {"applied"}
    lines = ran.out.splitlines()
    assert any(
        line.startswith("2 of 4 thing classes carried from MODEL.HEAD_ADAPT.SOURCE_CLASSES (5)") for line in lines
    )
    (header,) = (line for line in lines if line.startswith("part "))
    assert [word.strip() for word in header.split("  ") if word.strip()] == [
        "part", "action", "why", "regions", "left out", "penalties", "held out, before -> after",
    ]  # fmt: skip
    assert any(line.startswith(f"{HEAD} ") and " solved " in line for line in lines)
    assert lines[-1] == f"wrote {place.folder / 'fitted.pth'}"
    report = json.loads((place.folder / "report.json").read_text())
    assert report["new"] == {"thing": ["zebra", "yak"]}
    assert (report["without_examples"], report["untrained"], report["skipped"]) == ({}, {}, [])
    actions = {part["part"]: part["action"] for part in report["parts"]}
    assert actions == {"proposal_generator": "kept", HEAD: "solved", "roi_heads.mask_head.predictor": "solved"}


def test_the_same_command_writes_the_same_file(place: Workplace) -> None:
    first, second = place.fit(), place.fit("--force")
    assert same_bits(first["model"], second["model"])


def test_a_class_without_an_example_stays_untrained(place: Workplace) -> None:
    place.take_away("yak")
    ran = place.run("fit", "--output", place.folder / "fitted.pth", "--json", "-")
    assert ran.code == 0
    assert json.loads(ran.out)["without_examples"] == {"thing": ["yak"]}
    assert f"wrote {place.folder / 'fitted.pth'}" in ran.err
    assert torch.load(place.folder / "fitted.pth")[KEY]["extra"]["untrained"] == {"thing": ["yak"]}
    ran = place.run("fit", "--output", place.folder / "fitted.pth", "--force")
    assert "thing classes without an example, which keep their initial rows: yak" in ran.out.splitlines()


def test_a_class_of_which_a_part_was_kept_stays_untrained(place: Workplace) -> None:
    data = place.fit(opts=["MODEL.HEAD_ADAPT.FIT.PARTS", "['box']"])
    rows = {f"roi_heads.mask_head.predictor.{leaf}": ["zebra", "yak"] for leaf in ("weight", "bias")}
    extra = data[KEY]["extra"]
    assert (extra["untrained"], extra["untrained_rows"]) == ({"thing": ["yak", "zebra"]}, rows)


def test_where_nothing_is_new_the_file_is_written_all_the_same(place: Workplace) -> None:
    place.fit()
    ran = place.run("fit", "--output", place.folder / "again.pth", weights=place.folder / "fitted.pth")
    assert ran.code == 0
    assert ran.out.splitlines()[-2:] == ["no row is new: nothing to fit", f"wrote {place.folder / 'again.pth'}"]
    first, second = (torch.load(place.folder / f"{name}.pth") for name in ("fitted", "again"))
    assert same_bits(first["model"], second["model"]) and first[KEY] == second[KEY]


def test_an_image_that_cannot_be_read_is_named(place: Workplace) -> None:
    (place.folder / "data" / "2.png").write_bytes(b"no image")
    ran = place.run("fit", "--output", place.folder / "fitted.pth")
    assert ran.code == 0
    (line,) = (line for line in ran.out.splitlines() if line.startswith("images passed over: "))
    assert line.startswith("images passed over: 2 (")


def test_a_config_for_a_gpu_fits_without_one_and_says_so(place: Workplace) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ran = place.run("fit", "--output", place.folder / "fitted.pth", opts=["MODEL.DEVICE", "cuda"])
    assert ran.code == 0
    assert "MODEL.DEVICE is cuda, but this machine has no CUDA: running on the CPU." in ran.out


@pytest.mark.gpu
def test_a_file_that_a_gpu_wrote_holds_cpu_tensors(place: Workplace) -> None:
    data = place.fit(opts=["MODEL.DEVICE", "cuda"])
    assert all(value.device.type == "cpu" for value in data["model"].values())
    assert not {"untrained", "untrained_rows"} & {*data[KEY]["extra"]}


# ----------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("flags", "opts", "code", "words"),
    [
        (["--output", "new.pth"], ["DATASETS.TRAIN", "()"], 2, "DATASETS.TRAIN: expected a dataset to fit new rows on"),
        (["--output", "old.pth", "--force"], [], 1, "expected an output that is not the input"),
        (["--output", "there.pth"], [], 1, "expected an output that does not exist yet, found a file"),
        (["--output", "new.pth", "--json", "old.pth"], [], 2, "expected an output that is not the checkpoint"),
        (["--output", "new.pth", "--json", "new.pth"], [], 2, "expected an output that is not the checkpoint"),
        (["--output", "new.pth", "--json", "no/where.json"], [], 2, "expected an existing folder, found no folder"),
        (["--output", "new.pth"], ["MODEL.HEAD_ADAPT.FIT.IMAGES", "0"], 1, "MODEL.HEAD_ADAPT.FIT.IMAGES: expected"),
        (["--output", "new.pth"], ["DATASETS.TRAIN", "('nobody',)"], 1, "dataset 'nobody': expected a registered"),
        (["--output", "new.pth"], ["MODEL.HEAD_ADAPT.TARGET_CLASSES", "['yak']"], 1, "DATASETS.TRAIN: expected the 1"),
        ([], [], 2, "--output"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(
    flags: list[str], opts: list[str], code: int, words: str, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    (place.folder / "there.pth").write_text("precious")
    before = content(place.folder)
    ran = place.run("fit", *flags, opts=opts)
    assert ran.code == code
    assert words in ran.err
    assert content(place.folder) == before


def test_labels_without_an_image_are_no_training_set(place: Workplace) -> None:
    data = json.loads(place.labels.read_text())
    place.labels.write_text(json.dumps({**data, "images": [], "annotations": []}))
    ran = place.run("fit", "--output", place.folder / "fitted.pth")
    assert ran.code == 1
    # detectron2 may have logged something before.
    assert (
        "\nerror: DATASETS.TRAIN: expected datasets with images, found Dataset 'd2ha_fit' is empty!" in f"\n{ran.err}"
    )
    assert not (place.folder / "fitted.pth").exists()


# -------------------------------------------------------------------------------------------- what training makes of it


def test_a_training_does_not_fit_solved_rows_again(place: Workplace) -> None:
    place.fit()
    trainer = place.trainer("MODEL.WEIGHTS", place.folder / "fitted.pth")
    assert trainer.checkpointer.plan is not None and trainer.checkpointer.plan.new_classes() == {}
    assert trainer.checkpointer.untrained == {}
    before = state_of(trainer.checkpointer.model)
    hook_of(trainer).before_train()
    assert hook_of(trainer).report is None
    assert same_bits(state_of(trainer.checkpointer.model), before)


@pytest.mark.parametrize(("gone", "untrained"), [("", {}), ("yak", {"thing": ("yak",)})])
def test_in_a_training_solved_rows_are_not_untrained(gone: str, untrained: dict[str, Any], place: Workplace) -> None:
    if gone:
        place.take_away(gone)
    trainer = place.trainer("MODEL.WEIGHTS", place.weights)
    assert trainer.checkpointer.untrained == {"thing": ("yak", "zebra")}
    hook_of(trainer).before_train()
    assert trainer.checkpointer.untrained == untrained
    hook_of(trainer).before_train()
    assert trainer.checkpointer.untrained == untrained, "a second fit finds the rows of the first"
    trainer.checkpointer.save("before")
    stored = torch.load(place.folder / "out" / "before.pth")[KEY]["extra"].get("untrained", {})
    assert stored == {space: list(classes) for space, classes in untrained.items()}


def test_a_failed_fit_leaves_the_list_of_untrained_classes(place: Workplace) -> None:
    trainer = place.trainer("MODEL.WEIGHTS", place.weights)
    with pytest.raises(KeyError), trainer.checkpointer.fitted_rows():
        trainer.checkpointer.model.roi_heads.box_predictor.cls_score.weight.data.zero_()
        raise KeyError
    assert trainer.checkpointer.untrained == {"thing": ("yak", "zebra")}


def test_rows_carried_from_random_ones_are_fitted_too(place: Workplace) -> None:
    """``adapt`` first, and train later: what nobody trained yet is solved then, and what was trained is not."""
    assert place.run("adapt", "--output", place.folder / "adapted.pth").code == 0
    data = torch.load(place.folder / "adapted.pth")
    data["model"] = {name: value for name, value in data["model"].items() if "mask_head.predictor" not in name}
    torch.save(data, place.folder / "boxes.pth")
    trainer = place.trainer("MODEL.WEIGHTS", place.folder / "boxes.pth")
    assert trainer.checkpointer.untrained == {"thing": tuple(sorted(TARGET))}, "the masks of all are new"
    before = state_of(trainer.checkpointer.model)
    hook_of(trainer).before_train()
    assert trainer.checkpointer.untrained == {}
    name = "roi_heads.box_predictor.cls_score.weight"
    changed = (state_of(trainer.checkpointer.model)[name] != before[name]).any(1).tolist()
    assert changed == [entry in ("yak", "zebra") for entry in TARGET] + [False]


def test_without_a_load_nothing_was_untrained() -> None:
    checkpointer = HeadAdaptCheckpointer(stock_model(2))
    with checkpointer.fitted_rows():
        pass
    assert checkpointer.untrained == {}


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_in_words() -> None:
    parts = (
        PartReport("head", "solved", "2 new classes", 50, 3, {"cls_score": 0.01}, {"held-out loss": (0.5, 0.25)}),
        PartReport("rpn", "kept", "no reason"),
    )
    report = FitReport(parts, {"thing": (0, 2), "stuff": (1,)}, {"stuff": (1,)}, 9, (("7", "broken"),), 1.5)
    table = {"thing": ClassTable(["a", "b", "c"], origin="test")}
    head, line, *rows = fit_lines(report, table).splitlines()
    assert head.split()[0] == "part" and set(line) == {"-", " "}
    assert " ".join(rows[0].split()) == "head solved 2 new classes 50 3 cls_score 0.01 loss 0.5 -> 0.25"
    assert " ".join(rows[1].split()) == "rpn kept no reason"
    assert rows[2:] == [
        "stuff classes without an example, which keep their initial rows: class 1",
        "images passed over: 7 (broken)",
        report.line(),
    ]
    data = json.loads(fit_json(report, table, {"stuff": ("sky",)}))
    assert data["new"] == {"thing": ["a", "c"], "stuff": ["class 1"]} and data["untrained"] == {"stuff": ["sky"]}
    assert data["parts"][0]["score"] == {"held-out loss": [0.5, 0.25]} and data["skipped"] == [["7", "broken"]]
