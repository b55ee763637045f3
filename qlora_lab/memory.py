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
   linear layer's weight (a mixture's fused experts, for one) stay in 16 bits, here as there, and
   so do linear layers of a class of their own (all of Falcon's).
3. *Run one forward pass on fake tensors and watch what autograd keeps.* That is an idea of its
   own, and the module `activations` holds it.

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
`quantizers/base.py` and `integrations/bitsandbytes.py`; bitsandbytes `functional.py`
(`quantize_4bit`) and `optim/optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab._meta_model import Adapter, Run, as_config, as_dtype, check_run, quantizable
from qlora_lab.activations import Activations, _activations
from qlora_lab.blockwise import check_blocksize
from qlora_lab.errors import InputError, share, shown, whole
from qlora_lab.paged_optimizer import is_paged

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
        InputError: A value is not allowed, the rank is larger than every layer with an adapter,
            PEFT puts no adapter on one of the targets, or the architecture does not take text and
            `batch` is not 0.

    Source:
        The module's docstring, row by row.
    """
    dtype, adapter_dtype = as_dtype(dtype), as_dtype(adapter_dtype)
    check_run(method, r, batch, sequence, optimizer, attention)
    check_blocksize(blocksize)
    share("dropout", dropout)
    run = Run(
        as_config(config), method, r, targets, dtype, adapter_dtype, attention, dropout, kbit_prep
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


def _units(total: int) -> tuple[int, str, int, str]:
    """The decimal and the binary unit in which a table of this total is readable."""
    if total >= 10**9:
        return 10**9, "GB", 2**30, "GiB"
    return 10**6, "MB", 2**20, "MiB"


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


def _weight_rows(model: nn.Module, run: Run, blocksize: int, double_quant: bool) -> list[Row]:
    """Base model: linear layers, constants, embeddings, the rest, buffers."""
    linear = set(quantizable(model))
    head = _output_head(model)
    numels: dict[str, list[tuple[int, int]]] = {"linear": [], "embeddings": [], "other": []}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Adapter):
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
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
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
    layers = [model.get_submodule(name) for name in quantizable(model)]
    largest = max((_base(layer).weight.numel() for layer in layers), default=0)
    note = "temporary: the largest layer, in the compute dtype, for its matrix product"
    return Row("one weight dequantized", 0, largest * dtype.itemsize, note)


def _base(layer: nn.Module) -> nn.Linear:
    return layer.base if isinstance(layer, Adapter) else layer


def _output_head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _vocabulary(model: nn.Module) -> int:
    head = _output_head(model)
    return head.weight.shape[0] if head is not None else 0
