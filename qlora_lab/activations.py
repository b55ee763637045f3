"""Activations: what a forward pass keeps for the backward pass, tensor by tensor.

What a layer saves depends on its code: RMSNorm keeps a 32-bit copy, an adapter keeps its input a
second time. There are three ways to know:

1. *Watch a real model.* `record_saved` asks autograd what one forward pass saves, each storage
   once; `LiveBytes` follows a whole training step, operation by operation, to its peak.
2. *Watch a model that is not there.* The ledger's row comes from PyTorch's fake tensors, which run
   the real code at any size in a second or two, allocating nothing. Of a stack of equal blocks two
   run, and the second stands for all that follow. `Activations` holds what was seen.
3. *Derive it on paper.* `llama_block_activations` does so for one family.

The choice made here is to trace, because tables of formulas go stale. The formula stays as a
referee: the tests hold formula, trace and a real model equal. The price is that a trace needs an
architecture that runs on `input_ids` alone.

Source: PyTorch `torch.autograd.graph.saved_tensors_hooks` and
`torch._subclasses.fake_tensor.FakeTensorMode`; peft `tuners/lora/bnb.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lab._meta_model import Run, as_config, as_dtype, check_run, quantizable
from qlora_lab.errors import InputError, needs

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# What autograd saves


@dataclass(frozen=True)
class Saved:
    """One tensor that autograd keeps for the backward pass.

    Attributes:
        module: Name of the module whose forward pass saved it; "" for the model itself.
        shape: The tensor's shape.
        dtype: Its dtype.
        bytes: Bytes of the storage behind it, which is what stays in memory.
        storage: Identity of that storage; tensors with the same one share their memory.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    storage: int


