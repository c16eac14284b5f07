"""detectron2's Mask R-CNN, trained on COCO, on your own classes: a LazyConfig made of the model zoo's own pieces.

    tools/lazyconfig_train_net.py --config-file configs/lazy_mask_rcnn_R_50_FPN.py

Class counts follow your json, also in heads that only interpolate them; nothing here counts classes.
"""

from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train

# The keys of MODEL.HEAD_ADAPT in lower case, register and tasks: see docs/lazy.md. Paths are relative to this file.
head_adapt = dict(
    register=[
        dict(name="my_train", json="../data/train.json", images="../data/train"),
        dict(name="my_val", json="../data/val.json", images="../data/val"),
    ],
)

dataloader.train.dataset.names = "my_train"
dataloader.test.dataset.names = "my_val"
dataloader.train.total_batch_size = 8

model.backbone.bottom_up.freeze_at = 2
# The address tells the classes of the file: COCO's. For a file of your own, head_adapt.source_classes does.
train.init_checkpoint = "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"
train.max_iter = 3000
train.eval_period = 500
train.output_dir = "output/lazy_mask_rcnn"
optimizer.lr = 0.01
