"""More than one device: what every process of a run holds, and what it sends.

`torchrun` starts one process a device and tells each its number, its *rank*. Two ways to share a
step among them:

1. DDP: every process holds the whole model and reads its own rows. After the backward pass the
   gradients are averaged (an all-reduce). The `Trainer` does this by itself under torchrun; with
   4-bit weights only the adapters have gradients, so little is sent.
2. FSDP (`shard`): every process holds a share of each parameter. A layer's weights are gathered
   from all shares before its forward and again before its backward pass, and dropped after each
   (an all-gather); of the gradients each process receives its share (a reduce-scatter).

Both are the libraries' own. What this module adds: the first process alone decides and writes
(`first`), a model is cut in the way that the Trainer knows (`shard`), and `Traffic` counts the
bytes that are handed to the network. The choice made in `shard`: adapters are cut, too, so that
gradients and Adam's moments are, and no process is special. The price: `shard` is given a model
that each process has already loaded as a whole, which 70B and small cards do not allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lab.errors import InputError, needs, whole

T = TypeVar("T")
ALONE = (
    "one process has nobody to share weights with: start two with "
    "`python -m torch.distributed.run --standalone --nproc_per_node 2 -m qlora_lab ...`"
)


def world_size() -> int:
    """Number of processes in this run, as torchrun says: 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def is_first() -> bool:
    """Whether this process is the one that speaks and writes: rank 0, or the only one."""
    return not _launched() or os.environ["RANK"] == "0"


def _launched() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


def start(device: str) -> None:
    """Join the other processes of the run; does nothing for a process that is alone.

    Args:
        device: "cpu" (they talk over gloo) or "cuda" (over NCCL, each on its own card).

    Raises:
        InputError: If there are more processes than CUDA devices on this machine.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"{torch.cuda.device_count()} CUDA devices cannot serve process {local + 1}: "
                "start as many processes as there are devices, or use --device cpu"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def stop() -> None:
    """Leave the other processes; does nothing for a process that is alone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first(task: Callable[[], T]) -> T:
    """Let the first process do something that must be done once, and tell all how it ended.

    Args:
        task: What to do; what it returns is pickled.

    Returns:
        What it returned, in every process.

    Raises:
        InputError: In every process, if the task raised one in the first.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return task()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = task()
        except InputError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Cut every parameter of a model among the processes, block by block (FSDP2).

    Call it after the adapters are attached and before the optimizer is made. Buffers and the
    scales of 4-bit weights are no parameters: each process keeps them whole.

    Args:
        model: A PEFT model on a transformers base; changed in place.

    Returns:
        The model. Its parameters are `DTensor`s; every process must take part in each forward.

    Raises:
        InputError: If this process is alone, or this is no model.

    Source:
        Zhao et al. 2023 (PyTorch FSDP); torch.distributed.fsdp.fully_shard.
    """
    from torch.distributed.fsdp import fully_shard

    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(ALONE)
    needs("model", model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)  # what is left: embeddings, head, last norm
    # The Trainer leaves a model alone that says it was cut already. accelerate's own FSDP does
    # nothing on CPUs and would wrap it in DDP instead.
    base._is_distributed_loading_by_transformers = True
    base._is_fsdp_managed_module = True
    return model


def gather_trained(model: torch.nn.Module) -> dict[str, Tensor] | None:
    """Gather the trained parameters of a model that was cut; every process has to ask.

    Args:
        model: Any model.

    Returns:
        Whole values by name, or None if nothing is cut.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(hasattr(p, "full_tensor") for p in trained.values()):
        return None
    return {name: p.full_tensor().detach() for name, p in trained.items()}


def held_bytes(model: torch.nn.Module, trained_copies: int = 3) -> dict[str, int]:
    """Count what this process holds for a run before its first batch.

    Args:
        model: With adapters; cut or whole. Of a cut one, what is gathered at the moment is
            dropped first.
        trained_copies: What is kept beside each trained number in the same size: its gradient and
            Adam's two moments.

    Returns:
        Bytes by slice, with the names of `plots.SLICES`.

    Raises:
        InputError: This is no model, or there is less than one copy.
    """
    needs("model", model)
    whole("trained_copies", trained_copies)
    from qlora_lab.loading import constant_bytes, four_bit_layers

    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    packed = {f"{name}.weight" for name in four_bit_layers(model)}
    held = dict.fromkeys(("weights", "embeddings", "adapters", "gradients", "optimizer"), 0)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.requires_grad:
            held["adapters"] += local.nbytes
        else:
            held["weights" if name in packed else "embeddings"] += local.nbytes
    held["gradients"] = held["adapters"]
    held["optimizer"] = (trained_copies - 1) * held["adapters"]
    return held | {"constants": constant_bytes(model)}


# What one process sends for a buffer of a given size, of N processes, by the usual rings: in an
# all-reduce every piece of 1/N travels twice around, in the other two once.
_SENT = {
    "allreduce_": ("all-reduce", 0, lambda size, n: 2 * (n - 1) * size // n),
    "_allgather_base_": ("all-gather", 1, lambda share, n: (n - 1) * share),
    "allgather_": ("all-gather", 1, lambda share, n: (n - 1) * share),
    "_reduce_scatter_base_": ("reduce-scatter", 1, lambda size, n: (n - 1) * size // n),
    "broadcast_": ("broadcast", 0, lambda size, n: size),
}


class Traffic(TorchDispatchMode):
    """Count the bytes that this process hands to the network while the context is open.

    `sent` lists (collective, bytes) in order. The bytes are those a ring sends, for the tensors as
    they were handed over; headers and what a backend does otherwise are not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at one operation, and do it."""
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name in _SENT:
            kind, place, rule = _SENT[name]
            self.sent.append((kind, rule(_nbytes(args[place]), dist.get_world_size())))
        return func(*args, **(kwargs or {}))

    def total(self, kind: str) -> int:
        """Bytes of one kind of collective: "all-reduce", "all-gather", ..."""
        return sum(size for name, size in self.sent if name == kind)


def _nbytes(tensors: Tensor | list) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(_nbytes(tensor) for tensor in tensors)
