"""The memory ledger: every byte of a run, before the run, without allocating the model.

"Will it fit?" has an exact answer for most of what a run holds, and the ledger gives it row by
row. It works in three steps:

1. *Build the model without its weights.* Any `transformers` config is instantiated on PyTorch's
   "meta" device, where a tensor has a shape and a dtype but no memory. Shapes are all that is
   needed to count weights, constants, adapters, gradients and optimizer state.
2. *Apply the libraries' rules.* Which layers become 4-bit is asked of `transformers` itself (all
   linear layers but the output head and what is tied to it). GPT-2's `Conv1D` is a linear layer
   with its weight transposed: `transformers` transposes it before bitsandbytes quantizes it, and
   PEFT's "all-linear" includes it, so it is counted as a linear layer. Parameters that are not a
   linear layer's weight (a mixture's fused experts, for one) stay in 16 bits, here as there.
3. *Run one forward pass on fake tensors and watch what autograd keeps.* What a layer saves for
   the backward pass depends on its code: RMSNorm keeps a 32-bit copy, an adapter keeps its input
   a second time. Tables of formulas go stale; PyTorch's fake tensors run the real code at any
   size in a second or two, allocating nothing. `llama_block_activations` derives the same number
   on paper for one family, and the tests hold formula, trace and a real model equal.

What is *not* counted: the CUDA context, cuBLAS workspaces, the allocator's fragmentation, the
causal mask that a padded batch needs, and temporaries that live for one operation, except the
largest one that is QLoRA's own (a 4-bit weight dequantized for its matrix product). The rows do
not all peak in the same instant (logits are gone when the first gradients appear), and the
gradients that travel from one layer to the next have no row, so the parts are exact and their
total is an estimate of the peak, usually from above.

The choice made here is to count the default code path of PEFT and bitsandbytes as it is, with
its 32-bit adapters, instead of an ideal one. An ideal ledger would be shorter, and wrong by the
32-bit copy of its input that every adapter keeps beside a 16-bit base.

Source: QLoRA (arXiv 2305.14314), section 3 and its appendix on memory; transformers
`quantizers/base.py` and `integrations/bitsandbytes.py`; peft `tuners/lora/bnb.py`; bitsandbytes
`functional.py` (`quantize_4bit`) and `optim/optimizer.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lab.blockwise import check_blocksize
from qlora_lab.errors import InputError, needs, share, shown, whole
from qlora_lab.lora import find_targets
from qlora_lab.paged_optimizer import is_paged

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit")
LOSS_BYTES_PER_LOGIT = 12
"""Log-probabilities, their gradient and the logits' gradient, each in float32, at the peak of the
loss's backward pass. The model's own 16-bit logits are gone by then."""


# The ledger


@dataclass(frozen=True)
class Row:
    """One line of the ledger.

    Attributes:
        name: What holds the bytes.
        parameters: Model or adapter parameters in this row; 0 where the bytes are not parameters.
        bytes: Bytes on the device.
        note: Where the number comes from, in a few words.
        pageable: How many of the bytes a paged optimizer may send to the CPU.
    """

    name: str
    parameters: int
    bytes: int
    note: str = ""
    pageable: int = 0


@dataclass(frozen=True)
class Ledger:
    """The rows of a run, their sum, and a table when printed.

    Attributes:
        title: The run in one line.
        rows: The rows, in the order in which a run comes to hold them.
        activations: What autograd saves, tensor by tensor; None for `batch=0`.
    """

    title: str
    rows: tuple[Row, ...]
    activations: Activations | None = None

    @property
    def total(self) -> int:
        """Sum of all rows in bytes."""
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of the model and its adapters, tied ones counted once."""
        return sum(row.parameters for row in self.rows)

    @property
    def footprint(self) -> int:
        """Bytes that `model.get_memory_footprint()` reports for the base model.

        It adds up parameters and buffers, and so leaves the quantization constants out, which
        bitsandbytes keeps beside the parameters.
        """
        return sum(self[name].bytes for name in (self.rows[0].name, *_REPORTED))

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows)
        raise InputError(f"no row {name!r} in this ledger: it has {known}")

    def __str__(self) -> str:
        scale, decimal, binary_scale, binary = _units(self.total)
        head = f"{'':24}{'parameters':>16}{'bytes':>18}{decimal:>10}{binary:>10}{'share':>9}"
        lines = [self.title, head]
        total = Row("total", self.parameters, self.total)
        for row in (*self.rows, total):
            if row is total:
                lines.append("-" * len(head))
            parameters = f"{row.parameters:,}" if row.parameters else "-"
            lines.append(
                f"{row.name:24}{parameters:>16}{row.bytes:>18,}{row.bytes / scale:>10.3f}"
                f"{row.bytes / binary_scale:>10.3f}{row.bytes / max(1, self.total):>9.1%}"
            )
        lines.append(f"1 {decimal} = {scale:,} bytes, 1 {binary} = {binary_scale:,} bytes")
        pageable = sum(row.pageable for row in self.rows)
        if pageable:
            lines.append(f"of the optimizer state, {pageable:,} bytes may be paged to the CPU")
        return "\n".join(lines)


