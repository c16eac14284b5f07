"""Pictures with the labels of tasks: the text exactly, and that it stands where it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from helpers.streams import random_streams

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.data.task_spec import TaskSpec
from d2_headadapt.evaluation.drawing import box_labels, draw_tasks, image_lines, task_line

COLOUR = TaskSpec("colour", "box", ClassTable(["red", "green"]))
MARKS = TaskSpec("marks", "box", ClassTable(["dot", "line", "cross"]), kind="multi")
SCENE = TaskSpec("scene", "image", ClassTable(["street", "beach"]))
TAGS = TaskSpec("tags", "image", ClassTable(["wet", "old"]), kind="multi")
SPECS = (COLOUR, SCENE, MARKS, TAGS)
IMAGE_OUTPUT = {
    "pred_scene": 1,
    "scores_scene": torch.tensor([0.07, 0.93]),
    "pred_tags": [],
    "scores_tags": torch.tensor([0.1, 0.2]),
}


def two_detections(**more: Any) -> Instances:
    found = Instances((200, 300), **more)
    found.pred_boxes = Boxes(torch.tensor([[30.0, 40.0, 150.0, 160.0], [200.0, 100.0, 290.0, 190.0]]))
    found.scores = torch.tensor([0.97, 0.3])
    found.pred_classes = torch.tensor([1, 0])
    return found


def with_tasks() -> Instances:
    return two_detections(
        pred_colour=torch.tensor([0, 1]),
        scores_colour=torch.tensor([[0.93, 0.07], [0.4, 0.6]]),
        pred_marks=torch.tensor([[True, False, True], [False, False, False]]),
        scores_marks=torch.tensor([[0.6, 0.1, 0.875], [0.1, 0.1, 0.1]]),
    )


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("spec", "predicted", "scores", "expected"),
    [
        (COLOUR, 0, [0.93, 0.07], "colour: red 93%"),
        (COLOUR, 1, torch.tensor([0.004, 0.996]), "colour: green 100%"),
        (MARKS, [0, 2], [0.61, 0.2, 0.8], "marks: cross 80%, dot 61%"),
        (MARKS, [], [0.1, 0.2, 0.3], "marks: none"),
    ],
)
def test_what_one_task_says(spec: TaskSpec, predicted: Any, scores: Any, expected: str) -> None:
    assert task_line(spec, predicted, scores) == expected


def test_a_box_has_its_class_and_a_line_for_each_of_its_tasks() -> None:
    assert box_labels(with_tasks(), ["gnu", "lorry"], SPECS) == [
        "lorry 97%\ncolour: red 93%\nmarks: cross 88%, dot 60%",
        "gnu 30%\ncolour: green 60%\nmarks: none",
    ]


def test_without_names_classes_are_numbers_and_without_fields_there_are_no_tasks() -> None:
    assert box_labels(two_detections(), None, SPECS) == ["1 97%", "0 30%"]
    assert box_labels(two_detections()[:0], None, SPECS) == []


def test_an_image_has_a_line_for_each_of_its_tasks_that_the_output_holds() -> None:
    assert image_lines(IMAGE_OUTPUT, SPECS) == ["scene: beach 93%", "tags: none"]
    assert image_lines({"instances": with_tasks()}, SPECS) == []


# ------------------------------------------------------------------------------------------------------------- pixels


@pytest.fixture
def image() -> np.ndarray:
    return np.full((200, 300, 3), 255, dtype=np.uint8)


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(thing_classes=["gnu", "lorry"])


def changed(image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
    """Where (H, W) the drawing differs from the image."""
    before = image.copy()
    drawn = draw_tasks(image, *args, **kwargs).get_image()
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert np.array_equal(image, before), "the image itself is left as it was"
    return np.abs(drawn.astype(int) - image).max(axis=2) > 40


def test_labels_of_the_image_stand_in_its_corner(image: np.ndarray, metadata: Metadata) -> None:
    assert not changed(image, {}, metadata, SPECS).any()
    where = changed(image, IMAGE_OUTPUT, metadata, SPECS)
    assert where[3:12, 3:60].mean() > 0.9, "text on its dark ground"
    assert not where[60:].any() and not where[:, 200:].any()
    one_line = changed(image, IMAGE_OUTPUT, metadata, [SCENE])
    assert one_line.sum() < where.sum() and one_line.any()


def test_labels_of_a_box_stand_at_the_box(image: np.ndarray, metadata: Metadata) -> None:
    plain = changed(image, {"instances": with_tasks()}, metadata, [])
    where = changed(image, {"instances": with_tasks()}, metadata, SPECS)
    rows, columns = (where & ~plain).nonzero()
    assert len(rows) > 200, "two more lines of text"
    assert rows.min() >= 38 and rows.max() < 100 and columns.min() >= 28 and columns.max() < 240


def test_boxes_below_the_least_score_are_not_drawn(image: np.ndarray, metadata: Metadata) -> None:
    output = {"instances": with_tasks()}
    assert not changed(image, output, metadata, SPECS)[95:, 195:].any()
    assert changed(image, output, metadata, SPECS, least_score=0.2)[95:, 195:].any()
    assert not changed(image, output, metadata, SPECS, least_score=0.99).any()


def test_the_same_input_gives_the_same_picture(image: np.ndarray, metadata: Metadata) -> None:
    """The visualizer alone would draw its colours from numpy's random state."""
    output = {"instances": with_tasks(), **IMAGE_OUTPUT}
    state = random_streams()
    one, other = (draw_tasks(image, output, metadata, SPECS).get_image() for _ in range(2))
    assert np.array_equal(one, other)
    assert random_streams() == state


def test_colours_are_those_of_the_dataset(image: np.ndarray) -> None:
    own = Metadata(thing_classes=["gnu", "lorry"], thing_colors=[(0, 0, 0), (0, 0, 250)])
    drawn = draw_tasks(image, {"instances": two_detections()}, own, []).get_image().astype(int)
    edge = drawn[100, 28:33]
    assert (edge[:, 2] - edge[:, 0]).max() > 60, "blue"


def test_masks_are_drawn_too_and_no_metadata_is_needed(image: np.ndarray) -> None:
    masks = torch.zeros(2, 200, 300, dtype=torch.bool)
    masks[0, 80:150, 40:140] = True
    where = changed(image, {"instances": two_detections(pred_masks=masks)}, None, SPECS)
    assert where[110:140, 60:120].all()


def test_a_scaled_drawing(image: np.ndarray, metadata: Metadata) -> None:
    assert draw_tasks(image, IMAGE_OUTPUT, metadata, SPECS, scale=2.0).get_image().shape == (400, 600, 3)
