"""Forward, backward and step of any network here: DeepSpeed's engine, SGD, and the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bsnas.engine.checkpoints.tensor_file import check_tensor, take
from bsnas.engine.config import OptimizerConfig, Precision
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.training.finite import Finiteness, RunningStatistics

Network = TypeVar("Network", bound=nn.Module)


def learning_rate(config: OptimizerConfig, peak: float, epoch: float, total_epochs: int, power: float = 1.0) -> float:
    """Linear warmup to `peak`, then one cosine cycle to zero over all epochs (paper, section 4.1), raised to `power`.

    `epoch` may be fractional: the position in training before the step that is made.
    """
    warmup = config.warmup_epochs
    factor = 1.0 if epoch >= warmup else epoch / warmup
    decay = 0.5 * (1 + math.cos(math.pi * min(epoch / total_epochs, 1.0)))
    return peak * factor * (decay if power == 1 else decay**power)


def deepspeed_config(
    batch_size: int, process: Process, precision: Precision, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, with the user's JSON (engine/host/deepspeed_settings.py) merged over it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": process.per_rank(batch_size),
        "gradient_accumulation_steps": 1,
        # The trainer decides after which backward pass the weights move: after a path or after a round.
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        # It would wait for the device in every forward pass and step; `Meter` measures speed.
        "timers": {"throughput": {"enabled": False}},
    }
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return _merged(config, overrides)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if nested else value
    return result


class PathSGD(torch.optim.SGD):
    """SGD whose step moves the parameters that `use` was given, by torch's fused kernel, and looks at no other.

    SGD's own step, and what DeepSpeed does around it, walk through all parameters several times in Python: a step of
    the imagenet preset's 2,412 took twice as long on the host, with several processes two and a half times.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        super().__init__(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.found_inf: Tensor | None = None
        """[1] on the device: where it is not 0, a step writes nothing."""
        self._known: dict[int, tuple[Tensor, tuple[int, ...] | None]] = {}
        """Momentum of a parameter, and strides unless it is a vector, by its id: a tensor's own hash is Python code."""
        self._used: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._momenta: list[Tensor] = []

    def settle(self) -> None:
        """Make momenta of zero where there are none, in the parameters' layout: after either of them has changed."""
        for parameter in self.param_groups[0]["params"]:
            momentum = self.state[parameter].get("momentum_buffer")
            if momentum is None:
                momentum = torch.zeros_like(parameter)
            elif momentum.stride() != parameter.stride():
                momentum = torch.empty_like(parameter).copy_(momentum)
            self.state[parameter]["momentum_buffer"] = momentum
            self._known[id(parameter)] = momentum, None if parameter.dim() == 1 else parameter.stride()

    def use(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Take what the next step moves, those of `parameters` that have a gradient. Returns the gradients.

        They get their parameters' strides, which the fused kernel compares: they differ in dimensions of one element.
        """
        self._used, self._gradients, self._momenta = [], [], []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            momentum, stride = self._known[id(parameter)]
            if stride is not None and gradient.stride() != stride:
                parameter.grad = gradient = torch.empty_like(parameter).copy_(gradient)
            self._used.append(parameter)
            self._gradients.append(gradient)
            self._momenta.append(momentum)
        return self._gradients

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        torch._fused_sgd_(
            self._used, self._gradients, self._momenta if group["momentum"] else [],
            weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"], dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False, found_inf=self.found_inf,
        )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that `use` took."""
        for parameter in self._used:
            parameter.grad = None
        self._used, self._gradients, self._momenta = [], [], []


class Optimization:
    """A network wrapped by DeepSpeed together with its optimizer.

    Only the parameters that a step names are reduced over ranks and moved. The others have no gradient, so weight
    decay and momentum leave them alone, bit for bit.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimizerConfig,
        process: Process,
        precision: Precision,
        overrides: Mapping[str, Any],
    ) -> None:
        import deepspeed

        self.world_size = process.world_size
        self.optimizer = PathSGD(network.parameters(), config)
        self.engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=self.optimizer,
            config=deepspeed_config(config.batch_size, process, precision, overrides),
        )
        # DeepSpeed would reduce all parameters, with zeros for those without a gradient.
        self.engine.enable_backward_allreduce = False
        # After initialize: DeepSpeed broadcasts weights as bytes, which channels_last ones refuse.
        self.engine.module.to(memory_format=torch.channels_last)
        self.engine.torch_autocast_z0_gradscaler = None  # it would wait for the device in every step
        self.engine.zero_grad = self.optimizer.zero_grad  # its own walks through the modules after each step
        self.optimizer.settle()
        self.finiteness = Finiteness(process.device, scaled=precision == "fp16")
        self.statistics = RunningStatistics(network)

    def forward(self, *inputs: Any) -> Tensor:
        self.statistics.keep()
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to the parameters'."""
        self.engine.backward(self.finiteness.scaled_loss(loss))

    def step(self, parameters: Iterable[nn.Parameter], lr: float, notes: Tensor | None = None) -> Tensor:
        """Average the gradients of `parameters` over ranks, move them, and clear their gradients.

        `notes`, float32, are averaged over ranks with them. Returns [1] on the device: 1 when a loss or gradient of
        any rank was not finite, and nothing has changed then but that gradients are cleared.
        """
        gradients = self.optimizer.use(parameters)
        self.finiteness.spread(gradients)
        bad = self._average_and_check(gradients, notes) if self.world_size > 1 else self.finiteness.check(gradients)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.found_inf = bad
        self.engine.step()
        self.statistics.settle(bad)
        return bad

    def _average_and_check(self, gradients: list[Tensor], notes: Tensor | None) -> Tensor:
        """Replace gradients and notes by their means over ranks, in one message. Returns what `Finiteness.check` does.

        DeepSpeed would launch a copy for each gradient. As vectors, in the order of memory, all are copied by a few.
        """
        vectors = [g if g.dim() == 1 else g.as_strided((g.numel(),), (1,)) for g in gradients]
        flat = torch.cat(vectors if notes is None else [*vectors, notes])
        self.engine.buffered_allreduce_fallback(grads=[flat])
        sizes = [vector.numel() for vector in vectors]
        means = flat[: sum(sizes)]
        if notes is not None:
            notes.copy_(flat[len(means) :])
        bad = self.finiteness.check([means])
        torch._foreach_copy_(vectors, means.split(sizes))
        return bad

    def close(self) -> None:
        """Let go of the network and of all that belongs to its training; this object is of no use afterwards.

        Hooks on the network, and functions inside the engine, refer to the engine: without this all of it, weights and
        captured operations included, would take memory until Python looks for cycles, which may be epochs away.
        """
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        self.engine.destroy()
        vars(self.engine).clear()
        vars(self).clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the network."""
        return {"optimizer": self.optimizer.state_dict(), "finiteness": self.finiteness.state()}

    def load_state(self, content: Mapping[str, Any], name: str, file: Path) -> None:
        """Go on from what `state` gave, `content[name]`. Raises `UserError` when it does not fit the network."""
        state = take(content, name, dict, file)
        optimizer = take(state, "optimizer", dict, file)
        own, given = self.optimizer.state_dict()["param_groups"], take(optimizer, "param_groups", list, file)
        # The rate is set in every step, and other versions of torch have other settings besides.
        settings = [[{k: g.get(k) for k in ("params", "momentum", "weight_decay")} for g in gs] for gs in (own, given)]
        if settings[0] != settings[1]:
            raise UserError(f"the optimizer in {file} has other parameters or settings; use the run's own files")
        parameters = self.optimizer.param_groups[0]["params"]
        for index, values in take(optimizer, "state", dict, file).items():
            if index not in range(len(parameters)) or values.keys() != {"momentum_buffer"}:
                raise UserError(f"the optimizer in {file} knows a parameter {index!r:.20}; use the run's own files")
            check_tensor(values["momentum_buffer"], like=parameters[index], name=f"momentum {index}", file=file)
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.settle()
        finiteness = take(state, "finiteness", dict, file)
        for part, tensor in self.finiteness.state().items():
            check_tensor(finiteness.get(part), like=tensor, name=part, file=file)
        if not finiteness["scale"].isfinite() or finiteness["scale"] <= 0:
            raise UserError(f"the loss scale in {file} is {finiteness['scale']}; it must be above 0")
        self.finiteness.load(finiteness)
