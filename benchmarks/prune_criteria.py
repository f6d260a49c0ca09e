"""Criteria of pruning: how well they rank channels, and what ranking costs.

python -m benchmarks.prune_criteria
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from benchmarks import data
from benchmarks.choices import in_memory
from benchmarks.rows import Row, main
from deploykit.core.data import DataSet
from deploykit.pruning.criteria import CRITERIA as FUNCTIONS
from deploykit.pruning.criteria import importance
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.groups import find_groups

COMMAND = "python -m benchmarks.prune_criteria"
JUDGED = 256
"""Images that the oracle sees for every channel."""
FEW, MANY = 32, 256


def ranks() -> list[Row]:
    """Molchanov et al. 2017, table 1: Spearman's correlation with the true change of the cost, channel by channel."""
    net = data.resnet20()
    images = in_memory(data.cifar("train", JUDGED))
    sample = {"x": torch.from_numpy(next(images.batches(1)).inputs["x"])}
    groups, evidence = find_groups(net, sample), Evidence(sample, images)
    truth = [scores.numpy() for scores in importance(net, groups, "oracle", evidence)]
    values = {}
    for criterion in (name for name in FUNCTIONS if name != "oracle"):
        found = [scores.numpy() for scores in importance(net, groups, criterion, evidence)]
        whole = spearmanr(np.concatenate(found), np.concatenate(truth)).statistic
        within = [spearmanr(own, true).statistic for own, true in zip(found, truth, strict=True)]
        values |= {f"{criterion}: all layers": float(whole), f"{criterion}: within a layer": float(np.mean(within))}
        print(criterion, whole, np.mean(within), flush=True)
    best = max(v for k, v in values.items() if k.endswith("all layers") and not k.startswith("fisher"))
    about = (
        f"ResNet-20, {sum(len(g.channels) for g in groups)} channels, {JUDGED} JPEG CIFAR-10 training images, labels"
    )
    return [
        Row("ResNet-20: rank correlation with the oracle, the default criterion (fisher) above the best other one",
            values["fisher: all layers"] - best, 0.0, "higher", about, f"{COMMAND} ranks", [0], values)
    ]  # fmt: skip


# ------------------------------------------------------------------ what ranking costs


def counted(net: nn.Module, count: int) -> dict[str, float]:
    """Seconds of ranking a network by magnitude and by Taylor, and how the latter reads data: a process of its own."""
    read: list[int] = []

    def image(i: int) -> dict[str, NDArray[np.float32]]:
        read.append(i)
        return {"x": np.random.default_rng(i).standard_normal((3, 64, 64), np.float32)}

    sample = {"x": torch.zeros(1, 3, 64, 64)}
    groups = find_groups(net, sample)
    evidence = Evidence(sample, DataSet(image, tuple(range(count))), batch=16)
    start = time.process_time()
    importance(net, groups, "l2", evidence)
    magnitude = time.process_time() - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start = time.process_time()
    importance(net, groups, "taylor", evidence)
    return {
        "l2: CPU seconds": magnitude, "taylor: CPU seconds": time.process_time() - start,
        "taylor: passes over the data": len(read) / count, "taylor: MB": peak(),
    }  # fmt: skip


def peak() -> float:
    """MB that this process has held at most."""
    (found,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found) / 1024


def ranking() -> list[Row]:
    """ResNet-18, groups found."""
    code = (
        "import json, sys; from benchmarks.nets import resnet18; from benchmarks.prune_criteria import counted; "
        "print(json.dumps(counted(resnet18(), int(sys.argv[1]))))"
    )
    found = {}
    for count in (FEW, MANY):
        done = subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True, text=True, check=True)
        found[count] = json.loads(done.stdout.splitlines()[-1])
        print(count, found[count], flush=True)
    values = {f"{count} images, {what}": v for count, own in found.items() for what, v in own.items()}
    about = f"ResNet-18 with random weights, {FEW} and {MANY} images of 64 x 64"
    command = f"{COMMAND} ranking"
    return [
        Row("ResNet-18: ranking by magnitude (CPU seconds)", found[MANY]["l2: CPU seconds"], 1.0, "lower", about,
            command, [0], values),
        Row("ResNet-18: ranking by taylor, passes over the data", found[MANY]["taylor: passes over the data"], 1.0,
            "lower", about, command, [0], values),
        Row(f"ResNet-18: ranking by taylor, peak memory of the process with {MANY} images / with {FEW}",
            found[MANY]["taylor: MB"] / found[FEW]["taylor: MB"], 1.1, "lower", about, command, [0], values),
    ]  # fmt: skip


if __name__ == "__main__":
    main(__doc__, "prune", [ranks, ranking])
