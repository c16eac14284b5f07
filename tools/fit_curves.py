#!/usr/bin/env python3
"""AP against iterations and against seconds: fitted new rows beside stock detectron2.

Both arms train from the same file with the same config, seed, data order, schedule and budget. Stock is
detectron2's ``DefaultTrainer`` with its ``DetectionCheckpointer``; ours is ``d2_headadapt.Trainer``. An arm is
a process of its own, its command printed. Seconds are those of training and of the fit; evaluation does not count.

    tools/fit_curves.py --config-file configs/demo.yaml --seeds 1 2 3 --iterations 400 --output output/curves

writes ``curves.json``, ``curves.md`` and ``curves.png``. Arms that have their result already are not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS = ("stock", "ours")
STOCK_HEADS = {
    "HeadAdaptROIHeads": "StandardROIHeads",
    "HeadAdaptCascadeROIHeads": "CascadeROIHeads",
    "HeadAdaptRes5ROIHeads": "Res5ROIHeads",
}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--config-file", required=True)
    out.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE_OR_FILE.py")
    out.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    out.add_argument("--iterations", type=int, default=400)
    out.add_argument("--warmup", type=int, default=100, help="iterations until the full learning rate; for both arms")
    out.add_argument("--marks", type=int, nargs="+", default=[0, 25, 50, 100, 150, 200, 300, 400])
    out.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    out.add_argument("--output", type=Path, default=Path("output/fit_curves"))
    out.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    out.add_argument("--worker", choices=ARMS, help="run one arm with the first seed, in this process")
    out.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config, after --")
    return out


def main() -> int:
    args = parser().parse_args()
    args.opts = [word for word in args.opts if word != "--"]
    args.marks = sorted({mark for mark in args.marks if mark <= args.iterations} | {args.iterations})
    if args.worker:
        run_arm(args)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            command = worker_command(args, arm, seed)
            if result_file(args.output, arm, seed).exists():
                continue
            print(f"{arm}, seed {seed}: {shlex.join(command)}", flush=True)
            with open(args.output / f"{arm}_{seed}.log", "w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob("result_*.json"))]
    table = markdown(results)
    (args.output / "curves.json").write_text(json.dumps(results, indent=1))
    (args.output / "curves.md").write_text(table)
    draw(results, args.output / "curves.png")
    print(table)
    return 0


def result_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"result_{arm}_{seed}.json"


def worker_command(args: argparse.Namespace, arm: str, seed: int) -> list[str]:
    """The command of one arm. The config is the same for both; stock does not read this package's keys."""
    words = [sys.executable, str(Path(__file__)), "--worker", arm, "--config-file", args.config_file]
    for name in args.imports:
        words += ["--import", name]
    words += ["--seeds", str(seed), "--iterations", str(args.iterations), "--warmup", str(args.warmup)]
    words += ["--threads", str(args.threads), "--output", str(args.output), "--marks", *map(str, args.marks)]
    return [*words, "--", *args.opts]


def run_arm(args: argparse.Namespace) -> None:
    """Train one arm with one seed, and write AP and seconds at every mark."""
    import torch
    from detectron2.engine import DefaultTrainer, default_setup
    from detectron2.evaluation import COCOEvaluator
    from detectron2.utils.env import seed_all_rng

    from d2_headadapt import Trainer, load_config, resolve_config

    arm, seed = args.worker, args.seeds[0]
    torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, args.opts, args.imports)
    cfg.SEED = seed
    cfg.OUTPUT_DIR = str(args.output / f"{arm}_{seed}")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = args.iterations, args.warmup, ()
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SOLVER.CHECKPOINT_PERIOD = args.iterations
    if arm == "stock":
        cfg.MODEL.ROI_HEADS.NAME = STOCK_HEADS.get(cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME)
    resolve_config(cfg)
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    seed_all_rng(seed)

    class Stock(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: Any, name: str, folder: str | None = None) -> Any:
            return COCOEvaluator(name, output_dir=folder or cfg.OUTPUT_DIR, tasks=("bbox",))

        def test_quietly(self) -> dict[str, float]:
            return dict(self.test(self.cfg, self.model)["bbox"])

    class Ours(Trainer):
        build_evaluator = Stock.build_evaluator
        test_quietly = Stock.test_quietly

    trainer = (Stock if arm == "stock" else Ours)(cfg)
    trainer.resume_or_load(resume=False)
    points: list[dict[str, Any]] = []
    trainer.register_hooks([_marks(trainer, args.marks, points)])
    trainer.train()
    result_file(args.output, arm, seed).write_text(json.dumps({"arm": arm, "seed": seed, "points": points}))


