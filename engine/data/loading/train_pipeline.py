"""The DALI pipeline of training: decode and crop in one step, resize, augment, normalise.

It draws no random number itself: every window, operation and sign comes with the batch (augment.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from nvidia.dali.pipeline import DataNode, Pipeline

from bsnas.engine.data.checking.image_check import output_type
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.augment import Augmentation
from bsnas.engine.data.loading.decode import (
    JPEG,
    Batch,
    build,
    encoded,
    evaluation_transform,
    fn,
    prefetch_depth,
    types,
)


def train_pipeline(
    augmentation: Augmentation,
    source: Callable[[], Batch],
    files: FileList,
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
    dtype: torch.dtype,
    exact_size: bool,
) -> Pipeline:
    """`source()` gives encoded images or their paths, labels, and then what `augmentation` draws for them.

    Outputs are images [N, H, W, channels] and labels [N]. Images are normalised, fp16 for `dtype` fp16 (and bf16 on
    a GPU, which DALI lacks), else fp32. `exact_size` says that every image has the training resolution already.
    """
    config = augmentation.config
    gpu = device.type == "cuda"
    half = dtype == torch.float16 or (gpu and dtype == torch.bfloat16)
    names = augmentation.inputs(on_gpu=gpu)

    def graph() -> tuple[DataNode, ...]:
        given, label, *drawn = fn.external_source(source, num_outputs=2 + len(names), batch=True)
        inputs = dict(zip(names, drawn))  # noqa: B905 - DALI's conversion of this code knows no `strict`
        content = encoded(given, files)
        image = _decoded(content, inputs, config, gpu=gpu, exact_size=exact_size)
        if config.augment == "pad-crop":
            image = fn.slice(image, **_window(inputs), out_of_bounds_policy="pad", fill_values=0)
        if augmentation.policy is not None:
            image = augmentation.policy.apply(image, inputs["operation"], inputs["bin"], inputs["sign"])
        mean, std = config.scale
        leaves_as = types.FLOAT16 if half else types.FLOAT
        image = fn.crop_mirror_normalize(
            image,
            mirror=inputs["mirror"],
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            dtype=types.FLOAT if config.erase else leaves_as,
            output_layout="HWC",
        )
        if config.erase:  # the GPU's Erase has no fp16
            image = fn.erase(
                image, anchor=inputs["erase_start"], shape=inputs["erase_shape"], axis_names="HW", fill_value=0
            )
            if half:
                image = fn.cast(image, dtype=leaves_as)
        return image, label.gpu() if gpu else label

    return build(
        graph,
        batch_size,
        threads=threads,
        prefetch=prefetch_depth(config, device),
        device=device,
        conditionals=augmentation.policy is not None or "on_cpu" in names,
    )


def _decoded(
    content: DataNode, inputs: dict[str, DataNode], config: DataConfig, *, gpu: bool, exact_size: bool
) -> DataNode:
    if "on_cpu" not in inputs:
        return _decoded_by("mixed" if gpu else "cpu", content, inputs, config, exact_size)
    on_cpu = inputs["on_cpu"]
    if on_cpu:
        image = _decoded_by("cpu", content, inputs, config, exact_size).gpu()
    else:
        image = _decoded_by("mixed", content, inputs, config, exact_size)
    return image


def _decoded_by(
    decoder: str, content: DataNode, inputs: dict[str, DataNode], config: DataConfig, exact_size: bool
) -> DataNode:
    """The image at the training resolution, uint8; for pad-crop before it is shifted."""
    kind = output_type(config.channels)
    if config.augment == "resized-crop":
        image = fn.decoders.image_slice(content, **_window(inputs), device=decoder, output_type=kind, **JPEG)
        size = (config.resolution, config.resolution)
        if "matrix" in inputs:  # plain bilinear by OpenCV: 0.2 ms an image of 224x224, fn.resize takes 0.4
            return fn.experimental.warp_perspective(image, matrix=inputs["matrix"], size=size, border_mode="replicate")
        return fn.resize(image, size=size, antialias=config.antialias)
    if exact_size:
        return fn.decoders.image(content, device=decoder, output_type=kind, **JPEG)
    return evaluation_transform(content, config, decoder)


def _window(inputs: dict[str, DataNode]) -> dict[str, Any]:
    return {"start": inputs["start"], "shape": inputs["shape"], "axis_names": "HW"}
