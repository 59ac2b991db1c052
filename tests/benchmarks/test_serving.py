"""benchmarks/serve_check.py on one-channel images that an index lists."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bsnas.benchmarks import serve_check
from bsnas.benchmarks.serve_check import ServeArguments, Server, image_files, images_of_run, serve
from bsnas.engine.host.errors import UserError
from tests.engine.data.source_cases import prepare_source


def prepared_run(place: Path) -> Path:
    """A run whose data are an index of black and white images of one channel."""
    for part in ("train", "val"):
        for name, gray in (("dark", 0), ("light", 255)):
            (place / "raw" / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((9, 11 + number), gray, np.uint8)
                Image.fromarray(pixels).save(place / "raw" / part / name / f"{number}.png")
    prepare_source(place / "raw", place / "prepared", channels=1, val_per_class=1)
    run = place / "run"
    run.mkdir()
    data = {"source": "folder", "path": str(place / "prepared"), "cache_dir": str(place)}
    (run / "config.json").write_text(json.dumps({"data": data}))
    return run


def brightness(file: Path, classes: tuple[str, str]) -> Path:
    """A network of one-channel images of 8x8 that answers by their mean."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Neg", ["mean"], ["negative"]),
        helper.make_node("Concat", ["negative", "mean"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(nodes, "brightness", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    facts = {"classes": json.dumps(classes), "input": "normalised", "mean": "[0.5]", "std": "[0.25]"}
    helper.set_model_props(model, facts)
    onnx.save(model, file)
    return file


def test_one_channel_images_of_an_index_are_served(tmp_path):
    files = image_files(images_of_run(prepared_run(tmp_path)))
    assert [file.parent.name for file in files] == ["dark"] * 3 + ["light"] * 3
    server = Server(brightness(tmp_path / "a.onnx", ("dark", "light")), batch=6, threads=1)
    assert server.answer(files) == [file.parent.name for file in files]


def test_images_in_shards_are_not_served(tmp_path, monkeypatch):
    run = prepared_run(tmp_path)
    packed = SimpleNamespace(part=lambda _: SimpleNamespace(offsets=np.zeros(1)))
    monkeypatch.setattr(serve_check, "read_index", lambda _: packed)
    with pytest.raises(UserError, match=r"test images of .* are packed in shards; give image files with --images"):
        images_of_run(run)


def test_images_that_do_not_decode_are_named_and_the_others_served(tmp_path, capsys):
    run = prepared_run(tmp_path)
    model = brightness(tmp_path / "a.onnx", ("dark", "light"))
    places = tmp_path / "raw" / "val"
    for place in ("dark/odd.jpg", "dark/._0.png", "@eaDir/dark/0.png", "dark/notes.txt"):
        (places / place).parent.mkdir(parents=True, exist_ok=True)
        (places / place).write_bytes(b"no image")
    figures = serve(ServeArguments(model=model, images=(places,), threads=1, batch=4))
    assert (figures["images"], figures["set_aside"], figures["top1"]) == (6, 1, 1.0)
    told = capsys.readouterr().out
    assert f"1 of 7 images are set aside, the first: image {places}/dark/odd.jpg cannot be decoded" in told
    assert "3 files in" in told
    assert "are no images and left out: 2 hidden or of the system, 1 named .txt" in told
    with pytest.raises(
        UserError, match=r"none of 1 images can be decoded, the first is .*odd.jpg; give other --images"
    ):
        serve(ServeArguments(model=model, images=(places / "dark" / "odd.jpg",), run=run))


def sides(file: Path) -> Path:
    """A network of colour images of 8x8 that answers which half is lighter: upper and lower, or left and right."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])
    weight = np.zeros((2, 3, 8, 8), np.float32)
    weight[0, :, :4], weight[0, :, 4:] = 1, -1
    weight[1, :, :, :4], weight[1, :, :, 4:] = 1, -1
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["maps"]),
        helper.make_node("Flatten", ["maps"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "sides", [images], [logits], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    facts = {"classes": '["upper", "left"]', "input": "normalised", "mean": "[0.5]", "std": "[0.25]"}
    helper.set_model_props(model, facts)
    onnx.save(model, file)
    return file


BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""How an upright image is stored under each orientation."""


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_served_upright(tmp_path, suffix):
    server = Server(sides(tmp_path / "a.onnx"), batch=8, threads=1)
    for name in ("upper", "left"):
        pixels = np.zeros((24, 32, 3), np.uint8)
        pixels[(slice(12), slice(None)) if name == "upper" else (slice(None), slice(16))] = 255
        files = []
        for orientation in range(1, 9):
            exif, image = Image.Exif(), Image.fromarray(pixels)
            exif[0x112] = orientation
            files.append(tmp_path / f"{name}{orientation}.{suffix}")
            (image.transpose(BACK[orientation]) if orientation in BACK else image).save(files[-1], exif=exif)
        assert server.answer(files) == [name] * 8
