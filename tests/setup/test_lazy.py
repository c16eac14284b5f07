"""LazyConfigs: what is read, what is written into the tree of calls, and that a yaml does the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers.commands import cli, fresh_loggers
from helpers.files import HEAD
from helpers.lazy import TINY, write_config, write_lazy, write_yaml
from helpers.models import model_of, names, same_bits
from omegaconf import OmegaConf
from torch import nn

from d2_headadapt import (
    PREDICTOR_REGISTRY,
    ClassTable,
    HeadAdaptCheckpointer,
    HeadAdaptOutputLayers,
    HeadAdaptTextOutputLayers,
    add_headadapt_config,
    layouts_of,
    plan_adaptation,
)
from d2_headadapt.checkpoint.checkpointer import HeadAdaptCheckpointer as Checkpointer
from d2_headadapt.config.settings import settings_of
from d2_headadapt.errors import ConfigError, HeadAdaptError, UsageError
from d2_headadapt.files import read_checkpoint
from d2_headadapt.key import MIRRORED
from d2_headadapt.setup.lazy import load_lazy_config, prepare
from d2_headadapt.setup.lazy.counts import find_counts
from d2_headadapt.setup.lazy.mirror import mirror_of
from d2_headadapt.setup.yaml import all_keys

ZOO = Path(model_zoo.__file__).parent / "configs"
NEEDS_OTHER_PACKAGES = {"Misc/mmdet_mask_rcnn_R_50_FPN_1x.py", "common/models/mask_rcnn_vitdet.py"}
# The baselines of 200 and 400 epochs are the models of those of 100.
MODELS = sorted(
    name
    for path in ZOO.rglob("*.py")
    if (name := str(path.relative_to(ZOO))).startswith(("COCO", "Misc", "new_baselines", "common/models"))
    and not name.endswith(("200ep_LSJ.py", "400ep_LSJ.py", "torchvision_imagenet_R_50.py"))
)
TABLES = {
    "thing": ClassTable(["gnu", "cat", "emu"], origin="mine"),
    "stuff": ClassTable(["sky", "sea"], origin="mine"),
    "keypoint": ClassTable(["eye", "nose", "ear", "tail"], origin="mine"),
}
OLD = ["yak", "cat", "dog", "emu", "ant"]
NEW = ["emu", "fly", "cat"]


@pytest.fixture(autouse=True)
def _fresh_loggers() -> Any:
    with fresh_loggers():
        yield


def settled(path: Path, *opts: str, reads_labels: bool = False) -> Any:
    return prepare(load_lazy_config(str(path), opts), reads_labels=reads_labels)


def on_meta(tree: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = instantiate(tree)
    return model


# -- class counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_zoo_gets_its_counts_and_its_plan_is_complete(name: str) -> None:
    """All heads follow the tables, and each class-sized tensor is carried by name."""
    if name in NEEDS_OTHER_PACKAGES:
        pytest.importorskip({"M": "mmdet", "c": "timm"}[name[0]])
    lazy = load_lazy_config(str(ZOO / name))
    large = on_meta(lazy.model)
    tables = {f"target_classes{'' if s == 'thing' else f'_{s}'}": list(t.names) for s, t in TABLES.items()}
    OmegaConf.update(lazy, "head_adapt", tables, force_add=True)
    lazy.pop("dataloader", None)
    prepare(lazy, reads_labels=False)
    small = on_meta(lazy.model)
    before, after = ({n: tuple(v.shape) for n, v in m.state_dict().items()} for m in (large, small))
    claimed = [layout for layout in layouts_of(small) if not layout.agnostic]
    assert {n for n in before if before[n] != after[n]} == {layout.tensor for layout in claimed}
    assert all(layout.fits(after[layout.tensor], len(TABLES[layout.space])) for layout in claimed)
    counts = {x.space: x.num_classes(before[x.tensor]) or 0 for x in layouts_of(large) if not x.agnostic}
    sources = {
        space: ClassTable([*TABLES[space].names, *(f"other {i}" for i in range(count))][:count])
        for space, count in counts.items()
    }
    plan = plan_adaptation(before, after, layouts_of(small), source_tables=sources, target_tables=TABLES)
    assert {t.name for t in plan.by_action("carried")} == {layout.tensor for layout in claimed}
    assert len(plan.by_action("copied")) == len(after) - len(claimed)


def test_what_changed_is_one_line_for_each_number_that_was_written(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", "d2_headadapt"):
        settled(write_lazy(tmp_path))
    said = [r.getMessage() for r in caplog.records if " was " in r.getMessage()]
    assert said == ["model.roi_heads.num_classes was 80, is 3, the classes of lazy_data"]


def test_numbers_of_their_own_and_those_that_point_out_of_the_model_follow_too(tmp_path: Path) -> None:
    body = 'shared = dict(k=7)\nmodel.roi_heads.num_classes = "${shared.k}"\n'
    body += "model.roi_heads.box_predictor.num_classes = 9"
    made = settled(write_lazy(tmp_path, body=body))
    assert {count.value for count in find_counts(made.lazy.model)} == {3}
    assert made.lazy.shared.k == 7


def test_a_backbone_that_was_a_classifier_once_keeps_its_count(tmp_path: Path) -> None:
    path = write_lazy(tmp_path, body="model.backbone.bottom_up.num_classes = 1000")
    assert settled(path).lazy.model.backbone.bottom_up.num_classes == 1000


def test_an_agnostic_mask_head_stays_agnostic(tmp_path: Path) -> None:
    """Its single class has the shape of a one-class head; that the heads around it have more tells."""
    path = write_lazy(tmp_path, ["cat"], body="model.roi_heads.mask_head.num_classes = 1")
    made = settled(path)
    masks = made.lazy.model.roi_heads.mask_head
    assert masks.num_classes == 1 and made.lazy.model.roi_heads.num_classes == 1
    path = write_lazy(tmp_path / "two", ["cat", "dog"], body="model.roi_heads.mask_head.num_classes = 1")
    path.write_text(path.read_text().replace("lazy_data", "lazy_two"))
    model = instantiate(settled(path).lazy.model)
    assert model.roi_heads.mask_head.predictor.out_channels == 1
    assert model.roi_heads.box_predictor.cls_score.out_features == 3


def test_our_heads_remember_an_agnostic_mask_head_of_a_one_class_detector(tmp_path: Path) -> None:
    made = settled(write_lazy(tmp_path, ["cat"], body=f"{OURS}model.roi_heads.mask_head.num_classes = 1"))
    for _ in range(2):
        heads = instantiate(made.lazy.model).roi_heads
        assert heads.num_classes == 1 and heads.mask_head.cls_agnostic is True
        prepare(made.lazy, reads_labels=False)


def test_a_head_that_does_not_follow_is_refused_by_its_node(tmp_path: Path) -> None:
    body = (
        "import torch\n"
        "from detectron2.modeling.roi_heads import FastRCNNOutputLayers\n"
        "def five_classes(num_classes, **kwargs):\n    return FastRCNNOutputLayers(num_classes=5, **kwargs)\n"
        "model.roi_heads.box_predictor._target_ = five_classes\n"
    )
    made = settled(write_lazy(tmp_path, body=body))
    with pytest.raises(ConfigError, match=r"^model\.roi_heads\.box_predictor: expected 3 classes.*cls_score.*for 5"):
        instantiate(made.lazy.model)


# -- keys and files ----------------------------------------------------------------------------------------------------


def test_every_key_of_the_package_is_taken_in_lower_case(tmp_path: Path) -> None:
    """One declaration: nothing is listed twice, so a key that config.py gets tomorrow is here too."""
    cfg = get_cfg()
    add_headadapt_config(cfg)
    own = [key for key in all_keys(cfg) if key.startswith("MODEL.HEAD_ADAPT.")]
    assert len(own) > 40
    lazy = load_lazy_config(str(write_config(tmp_path, "head_adapt = dict()")))
    for key in own:
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        changed = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 1.0, str: lambda v: f"{v}x"}
        wanted = changed[type(value)](value) if type(value) in changed else ["x"]
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], str):
            wanted = list(value[:1])
        OmegaConf.update(lazy, f"head_adapt.{key.removeprefix('MODEL.HEAD_ADAPT.').lower()}", wanted, force_add=True)
        found: Any = mirror_of(lazy)
        for part in key.split("."):
            found = found[part]
        assert found == wanted, key
        lazy.head_adapt = {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("dict(aliasses=[])", r"head_adapt\.aliasses: .*Nearest: 'aliases'"),
        ("dict(fit=dict(image=3))", r"head_adapt\.fit\.image: .*Nearest: 'images'"),
        ("dict(fit=False)", r"head_adapt\.fit: expected a dict of keys, found False"),
        (
            "dict(min_coverage='much')",
            r"head_adapt\.min_coverage: expected a value like 0\.5 \(float\), found 'much' \(str\)",
        ),
        ("dict(match='nmae')", r"head_adapt\.match: .*Set head_adapt\.match=name"),
        ("dict(tasks=dict(colour=dict(on='bx')))", r"head_adapt\.tasks\.colour\.on: expected image or box, found 'bx'"),
        ("dict(register=[dict(name='x')])", r"head_adapt\.register\[0\]\.json: "),
        ("dict(register='x')", r"head_adapt\.register: expected a list, found 'x'"),
        ("dict(register=dict(name='x'))", r"head_adapt\.register: expected a list, found \{'name': 'x'\}"),
        ("dict(register=[3])", r'head_adapt\.register\[0\]: .*Write dict\(name="my_train", json='),
        ("dict(register=None, x=1)", r"head_adapt\.x: expected a key that exists, found 'x'"),
        ("dict(aliases=None)", r"head_adapt\.aliases: expected a value like \[\] \(list\), found None"),
        ("dict(source_classes=dict(a=1))", r"head_adapt\.source_classes: expected no dict"),
        ("dict(source_classes=7)", r"""head_adapt\.source_classes: .*: head_adapt\.source_classes="'7'", or as"""),
        ("dict(source_classes='${gone}')", r"head_adapt\.source_classes: .*Interpolation key 'gone' not found"),
        ("dict(tasks=['a'])", r"head_adapt\.tasks: expected a dict, found \['a'\]"),
        ("dict(tasks={1: dict(on='box')})", r"head_adapt\.tasks\.1: expected a task name"),
        (
            "dict(tasks=dict(a=None))",
            r'head_adapt\.tasks\.a: .*Write a=dict\(on="box", classes=\["first", "second"\]\)',
        ),
        ("dict(tasks=dict(a=dict(on='image', classes=['x', 'y'])))", r", or head_adapt\.tasks\.a\.on=box"),
        ("None", r"line \d+, head_adapt: expected a dict of keys, found None"),
        ("'coco'", r"line \d+, head_adapt: expected a dict of keys, found 'coco'"),
        ("dict(source_classes='cocoo')", r"head_adapt\.source_classes: .*'cocoo'"),
    ],
)
def test_a_wrong_key_is_one_line_in_the_config_s_own_words(tmp_path: Path, body: str, message: str) -> None:
    path = write_config(tmp_path, f"head_adapt = {body}\ndataloader.pop('train'); dataloader.pop('test')")
    ran = cli("plan", "--config-file", path, "--weights", path)
    assert ran.code == 1
    (line,) = [text for text in ran.err.splitlines() if text.startswith("error: ")]
    assert re.search(message, line), line
    assert "MODEL." not in line and "yaml" not in line


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "child").mkdir()
    entry = 'dict(register=[dict(name="a", json="a.json", images="~/a"), dict(name="b", json="/b.json", images="b")])'
    write_config(tmp_path / "base", f"head_adapt = {entry}", "base.py")
    ways = {
        "relative": "from ..base.base import model, head_adapt\nhead_adapt.aliases = ['a=b']",
        "rel": "from detectron2.config import LazyConfig\nhead_adapt, model = "
        "LazyConfig.load_rel('../base/base.py', ('head_adapt', 'model'))",
        "one": "from detectron2.config import LazyConfig\nhead_adapt = LazyConfig.load_rel('../base/base.py', "
        "'head_adapt')\nmodel = LazyConfig.load_rel('../base/base.py').model",
        "own": "from ..base.base import model\nhead_adapt = " + entry,
    }
    for name, text in ways.items():
        (tmp_path / "child" / f"{name}.py").write_text(text)
        found = load_lazy_config(str(tmp_path / "child" / f"{name}.py")).head_adapt.register
        folder = tmp_path / ("child" if name == "own" else "base")
        assert [e.json for e in found] == [str(folder / "a.json"), "/b.json"], name
        assert [e.images for e in found] == [os.path.expanduser("~/a"), str(folder / "b")], name
    monkeypatch.chdir(tmp_path)
    opts = ["head_adapt.register=[{name: c, json: c.json, images: c}]"]
    assert load_lazy_config(str(tmp_path / "child" / "own.py"), opts).head_adapt.register[0].json == str(
        tmp_path / "c.json"
    )


def test_loading_leaves_python_as_it_was(tmp_path: Path) -> None:
    """detectron2 itself forgets to put ``__import__`` back where a config raises."""
    import builtins

    from detectron2.config import lazy as stock

    before = (builtins.__import__, stock._patch_import, LazyConfig.load)
    (tmp_path / "bad.py").write_text("raise RuntimeError('half-way')")
    for path in (write_config(tmp_path, ""), tmp_path / "bad.py"):
        with contextlib.suppress(ConfigError):
            load_lazy_config(str(path))
        assert (builtins.__import__, stock._patch_import, LazyConfig.load) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = (", r"bad\.py, line 1: .*SyntaxError"),
        ("x = 1\nmodel = y", r"bad\.py, line 2: .*NameError: name 'y' is not defined"),
        ("from .gone import model", r"bad\.py, line 1: .*gone\.py does not exist"),
        ("def f():\n    raise ValueError('x')\nf()", r"bad\.py, line 3: .*ValueError: x"),
        ("from detectron2.config import LazyCall\n\nmodel = LazyCall(dict)()", r"bad\.py, line 3: .*ValidationError"),
        ("x = dict(a=1)", r"bad\.py: expected a node `model` made with LazyCall, found the nodes x"),
        ("model = dict(a=1)", r"bad\.py: expected a node `model` made with LazyCall, found the nodes model"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_lazy_config(str(tmp_path / "bad.py"))
    with pytest.raises(ConfigError, match="no file"):
        load_lazy_config(str(tmp_path / "gone.py"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iter", "expected key=value"),
        ("SOLVER.MAX_ITER=3", r"a key as YAML configs have it\. .*'SOLVER\.MAX_ITER' is train\.max_iter there"),
        ("MODEL.HEAD_ADAPT.FIT.ENABLED", r"'MODEL\.HEAD_ADAPT\.FIT\.ENABLED' is head_adapt\.fit\.enabled there"),
        ("train.max_iter=[1", "expected an override that LazyConfig can apply"),
        ("train.max_iter.x=1", "expected an override that LazyConfig can apply"),
        ("--eval-only", "expected options before the first key=value, found one behind it"),
    ],
)
def test_an_override_that_cannot_be_applied_is_a_usage_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_lazy_config(str(write_config(tmp_path, "")), [override])


def test_overrides_are_applied_and_a_probable_slip_is_said(tmp_path: Path, caplog: Any) -> None:
    path = write_config(tmp_path, "")
    with caplog.at_level("WARNING", "d2_headadapt"):
        lazy = load_lazy_config(
            str(path), ["train.max_iter=7", "head_adapt.aliases=['a=b']", "train.cudnn_benchmark=True"]
        )
        assert not caplog.records
        assert (lazy.train.max_iter, list(lazy.head_adapt.aliases)) == (7, ["a=b"])
        load_lazy_config(str(path), ["train.max_itre=7"])
    assert "train.max_itre is a key that this config did not have. Nearest: 'train.max_iter'" in caplog.text


def test_what_a_message_says_to_type_works_when_it_is_typed(tmp_path: Path, weights: Path) -> None:
    """Each fix is taken from the message and given on the command line, as a shell would."""
    path = write_lazy(tmp_path, ["cat", "gnu"], body="head_adapt['tasks'] = dict(c=dict(on='box', classes=['x', 'y']))")
    common = ["plan", "--config-file", path, "--weights", weights]
    ran = cli(*common)
    (fix,) = re.findall(r"Set (model\S+)\.$", ran.err, re.MULTILINE)
    ran = cli(*common, fix)
    assert ran.code == 0 and fix == "model.roi_heads._target_=d2_headadapt.HeadAdaptROIHeads", ran.err
    ran = cli(*common, fix, "head_adapt.match=x")
    (second,) = re.findall(r"Set (\S+)\.$", ran.err, re.MULTILINE)
    assert cli(*common, fix, second).code == 0 and second == "head_adapt.match=name"
    ran = cli(*common, fix, "head_adapt.target_classes=gone.txt")
    (third,) = re.findall(r'as a list: (head_adapt\S+?)="(.*)"\.$', ran.err, re.MULTILINE)
    assert "1 new (gone.txt)" in cli(*common, fix, "=".join(third)).out


def test_a_plan_says_in_the_config_s_words_what_to_type(tmp_path: Path, weights: Path) -> None:
    path = write_config(tmp_path, "dataloader.train.dataset.names = []")
    ran = cli("plan", "--config-file", path, "--weights", weights, "--html", tmp_path / "plan.html")
    assert "type: head_adapt.target_classes=names.txt" in ran.out and "MODEL." not in ran.out
    page = (tmp_path / "plan.html").read_text()
    assert "Type <code>head_adapt.target_classes=names.txt</code>" in page and "MODEL." not in page


def test_what_a_mirror_shows_is_what_the_config_says(tmp_path: Path) -> None:
    """Every mirrored key, with a value that is no default."""
    lazy = load_lazy_config(str(write_lazy(tmp_path)))
    values: dict[str, Any] = {}
    for i, (key, place) in enumerate(MIRRORED.items()):
        values[key] = [1.0, 2.0] if key.endswith(("SIGMAS", "MEAN", "STD")) else 100 + i
        OmegaConf.update(lazy, place, values[key], force_add=True)
    cfg = mirror_of(lazy)
    for key, value in values.items():
        node: Any = cfg
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert tuple(cfg.DATASETS.TRAIN) == tuple(cfg.DATASETS.TEST) == ("lazy_data",)
    assert (cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == ("horizontal", 64, 96)
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME) == ("GeneralizedRCNN", "StandardROIHeads")
    assert cfg.MODEL.MASK_ON and not cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("model.roi_heads.foo = 1", r"^error: model\.roi_heads: .* StandardROIHeads .*keyword argument 'foo'"),
        ("model.pop('backbone')", r"^error: model: .* GeneralizedRCNN .*missing 1 required.*'backbone'"),
        ("model.roi_heads.num_classes = None", r"^error: model\.roi_heads\.box_predictor: .*TypeError"),
        ("model.roi_heads.pop('num_classes')", r"^error: model\.roi_heads\.\S*num_classes: .*Interpolation key"),
        ("model.roi_heads._target_ = 'gone.Heads'", r"^error: _target_ 'gone\.Heads': .*No module named 'gone'"),
        ("def own(**k):\n    raise KeyError('a')\nmodel.roi_heads.box_head._target_ = own",
         r"^error: model\.roi_heads\.box_head: .* own .*KeyError: 'a' \(\S+config\.py, line \d+\)"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_built_is_one_line_with_its_node(
    tmp_path: Path, weights: Path, body: str, message: str
) -> None:
    ran = cli("plan", "--config-file", write_lazy(tmp_path, body=body), "--weights", weights)
    assert ran.code == 1
    (line,) = [text for text in ran.err.splitlines() if text.startswith("error: ")]
    assert re.search(message, line), line


def test_what_a_config_file_defines_itself_can_be_the_model(tmp_path: Path, weights: Path) -> None:
    """Such a function has no module, and a partial no name."""
    own = "_inner = model\ndef own(inner):\n    return inner\nmodel = L(own)(inner=_inner)"
    part = "from functools import partial\nfrom detectron2.modeling import GeneralizedRCNN\n"
    for i, body in enumerate((own, f"{part}model._target_ = partial(GeneralizedRCNN, vis_period=0)")):
        ran = cli("plan", "--config-file", write_lazy(tmp_path / str(i), body=body), "--weights", weights)
        assert ran.code == 0 and "3 of 3 thing classes carried" in ran.out, ran.err
        (tmp_path / str(i) / "data.json").unlink()
        DatasetCatalog.remove("lazy_data")
        MetadataCatalog.remove("lazy_data")


def test_a_lost_node_is_found_however_it_was_written(tmp_path: Path) -> None:
    for i, text in enumerate(("head_adapt: str = 'x'", "head_adapt, other = 'x', 1")):
        path = write_config(tmp_path, f"head_adapt = dict()\n{text}", f"{i}.py")
        line = path.read_text().splitlines().index(text) + 1
        with pytest.raises(
            ConfigError, match=rf"{i}\.py, line {line}, head_adapt: expected a dict of keys, found \(?'x'"
        ):
            load_lazy_config(str(path))


def test_an_override_that_takes_the_model_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a node `model` made with LazyCall"):
        load_lazy_config(str(write_config(tmp_path, "")), ["model=null"])


# -- the model ---------------------------------------------------------------------------------------------------------


def test_anybody_who_instantiates_gets_a_model_that_knows_its_classes(tmp_path: Path) -> None:
    """Stock classes throughout: what detectron2's own script builds."""
    made = settled(write_lazy(tmp_path))
    for _ in range(2):
        model = instantiate(made.lazy.model)
        found = settings_of(model)
        assert found is not None and found.target["thing"].names == ("cat", "dog", "emu")
        assert type(model).__name__ == "GeneralizedRCNN" and HeadAdaptCheckpointer(model).settings is found
        prepare(made.lazy, reads_labels=False)  # Again changes nothing.