@contextmanager
def record_saved(model: nn.Module) -> Iterator[list[Saved]]:
    """Record what one forward pass saves for the backward pass, each storage once.

    Parameters and buffers of the model are left out: they are in memory anyway. So is what a
    custom function puts on its context without `save_for_backward`, and whatever runs inside
    `torch.utils.checkpoint`, which has hooks of its own.

    Args:
        model: The model that will be called inside the `with` block, real or fake.

    Yields:
        A list that fills up during the forward pass, in the order of saving.

    Raises:
        InputError: This is no model.

    Source:
        `torch.autograd.graph.saved_tensors_hooks`.
    """
    needs("model", model)
    seen = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    saved: list[Saved] = []
    alive: list[Tensor] = []  # a freed storage's identity could be given to the next one
    path = [""]

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in seen:
            seen.add(key)
            alive.append(tensor)
            size = tensor.untyped_storage().nbytes()
            saved.append(Saved(path[-1], tuple(tensor.shape), tensor.dtype, size, key))
        return tensor

    def hooks(name: str, module: nn.Module):
        def leave(*_) -> None:  # a hook's return value would replace the module's output
            path.pop()

        yield module.register_forward_pre_hook(lambda *_: path.append(name))
        yield module.register_forward_hook(leave, always_call=True)

    handles = [handle for name, module in model.named_modules() for handle in hooks(name, module)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()


class LiveBytes(TorchDispatchMode):
    """Follow the bytes of a training step: what operations have made and nobody has freed.

    `record_saved` says what autograd keeps at the end of a forward pass. This context manager
    looks after every single operation, forward and backward, and so shows the peak and its
    moment. It counts storages, not allocations: workspaces inside one operation are not seen,
    and the model's own parameters, buffers and quantization constants are left out.

    Args:
        model: The model that will be trained inside the `with` block.

    Attributes:
        timeline: Bytes alive after each operation, in order.

    Raises:
        InputError: This is no model.

    Source:
        `torch.utils._python_dispatch.TorchDispatchMode`.
    """

    def __init__(self, model: nn.Module):
        needs("model", model)
        super().__init__()
        self.timeline: list[int] = []
        self._own = {_storage(tensor) for tensor in _held_tensors(model)}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in self._own:
                storage = leaf.untyped_storage()
                entry = (StorageWeakRef(storage), storage.nbytes())
                self._alive.setdefault(_storage(leaf), entry)
        self.timeline.append(self.now())
        return out

    def now(self) -> int:
        """Bytes alive at this moment."""
        for key in [key for key, (storage, _) in self._alive.items() if storage.expired()]:
            del self._alive[key]
        return sum(size for _, size in self._alive.values())


def _held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the constants that bitsandbytes hangs on a 4-bit weight."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # double quantization: a second state inside the first
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = getattr(state, "state2", None)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# One forward pass of a run, on fake tensors


@dataclass(frozen=True)
class Activations:
    """What one forward pass of a run leaves for its backward pass.

    A stack of equal blocks is run with two of them: the second stands for all that follow.

    Attributes:
        saved: The tensors, each storage once, in the order of saving.
        blocks: Name of each block that ran -> how many blocks of the model it stands for.
        inputs: Name of each block -> the storages of its inputs and their bytes.
    """

    saved: tuple[Saved, ...]
    blocks: dict[str, int]
    inputs: dict[str, dict[int, int]]

    def bytes(self, checkpointing: bool = False) -> int:
        """Bytes that are alive for the backward pass.

        Args:
            checkpointing: False adds up all that is saved. True keeps what lies outside the
                blocks and the inputs of every block, and adds the block that is being recomputed
                (the largest one), because the others are not there at that time.

        Returns:
            Bytes, logits and loss not included.
        """
        outside = sum(each.bytes for each in self.saved if self.block_of(each) is None)
        if not checkpointing:
            return outside + sum(self.block_bytes(b) * n for b, n in self.blocks.items())
        given = [key for inputs in self.inputs.values() for key in inputs]
        shared = {key for key in given if given.count(key) > 1}  # the rotary tables, for one
        once = {k: size for i in self.inputs.values() for k, size in i.items() if k in shared}
        own = sum(
            size * self.blocks[block]
            for block, inputs in self.inputs.items()
            for key, size in inputs.items()
            if key not in shared
        )
        recomputed = max((self.block_bytes(b, inputs=False) for b in self.blocks), default=0)
        return outside + sum(once.values()) + own + recomputed

    def block_of(self, tensor: Saved) -> str | None:
        """Name of the block that saved a tensor, or None for embeddings, last norm and head."""
        inside = (b for b in self.blocks if f"{tensor.module}.".startswith(f"{b}."))
        return next(inside, None)

    def block_bytes(self, block: str, inputs: bool = True) -> int:
        """Bytes that one block saves, with or without those that it was given as its input."""
        own = (each for each in self.saved if self.block_of(each) == block)
        given = self.inputs.get(block, {})
        return sum(each.bytes for each in own if inputs or each.storage not in given)

    def note(self, checkpointing: bool) -> str:
        """One line on how the bytes come about."""
        blocks = sum(self.blocks.values())
        if checkpointing:
            return f"inputs of {blocks} blocks, one block recomputed"
        return f"all that {blocks} blocks save"

    def __str__(self) -> str:
        """A table of one typical block: what is saved, by which module, how large."""
        block = list(self.blocks)[-1] if self.blocks else None
        lines = [f"{'saved by':34}{'shape':>24}{'dtype':>10}{'bytes':>14}"]
        for each in self.saved:
            if self.block_of(each) == block:
                name = each.module.removeprefix(f"{block}").lstrip(".") or "(the block itself)"
                shape = " x ".join(map(str, each.shape))
                dtype = str(each.dtype).removeprefix("torch.")
                lines.append(f"{name:34}{shape:>24}{dtype:>10}{each.bytes:>14,}")
        total = self.block_bytes(block) if block else 0
        lines.append(f"{'one block of ' + str(sum(self.blocks.values())):68}{total:>14,}")
        return "\n".join(lines)


def _activations(
    model: nn.Module, run: Run, batch: int, sequence: int, autocast: bool
) -> Activations:
    """What the run saves, or one line on why that cannot be known for its architecture."""
    try:
        return _trace(model, run, batch, sequence, autocast)
    except Exception as error:  # whatever someone else's forward pass needs that shapes lack
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{type(run.config).__name__} cannot be run on input_ids without values "
            f"({type(error).__name__}): give batch=0 for the ledger without activations"
        ) from None


def _trace(model: nn.Module, run: Run, batch: int, sequence: int, autocast: bool) -> Activations:
    """Run one forward pass on fake tensors and collect what it saves; this uses the model up."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs: dict[str, dict[int, int]] = {}
    alive: list[Tensor] = []

    def remember(name: str):
        def hook(module, args, kwargs):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            alive.extend(tensors)
            inputs[name] = {_storage(t): t.untyped_storage().nbytes() for t in tensors}

        return hook

    blocks = _fold_equal_blocks(model)
    with FakeTensorMode(), _DropoutAsOnGPU(), _CodesAreNoMatrix() as codes:
        _replace_tensors_by_fakes(model)  # only now: to build 80 blocks of fakes takes seconds
        if run.method == "qlora":
            codes.of.update(id(model.get_submodule(name).weight) for name in quantizable(model))
        for name in blocks:
            model.get_submodule(name).register_forward_pre_hook(remember(name), with_kwargs=True)
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        text = {"input_ids": ids, "use_cache": False}
        if run.config.is_encoder_decoder:
            text["decoder_input_ids"] = ids
        with record_saved(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**text)
    return Activations(tuple(saved), blocks, inputs)


def _fold_equal_blocks(model: nn.Module) -> dict[str, int]:
    """Shorten every stack of equal blocks to two, and say what each block left stands for."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    stands_for = {}
    for name, stack in list(model.named_modules()):
        if not isinstance(stack, nn.ModuleList) or not len(stack):
            continue
        if not all(isinstance(block, GradientCheckpointingLayer) for block in stack):
            continue
        count = len(stack)
        if count > 2 and len({repr(block) for block in stack}) == 1:
            model.set_submodule(name, nn.ModuleList([stack[0], stack[1]]))
            stands_for |= {f"{name}.0": 1, f"{name}.1": count - 1}
        else:
            stands_for |= {f"{name}.{i}": 1 for i in range(count)}
    return stands_for