_REPORTED = ("embeddings and head", "norms, biases, other", "buffers")


def ledger(
    config: PretrainedConfig | str,
    method: str = "qlora",
    *,
    r: int = 16,
    targets: str | Sequence[str] = "all-linear",
    batch: int = 1,
    sequence: int = 512,
    checkpointing: bool = False,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: torch.dtype | str = "bfloat16",
    adapter_dtype: torch.dtype | str = "float32",
    optimizer: str = "adamw",
    paged: bool = False,
    attention: str = "sdpa",
    dropout: float = 0.0,
    kbit_prep: bool = False,
    autocast: bool = False,
) -> Ledger:
    """Account for every byte of a fine-tuning run before it is started.

    Args:
        config: A transformers config, or the path or name of a model whose config is read. Any
            architecture for parameters; one that reads `input_ids` for the activations.
        method: "full" (everything is trained), "lora" (frozen base in `dtype`, adapters) or
            "qlora" (frozen linear layers in 4 bits, adapters).
        r: Rank of the adapters.
        targets: Layers with adapters, as in `qlora_lab.lora.add_adapters` and PEFT.
        batch: Sequences a step; 0 leaves out activations and logits.
        sequence: Tokens a sequence.
        checkpointing: Keep only each block's input and recompute the rest, one block at a time.
        double_quant: Quantize the 4-bit scales too (`bnb_4bit_use_double_quant`).
        blocksize: Weights per scale; transformers always uses 64.
        dtype: Dtype of everything that is not quantized, and of the compute.
        adapter_dtype: float32 is PEFT's default, also on a 16-bit base.
        optimizer: "adamw" keeps two float32 moments a parameter (torch's own keeps them in the
            parameter's dtype, which is half of that for 16-bit parameters); "adamw_8bit" is
            bitsandbytes'.
        paged: Mark the optimizer state that bitsandbytes would page.
        attention: "sdpa" (fused; keeps no scores) or "eager". A model without sdpa gets eager.
        dropout: Dropout of the adapters.
        kbit_prep: Count PEFT's `prepare_model_for_kbit_training`, which casts all that is not
            4-bit to float32, embeddings and head included.
        autocast: Count a forward pass under bfloat16 autocast, as with `Trainer(bf16=True)` on a
            GPU. (On a CPU, PEFT's 4-bit layers do not notice autocast and keep more.)

    Returns:
        The ledger; print it, or read `.rows`, `.total`, `ledger["activations"].bytes`.

    Raises:
        InputError: A value is not allowed, the rank is larger than a layer, or the architecture
            does not take text and `batch` is not 0.

    Source:
        The module's docstring, row by row.
    """
    dtype, adapter_dtype = _dtype(dtype), _dtype(adapter_dtype)
    _check(method, r, batch, sequence, optimizer, attention)
    check_blocksize(blocksize)
    share("dropout", dropout)
    run = _Run(
        _config(config), method, r, targets, dtype, adapter_dtype, attention, dropout, kbit_prep
    )
    with torch.device("meta"):
        model = run.model()

    rows = _weight_rows(model, run, blocksize, double_quant)
    trainable, trainable_bytes = _trainable(model, method, adapter_dtype)
    if method == "full":
        rows.append(Row("adapters", 0, 0, "none: the weights themselves are trained"))
    else:
        note = f"r={r} on {len(trainable) // 2} layers"
        rows.append(Row("adapters", sum(trainable), trainable_bytes, note))
    rows.append(Row("gradients", 0, trainable_bytes, "one for every trained parameter"))
    rows.append(_optimizer_row(trainable, optimizer, paged))
    vocabulary, dequantized = _vocabulary(model), _dequantized_row(model, dtype)
    seen = _activations(model, run, batch, sequence, autocast) if batch else None
    if seen is not None:  # by now the model has only two blocks left
        rows.append(Row("activations", 0, seen.bytes(checkpointing), seen.note(checkpointing)))
        logits = LOSS_BYTES_PER_LOGIT * batch * sequence * vocabulary
        rows.append(Row("logits", 0, logits, f"12 bytes x tokens x {vocabulary:,} words"))
    if method == "qlora":
        rows.append(dequantized)

    name = type(model).__name__
    adapters = "" if method == "full" else f", r={r}"
    tokens = f", {batch} x {sequence} tokens" if batch else ", before the first batch"
    stored = ", checkpointing" if checkpointing and batch else ""
    precision = str(dtype).removeprefix("torch.")
    title = f"{method} of {name}{adapters}{tokens}{stored}, {precision}"
    return Ledger(title, tuple(rows), seen)


