"""What a user wants, read from a config, and left where any checkpointer finds it."""

from __future__ import annotations

from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers.models import tiny_cfg
from torch import nn

from d2_headadapt import AdaptSettings, ClassTable, add_headadapt_config, vocabulary
from d2_headadapt.config.settings import (
    ATTRIBUTE,
    NUM_CLASSES_KEYS,
    apply_num_classes,
    attach_settings,
    settings_of,
    with_keys,
)
from d2_headadapt.errors import ClassTableError, ConfigError, DatasetError
from d2_headadapt.setup.yaml import all_keys


def config(*, train: tuple[str, ...] = (), **keys: Any) -> CfgNode:
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN = train
    for key, value in keys.items():
        cfg.MODEL.HEAD_ADAPT[key] = value
    return cfg


@pytest.fixture()
def animals() -> str:
    DatasetCatalog.register("d2ha_animals", list)
    MetadataCatalog.get("d2ha_animals").set(thing_classes=["cat", "dog"])
    return "d2ha_animals"


def test_the_target_is_the_training_set(animals: str) -> None:
    assert AdaptSettings.from_config(config(train=(animals,))).target == {"thing": ClassTable(["cat", "dog"])}


def test_target_classes_win_over_the_training_set(animals: str) -> None:
    found = AdaptSettings.from_config(config(train=(animals,), TARGET_CLASSES=["eel"]))
    assert found.target["thing"].names == ("eel",)


def test_every_space_has_its_own_keys() -> None:
    found = AdaptSettings.from_config(
        config(
            SOURCE_CLASSES="coco",
            SOURCE_CLASSES_STUFF="coco",
            SOURCE_CLASSES_KEYPOINT="coco",
            TARGET_CLASSES_KEYPOINT=["nose", "tail"],
        )
    )
    assert {space: len(table) for space, table in found.source.items()} == {"thing": 80, "stuff": 54, "keypoint": 17}
    assert found.target == {"keypoint": ClassTable(["nose", "tail"])}


@pytest.mark.parametrize("word", ["none", "NONE"])
def test_none_initialises_its_space_alone(word: str) -> None:
    found = AdaptSettings.from_config(config(SOURCE_CLASSES=word, SOURCE_CLASSES_STUFF="coco"))
    assert found.initialise == {"thing"}
    assert set(found.source) == {"stuff"}


def test_a_class_called_none_is_a_list() -> None:
    found = AdaptSettings.from_config(config(SOURCE_CLASSES=["none"]))
    assert found.source["thing"].names == ("none",)
    assert not found.initialise


def test_an_unregistered_training_set_is_an_error_except_where_a_model_is_only_built(animals: str) -> None:
    cfg = config(train=("d2ha_animal",))
    with pytest.raises(DatasetError, match=r"dataset 'd2ha_animal'.*Nearest: 'd2ha_animals'"):
        AdaptSettings.from_config(cfg, required=True)
    assert AdaptSettings.from_config(cfg).target == {}


def test_training_sets_that_disagree_are_an_error_even_then(animals: str) -> None:
    """A model that is built for one of two lists would be wrong for the other."""
    DatasetCatalog.register("d2ha_others", list)
    MetadataCatalog.get("d2ha_others").set(thing_classes=["dog", "cat"])
    with pytest.raises(DatasetError, match="the same names in another order"):
        AdaptSettings.from_config(config(train=(animals, "d2ha_others")))


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"MATCH": "names"}, ConfigError, "MODEL.HEAD_ADAPT.MATCH: expected 'name' or 'position' or .*, found 'names'"),
        ({"TARGET_CLASSES": 80}, ClassTableError, "MODEL.HEAD_ADAPT.TARGET_CLASSES: .*found 80 .int.*quotes"),
        ({"TARGET_CLASSES": ["cat", "cat"]}, ClassTableError, "TARGET_CLASSES: .*'cat' twice"),
        ({"SOURCE_CLASSES": []}, ClassTableError, "SOURCE_CLASSES: expected at least one class name, found none"),
        ({"SOURCE_CLASSES": "cocoo"}, ClassTableError, "MODEL.HEAD_ADAPT.SOURCE_CLASSES: .*Vocabularies: coco"),
        ({"TARGET_CLASSES_STUFF": "voc"}, ClassTableError, "vocabulary 'voc': expected a table for the space 'stuff'"),
    ],
)
def test_a_key_that_cannot_be_used_names_itself(keys: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdaptSettings.from_config(config(**keys))


def test_a_config_without_our_keys_has_the_defaults() -> None:
    cfg = get_cfg()
    cfg.freeze()
    assert AdaptSettings.from_config(cfg) == AdaptSettings()
    assert "HEAD_ADAPT" not in cfg.MODEL
    assert cfg.is_frozen()
    assert with_keys(cfg).is_frozen()


def test_adding_the_keys_twice_keeps_what_is_set() -> None:
    cfg = config(MATCH="position")
    add_headadapt_config(cfg)
    assert cfg.MODEL.HEAD_ADAPT.MATCH == "position"


def test_the_defaults_change_nothing() -> None:
    """No key of ours has a default that turns something on, and detectron2's keys keep their values."""
    cfg, stock = get_cfg(), get_cfg()
    add_headadapt_config(cfg)
    assert AdaptSettings.from_config(cfg) == AdaptSettings()
    del cfg.MODEL["HEAD_ADAPT"], cfg.MODEL["TASKS"], cfg.MODEL["CLASSIFIER"], cfg.MODEL["CONV_NET"]
    del cfg.DATASETS["REGISTER"]
    assert cfg == stock


@pytest.mark.parametrize("architecture", [*NUM_CLASSES_KEYS, "SomebodysOwn"])
def test_num_classes_is_written_under_every_key_that_the_architecture_reads(architecture: str) -> None:
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    target = {"thing": vocabulary("voc"), "stuff": vocabulary("cityscapes", "stuff")}
    before = cfg.clone()
    lines = apply_num_classes(cfg, target)
    keys = NUM_CLASSES_KEYS.get(architecture, NUM_CLASSES_KEYS["PanopticFPN"])
    # detectron2's own config has no POINT_HEAD and no FCOS, and no keypoint table was given.
    there = set(all_keys(cfg))
    written = [(space, key) for space, key in keys if key.yaml in there and space in target]
    for space, key in written:
        assert key.of(cfg) == len(target[space]), key
    assert len(lines) == len(written)
    changed = {key.split(" was ")[0] for key in lines}
    assert changed == {key.yaml for _, key in written}
    if architecture not in ("RetinaNet", "FCOS"):
        assert before.MODEL.RETINANET == cfg.MODEL.RETINANET


def test_a_line_says_what_a_class_count_was_and_is(animals: str) -> None:
    cfg = config(train=(animals,))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    target = AdaptSettings.from_config(cfg).target
    assert apply_num_classes(cfg, target) == ["MODEL.ROI_HEADS.NUM_CLASSES was 80, is 2, the classes of d2ha_animals"]
    assert apply_num_classes(cfg, target) == []


def test_settings_are_found_on_the_model_first_and_inside_it_else() -> None:
    inner, outer = AdaptSettings(match="position"), AdaptSettings(trust_file=True)
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))
    assert settings_of(model) is None
    attach_settings(model[1][0], inner)
    assert settings_of(model) is inner
    attach_settings(model, outer)
    assert settings_of(model) is outer


def test_somebodys_attribute_of_that_name_is_not_taken() -> None:
    model = nn.Identity()
    setattr(model, ATTRIBUTE, {"match": "position"})
    assert settings_of(model) is None