def _replace_tensors_by_fakes(model: nn.Module) -> None:
    """Give every parameter and buffer of a "meta" model a place on the current mode's fake CPU."""
    fakes: dict[int, Tensor] = {}  # a tied weight is replaced by one and the same fake
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


class _DropoutAsOnGPU(torch.overrides.TorchFunctionMode):
    """Make dropout keep a one-byte mask, as the CUDA kernel does (the CPU's keeps a float)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))

        def masked(input, p=0.5, training=True, inplace=False):
            return torch.native_dropout(input, p, True)[0] if training and p else input

        return masked(*args, **(kwargs or {}))


class _CodesAreNoMatrix(torch.overrides.TorchFunctionMode):
    """Refuse what a real run cannot do: to multiply by a 4-bit weight outside its own layer."""

    def __init__(self):
        super().__init__()
        self.of: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.matmul, Tensor.matmul) and self.of.intersection(map(id, args)):
            raise InputError(
                "this architecture multiplies by the weight of a layer itself, which bitsandbytes "
                "holds as 4-bit codes: give another method than 'qlora', or batch=0"
            )
        return func(*args, **(kwargs or {}))


# The same on paper


def llama_block_activations(
    config: PretrainedConfig,
    method: str = "qlora",
    *,
    r: int = 16,
    batch: int = 1,
    sequence: int = 512,
    dtype: torch.dtype | str = "bfloat16",
    adapter_dtype: torch.dtype | str = "float32",
    attention: str = "sdpa",
) -> int:
    """Derive on paper what one Llama, Mistral or Qwen2 block saves for its backward pass.

    Per token, with widths h (hidden), q and k (all query heads, all key heads) and f (the MLP),
    c bytes an element of the compute dtype and a bytes an element of the adapters:

    - each of two RMSNorms: its input in float32, and one float32 for the root mean square:
      4h + 4. With a trained scale also the normalised vector: ch;
    - attention: query, key and value after the rotation, the result and a float32 a head for
      the softmax's sum: c(2q + 2k) + 4 heads. Eager attention keeps the scores instead,
      in float32 and in c, once for each token attended to, and key and value once for each
      query head;
    - the MLP: the gate, the gate after SiLU, the up-projection: 3cf;
    - the inputs of the seven linear layers, kept where something must be multiplied by them in
      the backward pass. A trained weight or an adapter needs its input; a frozen weight does
      not. Layers that share an input share the tensor (h for q, k, v; q for o; h for gate and
      up; f for down), unless the adapters' dtype differs from it: then each layer casts a copy
      for itself. An adapter also keeps its r-wide middle.

    Args:
        config: A config of one of the three families.
        method: "full", "lora" or "qlora"; the last two keep the same.
        r: Rank; all seven linear layers have adapters, without dropout.
        batch: Sequences a step.
        sequence: Tokens a sequence.
        dtype: Compute dtype.
        adapter_dtype: Dtype of the adapters.
        attention: "sdpa" or "eager".

    Returns:
        Bytes one block keeps (its rotary tables, which all blocks share, not included).

    Raises:
        InputError: `method` or `attention` is unknown, a number is out of range, or the config is
            of another family.
    """
    check_run(method, r, batch, sequence, "adamw", attention)
    config = as_config(config)
    if not hasattr(config, "num_key_value_heads"):
        kind = type(config).__name__
        raise InputError(f"config {kind} has no formula: give one of Llama, Mistral or Qwen2")
    c, a = as_dtype(dtype).itemsize, as_dtype(adapter_dtype).itemsize
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    h, f = config.hidden_size, config.intermediate_size
    q, k = heads * head, config.num_key_value_heads * head

    norms = 2 * (4 * h + 4)
    mlp = 3 * c * f
    if attention == "sdpa":
        kept = c * (2 * q + 2 * k) + 4 * heads
    else:
        scores = heads * sequence * (4 if c == 4 else 4 + c)
        kept = c * 3 * q + scores
    inputs = [(3, h), (1, q), (2, h), (1, f)]  # layers that share an input, and its width
    if method == "full":
        norms += 2 * c * h
        linear = c * sum(width for _, width in inputs)
    elif a == c:
        linear = c * sum(width for _, width in inputs) + 7 * a * r
    else:
        linear = a * sum(layers * width for layers, width in inputs) + 7 * a * r
    if attention == "sdpa" and (method == "full" or a == c):
        linear -= c * q  # o_proj's input is the attention's result, already kept
    return batch * sequence * (norms + kept + mlp + linear)
