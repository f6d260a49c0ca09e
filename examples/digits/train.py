"""Trains the network with plain PyTorch and writes ``digits.safetensors`` and two sets of samples."""

from __future__ import annotations

import data
import torch
from model import build
from safetensors.torch import save_file

EPOCHS, BATCH = 6, 64


def main() -> None:
    """A few seconds on one core."""
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a) for a in data.training())
    net = build()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            loss = torch.nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        test, answers = (torch.from_numpy(a) for a in data.test())
        print(f"test accuracy {100 * (net(test).argmax(1) == answers).float().mean():.2f} %")
    save_file(net.state_dict(), "digits.safetensors")


if __name__ == "__main__":
    main()