# Rows that follow from shapes


def packed_bytes(numel: int) -> int:
    """Bytes of a weight's 4-bit codes, two to a byte.

    Args:
        numel: Elements of the weight.

    Returns:
        Bytes; an odd count pads one code.

    Raises:
        InputError: This is no number of elements.
    """
    whole("numel", numel, 0)
    return -(-numel // 2)


def constant_bytes(numel: int, blocksize: int = 64, double_quant: bool = True) -> int:
    """Bytes of the quantization constants that bitsandbytes keeps for one weight.

    Without double quantization: one float32 scale a block, and the 16 values of the codebook.
    With it: one byte a block, one float32 scale per 256 of those, the offset, the codebook and
    the 256 values of the 8-bit map. The two tables are a copy per weight in bitsandbytes.

    Args:
        numel: Elements of the weight.
        blocksize: Weights per scale.
        double_quant: Whether the scales are quantized.

    Returns:
        Bytes, equal to the sum over the tensors of the weight's `quant_state`.

    Raises:
        InputError: A number is out of range.

    Source:
        QLoRA, section 3, "Double Quantization"; bitsandbytes `QuantState`.
    """
    whole("numel", numel, 0)
    check_blocksize(blocksize)
    blocks = -(-numel // blocksize)
    codebook = 16 * 4
    if not double_quant:
        return 4 * blocks + codebook
    return blocks + 4 * -(-blocks // 256) + 4 + codebook + 256 * 4


def adam_bytes(numel: int, bits: int = 32) -> int:
    """Bytes of Adam's two moments for one tensor.

    The 8-bit optimizer leaves tensors under 4,096 elements in 32 bits, and keeps one float32
    scale per 256 elements for each moment.

    Args:
        numel: Elements of the tensor.
        bits: 32 or 8.

    Returns:
        Bytes, without the 8-bit maps that all tensors share (2 x 256 float32).

    Raises:
        InputError: This is no number of elements, or the bits are others.

    Source:
        bitsandbytes `optim/optimizer.py`, `Optimizer2State.init_state`.
    """
    whole("numel", numel, 0)
    if not isinstance(bits, int) or bits not in (8, 32):
        raise InputError(
            f"bits={shown(bits)} is not possible; give 32 or 8, the Adams that bitsandbytes has"
        )
    if bits == 32 or numel < 4096:
        return 2 * 4 * numel
    return 2 * (numel + 4 * -(-numel // 256))


def _weight_rows(model: nn.Module, run: _Run, blocksize: int, double_quant: bool) -> list[Row]:
    """Base model: linear layers, constants, embeddings, the rest, buffers."""
    linear = set(_quantizable(model))
    head = _output_head(model)
    numels: dict[str, list[tuple[int, int]]] = {"linear": [], "embeddings": [], "other": []}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, _Adapter):
            continue
        if path.removesuffix(".base") in linear and leaf == "weight":
            kind = "linear"
        elif isinstance(module, nn.Embedding) or module is head:
            kind = "embeddings"
        else:
            kind = "other"
        numels[kind].append((parameter.numel(), parameter.nbytes))

    parameters = {kind: sum(n for n, _ in pairs) for kind, pairs in numels.items()}
    stored = {kind: sum(b for _, b in pairs) for kind, pairs in numels.items()}
    bits = 8 * run.dtype.itemsize
    weights, constants = f"{bits}-bit weights", 0
    if run.method == "qlora":
        weights = "4-bit weights"
        stored["linear"] = sum(packed_bytes(n) for n, _ in numels["linear"])
        constants = sum(constant_bytes(n, blocksize, double_quant) for n, _ in numels["linear"])
    width = "float32 after kbit_prep" if run.casts_to_float32 else f"{bits}-bit"
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    scales = f"{'8-bit' if double_quant else '32-bit'} scales, blocks of {blocksize}"
    return [
        Row(weights, parameters["linear"], stored["linear"], f"{len(numels['linear'])} layers"),
        Row("quantization constants", 0, constants, scales if constants else "nothing quantized"),
        Row("embeddings and head", parameters["embeddings"], stored["embeddings"], width),
        Row("norms, biases, other", parameters["other"], stored["other"], width),
        Row("buffers", 0, buffers, "rotary frequencies and the like"),
    ]


def _trainable(model: nn.Module, method: str, adapter_dtype: torch.dtype) -> tuple[list[int], int]:
    """Elements of every trained tensor, and the bytes of all of them."""
    if method == "full":
        weights = list(model.parameters())
        return [weight.numel() for weight in weights], sum(weight.nbytes for weight in weights)
    adapters = [module for module in model.modules() if isinstance(module, _Adapter)]
    numels = [p.numel() for adapter in adapters for p in (adapter.lora_A, adapter.lora_B)]
    return numels, sum(numels) * adapter_dtype.itemsize


def _optimizer_row(numels: list[int], optimizer: str, paged: bool) -> Row:
    bits = 8 if optimizer == "adamw_8bit" else 32
    total = sum(adam_bytes(n, bits) for n in numels)
    if bits == 8 and any(n >= 4096 for n in numels):
        total += 2 * 256 * 4  # the signed and the unsigned 8-bit map, shared by all tensors
    # Only the moments are paged; the 8-bit optimizer's scales stay on the device.
    pageable = sum(2 * (bits // 8) * n for n in numels if paged and is_paged(n))
    return Row("optimizer state", 0, total, f"two {bits}-bit moments a parameter", pageable)


def _dequantized_row(model: nn.Module, dtype: torch.dtype) -> Row:
    layers = [model.get_submodule(name) for name in _quantizable(model)]
    largest = max((_base(layer).weight.numel() for layer in layers), default=0)
    note = "temporary: the largest layer, in the compute dtype, for its matrix product"
    return Row("one weight dequantized", 0, largest * dtype.itemsize, note)


# The model without its weights


@dataclass(frozen=True)
class _Run:
    """What decides which modules a run has and what they save."""

    config: PretrainedConfig
    method: str
    r: int
    targets: str | Sequence[str]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    attention: str
    dropout: float
    kbit_prep: bool

    @property
    def casts_to_float32(self) -> bool:
        return self.kbit_prep and self.method == "qlora" and self.dtype.itemsize == 2

    def model(self) -> nn.Module:
        """The model with stand-ins for its adapted layers, on whatever device is current."""
        model = _instantiate(self.config, self.dtype, self.attention)
        model.train()
        _transpose_conv1d(model)
        if self.method == "full":
            return model
        model.requires_grad_(False)
        quantized = set(_quantizable(model)) if self.method == "qlora" else set()
        if self.casts_to_float32:
            _cast_to_float32(model, except_weights_of=quantized)
        for name, layer in find_targets(model, self.targets).items():
            adapter = _Adapter(layer, self, name in quantized)
            model.set_submodule(name, adapter)
        return model


class _Adapter(nn.Module):
    """A stand-in for PEFT's LoRA layer that saves for the backward pass what PEFT's saves.

    The base is an ordinary frozen linear layer also where the run has a 4-bit one: neither keeps
    its input, because a frozen weight needs no gradient (bitsandbytes keeps only the codes).

    Source:
        peft `tuners/lora/layer.py`, `Linear.forward`; `tuners/lora/bnb.py`,
        `Linear4bit.forward`; bitsandbytes `nn/modules.py`, `Linear4bit.forward`.
    """

    def __init__(self, base: nn.Linear, run: _Run, quantized: bool):
        super().__init__()
        narrow = min(base.in_features, base.out_features)
        if run.r > narrow:
            raise InputError(
                f"rank {run.r} is larger than a layer of {base.in_features} -> "
                f"{base.out_features}: give 1..{narrow}"
            )
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(run.r, base.in_features, dtype=run.adapter_dtype))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, run.r, dtype=run.adapter_dtype))
        self.dropout = run.dropout
        self.compute_dtype = run.dtype if quantized else None

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # some models read a layer's dtype from its weight

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is not None:  # Linear4bit casts its input, and its answer back
            result = self.base(x.to(self.compute_dtype)).to(x.dtype)
        else:
            result = self.base(x)
        if self.compute_dtype is None or not torch.is_autocast_enabled("cpu"):
            x = x.to(self.lora_A.dtype)  # a copy of its own for every adapter, if it casts
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return result + update.to(result.dtype)


def _instantiate(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    """Build the architecture of a config; memory is taken only if the current device has any."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = copy.deepcopy(config)  # from_config writes into it
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        if type(config) in auto._model_mapping:
            cls = auto._model_mapping[type(config)]
            cls = cls[0] if isinstance(cls, tuple) else cls
            fused = attention == "sdpa" and cls._supports_sdpa and not config.is_encoder_decoder
            implementation = _register_causal_attention() if fused else "eager"
            return auto.from_config(config, dtype=dtype, attn_implementation=implementation)
    raise InputError(f"no model class is known for {type(config).__name__}: give another config")


def _register_causal_attention() -> str:
    """Teach transformers an sdpa that needs no mask tensor, and return its name.

    A training batch without padding runs sdpa with `is_causal=True` and no mask. On fake tensors
    transformers cannot look whether there is padding and would build the mask; this attention is
    the same call without the question.
    """
    from transformers import AttentionInterface

    def causal(module, query, key, value, attention_mask, scaling=None, **kwargs):
        grouped = query.shape[1] != key.shape[1]
        result = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        return result.transpose(1, 2).contiguous(), None

    AttentionInterface.register("qlora_lab_causal", causal)
    return "qlora_lab_causal"


def _transpose_conv1d(model: nn.Module) -> None:
    """Write GPT-2's Conv1D layers as the linear layers they are (weight stored transposed)."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inside, outside = module.weight.shape
            linear = nn.Linear(inside, outside, dtype=module.weight.dtype)
            model.set_submodule(name, linear)


def _quantizable(model: nn.Module) -> list[str]:
    """Names of the layers that `load_in_4bit` quantizes, by transformers' own rule."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, _Adapter))
        and not name.endswith(".base")
        and should_convert_module(name, kept)
    ]


def _cast_to_float32(model: nn.Module, except_weights_of: set[str]) -> None:
    """What PEFT's prepare_model_for_kbit_training does to parameters that are not 4-bit."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if not (path in except_weights_of and leaf == "weight"):
            cast = nn.Parameter(parameter.float(), requires_grad=False)
            setattr(model.get_submodule(path), leaf, cast)
    model.tie_weights()


def _base(layer: nn.Module) -> nn.Linear:
    return layer.base if isinstance(layer, _Adapter) else layer


def _output_head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _vocabulary(model: nn.Module) -> int:
    head = _output_head(model)
    return head.weight.shape[0] if head is not None else 0


# Activations: what autograd saves


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
    model: nn.Module, run: _Run, batch: int, sequence: int, autocast: bool
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


def _trace(model: nn.Module, run: _Run, batch: int, sequence: int, autocast: bool) -> Activations:
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
    with FakeTensorMode(), _DropoutAsOnGPU():
        _replace_tensors_by_fakes(model)  # only now: to build 80 blocks of fakes takes seconds
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
    _check(method, r, batch, sequence, "adamw", attention)
    config = _config(config)
    if not hasattr(config, "num_key_value_heads"):
        kind = type(config).__name__
        raise InputError(f"config {kind} has no formula: give one of Llama, Mistral or Qwen2")
    c, a = _dtype(dtype).itemsize, _dtype(adapter_dtype).itemsize
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


# Arguments


def _config(config: PretrainedConfig | str) -> PretrainedConfig:
    from transformers import PretrainedConfig

    if isinstance(config, str | os.PathLike):
        from qlora_lab.loading import load_config

        return load_config(config)
    if not isinstance(config, PretrainedConfig):
        raise InputError(
            f"config is a {type(config).__name__}: give a transformers config or a model's path"
        )
    return config


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    names = ("bfloat16", "float16", "float32")
    name = (dtype if isinstance(dtype, str) else shown(dtype)).removeprefix("torch.")
    if name not in names:
        raise InputError(f"dtype {name!r} is not possible here: give one of {', '.join(names)}")
    return getattr(torch, name)


def _check(method: str, r: int, batch: int, sequence: int, optimizer: str, attention: str) -> None:
    if method not in METHODS:
        raise InputError(f"method {shown(method)} is unknown: give one of {', '.join(METHODS)}")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer {shown(optimizer)} is unknown: give {' or '.join(OPTIMIZERS)}")
    for name, value, least in (("r", r, 1), ("batch", batch, 0), ("sequence", sequence, 1)):
        whole(name, value, least)
    if attention not in ("sdpa", "eager"):
        raise InputError(f"attention {shown(attention)} is unknown: give 'sdpa' or 'eager'")


def _units(total: int) -> tuple[int, str, int, str]:
    """The decimal and the binary unit in which a table of this total is readable."""
    if total >= 10**9:
        return 10**9, "GB", 2**30, "GiB"
    return 10**6, "MB", 2**20, "MiB"
