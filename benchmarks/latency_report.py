"""What benchmarks/latency.py tells beside times: MACs of any network, memory, a CSV and a plot."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from engine.atomic import write_atomically


@torch.inference_mode()
def count_macs(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one image [1, C, H, W]."""
    total = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, Tensor)
        total += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    network(image)
    for hook in hooks:
        hook.remove()
    return total


def memory_mib(backend: str) -> float:
    """Memory in use where a backend puts its networks: of the GPU as a whole, or of this process."""
    if torch.cuda.is_available() and not backend.endswith("cpu"):
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV with every column that any of them has; the file appears whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


def plot_latency(rows: Sequence[dict[str, Any]], file: Path) -> Path | None:
    """MACs against median latency, a panel per batch size. None where matplotlib is missing or nothing ran."""
    ran = [row for row in rows if "p50_ms" in row]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not ran:
        return None
    batches = sorted({row["batch"] for row in ran})
    figure = Figure(figsize=(4.5 * len(batches), 4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for way in sorted({(row["backend"], row["precision"]) for row in ran}):
            points = [r for r in ran if r["batch"] == batch and (r["backend"], r["precision"]) == way]
            axes.scatter([r["p50_ms"] for r in points], [r["macs"] / 1e6 for r in points], label=" ".join(way), s=18)
        for row in (r for r in ran if r["batch"] == batch):
            axes.annotate(row["network"], (row["p50_ms"], row["macs"] / 1e6), fontsize=6, alpha=0.7)
        axes.set(xlabel="median latency in ms", ylabel="M MACs", title=f"batch {batch}", xscale="log")
        axes.legend(fontsize=6)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(file, content.getvalue())
    return file