def _marks(trainer: Any, marks: list[int], points: list[dict[str, Any]]) -> Any:
    from detectron2.engine import HookBase

    class Marks(HookBase):
        """Evaluates at marks with the clock stopped. Registered last, so the fit before training is on the clock."""

        def __init__(self) -> None:
            self.started = time.perf_counter()

        def before_train(self) -> None:
            self._at(0)

        def after_step(self) -> None:
            self._at(self.trainer.iter + 1)

        def _at(self, iteration: int) -> None:
            if iteration not in marks:
                return
            stopped = time.perf_counter()
            found = trainer.test_quietly()
            points.append(
                {"iteration": iteration, "seconds": stopped - self.started, "AP": found["AP"], "AP50": found["AP50"]}
            )
            print(f"MARK {points[-1]}", flush=True)
            self.started += time.perf_counter() - stopped

    return Marks()


def spread(values: list[float]) -> str:
    """Mean, and the range of the seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else f"{mean:.1f}"


def markdown(results: list[dict[str, Any]]) -> str:
    """A table of AP, AP50 and seconds at every mark: mean and range over seeds."""
    arms = [arm for arm in ARMS if any(result["arm"] == arm for result in results)]
    marks = sorted({point["iteration"] for result in results for point in result["points"]})
    head = [f"{arm} {what}" for arm in arms for what in ("AP", "AP50", "seconds")]
    lines = ["| iteration | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for mark in marks:
        cells: list[str] = []
        for arm in arms:
            points = [p for r in results if r["arm"] == arm for p in r["points"] if p["iteration"] == mark]
            cells += [spread([p["AP"] for p in points]), spread([p["AP50"] for p in points])] if points else ["", ""]
            cells.append(f"{statistics.fmean(p['seconds'] for p in points):.0f}" if points else "")
        lines.append(f"| {mark} | " + " | ".join(cells) + " |")
    seeds = sorted({result["seed"] for result in results})
    return "\n".join([*lines, "", f"Seeds {', '.join(map(str, seeds))}: mean and range. {reach(results)}", ""])


def reach(results: list[dict[str, Any]]) -> str:
    """When our arm has reached stock's last AP, as a share of the seconds that stock took."""
    by_arm = {arm: {r["seed"]: r["points"] for r in results if r["arm"] == arm} for arm in ARMS}
    shares: list[float] = []
    for seed, stock in by_arm["stock"].items():
        goal = stock[-1]
        reached = [p["seconds"] for p in by_arm["ours"].get(seed, []) if p["AP"] >= goal["AP"]]
        if reached:
            shares.append(min(reached) / goal["seconds"])
    if not shares:
        return "Stock's last AP was not reached."
    return f"Stock's last AP is reached in {spread([100 * share for share in shares])} % of stock's seconds."


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """AP against iterations and against seconds, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for arm, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
        runs = [result["points"] for result in results if result["arm"] == arm]
        if not runs:
            continue
        marks = [point["iteration"] for point in runs[0]]
        values = [[run[i]["AP"] for run in runs if len(run) > i] for i in range(len(marks))]
        seconds = [statistics.fmean(run[i]["seconds"] for run in runs if len(run) > i) for i in range(len(marks))]
        for axis, x in zip(axes, (marks, seconds), strict=True):
            axis.plot(x, [statistics.fmean(v) for v in values], marker="o", color=colour, label=arm)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
    for axis, label in zip(axes, ("iterations", "seconds of training, the fit included"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("AP")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
