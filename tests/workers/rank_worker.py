"""One job of several processes that loads a checkpoint; run by test_ranks.py through ``launch`` or ``torchrun``.

Usage: rank_worker.py HOW PROCESSES FOLDER
HOW is launch, torchrun, or forked: as launch, but importing once.
Each rank writes FOLDER/<scenario> <rank>.txt: a digest of its model, or the error it met.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from helpers.ranks import launch_forked
from torch import nn

from d2_headadapt import ClassTable, HeadAdaptCheckpointer, register_head_layout
from d2_headadapt.checkpoint import checkpointer as checkpoint_room
from d2_headadapt.checkpoint.ranks import digest
from d2_headadapt.config.settings import AdaptSettings
from d2_headadapt.engine.train import default_argument_parser, launch
from d2_headadapt.errors import HeadAdaptError

register_head_layout("cls.*", group="head", extra=1)
OLD, NEW = ClassTable(["cat", "dog", "cow"]), ClassTable(["cow", "owl", "cat", "emu"])


class Net(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.added = nn.Linear(4, 1)
        self.cls = nn.Linear(4, k + 1)


def write_file(path: str, seed: int) -> None:
    torch.manual_seed(seed)
    state = {name: value for name, value in Net(3).state_dict().items() if not name.startswith("added")}
    torch.save({"model": state}, path)


SCENARIOS = ["same file", "only on rank 0", "different files", "broken on rank 1", "nowhere", "mutation"]


def run_all(args) -> None:
    folder = args.opts[0]
    for scenario in SCENARIOS:
        run(scenario, folder)


def run(scenario: str, folder: str) -> None:
    rank = torch.distributed.get_rank()
    torch.manual_seed(100 + rank)
    model = Net(4)
    path = os.path.join(folder, "shared.pth")
    if scenario == "different files":
        path = os.path.join(folder, f"rank{min(rank, 1)}.pth")
    if scenario == "only on rank 0" and rank:
        path = os.path.join(folder, "not there", "shared.pth")
    if scenario == "broken on rank 1":
        path = os.path.join(folder, "broken.pth" if rank == 1 else "shared.pth")
    if scenario == "nowhere":
        path = os.path.join(folder, "nowhere.pth")
    if scenario == "mutation":
        checkpoint_room.share_new_rows = lambda *args: None
    before = [digest(value) for value in model.state_dict().values()]
    settings = AdaptSettings(target={"thing": NEW}, source={"thing": OLD})
    try:
        HeadAdaptCheckpointer(model, settings=settings).load(path)
        after = [digest(value) for value in model.state_dict().values()]
        text = "loaded " + " ".join(after) if after != before else "loaded nothing"
    except HeadAdaptError as exc:
        unchanged = [digest(value) for value in model.state_dict().values()] == before
        text = f"{type(exc).__name__} {exc} model {'unchanged' if unchanged else 'CHANGED'}"
    with open(os.path.join(folder, f"{scenario} {rank}.txt"), "w") as file:
        file.write(text)


if __name__ == "__main__":
    how, processes, folder = sys.argv[1:]
    if how == "forked":
        launch_forked(run_all, int(processes), folder)
    else:
        launch(run_all, default_argument_parser().parse_args(["--num-gpus", processes, "--dist-url", "auto", folder]))