def test_a_failure_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    lazy = load_lazy_config(str(write_lazy(tmp_path)), ["head_adapt.target_classes=[cat]"])
    before = str(lazy)
    with pytest.raises(HeadAdaptError, match="the 1 classes of"):
        prepare(lazy)
    assert str(lazy) == before


def test_a_saved_config_is_plain_yaml_that_names_stock_s_classes(tmp_path: Path) -> None:
    body = 'head_adapt["tasks"] = dict(parity=dict(on="box", classes=["odd", "even"]))\n' + OURS
    made = settled(write_lazy(tmp_path, body=body))
    LazyConfig.save(made.lazy, str(tmp_path / "saved.yaml"))
    assert not (tmp_path / "saved.yaml.pkl").exists()
    saved = LazyConfig.load(str(tmp_path / "saved.yaml"))
    assert saved.model._target_ == "detectron2.modeling.GeneralizedRCNN"
    assert saved.model.roi_heads._target_ == "d2_headadapt.HeadAdaptROIHeads"
    assert saved.dataloader.train.dataset._target_ == "detectron2.data.get_detection_dataset_dicts"
    assert saved.model.roi_heads.num_classes == 3
    model = instantiate(prepare(saved, reads_labels=False).lazy.model)
    assert [head.spec.name for head in model.roi_heads.box_predictor.tasks] == ["parity"]


