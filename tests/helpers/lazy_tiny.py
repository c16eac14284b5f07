"""A LazyConfig: the tiny Mask R-CNN of tests/helpers/models.py, tensor by tensor, made of detectron2's own pieces."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BottleneckBlock, ResNet

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train

_bottom_up = model.backbone.bottom_up
_bottom_up.stem.out_channels = 8
_bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=blocks,
        stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
        in_channels=8 if i == 0 else 8 * 2**i,
        bottleneck_channels=4 * 2**i,
        out_channels=16 * 2**i,
        stride_in_1x1=True,
        norm="FrozenBN",
    )
    for i, blocks in enumerate((3, 4, 6, 3))
]
_bottom_up.freeze_at = 2
model.backbone.out_channels = 8
model.proposal_generator.head.in_channels = 8
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [96], [128]]
model.proposal_generator.post_nms_topk = (24, 12)
_heads = model.roi_heads
_heads.batch_size_per_image = 16
_heads.box_head.update(input_shape=L(ShapeSpec)(channels=8, height=7, width=7), fc_dims=[24])
_heads.box_predictor.update(input_shape=L(ShapeSpec)(channels=24), test_score_thresh=0.0, test_topk_per_image=8)
_heads.mask_head.update(input_shape=L(ShapeSpec)(channels=8, width=14, height=14), conv_dims=[8, 8])

for which in ("train", "test"):
    dataloader[which].num_workers = 0
    dataloader[which].mapper.augmentations[0].update(short_edge_length=64, max_size=96)
dataloader.train.total_batch_size = 2
train.update(max_iter=2, device="cpu", eval_period=0, log_period=1)
train.seed = 1
optimizer.lr = 0.0005
