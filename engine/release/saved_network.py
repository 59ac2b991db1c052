"""Released networks on disk: one file with the architecture, its space and the weights."""

from pathlib import Path

from bsnas.engine.checkpoints.tensor_file import load_weights, read_tensors, write_tensors
from bsnas.engine.host.atomic import write_error
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.space import Space

FORMAT = 1
"""Version of the file layout."""


def save_network(file: Path, network: Subnet) -> None:
    """Write a released network; the file appears whole or not at all.

    Raises `UserError` for a place that cannot be written and `MachineError` when the disk is full or fails.
    """
    content = {
        "format": FORMAT,
        "space": network.space.to_json(),
        "arch": str(network.arch),
        "network": network.state_dict(),
    }
    try:
        write_tensors(file, content)
    except OSError as error:
        raise write_error(file, error) from None


def load_network(file: Path) -> Subnet:
    """The network that `save_network` wrote, on the CPU, in evaluation mode. Raises `UserError` when it is none."""
    try:
        content = read_tensors(file)
    except ValueError as error:
        raise UserError(f"network {file} cannot be read: {error}; give a file that retraining wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} is no released network of format {FORMAT}; give a file that retraining wrote")
    try:
        space, arch = Space.from_json(content.get("space")), Arch.parse(str(content.get("arch")))
        space.check(arch)
    except UserError as error:
        raise UserError(f"network {file}: {error}") from None
    if 4 * CostModel(space).macs_and_params(arch)[1] > file.stat().st_size:  # before its size in memory is taken
        raise UserError(f"network {file} is too small for the weights of {arch}; give a file that retraining wrote")
    network = Subnet(space, arch)
    load_weights(network, content.get("network"), file)
    return network.eval()
