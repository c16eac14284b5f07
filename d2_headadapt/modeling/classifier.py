"""A registered meta-architecture that classifies whole images: one backbone, and one head for each task.

N   number of images
C   channels of the backbone's map, of H x W cells
F   number of pooled or flattened features
K   number of classes of a task

Pooled features are what most users should take: their width does not depend on the size of an image. Flattened ones
are wide: the WikiArt network (3x3 convolutions 64-128-256, images of 224 x 224) has maps of 256 x 28 x 28, so 200,704
features, and three heads with a hidden layer of 512 have 308 million parameters; pooled, 0.5 million.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch import GeneralizedRCNN
from fvcore.common.registry import Registry
from torch import nn

from ..adapt.classes import did_you_mean
from ..config.registries import registered
from ..config.settings import AdaptSettings, attach_settings
from ..data.task_spec import TaskSpec, task_specs
from ..errors import ConfigError, DatasetError
from ..key import MODEL, TASKS
from .task_dry_run import dry_run, padded_size
from .task_heads import TaskHeads

MOST_IMAGES = 32
"""A dry run takes no larger batch, in case it must run on zeros."""


@META_ARCH_REGISTRY.register()
class MultiTaskClassifier(nn.Module):
    """Several classifiers of whole images on one backbone; images are prepared as ``GeneralizedRCNN`` does it.

    Every layer between images and logits must keep the batch. That is tried at build time, and looked at in every step:
    ``x.view(-1, 256 * 16 * 16)`` on maps of 32 x 256 x 28 x 28 gives 98 rows, and a loss that does not fit.

    An image that is smaller than its batch is padded, and only its own cells are pooled: its scores do not depend on
    the other images of the batch beyond the border of a convolution.

    Attributes:
        backbone, pooling, in_feature, input_format, input_size: as given.
        heads: one head for each task, by name.
        device: where the pixel mean is, and images go.

    Example:
        >>> import torch
        >>> from detectron2.config import CfgNode, get_cfg
        >>> from detectron2.modeling import build_model
        >>> from d2_headadapt import add_headadapt_config
        >>> cfg = get_cfg()
        >>> add_headadapt_config(cfg)
        >>> cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "MultiTaskClassifier"
        >>> cfg.MODEL.BACKBONE.NAME, cfg.MODEL.CONV_NET.CHANNELS = "build_conv_net_backbone", [4, 8]
        >>> cfg.MODEL.TASKS.genre = CfgNode({"on": "image", "classes": ["portrait", "landscape", "abstract"]})
        >>> model = build_model(cfg).eval()
        >>> with torch.no_grad():
        ...     [output] = model([{"image": torch.zeros(3, 64, 64)}])
        >>> output["scores_genre"].shape, int(output["pred_genre"]) in range(3)
        (torch.Size([3]), True)
    """

    device = GeneralizedRCNN.device
    preprocess_image = GeneralizedRCNN.preprocess_image
    _move_to_current_device = GeneralizedRCNN._move_to_current_device

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pooling: nn.Module,
        specs: Sequence[TaskSpec],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_feature: str = "",
        input_format: str | None = None,
        input_size: Sequence[int] = (224, 224),
        dry_batch: int = 2,
        settings: AdaptSettings | None = None,
    ) -> None:
        """
        Args:
            backbone: any of detectron2's.
            pooling: from a map (N, C, H, W) to features (N, F).
            specs: the tasks, at least one.
            pixel_mean, pixel_std, input_format: as in ``GeneralizedRCNN``.
            in_feature: the backbone's feature; empty for its last one.
            input_size: (height, width) of the images that the width F is inferred from.
            dry_batch: how many images the dry run takes.
            settings: left on the model for the checkpointer.

        Raises:
            ConfigError: no task, no such feature, or a layer that does not keep the batch.
        """
        super().__init__()
        features = backbone.output_shape()
        in_feature = in_feature or list(features)[-1]
        if in_feature not in features:
            raise ConfigError(
                MODEL.CLASSIFIER.IN_FEATURE,
                expected=f"a feature of {type(backbone).__name__}: {', '.join(features)}",
                found=repr(in_feature),
                fix=f"Correct the key, or add it to the backbone's OUT_FEATURES.{did_you_mean(in_feature, features)}",
            )
        if not specs:
            raise ConfigError(
                TASKS,
                expected="at least one task on images, which MultiTaskClassifier has heads for",
                found="none",
                fix=f"Write {TASKS.write({'colour': {'on': 'image', 'classes': ['red', 'green']}})}.",
            )
        self.backbone = backbone
        self.pooling = pooling
        self.in_feature = in_feature
        self.input_format = input_format
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self._expected: tuple[int, ...] = ()
        self._width = 0
        self._try_features(len(pixel_mean), max(2, dry_batch))
        self.heads = self.build_heads(self._width, specs)
        self._try_heads(max(2, dry_batch))
        if settings is not None:
            attach_settings(self, settings)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the arguments that ``MODEL.CLASSIFIER`` and ``MODEL.TASKS`` of ``cfg`` describe.

        Raises:
            ConfigError: no such pooling, a task on boxes, or what :func:`task_specs` refuses.
        """
        node = cfg.MODEL.CLASSIFIER
        # A task whose classes nobody tells would be a head that is silently not there.
        specs = task_specs(cfg, required=True)
        on_boxes = [spec.name for spec in specs if spec.on != "image"]
        if on_boxes:
            raise ConfigError(
                TASKS[on_boxes[0]].on,
                expected="image, because MultiTaskClassifier has no boxes",
                found="'box'",
                fix=f"Set it to image, or use {MODEL.META_ARCHITECTURE.set('GeneralizedRCNN')} with HeadAdaptROIHeads.",
            )
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        shape = shapes.get(node.IN_FEATURE) or list(shapes.values())[-1]
        return {
            "backbone": backbone,
            "pooling": build_pooling(cfg, shape),
            "specs": specs,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "in_feature": node.IN_FEATURE,
            "input_format": cfg.INPUT.FORMAT,
            "input_size": node.INPUT_SIZE,
            "dry_batch": min(cfg.SOLVER.IMS_PER_BATCH, MOST_IMAGES),
            "settings": AdaptSettings.from_config(cfg),
        }

    def build_heads(self, in_features: int, specs: Sequence[TaskSpec]) -> TaskHeads:
        """Build the heads; override it for heads of your own.

        Args:
            in_features: F of the features (N, F) that they take.
            specs: the tasks.
        """
        return TaskHeads(in_features, specs)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training, else the scores of each image.

        Args:
            batched_inputs: mapped images: ``image`` (3, H, W) and, for training, ``tasks``: a tensor for each task
                that the image has a label of (see :meth:`TaskHead.loss`), as ``TaskMapper`` leaves them.

        Returns:
            In training, ``{"loss_task_<name>": scalar}``. Otherwise a dict for each image: ``tasks`` with the scores
            (K,) by task, ``scores_<task>`` with the same tensor, and ``pred_<task>``: the class index, or for several
            labels a list of the indices whose score is at least 0.5.
        """
        images = self.preprocess_image(batched_inputs)
        logits = self.logits(images.tensor, images.image_sizes)
        if self.training:
            return self.heads.losses(logits, self._labels(batched_inputs, logits))
        return self._predictions(logits)

    def logits(
        self, images: torch.Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute logits (N, K) by task.

        Args:
            images: (N, 3, height, width), normalised.
            image_sizes: (height, width) of each before it was padded; none was by default.

        Raises:
            ConfigError: maps of another size than flattened features are made for.
        """
        # As shapes are, not as int(): tracing would write the size of its one image into the graph.
        padded = (images.shape[-2], images.shape[-1])
        sizes = [padded] * len(images) if image_sizes is None else image_sizes
        return self._kept(self.heads(self.image_features(self.backbone(images), padded, sizes)), len(images))

    def image_features(
        self, maps: Mapping[str, torch.Tensor], padded: tuple[int, int], image_sizes: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Pool the backbone's maps into what the heads see, (N, F).

        Args:
            maps: by name, (N, C, H, W).
            padded: (height, width) of the batch of images.
            image_sizes: (height, width) of each image.
        """
        own = maps[self.in_feature]
        height, width = own.shape[-2:]
        # Rounded up by whole numbers, which tracing can follow.
        cells = [(-(-h * height // padded[0]), -(-w * width // padded[1])) for h, w in image_sizes]
        if len(cells) == 1 or len(set(cells)) == 1:
            return self._pooled(own[:, :, : cells[0][0], : cells[0][1]])
        return torch.cat([self._pooled(own[i : i + 1, :, :h, :w]) for i, (h, w) in enumerate(cells)])

    def _pooled(self, maps: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.pooling(maps)
        if x.dim() == 2 and len(x) == len(maps) and x.shape[1] == self._width:
            return x
        if x.dim() == 2 and len(x) == len(maps):
            height, width = self.input_size
            made_for = f"maps (N, {', '.join(map(str, self._expected))}) of images of {height} x {width}"
            raise ConfigError(
                f"layer pooling ({type(self.pooling).__name__})",
                expected=f"{made_for}, {self._width} features",
                found=f"maps {tuple(maps.shape)}, {x.shape[1]} features",
                fix=f"Give images of {MODEL.CLASSIFIER.INPUT_SIZE.set([height, width])}, set that key to their "
                f"size and train anew, or set {MODEL.CLASSIFIER.POOLING.set('avg')}, which takes any size.",
            )
        raise self._batch_lost(maps, str(tuple(x.shape)))

    def _batch_lost(self, maps: torch.Tensor, found: str) -> ConfigError:
        return ConfigError(
            f"{MODEL.CLASSIFIER.POOLING}, layer pooling ({type(self.pooling).__name__})",
            expected=f"({len(maps)}, features), one row for each image, from maps {tuple(maps.shape)}",
            found=found,
            fix="Flatten with x.flatten(1), which keeps the batch, never with x.view(-1, width).",
        )

    def _kept(self, logits: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Return ``logits`` if they hold one row for each image and one column for each class, else raise."""
        for spec in self.heads.specs:
            shape, expected = tuple(logits[spec.name].shape), (count, len(spec.table))
            if shape != expected:
                raise ConfigError(
                    f"layer heads, task {spec.name} ({type(self.heads).__name__})",
                    expected=f"logits {expected}, one row for each image, from features {(count, self._width)}",
                    found=str(shape),
                    fix="Correct the head: flatten with x.flatten(1), which keeps the batch, never with x.view(-1, ..)",
                )
        return logits

    def _try_features(self, channels: int, count: int) -> None:
        """Find the width of the features, and what loses the batch on the way to it."""
        padded = padded_size(self.backbone, self.input_size)
        maps = dry_run(self.backbone, (2, channels, *padded))[self.in_feature]
        if maps.dim() != 4 or len(maps) != 2:
            raise ConfigError(
                f"{MODEL.CLASSIFIER.IN_FEATURE}, layer backbone ({type(self.backbone).__name__})",
                expected=f"a map (2, channels, height, width) from images {(2, channels, *padded)}",
                found=f"{self.in_feature} of {tuple(maps.shape)}",
                fix="Name a feature that is a map.",
            )
        height, width = (math.ceil(s * n / p) for s, n, p in zip(self.input_size, maps.shape[2:], padded, strict=True))
        self._expected = (int(maps.shape[1]), height, width)
        maps = torch.empty(count, *self._expected, device="meta")
        try:
            x = dry_run(self.pooling, maps.shape)
        except NotImplementedError:
            raise
        except RuntimeError as exc:
            raise self._batch_lost(maps, " ".join(str(exc).split())) from exc
        if x.dim() != 2 or len(x) != count:
            raise self._batch_lost(maps, str(tuple(x.shape)))
        self._width = int(x.shape[1])

    def _try_heads(self, count: int) -> None:
        try:
            logits = dry_run(self.heads, (count, self._width))
        except NotImplementedError:
            raise
        except RuntimeError as exc:
            raise ConfigError(
                f"layer heads ({type(self.heads).__name__})",
                expected=f"logits of {count} images from features {(count, self._width)}",
                found=" ".join(str(exc).split()),
                fix="Correct the head.",
            ) from exc
        self._kept(logits, count)

    def _labels(
        self, batched_inputs: Sequence[Mapping[str, Any]], logits: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Read labels (N,) or (N, K) by task."""
        found: dict[str, torch.Tensor] = {}
        for name in logits:
            labels = [image.get("tasks", {}).get(name) for image in batched_inputs]
            if not all(isinstance(label, torch.Tensor) for label in labels):
                wrong = next(label for label in labels if not isinstance(label, torch.Tensor))
                raise DatasetError(
                    f"training images, tasks[{name!r}]",
                    expected="a tensor, as TaskMapper leaves it",
                    found=repr(wrong),
                    fix="Build the loader with mapper=TaskMapper(cfg); d2_headadapt.Trainer does.",
                )
            found[name] = torch.stack(labels).to(self.device)
        return found

    def _predictions(self, logits: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        count = len(next(iter(logits.values())))
        found: list[dict[str, Any]] = [{"tasks": {}} for _ in range(count)]
        for head in self.heads:
            name = head.spec.name
            scores = head.scores(logits[name])
            chosen = head.chosen(scores).tolist()
            for i, out in enumerate(found):
                out["tasks"][name] = out[f"scores_{name}"] = scores[i]
                out[f"pred_{name}"] = [k for k, on in enumerate(chosen[i]) if on] if head.spec.multi else chosen[i]
        return found


POOLING_REGISTRY = Registry("POOLING")
POOLING_REGISTRY.__doc__ = """
Steps from a map (N, C, H, W) to features (N, F), called as ``step(cfg, shape)`` with the map's channels and stride,
returning a module. The config key ``MODEL.CLASSIFIER.POOLING`` names the one to use.
"""


class MeanPooling(nn.Module):
    """Mean pooling over all cells: (N, C, H, W) -> (N, C)."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean(dim=(2, 3))


@POOLING_REGISTRY.register()
def avg(cfg: CfgNode, shape: ShapeSpec) -> nn.Module:
    """Average the features, so that they do not depend on an image's size."""
    return MeanPooling()


@POOLING_REGISTRY.register()
def flatten(cfg: CfgNode, shape: ShapeSpec) -> nn.Module:
    """Flatten all cells side by side: images of ``MODEL.CLASSIFIER.INPUT_SIZE`` only."""
    return nn.Flatten(1)


def build_pooling(cfg: CfgNode, shape: ShapeSpec) -> nn.Module:
    """Build the step that ``MODEL.CLASSIFIER.POOLING`` names.

    Args:
        cfg: with that key.
        shape: channels and stride of the map.

    Raises:
        ConfigError: no step of that name.
    """
    name = cfg.MODEL.CLASSIFIER.POOLING
    step: nn.Module = registered(POOLING_REGISTRY, MODEL.CLASSIFIER.POOLING, name)(cfg, shape)
    return step
