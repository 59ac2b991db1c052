"""The option `--kernels` of the scripts that train or score networks."""

import torch

from bsnas.engine.host.errors import UserError
from bsnas.kernels import choose_backend, set_backend


def force_kernels(name: str | None, device: torch.device) -> None:
    """Force the kernels' backend in this process; None leaves BSNAS_KERNELS or the device's fastest.

    Raises `UserError` when it is unknown or cannot run on the device.
    """
    try:
        set_backend(name)
        choose_backend(torch.empty(1, device=device))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
