"""One job of two processes that trains a tiny detector with tasks on boxes; run by test_task_boxes.py.

Usage: box_task_worker.py FOLDER [mutation]
Rank 1 never sees a label of some tasks, then no object at all. Each rank writes FOLDER/<rank>.pt, its state afterwards.
With ``mutation`` a loss without labels has no graph.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers.box_tasks import labelled_batch, task_model
from helpers.models import batch
from helpers.ranks import launch_forked

from d2_headadapt.data.task_labels import MISSING
from d2_headadapt.modeling.task_heads import TaskHead


def step_batches(rank: int) -> list[list[dict]]:
    """Three steps: one task without a label on rank 1, no task labelled on rank 1, no object on any rank."""
    first = labelled_batch(images=2, missing=0.0, seed=5 + rank)
    second = labelled_batch(images=2, missing=0.0, seed=7 + rank)
    if rank == 1:
        for entry in first:
            entry["instances"].gt_colour[:] = MISSING
        second = batch(5, images=2, seed=9)
    return [first, second, batch(5, images=1), labelled_batch(images=2, seed=11 + rank)]


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder, *mutation = args.opts
    if mutation:
        whole = TaskHead.loss
        TaskHead.loss = lambda self, logits, labels: (
            whole(self, logits, labels) if (labels != MISSING).any() else logits.new_zeros(())
        )
    model = create_ddp_model(task_model("standard"), device_ids=None, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for inputs in step_batches(comm.get_rank()):
        with EventStorage():
            losses = model.train()(inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), os.path.join(folder, f"{comm.get_rank()}.pt"))


if __name__ == "__main__":
    launch_forked(work, 2, *sys.argv[1:])