OURS = "from d2_headadapt import HeadAdaptROIHeads\nmodel.roi_heads._target_ = HeadAdaptROIHeads\n"


def test_one_line_brings_our_heads_with_their_predictor_and_tables(tmp_path: Path) -> None:
    model = instantiate(settled(write_lazy(tmp_path, body=OURS)).lazy.model)
    predictor = model.roi_heads.box_predictor
    assert type(predictor) is HeadAdaptOutputLayers
    assert predictor.class_table.names == ("cat", "dog", "emu") and predictor.tasks is None
    assert model.roi_heads.mask_head.cls_agnostic is False


def test_a_predictor_that_cannot_be_put_in_is_refused(tmp_path: Path, caplog: Any) -> None:
    path = write_lazy(tmp_path, body=OURS)
    with pytest.raises(ConfigError, match=r"head_adapt\.predictor: .*'HeadAdaptOutput'.*Nearest"):
        settled(path, "head_adapt.predictor=HeadAdaptOutput")
    PREDICTOR_REGISTRY._do_register("lazy_function", lambda cfg, shape, **kwargs: None)
    try:
        with pytest.raises(ConfigError, match="a class derived from HeadAdaptOutputLayers"):
            settled(path, "head_adapt.predictor=lazy_function")
    finally:
        del PREDICTOR_REGISTRY._obj_map["lazy_function"]
    with caplog.at_level("WARNING", "d2_headadapt"):
        stock = "model.roi_heads._target_=detectron2.modeling.roi_heads.StandardROIHeads"
        settled(path, "head_adapt.predictor=Another", stock)
    assert "Nothing reads head_adapt.predictor" in caplog.text


