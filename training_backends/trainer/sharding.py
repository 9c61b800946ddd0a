"""Divide a model among processes with torch's FSDP2 (`fully_shard`).

zero2 divides gradients and optimizer state; each process keeps all weights while a step runs.
zero3 also divides the weights, including frozen ones: a block's weights are gathered when it runs.
"""

from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from training_backends.trainer.checkpoint import trained_weights
from training_backends.trainer.world import World

__all__ = ["RootModule", "Sharding", "choose_sharding", "shard"]

R = TypeVar("R")
Sharding = Literal["none", "zero2", "zero3"]

_MOST: Final = 0.5
"""Fraction of a GPU's memory that weights, gradients and optimizer state may take with zero2. The
rest is for activations.
"""


class RootModule(torch.nn.Module):
    """Calls functions of a model inside its own forward, where sharded weights are complete.

    The losses use parts of a model, such as its last layer's weights, without calling its forward.

    Attributes:
        weights: The trained weights by name; of a sharded model, this process's shards of them.
    """

    def __init__(self, model: Any, sharding: Sharding = "none") -> None:
        super().__init__()
        self.model = model
        self.sharding: Sharding = sharding
        self.weights: dict[str, torch.nn.Parameter] = trained_weights(model)

    def forward(self, function: Callable[..., R], *arguments: Any) -> R:
        """Return `function(model, *arguments)`."""
        return function(self.model, *arguments)

    def start_pass(self, *, is_last: bool) -> None:
        """Prepare for a forward and backward pass of a step."""
        if self.sharding == "zero2" and isinstance(self, FSDPModule):
            # Gradients are summed, and the weights released, once a step.
            self.set_requires_gradient_sync(is_last)
            self.set_reshard_after_backward(is_last)
            self.set_is_last_backward(is_last)


def choose_sharding(
    requested: str, model: Any, world: World, device: torch.device, dtype: torch.dtype
) -> Sharding:
    """Return how to shard; `auto` is zero2 if it leaves enough of a GPU's memory free."""
    if world.size == 1:
        return "none"
    if requested != "auto":
        return "zero3" if requested == "zero3" else "zero2"
    if device.type != "cuda":
        return "zero2"
    memory = torch.cuda.get_device_properties(device).total_memory
    return "zero2" if _zero2_bytes(model, world.size, dtype) <= _MOST * memory else "zero3"


def _zero2_bytes(model: Any, size: int, dtype: torch.dtype) -> float:
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    frozen = sum(w.numel() * w.element_size() for w in weights if not w.requires_grad)
    # Complete weights and gradients in the compute dtype; float32 weights, gradients and the
    # optimizer's two moments divided among the processes.
    needed: float = frozen + trained * (2 * dtype.itemsize + 16 / size)
    return needed


class _Transfer:
    """Copies the weights of the leader's model to the other processes, a part at a time.

    Only the leader has to hold a complete model: the others keep their share of each part before
    they receive the next one.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world = world
        self._device = device
        self._modules: set[torch.nn.Module] = set()

    def receive(self, part: torch.nn.Module) -> None:
        """Give a part the leader's weights and buffers; collective."""
        modules = [each for each in part.modules() if each not in self._modules]
        self._modules.update(modules)
        slots: list[tuple[dict[str, Any], str]] = [
            (tensors, name)
            for module in modules
            for tensors in (module._parameters, module._buffers)  # noqa: SLF001  # as torch does
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        # Shared weights, such as those of tied embeddings, stay shared.
        own = {id(tensors[name]): tensors[name] for tensors, name in slots}
        facts = self._world.broadcast([(each.shape, each.dtype) for each in own.values()])
        received = {
            key: self._received(tensor, *fact)
            for (key, tensor), fact in zip(own.items(), facts, strict=True)
        }
        for tensors, name in slots:
            tensors[name] = received[id(tensors[name])]

    def _received(self, tensor: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
        if self._world.is_leader:
            self._world.broadcast_tensor(tensor.data.to(self._device).contiguous())
            return tensor
        data = torch.empty(shape, dtype=dtype, device=self._device)
        self._world.broadcast_tensor(data)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
        return data


def shard(
    model: Any,
    sharding: Sharding,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    *,
    transfers: bool = True,
) -> RootModule:
    """Return the root module of a model; shard the model in place unless `sharding` is none.

    Args:
        dtype: Compute dtype of the trained weights, which are kept in float32.
        transfers: The leader's weights replace those of the other processes, which may be empty.
    """
    root = RootModule(model, sharding)
    if sharding == "none":
        return root
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        "reshard_after_forward": sharding == "zero3",
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
    }
    transfer = _Transfer(world, device)
    for part in (*_blocks(model), root):
        if transfers:
            transfer.receive(part)
        fully_shard(part, **options, ignored_params=_replicated(part, sharding))
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Losses are sums over the step. Without the second setting gloo rejects the operation.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # its signature
    root.weights = trained_weights(model)
    return root


def _replicated(part: torch.nn.Module, sharding: Sharding) -> set[torch.nn.Parameter]:
    """Return the weights that every process keeps complete."""
    # FSDP2 cannot divide 4-bit weights, which are stored as integers.
    return {
        weight
        for weight in part.parameters()
        if not weight.requires_grad and (sharding == "zero2" or not weight.is_floating_point())
    }


def _blocks(model: Any) -> list[torch.nn.Module]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())  # noqa: SLF001  # as accelerate and device_map do
    return [module for module in base.modules() if type(module).__name__ in names]
