"""One job of several processes that fits a tiny model; run by test_fit.py.

Usage: fit_worker.py PROCESSES FOLDER
Each rank writes FOLDER/<rank>.pt, its state after the fit.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from detectron2.utils import comm
from helpers.fit import SETTINGS, scene, scenes, tiny_model

from d2_headadapt.engine.train import default_argument_parser, launch
from d2_headadapt.fit import fit_new_rows


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder = args.opts[0]
    model = tiny_model("standard")
    fit_new_rows(model, scenes(13), scene, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    torch.save(model.state_dict(), os.path.join(folder, f"{comm.get_rank()}.pt"))


if __name__ == "__main__":
    # --num-gpus is how detectron2 calls the number of processes.
    launch(work, default_argument_parser().parse_args(["--num-gpus", sys.argv[1], "--dist-url", "auto", sys.argv[2]]))
