"""Files of before: weights under their old names, and momenta numbered in the old order."""

import re

import pytest
import torch

from bsnas.engine.checkpoints.old_names import old_name, with_present_names, with_present_order
from bsnas.engine.checkpoints.tensor_file import load_weights
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.networks.supernet import Supernet
from tests.engine.tiny import ARCH, TINY

OLD_SUPERNET = {
    "separable_depthwise", "separable_project", "tail_weight", "stem_conv.weight", "stem_bn.weight",
    "separable_bns.0.weight", "separable_bns.1.running_var", "blocks.0.norms.k3t2c8.0.weight",
    "blocks.4.weights.all.expand", "tail_bns.c32.bias", "classifier.weight",
}  # fmt: skip
OLD_SUBNET = {
    "stem.0.weight", "stem.1.running_mean", "separable.depthwise.0.weight", "separable.project.1.bias",
    "blocks.1.expand.0.weight", "tail.0.weight", "tail.1.weight", "classifier.bias",
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "old"), [(Supernet(TINY), OLD_SUPERNET), (Subnet(TINY, ARCH), OLD_SUBNET)], ids=["supernet", "subnet"]
)
def test_weights_of_before_fill_a_network(network, old, tmp_path):
    torch.manual_seed(1)
    values = {name: torch.rand_like(t) if t.is_floating_point() else t + 7 for name, t in network.state_dict().items()}
    before = {old_name(name): tensor for name, tensor in values.items()}
    assert len(before) == len(values)
    assert old <= before.keys()
    load_weights(network, before, tmp_path / "old.pt")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    with pytest.raises(UserError, match=r"holds no weights of this network \(blocks"):
        load_weights(network, {k: v for k, v in before.items() if not k.startswith("blocks")}, tmp_path / "old.pt")


def test_names_of_now_stay():
    names = list(Supernet(TINY).state_dict())
    weights = dict.fromkeys(names, 1)
    assert with_present_names(weights, names) is weights
    assert with_present_names(None, names) is None
    assert all(re.fullmatch(r"[\w.]+", name) for name in names)


def test_momenta_follow_their_parameters():
    """Before, parameters of the supernet itself came first in its order."""
    names = [name for name, _ in Supernet(TINY).named_parameters()]
    old = [old_name(name) for name in names]
    first = ["separable_depthwise", "separable_project", "tail_weight"]
    order = [*first, *(name for name in old if name not in first)]
    content = {
        "supernet": dict.fromkeys(order, 0),
        "optimization": {"optimizer": {"state": {n: name for n, name in enumerate(order) if n % 3}}, "other": 1},
    }
    moved = with_present_order(content, "supernet", names)
    state = moved["optimization"]["optimizer"]["state"]
    assert len(state) == len(content["optimization"]["optimizer"]["state"])
    assert all(old[number] == name for number, name in state.items())
    assert moved["optimization"]["other"] == 1
    present = {**content, "supernet": dict.fromkeys(names, 0)}
    assert with_present_order(present, "supernet", names) is present
    assert with_present_order({"supernet": 3}, "supernet", names) == {"supernet": 3}
