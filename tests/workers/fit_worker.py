"""Jobs of several processes that fit a tiny model, one after the other; run by test_fit.py.

Usage: fit_worker.py FOLDER PROCESSES [PROCESSES ...]
Each rank writes FOLDER/<processes>/<rank>.pt, its state after the fit.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from detectron2.utils import comm
from helpers.fit import SETTINGS, scene, scenes, tiny_model
from helpers.ranks import launch_forked

from d2_headadapt.fit import fit_new_rows


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder = args.opts[0]
    model = tiny_model("standard")
    fit_new_rows(model, scenes(13), scene, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    torch.save(model.state_dict(), os.path.join(folder, f"{comm.get_rank()}.pt"))


if __name__ == "__main__":
    for processes in sys.argv[2:]:
        made = os.path.join(sys.argv[1], processes)
        os.mkdir(made)
        launch_forked(work, int(processes), made)