def test_explicit_arguments_win(tmp_path: Path) -> None:
    body = OURS + (
        "from d2_headadapt import HeadAdaptOutputLayers\n"
        "from d2_headadapt.adapt.classes import ClassTable\n"
        "def own_table():\n    return ClassTable(['x', 'y', 'z'])\n"
        "model.roi_heads.box_predictor._target_ = HeadAdaptOutputLayers\n"
        "model.roi_heads.box_predictor.class_table = L(own_table)()\n"
        "model.roi_heads.cls_agnostic_mask = True\nmodel.roi_heads.mask_head.num_classes = 1\n"
    )
    model = instantiate(settled(write_lazy(tmp_path, body=body)).lazy.model)
    assert model.roi_heads.box_predictor.class_table.names == ("x", "y", "z")
    assert model.roi_heads.mask_head.cls_agnostic is True


def test_text_embeddings_are_the_classifier(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.random.RandomState(0).randn(3, 40).astype(np.float32))
    file = f'dict(file={str(tmp_path / "clip.npy")!r}, names=["emu", "cat", "dog"])'
    keys = f'predictor="HeadAdaptTextOutputLayers", text={file}'
    path = write_lazy(tmp_path, body=f"head_adapt.update({keys})\n{OURS}")
    model = instantiate(settled(path).lazy.model)
    predictor = model.roi_heads.box_predictor
    assert type(predictor) is HeadAdaptTextOutputLayers
    rows = torch.from_numpy(np.load(tmp_path / "clip.npy"))[[1, 2, 0]]
    assert torch.equal(predictor.cls_score.embeddings.detach(), rows)
    with pytest.raises(HeadAdaptError, match="ROI heads that read"):
        settled(path, "model.roi_heads._target_=detectron2.modeling.roi_heads.StandardROIHeads")
    # Regions are 24 wide: without a projection the widths must agree, which is found before anything is built.
    with pytest.raises(HeadAdaptError, match="24"):
        settled(path, "head_adapt.text.projection=never")


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask R-CNN of five classes, saved with its tables."""
    folder = tmp_path_factory.mktemp("weights")
    model = model_of(OLD, masks=True, seed=5)
    Checkpointer(model, str(folder)).save("old", iteration=1)
    return folder / "old.pth"


def test_a_yaml_of_the_same_model_gives_the_same_plan_and_the_same_bits(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, NEW, body='head_adapt["aliases"] = ["fly=ant"]')
    ways = {"lazy": config, "yaml": write_yaml(tmp_path, ALIASES=["fly=ant"])}
    plans, states = {}, {}
    for name, path in ways.items():
        ran = cli("plan", "--config-file", path, "--weights", weights, "--json", tmp_path / f"{name}.json")
        assert ran.code == 0, ran.err
        plans[name] = json.loads((tmp_path / f"{name}.json").read_text())
        ran = cli("adapt", "--config-file", path, "--weights", weights, "--output", tmp_path / f"{name}.pth")
        assert ran.code == 0, ran.err
        states[name] = read_checkpoint(str(tmp_path / f"{name}.pth"), trust=False, verify=True)["model"]
    # Each form names its own keys.
    said = {name: plan.pop("found")[0].split("): ")[1] for name, plan in plans.items()}
    assert said["lazy"] == said["yaml"]
    assert plans["lazy"] == plans["yaml"]
    assert {t["action"] for t in plans["lazy"]["tensors"]} == {"copied", "carried"}
    assert same_bits(states["lazy"], states["yaml"])
    # Not because both did nothing: emu is row 3 of the old file, and row 0 of both.
    old = read_checkpoint(str(weights), trust=False, verify=True)["model"]
    assert torch.equal(states["lazy"][f"{HEAD}.cls_score.weight"][0], old[f"{HEAD}.cls_score.weight"][3])


def test_new_rows_are_fitted_to_the_same_bits_as_from_a_yaml(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, NEW, body="head_adapt.update(fit=dict(images=4, parts=['box']))", images=6)
    yaml = write_yaml(tmp_path, FIT={"IMAGES": 4, "PARTS": ["box"]})
    text = yaml.read_text()
    sizes = {"MIN_SIZE_TEST: 800": "MIN_SIZE_TEST: 64", "MAX_SIZE_TEST: 1333": "MAX_SIZE_TEST: 96"}
    for old, new in sizes.items():
        assert old in text
        text = text.replace(old, new)
    yaml.write_text(text)
    states = {}
    for name, path in (("lazy", config), ("yaml", yaml)):
        ran = cli("fit", "--config-file", path, "--weights", weights, "--output", tmp_path / f"{name}.pth")
        assert ran.code == 0, ran.err
        assert "fitted 1 of 1 new classes" in ran.out
        states[name] = read_checkpoint(str(tmp_path / f"{name}.pth"), trust=False, verify=True)["model"]
    assert same_bits(states["lazy"], states["yaml"])


OWN_DATASET = """
def own_dataset():
    from detectron2.data import DatasetCatalog
    return DatasetCatalog.get("lazy_data")
