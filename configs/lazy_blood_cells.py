"""configs/blood_cells.yaml as a LazyConfig: COCO's 80 classes -> three kinds of blood cells, none of them in COCO.

It needs the real material beside the project (see D2HA_REAL in the README), and its model:

    tools/lazyconfig_train_net.py --config-file configs/lazy_blood_cells.py --import ../shared/real/models/fbnet_c4.py
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from fbnet_c4 import FBNetBoxHead, FBNetC4, FBNetRPNHead

model = model_zoo.get_config("common/models/mask_rcnn_c4.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train
_faster_rcnn = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

head_adapt = dict(
    source_classes="coco",  # the file does not say it itself
    register=[
        dict(name="bccd_train", json="../../shared/real/bccd/train.json", images="../../shared/real/bccd/train"),
        dict(name="bccd_test", json="../../shared/real/bccd/test.json", images="../../shared/real/bccd/test"),
    ],
)

model.backbone = L(FBNetC4)(freeze=True)
model.proposal_generator.head = L(FBNetRPNHead)(in_channels=112, num_anchors=15)
model.proposal_generator.anchor_generator.sizes = [[32, 64, 96, 128, 160]]
model.proposal_generator.pre_nms_topk = (2000, 1000)
model.proposal_generator.post_nms_topk = (300, 100)
model.roi_heads = _faster_rcnn.roi_heads
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_in_features = ["res4"]
model.roi_heads.box_pooler.update(output_size=6, scales=[1.0 / 16])
model.roi_heads.box_head = L(FBNetBoxHead)(cfg=None, input_shape=L(ShapeSpec)(channels=112, height=6, width=6))
model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels=160)

for which in ("train", "test"):
    dataloader[which].num_workers = 0
    dataloader[which].mapper.augmentations[0].update(short_edge_length=320, max_size=640)
dataloader.train.mapper.use_instance_mask = False
dataloader.train.total_batch_size = 4
dataloader.train.dataset.names = "bccd_train"
dataloader.test.dataset.names = "bccd_test"

train.init_checkpoint = "../shared/real/models/fbnet_c4_coco.pth"
train.output_dir = "output/lazy_blood_cells"
train.max_iter = 300
train.eval_period = 100
train.device = "cpu"
optimizer.lr = 0.0005  # without gradient clipping; at 0.005 this model diverges
