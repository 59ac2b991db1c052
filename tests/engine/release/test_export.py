"""ONNX files of released networks, checked against torch."""

import json
import random

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.fold_batchnorm import fold_batchnorm
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.int8 import quantize_onnx
from bsnas.engine.release.onnx import (
    OnnxFormat,
    compare_logits,
    export_onnx,
    onnx_logits,
    torch_logits,
    typed_logits,
)
from bsnas.engine.release.saved_network import load_network, save_network
from bsnas.engine.space.sampling import uniform_arch
from tests.search.runs import small_space

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def network() -> Subnet:
    """A small released network with statistics that are not those of a new one."""
    space = small_space()
    torch.manual_seed(0)
    subnet = Subnet(space, uniform_arch(space, random.Random(3)))
    with torch.no_grad():
        subnet.classifier.weight.mul_(30)
        for _ in range(3):
            subnet(torch.randn(16, 3, 16, 16))
        for module in subnet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return subnet.eval()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    return ((torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "deep" / "network.onnx"
    metadata = {"classes": json.dumps(["zero", "one"]), "arch": str(network.arch)}
    export_onnx(network, path, OnnxFormat(resolution=16, mean=MEAN, std=STD), metadata)
    return path


@pytest.mark.parametrize("batch", [1, 2, 5, 13])
def test_the_file_answers_like_torch_for_any_batch(network, file, pixels, batch):
    images = normalised(pixels)
    logits = onnx_logits(file, images.numpy(), batch=batch)
    expected = torch_logits(network, images)
    assert expected.std() > 0.1, "logits worth comparing"
    parity = compare_logits(logits, expected)
    assert parity == (13, pytest.approx(0, abs=1e-5), 1.0)


def test_the_file_holds_plain_folded_operators_and_its_metadata(network, file):
    model = onnx.load(file)
    operators = {node.op_type for node in model.graph.node}
    assert operators <= {"Conv", "Clip", "Add", "ReduceMean", "Unsqueeze", "Flatten", "Reshape"}, operators
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["classes"]) == ["zero", "one"]
    assert properties["arch"] == str(network.arch)
    assert json.loads(properties["mean"]) == list(MEAN)
    assert properties["input"] == "normalised"
    assert b".py" not in file.read_bytes(), "source paths of this machine leaked into the file"


def test_raw_pixels_and_a_fixed_batch(network, pixels, tmp_path):
    file = tmp_path / "raw.onnx"
    export_onnx(network, file, OnnxFormat(resolution=16, mean=MEAN, std=STD, input="uint8", batch=4))
    assert [d.dim_value for d in onnx.load(file).graph.input[0].type.tensor_type.shape.dim] == [4, 16, 16, 3]
    parity = compare_logits(onnx_logits(file, pixels), torch_logits(network, normalised(pixels)))
    assert parity == (13, pytest.approx(0, abs=1e-4), 1.0)


def test_parity_counts_what_differs():
    reference = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    other = reference + np.array([[0.0, 0.5], [0.0, 0.0], [7.0, 0.0], [0.0, 0.0]])
    assert compare_logits(other, reference) == (4, 7.0, 0.75)


def test_folding_keeps_the_function_and_the_original(network, pixels):
    images = normalised(pixels)
    before = torch_logits(network, images)
    folded = fold_batchnorm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    np.testing.assert_allclose(torch_logits(folded, images), before, atol=1e-5)
    np.testing.assert_array_equal(torch_logits(network, images), before)


def test_networks_are_saved_and_loaded_whole(network, pixels, tmp_path):
    file = tmp_path / "retrain" / "network.pt"
    save_network(file, network)
    loaded = load_network(file)
    assert (loaded.arch, loaded.space) == (network.arch, network.space)
    images = normalised(pixels)
    np.testing.assert_array_equal(torch_logits(loaded, images), torch_logits(network, images))
    assert [path.name for path in file.parent.iterdir()] == ["network.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"nothing of the kind", "cannot be read"), (None, "cannot be read"), ("other", "is no released network")],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    file = tmp_path / "network.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save({"weights": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=rf"network.pt {message}.*give a file that retraining wrote"):
        load_network(file)


@pytest.mark.parametrize(("kind", "batch"), [("normalised", None), ("uint8", 4)])
def test_int8_is_in_the_file_and_answers_like_torch(network, pixels, tmp_path, kind, batch):
    file = tmp_path / "int8.onnx"
    images = pixels if kind == "uint8" else normalised(pixels).numpy()
    format = OnnxFormat(resolution=16, mean=MEAN, std=STD, input=kind, batch=batch)
    export_onnx(network, tmp_path / "fp32.onnx", format, {"classes": "[]"})
    quantize_onnx(tmp_path / "fp32.onnx", file, images)
    model = onnx.load(file)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    weights = [w for w in model.graph.initializer if len(w.dims) == 4]
    assert {w.data_type for w in weights} == {onnx.TensorProto.INT8}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert (properties["precision"], properties["input"], properties["classes"]) == ("int8", kind, "[]")
    logits, expected = onnx_logits(file, images), torch_logits(network, normalised(pixels))
    assert 0 < np.abs(logits - expected).max() < 0.3 * expected.std() + 0.3 * np.abs(expected).max()
    assert compare_logits(logits, expected).top1_agreement > 0.7


def test_int8_needs_images(file, tmp_path):
    with pytest.raises(UserError, match="INT8 needs images to calibrate on"):
        quantize_onnx(file, tmp_path / "x.onnx", np.empty((0, 3, 16, 16), np.float32))
    assert not (tmp_path / "x.onnx").exists()


def test_what_bfloat16_loses_is_told_by_torch(network, pixels):
    images = normalised(pixels)
    error = compare_logits(typed_logits(network, images, "bf16"), torch_logits(network, images)).max_abs_error
    assert 1e-4 < error < 0.1 * np.abs(torch_logits(network, images)).max()
