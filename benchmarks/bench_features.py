"""Features of a pretrained network: against a plain torch loop, and out of the store.

`PretrainedFeatures(weights=None)` on 512 CIFAR-10 images, resized to 224 pixels, against the loop
one writes with torch alone: float32, images as torch lays them out, batches of 128. `store`
compares its second pass with `memory=` to its first. Random weights take as long as ImageNet's.

    python benchmarks/bench_features.py [--data-home DIR] [--only ROW,...] [--check]

takes 3 minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from _measure import (
    Result,
    exit_status,
    interleave,
    load_images,
    machine,
    parse_options,
    record,
    times_faster,
)
from torch.nn import functional as F

from skcifar import PretrainedFeatures

N_IMAGES = 512


def main() -> int:
    rows = ["resnet18", "resnet18-float32", "alexnet", "store"]
    options = parse_options(__doc__, rows, repeats=3)
    header = machine()
    images = load_images(options.data_home, "train", N_IMAGES)
    results: list[Result] = []
    for name in options.only:
        backbone, _, precision = name.partition("-")
        if name == "store":
            found = stored(images, options.repeats)
        else:
            found = extracted(name, backbone, precision or "auto", images, options.repeats)
        record([found], options.output / "features.csv", header)
        results.append(found)
    return exit_status(results, options.check)


def extracted(name: str, backbone: str, precision: str, images: Any, repeats: int) -> Result:
    ours = PretrainedFeatures(backbone, weights=None, precision=precision, random_state=0)
    ours.fit(images.X[:1])
    network = PretrainedFeatures(backbone, weights=None, precision="float32", random_state=0)
    network = network.fit(images.X[:1]).module_.network.to(memory_format=torch.contiguous_format)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    scale = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def plain_loop() -> np.ndarray:
        features = []
        with torch.no_grad():
            for start in range(0, len(images.X), 128):
                batch = torch.from_numpy(images.X[start : start + 128]).reshape(-1, 32, 32, 3)
                batch = batch.permute(0, 3, 1, 2).float() / 255
                batch = F.interpolate(batch, 224, mode="bilinear", antialias=True)
                features.append(network((batch - mean) / scale))
        return torch.cat(features).numpy()

    runs = interleave({"ours": lambda: ours.transform(images.X), "plain": plain_loop}, repeats)
    a, b = (runs[contestant][-1].outcome for contestant in ("ours", "plain"))
    difference = np.abs(a - b).max() / np.abs(b).max()
    return times_faster(
        name,
        runs["ours"],
        runs["plain"],
        at_least=1.0,
        n=len(images.X),
        data=images.name,
        note=f"{ours.dtype_}; differs by {difference:.1g} of the largest",
    )


def stored(images: Any, repeats: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        features = PretrainedFeatures(weights=None, memory=folder, random_state=0)
        features.fit(images.X[:1])
        first = interleave({"first pass": lambda: features.transform(images.X)}, 1, warm_up=False)[
            "first pass"
        ]
        again = interleave({"second pass": lambda: features.transform(images.X)}, repeats)
    about = {"n": len(images.X), "data": images.name}
    return times_faster("store", again["second pass"], first, at_least=10.0, **about)


if __name__ == "__main__":
    sys.exit(main())
