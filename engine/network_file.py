"""Released networks on disk: one file with the architecture, its space and the weights."""

import os
from pathlib import Path

import torch

from engine.errors import UserError
from engine.space import Arch, Space
from engine.subnet import Subnet

FORMAT = 1
"""Version of the file layout."""


def save_network(file: Path, network: Subnet) -> None:
    """Write a released network; the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    content = {
        "format": FORMAT,
        "space": network.space.to_json(),
        "arch": str(network.arch),
        "network": network.state_dict(),
    }
    torch.save(content, temporary)
    os.replace(temporary, file)


def load_network(file: Path) -> Subnet:
    """The network that `save_network` wrote, on the CPU, in evaluation mode. Raises `UserError` when it is none."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise UserError(f"network {file} cannot be read: {reason}; give a file that retraining wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} is no released network of format {FORMAT}; give a file that retraining wrote")
    network = Subnet(Space.from_json(content["space"]), Arch.parse(content["arch"]))
    network.load_state_dict(content["network"])
    return network.eval()
