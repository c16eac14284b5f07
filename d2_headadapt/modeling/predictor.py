"""The box predictor: stock detectron2's, which also knows its classes, its layouts and its own recipe for new rows.

R   number of regions
K   number of classes
C   number of input channels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from fvcore.common.registry import Registry
from torch import nn

from ..adapt.classes import ClassTable, did_you_mean
from ..adapt.detectron2_heads import fast_rcnn_layouts
from ..adapt.layouts import HeadLayout
from ..adapt.registry import ModuleContext
from ..config.registries import registered
from ..data.task_spec import TaskSpec
from ..errors import ClassTableError
from ..key import HEAD_ADAPT
from .task_boxes import Predictions, features_of, log_accuracies, task_labels
from .task_heads import TaskHeads

PREDICTOR_REGISTRY = Registry("PREDICTOR")
PREDICTOR_REGISTRY.__doc__ = """
Box predictors, called as ``predictor(cfg, input_shape, box2box_transform=..., class_table=...)``; where boxes have
tasks, also with ``tasks=`` their specs. The config key ``MODEL.HEAD_ADAPT.PREDICTOR`` names the one to use.
"""


@PREDICTOR_REGISTRY.register()
class HeadAdaptOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` with a class table, and with classification tasks on the same region features.

    Forward, losses and inference are the parent's; without tasks nothing is added to them.

    Attributes:
        class_table: the K classes of the rows; ``None`` where they are not known.
        cls_agnostic: one box regressor serves all classes.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        class_table: ClassTable | None = None,
        tasks: Sequence[TaskSpec] = (),
        cls_agnostic_bbox_reg: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of the region features, (C,) or (C, H, W).
            class_table: the K classes of the rows, where they are known.
            tasks: classified on every foreground region in training, and on every detection.
            cls_agnostic_bbox_reg: one box regressor for all classes.
            kwargs: the parent's.

        Raises:
            ClassTableError: a table whose length is not ``num_classes``.
        """
        super().__init__(input_shape, cls_agnostic_bbox_reg=cls_agnostic_bbox_reg, **kwargs)
        if class_table is not None and len(class_table) != self.num_classes:
            raise ClassTableError(
                "class_table",
                expected=f"{self.num_classes} classes, as num_classes says",
                found=f"{len(class_table)} of {class_table.origin}",
                fix="Pass the table that belongs to the model.",
            )
        self.class_table = class_table
        # A one-class regressor and a class-agnostic one have the same shape; only the constructor knows.
        self.cls_agnostic = cls_agnostic_bbox_reg
        # Last, so that a seeded generator gives everything before it the values it has without tasks.
        self.tasks = TaskHeads(self.cls_score.in_features, tasks) if tasks else None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the parent's arguments; class table and tasks are given by :func:`replace_predictor`."""
        ret: dict[str, Any] = super().from_config(cfg, input_shape)
        return ret

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict scores (R, K + 1) and box deltas (R, 4 K) of regions; with tasks a :class:`Predictions`.

        Args:
            x: region features, (R, C) or (R, C, H, W).
        """
        scores, deltas = super().forward(x)
        return (scores, deltas) if self.tasks is None else Predictions((scores, deltas), x.flatten(1))

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """Compute the parent's losses, and ``loss_task_<name>`` over the foreground regions whose label is known.

        Each is the mean over what is labelled, times the share of foreground among all regions: so an object weighs as
        much in the loss of a task as in those of class and box, which stock takes the mean of over all regions.

        Args:
            predictions: of :meth:`forward`.
            proposals: with ``gt_classes``, and ``gt_<task>`` where an image has labels of the task: (R_i,) int64, or
                (R_i, K) for several labels, as :meth:`TaskHead.loss` takes them.
        """
        losses: dict[str, torch.Tensor] = super().losses(predictions, proposals)
        if self.tasks is not None:
            features = features_of(predictions)
            foreground = [(p.gt_classes >= 0) & (p.gt_classes < self.num_classes) for p in proposals]
            # No foreground at all is no row, and still a graph: every rank reaches every parameter.
            chosen = features[torch.cat(foreground)]
            logits = self.tasks(chosen)
            labels = {head.spec.name: task_labels(head, proposals, foreground) for head in self.tasks}
            log_accuracies(logits, labels)
            # With the plain mean, two tasks outweighed the classes: the AP of configs/demo_tasks.yaml was 37, not 72.
            share = len(chosen) / max(len(features), 1)
            losses.update({name: loss * share for name, loss in self.tasks.losses(logits, labels).items()})
        return losses

    def inference(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """Detect like the parent, and add ``pred_<task>`` and ``scores_<task>`` of the region that each came from."""
        instances, kept = super().inference(predictions, proposals)
        if self.tasks is not None and proposals:
            regions: list[torch.Tensor] = []
            start = 0
            boxes, probs = self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals)
            for rows, box, prob in zip(kept, boxes, probs, strict=True):
                # Stock drops what is not finite before it counts, and counts in images of their own.
                finite = box.isfinite().all(dim=1) & prob.isfinite().all(dim=1)
                regions.append(start + finite.nonzero()[:, 0][rows])
                start += box.shape[0]
            self.classify(features_of(predictions)[torch.cat(regions)], instances)
        return instances, kept

    def classify(self, features: torch.Tensor, instances: Sequence[Instances]) -> None:
        """Set ``pred_<task>`` and ``scores_<task>`` of detections, in place.

        ``scores_<task>`` is (n, K). ``pred_<task>`` is the best class, (n,) int64; where several labels are possible,
        (n, K) bool: each whose score is 0.5 or more.

        Args:
            features: one row for each detection, those of the first image first.
            instances: one for each image.
        """
        if self.tasks is None:
            return
        for name, logits in self.tasks(features).items():
            head = self.tasks[name]
            scores = head.scores(logits)
            found = head.chosen(scores)
            start = 0
            for image in instances:
                # Not len(): tracing would write the number of detections of its one image into the graph.
                rows = slice(start, start + image.pred_boxes.tensor.shape[0])
                image.set(f"scores_{name}", scores[rows])
                image.set(f"pred_{name}", found[rows])
                start = rows.stop

    def head_layouts(self, context: ModuleContext) -> Iterable[HeadLayout]:
        """Describe ``cls_score``, ``bbox_pred`` and the federated-loss weights.

        Args:
            context: the name of this module in its model, and the modules around it.
        """
        return fast_rcnn_layouts(self, context)

    @torch.no_grad()
    def reinitialise_rows(self, classes: Sequence[int | str], generator: torch.Generator | None = None) -> None:
        """Give the rows of some classes the values that this constructor would have given them.

        ``cls_score`` rows are drawn from N(0, 0.01), class-specific ``bbox_pred`` rows from N(0, 0.001), biases are 0
        (``modeling/roi_heads/fast_rcnn.py``). Every other row, and an agnostic regressor, keeps its bits.

        Args:
            classes: indices, or names of the class table.
            generator: a CPU generator; the global one by default.

        Raises:
            ClassTableError: a name or an index that is not there.
        """
        indices = [self._class_index(entry) for entry in classes]
        recipes: list[tuple[nn.Linear, float, HeadLayout]] = []
        for layout in self.head_layouts(ModuleContext("", ())):
            name, _, leaf = layout.tensor.rpartition(".")
            if leaf == "weight" and layout.axes:
                recipes.append((getattr(self, name), {"cls_score": 0.01, "bbox_pred": 0.001}[name], layout))
        for layer, std, layout in recipes:
            rows = layout.rows(indices, self.num_classes)
            drawn = torch.empty(len(rows), layer.in_features).normal_(0.0, std, generator=generator)
            layer.weight[rows.to(layer.weight.device)] = drawn.to(layer.weight)
            layer.bias[rows.to(layer.bias.device)] = 0.0

    def _class_index(self, entry: int | str) -> int:
        table = self.class_table
        if isinstance(entry, str):
            found = table.find(entry) if table is not None else None
            if found is None:
                names = table.names if table is not None else ()
                raise ClassTableError(
                    "reinitialise_rows",
                    expected=f"a class of the {len(names)} that this head predicts",
                    found=repr(entry),
                    fix=f"Use one of its names.{did_you_mean(entry, names)}",
                )
            return found
        if not 0 <= entry < self.num_classes:
            raise ClassTableError(
                "reinitialise_rows",
                expected=f"an index from 0 to {self.num_classes - 1}",
                found=str(entry),
                fix="Background has no class index.",
            )
        return entry


def replace_predictor(
    name: str,
    cfg: CfgNode,
    stock: FastRCNNOutputLayers,
    input_shape: ShapeSpec,
    class_table: ClassTable | None,
    tasks: Sequence[TaskSpec] = (),
) -> nn.Module:
    """Build predictor ``name`` in place of the one that stock detectron2 just built.

    Stock hard-codes its predictor. Ours is built without moving the random stream and takes the values that stock's
    drew, so that every module built later, and every loss, is the one that stock would have had.

    Args:
        name: in :data:`PREDICTOR_REGISTRY`.
        cfg: what the predictor reads.
        stock: what detectron2 built.
        input_shape: of the region features.
        class_table: its classes, where they are known.
        tasks: passed on as ``tasks`` where there are any.

    Raises:
        ConfigError: no predictor of that name.
    """
    build = registered(PREDICTOR_REGISTRY, HEAD_ADAPT.PREDICTOR, name)
    # A registered predictor need not know of tasks as long as there are none.
    more = {"tasks": tasks} if tasks else {}
    with torch.random.fork_rng(devices=[]):
        ours: nn.Module = build(
            cfg, input_shape, box2box_transform=stock.box2box_transform, class_table=class_table, **more
        )
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    drawn = {key: value for key, value in stock.state_dict().items() if shapes.get(key) == value.shape}
    ours.load_state_dict(drawn, strict=False)
    return ours
