"""Spaces as TOML files: what is written is read, and what is wrong is told with its line."""

import pytest
from hypothesis import given, settings

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space_file import parse_space, read_space, space_text
from bsnas.engine.space.spaces import space_at, space_named, space_names
from bsnas.engine.space.table import TableError
from tests.engine.space.strategies import full_spaces

GOOD = """\
resolution = 8
classes = 10

[[cluster]]
channels = [16]
family = "conv"
stride = 2

[[cluster]]
channels = [8, 12]

[[cluster.row]]
family = "ir"
blocks = 2
kernels = [3, 5]
expansions = [3, 6]  # ratios

[[cluster.row]]
family = "basic"
stride = 2
widths = [16, 24]
activations = ["relu"]
"""


def error_of(text: str) -> str:
    with pytest.raises(UserError) as raised:
        parse_space(text, "my.toml")
    message = str(raised.value)
    assert "\n" not in message
    return message


@settings(max_examples=60, deadline=None)
@given(space=full_spaces())
def test_what_is_written_is_read(space):
    try:
        space.check_strides()
    except TableError:
        return  # such a file is refused
    assert parse_space(space_text(space), "written.toml") == space


@pytest.mark.parametrize("name", space_names())
def test_the_packages_spaces_are_as_they_would_be_written(name):
    space = space_named(name)
    assert parse_space(space_text(space), name) == space
    assert space_at(name) == space


def test_a_file_is_read_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text(GOOD)
    assert space_at("digits").resolution == 8
    with pytest.raises(UserError, match=r"space nowhere\.toml cannot be read: No such file or directory; give a TOML"):
        read_space("nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is no text"):
        read_space("binary.toml")


def test_other_ways_to_write_a_file(tmp_path):
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_space(tmp_path / "windows.toml") == parse_space(GOOD, "my.toml")
    inline = 'resolution = 8\ncluster = [{channels = [8], family = "ir", expansions = [3], kernels = [KERNEL]}]\n'
    assert parse_space(inline.replace("KERNEL", "3"), "inline").num_blocks == 1
    assert error_of(inline.replace("KERNEL", "4")).startswith("my.toml:2: kernels (4,)")


def test_rows_share_their_clusters_channels():
    space = parse_space(GOOD, "my.toml")
    assert [row.family for row in space.clusters[0].rows] == ["ir", "basic"]
    assert space.num_blocks == 3
    assert space.num_architectures == 2 * 4 * 4 * 2
    assert [space.block_stride(i) for i in range(3)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("resolution = 8", "resolution = ", 1, "this is not TOML: Invalid value in column"),
        ("resolution = 8", "resolution = 0", 1, "resolution of a space is 0; it must be a positive integer"),
        ("resolution = 8", "resolutoin = 8", 1, "key resolutoin is unknown; allowed are resolution, .*mean reso"),
        ("classes = 10", "classes = true", 2, "classes of a space is True"),
        ("classes = 10", 'springs = "loose"', 2, "springs 'loose' of a space; allowed are fixed and sliced"),
        ("channels = [8, 12]", "channels = [8, 8]", 10, r"channels \(8, 8\) of a cluster: give one or more different"),
        ("channels = [8, 12]", "channels = 8", 10, "channels 8 of a cluster: give one or more"),
        ("channels = [8, 12]", "# none", 9, "a cluster has no channels; give channels"),
        ('family = "ir"', 'family = "mbconv"', 13, "family 'mbconv' is unknown; allowed are ir, conv, separable"),
        ('family = "ir"', "family = [1]", 13, r"family \(1,\) is unknown"),
        ("blocks = 2", "blocks = 0", 14, "a cluster has 0 blocks; at least 1 is needed"),
        ("blocks = 2", "blocks = 5000", 14, "a space has at most 1000 blocks"),
        ("kernels = [3, 5]", "kernels = [3, 4]", 15, r"kernels \(3, 4\) of a cluster: kernel sizes must be odd"),
        ("kernels = [3, 5]", "kernels = [3, 3]", 15, "give one or more different positive integers"),
        ("kernels = [3, 5]", "kernel = [3, 5]", 15, "key kernel is unknown; .* did you mean kernels"),
        ("kernels = [3, 5]", "identity = 1", 15, "identity is 1; allowed are true and false"),
        ("expansions = [3, 6]", "expansions = []", 16, "family ir needs expansions or widths; give one or more"),
        ("expansions = [3, 6]", "widths = [8]\nexpansions = [3]", 16, "a row has expansions or widths, not both"),
        ("expansions = [3, 6]", "expand = false\nexpansions = [3]", 17, "a row without expansion has no hidden width"),
        ("expansions = [3, 6]", 'operations = ["k4t3"]', 15, "a row has operations or kernels, not both"),
        ("stride = 2\nwidths", "stride = 3\nwidths", 20, "a cluster has stride 3; allowed are 1 and 2"),
        ("widths = [16, 24]", "widths = [0]", 21, r"widths \(0,\) of a cluster: give one or more different"),
        ("widths = [16, 24]", "widths = [16]\npool = true", 22, "pool belongs to conv, not to family basic"),
        ('activations = ["relu"]', 'activations = ["swish"]', 22, "give one or more different of relu6, relu"),
        ("resolution = 8", "resolution = 2", 20, "stride of a block that reads 1x1 pixels: 2 pixels are used up"),
        ('family = "conv"', "", 4, "family ir needs expansions or widths"),
        ("channels = [8, 12]", "channels = [8, 12]\nstride = 1", 11, "stride stands beside rows"),
        ("[[cluster.row]]\nfamily = \"ir\"", "[cluster.row]\nfamily = \"ir\"", 18, "this is not TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(old, new, line, message):
    assert old in GOOD
    told = error_of(GOOD.replace(old, new, 1))
    assert told.startswith(f"my.toml:{line}: "), told
    with pytest.raises(UserError, match=message):
        raise UserError(told)


@pytest.mark.parametrize(
    "text", ["", "cluster = 3", "cluster = []", "[cluster]\nchannels = [3]", "cluster = [3]", "[[cluster]]\nrow = 4"]
)
def test_other_toml_is_no_space(text):
    assert error_of(text).startswith("my.toml:")


@pytest.mark.parametrize("text", ["k3", "k4t3", "k3t3c8", "k03t3", "i3", "", "k3w8t3", "k3t3x"])
def test_operations_that_are_none(text):
    told = error_of(GOOD.replace("kernels = [3, 5]\nexpansions = [3, 6]", f'operations = ["{text}"]'))
    assert told.startswith("my.toml:15: operation ")
    assert "none of family ir; allowed are i, and kKERNEL with an odd kernel and tEXPANSION or wWIDTH behind it" in told