dataloader.train.dataset = L(own_dataset)()
"""


def test_fit_takes_images_from_a_dataset_function_of_the_config(tmp_path: Path, weights: Path) -> None:
    fit = f"head_adapt.update(fit=dict(images=4, parts=['box']), target_classes={NEW})\n"
    path = write_lazy(tmp_path, NEW, body=fit + OWN_DATASET, images=6)
    common = ["fit", "--config-file", path, "--weights", weights, "--output"]
    ran = cli(*common, tmp_path / "own.pth")
    assert ran.code == 0 and "fitted 1 of 1 new classes" in ran.out, ran.err
    path.write_text(path.read_text().replace(OWN_DATASET, "dataloader.train.dataset.names = []"))
    ran = cli(*common, tmp_path / "none.pth")
    assert ran.code == 2 and "dataloader.train.dataset.names: expected a dataset to fit new rows on" in ran.err
    assert not (tmp_path / "none.pth").exists()


def test_predict_takes_names_from_the_file_and_sizes_from_the_test_mapper(tmp_path: Path, weights: Path) -> None:
    config = write_lazy(tmp_path, ["never", "read"])
    (tmp_path / "data.json").unlink()
    config.write_text(config.read_text().replace("head_adapt", "unread"))
    out = ["--images", tmp_path / "data", "--output", tmp_path / "seen", "--least-score", "0"]
    ran = cli("predict", "--config-file", config, "--weights", weights, *out)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "seen" / "predictions.json").read_text())["images"]
    seen = {d["class"] for entry in found for d in entry["detections"]}
    assert len(found) == 4 and seen and seen <= set(OLD)


def test_the_doctor_looks_at_everything_that_a_lazyconfig_has(tmp_path: Path, weights: Path) -> None:
    path = write_lazy(tmp_path, NEW, images=6)
    ran = cli("doctor", "--config-file", path, "--weights", weights, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert ran.code == 0, ran.out
    assert set(report["not_run"]) == {"HA107", "HA110", "HA123", "HA128"}
    assert all("LazyConfig" in reason or "head_adapt" in reason for reason in report["not_run"].values())
    assert not [f for f in report["findings"] if f["severity"] == "error"]


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        ("HA101", "head_adapt['alias'] = []", "head_adapt.alias"),
        ("HA102", "head_adapt['register'][0]['json'] = 'gone.json'", "head_adapt.register"),
        ("HA103", "dataloader.train.dataset.names = 'gone'", "'gone'"),
        ("HA104", "head_adapt['match'] = 'x'", "head_adapt.match"),
        ("HA121", "optimizer.lr = 90.0", "optimizer.lr"),
        ("HA122", "lr_multiplier.warmup_method = 'x'\nlr_multiplier.pop('scheduler')", "lr_multiplier"),
        ("HA126", "model.pixel_std = [1.0]", "model.pixel_std"),
        ("HA301", "train.init_checkpoint = 'gone.pth'", "gone.pth"),
        ("HA309", "head_adapt['freeze'] = ['nothing.*']", "head_adapt.freeze"),
        ("HA501", "model.backbone.bottom_up.out_features = ['res9']", "model.backbone.bottom_up"),
        ("HA101", "model.roi_heads.num_classes = '${gone}'", "model.roi_heads.num_classes"),
        ("HA101", "model.roi_heads._target_ = 'gone.Heads'", "_target_ 'gone.Heads'"),
    ],
)
def test_the_doctor_finds_a_mistake_and_says_it_in_the_config_s_words(
    tmp_path: Path, weights: Path, code: str, body: str, words: str
) -> None:
    path = write_lazy(tmp_path, NEW, body=f"train.init_checkpoint = {str(weights)!r}\n{body}")
    cli("doctor", "--config-file", path, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    found = [finding for finding in report["findings"] if finding["code"] == code]
    assert found, report["findings"]
    assert words in str(found[0])
    assert not any("MODEL.HEAD_ADAPT" in str(finding) or "SOLVER." in str(finding) for finding in found)


def test_the_rule_for_sgd_is_not_applied_to_another_optimizer(tmp_path: Path) -> None:
    body = "from detectron2 import model_zoo\noptimizer = model_zoo.get_config('common/optim.py').AdamW\n"
    cli("doctor", "--config-file", write_lazy(tmp_path, body=body), "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["not_run"]["HA121"] == "optimizer: the rule is about SGD, and the optimizer is AdamW"


def test_the_tiny_config_is_the_tiny_yaml_s_model() -> None:
    """The parity tests compare two ways to one model: names and shapes are those of helpers/models.py."""
    lazy = load_lazy_config(str(TINY), ["model.roi_heads.num_classes=5"])
    ours = {n: v.shape for n, v in on_meta(lazy.model).state_dict().items()}
    assert ours == {n: v.shape for n, v in model_of(names(5), masks=True).state_dict().items()}
