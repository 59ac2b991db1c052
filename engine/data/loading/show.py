"""The picture of augmented training images that `--show` writes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.data.picture_sheet import image_grid

ROWS, COLUMNS = 8, 8


def augmented(files: FileList, config: DataConfig, seed: int) -> npt.NDArray[np.uint8]:
    """[ROWS * COLUMNS, H, W, C]: each row an image as evaluation sees it, then as training does in one epoch each."""
    chosen = files.subset(np.linspace(0, len(files) - 1, min(ROWS, len(files))).round().astype(int))
    loader = TrainLoader(chosen, replace(config, cpu_decode_share=0.0), batch_size=len(chosen), seed=seed)
    columns = [np.asarray(evaluation_set(chosen, config).images)]
    for epoch in range(COLUMNS - 1):
        ((images, _),) = loader.epoch(epoch)
        back = np.argsort(loader.order_of(epoch))
        columns.append(_pixels(images[torch.from_numpy(back)], config))
    return np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])


def write_augmented(files: FileList, config: DataConfig, seed: int, target: Path) -> None:
    """Write the picture. Only the first three channels of images with more are shown."""
    image_grid(augmented(files, replace(config, threads=config.threads or 1), seed), COLUMNS, target)


def _pixels(images: torch.Tensor, config: DataConfig) -> npt.NDArray[np.uint8]:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in config.scale)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).numpy()
