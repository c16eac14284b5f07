"""Whatever a user can get wrong: one message that says where, what was expected, what was found and what to type.

Exit code 1, nothing written, nothing changed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import cli
from helpers.datasets import write_coco
from helpers.files import HEAD, Runs, content, save_stock
from helpers.models import names, stock_model, tiny_cfg

from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.data.categories import read_categories
from d2_headadapt.data.datasets import resolve_table
from d2_headadapt.doctor.context import _read_json
from d2_headadapt.errors import HeadAdaptError
from d2_headadapt.modeling.text.bundle import read_bundle

SOURCE = "MODEL.HEAD_ADAPT.SOURCE_CLASSES"
TARGET = "MODEL.HEAD_ADAPT.TARGET_CLASSES"
FIVE = str(names(5))


class Place:
    """A folder in which everything is right, until a test spoils one thing."""

    def __init__(self, folder: Path, weights: bytes) -> None:
        self.folder = folder
        self.weights: Any = folder / "old.pth"
        self.weights.write_bytes(weights)
        self.keys: dict[str, Any] = {SOURCE: FIVE, TARGET: "['class 3', 'zebra']"}
        self.yaml: dict[str, Any] = yaml.safe_load(tiny_cfg(masks=False).dump())

    def state(self) -> dict[str, torch.Tensor]:
        return dict(torch.load(self.weights)["model"])

    def save(self, data: Any, name: str = "old.pth") -> None:
        self.weights = self.folder / name
        torch.save(data, self.weights)

    def datasets(self, **changes: Any) -> None:
        """Train on a tiny registered dataset instead of a list of names."""
        write_coco(self.folder, ["class 3", "zebra"], name="d", images=1)
        self.keys.pop(TARGET)
        entry = {"name": "d2ha_bad_train", "json": "d.json", "images": "d", **changes}
        self.yaml["DATASETS"]["REGISTER"] = [{k: v for k, v in entry.items() if v is not None}]
        self.yaml["DATASETS"]["TRAIN"] = ["d2ha_bad_train"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(save_stock(stock_model(5, seed=21), tmp_path_factory.mktemp("w") / "old.pth")).read_bytes()


@pytest.fixture()
def place(tmp_path: Path, weights: bytes) -> Place:
    return Place(tmp_path, weights)


def truncated(p: Place) -> None:
    p.weights.write_bytes(p.weights.read_bytes()[:-3000])


def empty(p: Place) -> None:
    p.weights.write_bytes(b"")


def an_image(p: Place) -> None:
    write_coco(p.folder, ["a"], name="d", images=1)
    p.weights = p.folder / "d" / "0.png"


def a_page(p: Place) -> None:
    p.weights.write_text("<!DOCTYPE html><html>404</html>")


def a_whole_model(p: Place) -> None:
    p.save(stock_model(5))


def a_list(p: Place) -> None:
    p.save([1, 2, 3])


def nested(p: Place) -> None:
    p.save({"state_dict": p.state(), "epoch": 3})


def another_architecture(p: Place) -> None:
    state = p.state()
    kept = {n: v for n, v in state.items() if n.startswith("backbone.bottom_up.stem")}
    p.save({"model": {**kept, **{f"transformer.{i}": torch.zeros(2) for i in range(40)}}})


def running_pickle(p: Place) -> None:
    p.weights = p.folder / "evil.pkl"
    p.weights.write_bytes(pickle.dumps({"model": {"a": 1}, "x": Runs(str(p.folder / "ran"))}))


def running_torch_file(p: Place) -> None:
    p.save({"model": p.state(), "x": Runs(str(p.folder / "ran"))})


def nan(p: Place) -> None:
    state = p.state()
    state[f"{HEAD}.cls_score.weight"][3, 5] = float("nan")
    p.save({"model": state})


def key(name: str, value: Any) -> Callable[[Place], None]:
    def spoil(p: Place) -> None:
        p.keys[name] = value

    spoil.__name__ = f"{name.rpartition('.')[2]} {value}"
    return spoil


def unregistered(p: Place) -> None:
    p.datasets()
    p.yaml["DATASETS"]["TRAIN"] = ["d2ha_bad_trian"]


def missing_json(p: Place) -> None:
    p.datasets(json="nothere.json")


def missing_images(p: Place) -> None:
    p.datasets(images="nothere")


def wrong_thing_classes(p: Place) -> None:
    p.datasets(thing_classes=["zebra", "class 3"])


def entry_without_name(p: Place) -> None:
    p.datasets(name=None)


def entry_with_unknown_key(p: Place) -> None:
    p.datasets(image="d")


def damaged_json(p: Place) -> None:
    p.datasets()
    (p.folder / "d.json").write_text('{"categories": [')


def json_without_categories(p: Place) -> None:
    p.datasets()
    (p.folder / "d.json").write_text(json.dumps({"images": []}))


def duplicate_names(p: Place) -> None:
    p.datasets()
    data = json.loads((p.folder / "d.json").read_text())
    data["categories"][1]["name"] = data["categories"][0]["name"]
    (p.folder / "d.json").write_text(json.dumps(data))


def names_file_that_is_missing(p: Place) -> None:
    p.keys[TARGET] = "classes.txt"


def names_file_of_another_kind(p: Place) -> None:
    (p.folder / "classes.csv").write_text("cat\n")
    p.keys[TARGET] = str(p.folder / "classes.csv")


def names_file_without_names(p: Place) -> None:
    (p.folder / "classes.json").write_text('{"classes": ["cat"]}')
    p.keys[TARGET] = str(p.folder / "classes.json")


BAD: list[tuple[Callable[[Place], None], str, str]] = [
    # what is spoilt, where the message points to, what it says
    (lambda p: setattr(p, "weights", p.folder / "odl.pth"), "odl.pth", "found no such file.*Nearest: 'old.pth'"),
    (lambda p: setattr(p, "weights", p.folder), "", "found a folder"),
    (truncated, "old.pth", "expected"),
    (empty, "old.pth", "found an empty file"),
    (an_image, "0.png", "found a PNG image"),
    (a_page, "old.pth", "found a web page"),
    (a_whole_model, "old.pth", "TRUST_FILE"),
    (a_list, "old.pth", "found a list.*Save a dict"),
    (nested, "old.pth", "under 'state_dict'"),
    (another_architecture, "old.pth", r"expected at least 50%.*backbone \d+/\d+, transformer 0/40.*MIN_COVERAGE 0\."),
    (running_pickle, "evil.pkl", r"asks for '(_?io|builtins)\.open'.*TRUST_FILE True"),
    (running_torch_file, "old.pth", r"asks for '(_?io|builtins)\.open'.*TRUST_FILE True"),
    (nan, f"{HEAD}.cls_score.weight", "1 NaN or infinite values of .* in the rows of class 3.*Nothing was loaded"),
    (unregistered, "dataset 'd2ha_bad_trian'", "Nearest: 'd2ha_bad_train'"),
    (missing_json, "DATASETS.REGISTER[0] ('d2ha_bad_train').json", "nothere.json, which is not there"),
    (missing_images, "DATASETS.REGISTER[0] ('d2ha_bad_train').images", "nothere, which is not there"),
    (wrong_thing_classes, "DATASETS.REGISTER[0]", "the same names in another order"),
    (entry_without_name, "DATASETS.REGISTER[0].name", "expected a string, found nothing"),
    (entry_with_unknown_key, "DATASETS.REGISTER[0]", "found 'image'.*Nearest: 'images'"),
    (damaged_json, "d.json", "expected a COCO json"),
    (json_without_categories, "d.json", "expected a COCO json"),
    (duplicate_names, "d2ha_bad_train", "expected different names, found '(class 3|zebra)' twice"),
    (names_file_that_is_missing, TARGET, "'classes.txt', which is a file that is not there"),
    (names_file_of_another_kind, TARGET, "expected a .json or .txt file"),
    (names_file_without_names, TARGET, "expected a list of names"),
    (key(TARGET, "['cat', 'cat']"), TARGET, "'cat' twice"),
    (key(TARGET, "[]"), TARGET, "at least one class name"),
    (key(TARGET, "['cat', '']"), f"{TARGET}, class 1", "expected a name"),
    (key(TARGET, "[1.5, 2]"), f"{TARGET}, class 0", "Put it in quotes: '1.5'"),
    (key(TARGET, "80"), TARGET, "found 80 .int.*quotes"),
    (key(TARGET, "class 3, zebra"), TARGET, r"Names are written as a list: .*\['class 3', 'zebra'\]"),
    (key(SOURCE, "cocoo"), SOURCE, "Vocabularies: coco"),
    (key(SOURCE, str(names(4))), f"{HEAD}", "holds 5 classes .*names 4: correct MODEL.HEAD_ADAPT.SOURCE_CLASSES"),
    (key("MODEL.HEAD_ADAPT.ALIASES", "['zebra=klass 3']"), "MODEL.HEAD_ADAPT.ALIASES, 'zebra=klass 3'", "'class 3'"),
    (key("MODEL.HEAD_ADAPT.ALIASES", "['zebre=class 3']"), "MODEL.HEAD_ADAPT.ALIASES, 'zebre=class 3'", "'zebra'"),
    (key("MODEL.HEAD_ADAPT.ALIASES", "['zebra']"), "MODEL.HEAD_ADAPT.ALIASES, 'zebra'", "Write it like 'lorry=truck'"),
    (key("MODEL.HEAD_ADAPT.ALIASES", "zebra=class 3"), "command line", "HEAD_ADAPT.ALIASES"),
    (key("MODEL.HEAD_ADAPT.MATCH", "index"), "MODEL.HEAD_ADAPT.MATCH", "'name' or 'position'"),
    (key("MODEL.HEAD_ADAPT.MIN_COVERAGE", "half"), "command line", "MIN_COVERAGE"),
    (key("MODEL.HEAD_ADAPT.PREDICTOR", "HeadAdaptOutput"), "MODEL.HEAD_ADAPT.PREDICTOR", "HeadAdaptOutputLayers"),
    (key("MODEL.HEAD_ADPAT.MATCH", "name"), "command line", "Nearest: 'MODEL.HEAD_ADAPT.MATCH'"),
    (key("MODEL.ROI_HEADS.NAME", "HeadAdaptRoiHeads"), "ROI_HEADS", "found 'HeadAdaptRoiHeads'"),
    (key("MODEL.META_ARCHITECTURE", "RCNN"), "META_ARCH", "found 'RCNN'"),
    (key("MODEL.ROI_HEADS.NUM_CLASSES", "many"), "command line", "NUM_CLASSES"),
]


@pytest.mark.parametrize(("spoil", "where", "words"), BAD, ids=[f"{i} {b[0].__name__}" for i, b in enumerate(BAD)])
def test_bad_input_is_one_message_and_nothing_is_written(
    spoil: Callable[[Place], None], where: str, words: str, place: Place
) -> None:
    """Where, expected, found, fix; exit code 1; no file made or changed; no traceback."""
    import re

    spoil(place)
    config = place.folder / "c.yaml"
    config.write_text(yaml.safe_dump(place.yaml))
    before = content(place.folder)
    opts = [part for pair in place.keys.items() for part in pair]
    output = place.folder / "new.pth"
    ran = cli("adapt", "--config-file", config, "--weights", place.weights, "--output", output, *opts)
    assert ran.code == 1, ran
    message = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1, ran.err
    assert re.search(words, message[0]), message[0]
    assert where in message[0].partition(": expected")[0], message[0]
    assert ": expected " in message[0]
    assert ", found " in message[0]
    assert message[0].rstrip().endswith((".", "]", '"', "'")), message[0]
    assert "Traceback" not in ran.out + ran.err
    assert content(place.folder) == before


def test_what_is_right_is_written(place: Place) -> None:
    """The place itself is in order: only what a test spoils makes it fail."""
    config = place.folder / "c.yaml"
    place.datasets()
    config.write_text(yaml.safe_dump(place.yaml))
    opts = [part for pair in place.keys.items() for part in pair]
    output = place.folder / "new.pth"
    ran = cli("adapt", "--config-file", config, "--weights", place.weights, "--output", output, *opts)
    assert ran.code == 0, ran
    assert output.exists()


def test_a_file_that_needs_full_pickle_loads_where_it_is_trusted(place: Place) -> None:
    """The key that the refusal names is enough."""
    running_torch_file(place)
    config = place.folder / "c.yaml"
    config.write_text(yaml.safe_dump(place.yaml))
    opts = [part for pair in place.keys.items() for part in pair]
    arguments = ("adapt", "--config-file", config, "--weights", place.weights, "--output", place.folder / "new.pth")
    assert cli(*arguments, *opts).code == 1
    assert not (place.folder / "ran").exists()
    assert cli(*arguments, *opts, "MODEL.HEAD_ADAPT.TRUST_FILE", "True").code == 0
    assert (place.folder / "ran").exists()


def test_an_error_survives_the_way_to_another_process() -> None:
    """Spawned workers hand theirs to the parent by pickling."""
    for kind in (HeadAdaptError, *HeadAdaptError.__subclasses__()):
        error = kind("here", expected="a", found="b", fix="Do c.")
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind
        assert str(back) == "here: expected a, found b. Do c."
        assert back.exit_code == kind.exit_code


NEST = "[" * 200_000


@pytest.mark.parametrize(
    "nest", [NEST, '{"categories": ' * 200_000, '{"names": ' + NEST], ids=["lists", "dicts", "both"]
)
@pytest.mark.parametrize(
    "read",
    [
        lambda path: resolve_table(path, key=TARGET),
        lambda path: read_categories(path),
        lambda path: _read_json(path),
        lambda path: AdaptPlan.from_json(Path(path).read_text(encoding="utf-8")),
        lambda path: read_bundle(str(Path(path).with_suffix(".npy")), None),
    ],
    ids=["class names", "categories", "doctor", "plan", "embeddings"],
)
def test_a_json_nested_200_000_deep_is_one_line(read: Callable[[str], Any], nest: str, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(nest, encoding="utf-8")
    np.save(tmp_path / "names.npy", np.ones((3, 8), np.float32))
    with pytest.raises(HeadAdaptError) as caught:
        read(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000 and caught.value.fix
