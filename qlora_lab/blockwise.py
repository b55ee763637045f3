"""Blockwise 4-bit quantization: a weight becomes half a byte and a share of a scale.

How a tensor is stored, in five steps:

1. Flatten it and cut it into blocks of `blocksize` (64) consecutive weights; the last block may be
   shorter. Blocks run over the flattened tensor, not along rows.
2. Keep each block's largest magnitude, `absmax`: its scale.
3. Multiply the block by 1/absmax: now it lies in [-1, 1] and its largest weight at an end.
4. Replace every weight by the index of the nearest value of a 16-entry codebook (`codebooks`).
5. Pack two indices into a byte, the first in the high half.

Going back is a look-up and a multiplication: `codebook[index] * absmax`. The weight with the
largest magnitude comes back exactly; every other one with an error.

The choice made here: the bytes equal those of bitsandbytes on a CPU, on every device, so that a
reader can hold them side by side. That fixes what is otherwise a matter of taste: a tie goes to
the lower code; full blocks are *multiplied* by the rounded reciprocal, but the short last block is
*divided* by its absmax; magnitudes below 1e-38 are scaled as if they were 1e-38; an odd number of
weights is padded with one weight of 0. One thing differs on purpose: bitsandbytes takes NaN and
infinity, and stores garbage for the other weights of that block (a NaN makes every code of the
block the top one and the scale NaN, an infinity makes the others NaN); this module refuses them.

The steps stand below as they are read. A tensor of 16 million weights or more takes the same
arithmetic compiled (`_kernels`), about ten times faster; a smaller one never would earn back the
seconds that compiling takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlora_lab import _kernels, codebooks
from qlora_lab.double_quant import QuantizedAbsmax, dequantize_absmax, quantize_absmax
from qlora_lab.errors import InputError, needs, shown

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NOT_FINITE = "weight holds NaN or infinity: one such value ruins its block; clean it"
TINY = 1e-38  # the smallest magnitude a block is scaled by, so that no reciprocal overflows
COMPILE_FROM = 2**24  # weights from which compiling, once a process, is worth its seconds
_CHUNK = 2**19  # weights handled at a time: what fits a core's cache; a multiple of any blocksize


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in 4 bits a weight, with all that is needed to restore it.

    Attributes:
        packed: uint8, shape (ceil(weights / 2),), two codes a byte, the first in the high half.
        absmax: The blocks' scales: float32 of shape (ceil(weights / blocksize),), or a
            `QuantizedAbsmax` holding the same in 8 bits.
        shape: The shape of the original tensor.
        dtype: The dtype of the original tensor, and of what `dequantize_4bit` returns by default.
        blocksize: Weights per scale.
        codebook: A name that `codebooks.codebook` knows, or the values themselves, ascending.
    """

    packed: Tensor
    absmax: Tensor | QuantizedAbsmax
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    codebook: str | tuple[float, ...]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def values(self) -> tuple[float, ...]:
        """The codebook's values, in the order of their codes."""
        if isinstance(self.codebook, str):
            return codebooks.codebook(self.codebook)
        return self.codebook

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes and scales (not the codebook, which all tensors share)."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits held per weight: 4.5 at block size 64, 4.127 with double quantization."""
        return 8 * self.nbytes / self.shape.numel()

    def scales(self) -> Tensor:
        """Return the blocks' scales as float32, shape (blocks,), whichever way they are stored."""
        if isinstance(self.absmax, QuantizedAbsmax):
            return dequantize_absmax(self.absmax)
        return self.absmax

    def codes(self) -> Tensor:
        """Return the codes one a byte: uint8 of the original shape, values 0 to 15."""
        return unpack(self.packed, self.shape.numel()).view(self.shape)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same tensor on `device`."""
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device))

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file.

        Args:
            path: The file to write, by custom ending in `.safetensors`.
        """
        from safetensors.torch import save_file

        tensors = {"packed": self.packed}
        header = {
            "format": "qlora_lab.QuantizedTensor/1",
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "blocksize": self.blocksize,
            "codebook": self.codebook,
        }
        if isinstance(self.absmax, QuantizedAbsmax):
            tensors |= {
                "absmax_codes": self.absmax.codes,
                "absmax2": self.absmax.absmax2,
                "offset": self.absmax.offset,
            }
            header["absmax_blocksize"] = self.absmax.blocksize
        else:
            tensors["absmax"] = self.absmax
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, str(path), metadata={"quantized_tensor": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> QuantizedTensor:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where to put the tensors.

        Returns:
            A tensor equal to the saved one in every byte.

        Raises:
            InputError: If the file was not written by `QuantizedTensor.save`.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path} cannot be read ({reason})") from None
        if "quantized_tensor" not in metadata:
            raise InputError(f"{path} was not written by QuantizedTensor.save")
        header = json.loads(metadata["quantized_tensor"])
        name = header["codebook"]
        absmax = tensors.get("absmax")
        if absmax is None:
            absmax = QuantizedAbsmax(
                tensors["absmax_codes"],
                tensors["absmax2"],
                tensors["offset"],
                header["absmax_blocksize"],
            )
        return cls(
            packed=tensors["packed"],
            absmax=absmax,
            shape=torch.Size(header["shape"]),
            dtype=getattr(torch, header["dtype"]),
            blocksize=header["blocksize"],
            codebook=name if isinstance(name, str) else tuple(name),
        )

    def __repr__(self) -> str:
        name = self.codebook if isinstance(self.codebook, str) else f"{len(self.codebook)} values"
        scales = "8-bit" if isinstance(self.absmax, QuantizedAbsmax) else "fp32"
        size = "x".join(str(n) for n in self.shape) or "scalar"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"QuantizedTensor({size} {dtype}, {name}, blocksize {self.blocksize}, {scales} scales: "
            f"{self.nbytes:,} bytes, {self.bits_per_weight:.3f} bits a weight, {self.device})"
        )


def quantize_4bit(
    weight: Tensor,
    blocksize: int = 64,
    codebook: str | Sequence[float] = "nf4",
    double_quant: bool = False,
    compiled: bool | None = None,
) -> QuantizedTensor:
    """Quantize a tensor to 4 bits a weight, equal to bitsandbytes byte for byte.

    With `double_quant` the scales are rounded to the nearest 8-bit value; bitsandbytes rounds
    about one in 600 of them differently (see `double_quant`, and `bnb_compat` for its bytes).

    Args:
        weight: float32, float16 or bfloat16, any non-empty shape, all values finite.
        blocksize: Weights per scale: a power of two from 32 to 4096.
        codebook: "nf4", "fp4" or another name of at most 4 bits that `codebooks.codebook` knows,
            or 2 to 16 ascending values within [-1, 1].
        double_quant: Store the scales in 8 bits.
        compiled: Use the compiled arithmetic, on a CPU; None does so from 16 million weights on.
            The bytes are the same, and without a working C++ compiler nothing changes but speed.

    Returns:
        A `QuantizedTensor` on the weight's device.

    Raises:
        InputError: If the weight is empty, of another dtype, or holds NaN or infinity (where
            bitsandbytes would store a poisoned block); if the block size or codebook is not one
            of the above.

    Source:
        Dettmers et al., "QLoRA", section 2, equation 1 and section 3;
        `bitsandbytes.functional.quantize_4bit`.
    """
    name, values = _resolve(codebook, most=16)
    _check(weight)
    check_blocksize(blocksize)
    if not isinstance(double_quant, bool):
        raise InputError(f"double_quant={shown(double_quant)}: use True or False")
    flat = weight.detach().reshape(-1)
    packed, absmax = _quantize_flat(flat, blocksize, values, compiled)
    scales = quantize_absmax(absmax) if double_quant else absmax
    return QuantizedTensor(packed, scales, weight.shape, weight.dtype, blocksize, name)


def dequantize_4bit(
    quantized: QuantizedTensor, dtype: torch.dtype | None = None, compiled: bool | None = None
) -> Tensor:
    """Restore a tensor: look every code up and multiply by its block's scale, in float32.

    Args:
        quantized: What `quantize_4bit` returned.
        dtype: float32, float16 or bfloat16; the original's by default. The product is rounded to
            it once.
        compiled: As in `quantize_4bit`: a matter of speed alone.

    Returns:
        A tensor of the original shape, on the same device.

    Raises:
        InputError: If `dtype` is none of these three, or `quantized` something else.

    Source:
        Dettmers et al., "QLoRA", section 2, equation 2 and section 3, equation 6.
    """
    if not isinstance(quantized, QuantizedTensor):
        raise InputError(f"{shown(quantized)} is no QuantizedTensor; give what quantize_4bit gave")
    dtype = quantized.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype={shown(dtype)}: dequantize to float32, float16 or bfloat16")
    weights = quantized.shape.numel()
    flat = _dequantize_flat(
        quantized.packed,
        quantized.scales(),
        quantized.blocksize,
        quantized.values,
        weights,
        dtype,
        compiled,
    )
    return flat.view(quantized.shape)


def fake_quantize(
    weight: Tensor, blocksize: int | None = 64, codebook: str | Sequence[float] = "nf4"
) -> Tensor:
    """Quantize and restore at once, with a codebook of any size from 2 to 256 values.

    For comparing formats: 2, 3 or 5 bits have no packing here, but their error can be measured.

    Args:
        weight: float32, float16 or bfloat16, any non-empty shape, all values finite.
        blocksize: Weights per scale, a power of two from 32 to 4096; None for one scale for the
            whole tensor.
        codebook: A name that `codebooks.codebook` knows, or 2 to 256 ascending values in [-1, 1].

    Returns:
        A tensor of the same shape, dtype and device, each value one of the codebook's times its
        block's largest magnitude.

    Raises:
        InputError: As `quantize_4bit`.
    """
    _, values = _resolve(codebook, most=256)
    _check(weight)
    if blocksize is not None:
        check_blocksize(blocksize)
    flat = weight.detach().reshape(-1)
    size = flat.numel() if blocksize is None else blocksize
    codes, absmax = quantize_codes(flat, size, values)
    levels = _tensor(tuple(sorted(values)), weight.device)
    restored = levels[codes.int()] * absmax.repeat_interleave(size)[: flat.numel()]
    return restored.to(weight.dtype).view(weight.shape)


def quantize_codes(flat: Tensor, blocksize: int, values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Find each weight's nearest codebook value: steps 2 to 4, readable.

    Args:
        flat: floating point, shape (weights,), all values finite.
        blocksize: Weights per scale: a power of two, or all of them.
        values: 2 to 256 codebook values, in any order.

    Returns:
        The codes, uint8 of shape (weights,), as indices into the *sorted* values; the scales,
        float32 of shape (ceil(weights / blocksize),).

    Raises:
        InputError: If the weights are no vector of numbers or not finite; if the block size
            or the values are none of the above.
    """
    needs("tensor", flat, "flat")
    if flat.dim() != 1 or not flat.is_floating_point():
        shape = tuple(flat.shape)
        raise InputError(f"weights of shape {shape}, {flat.dtype}: give a vector of real numbers")
    weights = flat.numel()
    power = isinstance(blocksize, Integral) and blocksize > 1 and not blocksize & (blocksize - 1)
    if not power and not (isinstance(blocksize, Integral) and blocksize == weights):
        raise InputError(
            f"blocksize={shown(blocksize)}: use a power of two as all kernels do, or {weights} "
            "for a single scale"
        )
    values = codebooks.numbers(values)
    flat = flat.float()
    full = flat.numel() // blocksize * blocksize
    blocks, rest = flat[:full].view(-1, blocksize), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).view(-1)
    if rest.numel():
        last = rest.abs().amax(dim=0, keepdim=True).clamp(min=TINY)
        absmax = torch.cat([absmax, last])
        # Divided, where the full blocks are multiplied: bitsandbytes does so, and at a midpoint
        # the reciprocal's rounding error decides between two codes.
        scaled = torch.cat([scaled, rest / last])
    if not torch.isfinite(absmax).all():
        raise InputError(NOT_FINITE)
    borders = _borders(values, flat.device)
    # bucketize counts the borders strictly below a value, so a tie takes the lower code.
    return torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8), absmax


def pack(codes: Tensor, pad: int = 7) -> Tensor:
    """Put two 4-bit codes into each byte, the first in the high half.

    Args:
        codes: uint8, shape (weights,), values 0 to 15.
        pad: The code that fills the last low half if the number of codes is odd: 7 is NF4's zero.

    Returns:
        uint8, shape (ceil(weights / 2),).

    Raises:
        InputError: If `codes` is not a uint8 vector.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise InputError(
            f"codes are {codes.dtype} of {codes.dim()} dimensions: give a uint8 vector"
        )
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=pad)
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor, weights: int) -> Tensor:
    """Take the 4-bit codes out of their bytes.

    Args:
        packed: uint8, shape (ceil(weights / 2),).
        weights: How many codes there are; an odd number drops the padding.

    Returns:
        uint8, shape (weights,), values 0 to 15.

    Raises:
        InputError: If that many codes do not fill that many bytes.
    """
    if packed.numel() != (weights + 1) // 2:
        raise InputError(f"{packed.numel()} bytes hold {2 * packed.numel()} codes, not {weights}")
    return torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[:weights]


def _quantize_flat(
    flat: Tensor, blocksize: int, values: tuple[float, ...], compiled: bool | None
) -> tuple[Tensor, Tensor]:
    """Quantize and pack a flat tensor: compiled as far as that goes, the rest chunk by chunk."""
    borders = codebooks.midpoints(values)
    zero = sum(border < 0 for border in borders)  # the code that 0 gets, to pad with
    packed, absmax, done = [], [], 0
    wanted = flat.numel() >= COMPILE_FROM if compiled is None else compiled
    if wanted and flat.device.type == "cpu":
        full = flat.numel() // blocksize * blocksize
        result = _kernels.quantize(flat[:full], blocksize, borders)
        if result is not None:  # None: no compiler here
            if not torch.isfinite(result[1]).all():
                raise InputError(NOT_FINITE)
            done = full
            packed.append(result[0])
            absmax.append(result[1])
    for chunk in flat[done:].split(_chunk(flat)):  # starts at a block's start, as _CHUNK is one
        codes, scales = quantize_codes(chunk, blocksize, values)
        packed.append(pack(codes, pad=zero))
        absmax.append(scales)
    return _relabel(torch.cat(packed), values), torch.cat(absmax)


def _dequantize_flat(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    values: tuple[float, ...],
    weights: int,
    dtype: torch.dtype,
    compiled: bool | None = None,
) -> Tensor:
    """Restore a flat tensor: compiled if it is large, otherwise chunk by chunk, two at a time.

    A byte has 256 values, so one table holds both weights of every byte, and one look-up fetches
    them as a single 8-byte number: half the look-ups, and no unpacking.
    """
    full = weights // blocksize * blocksize
    out = _room(weights, dtype, packed.device)
    wanted = weights >= COMPILE_FROM if compiled is None else compiled
    if wanted and full == weights and packed.device.type == "cpu":
        levels = _tensor((*values, *[0.0] * (16 - len(values))), packed.device)
        if _kernels.dequantize(packed, absmax, blocksize, levels, out) is not None:
            return out
    table = _pairs(values, packed.device)
    step = min(_chunk(packed), full)
    room = None if dtype == torch.float32 else torch.empty(step, device=packed.device)
    for start in range(0, full, step or 1):
        stop = min(start + step, full)
        piece = out[start:stop]
        exact = piece if room is None else room[: stop - start]
        bytes_ = packed[start // 2 : stop // 2].int()
        torch.index_select(table, 0, bytes_, out=exact.view(torch.int64))
        scale = absmax[start // blocksize : stop // blocksize, None]
        torch.mul(exact.view(-1, blocksize), scale, out=piece.view(-1, blocksize))
    if full < weights:
        pairs = table.index_select(0, packed[full // 2 :].int()).view(torch.float32)
        torch.mul(pairs[: weights - full], absmax[-1], out=out[full:])
    return out


def _room(weights: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, a large one on a CPU in memory that NumPy asked for.

    NumPy asks Linux for pages of 2 MiB where PyTorch takes pages of 4 KiB. Each page is fetched
    and cleared when it is first written to, and for 64 MiB that took longer than the arithmetic.
    """
    if device.type != "cpu" or weights < COMPILE_FROM:
        return torch.empty(weights, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(weights * dtype.itemsize, dtype=np.uint8)).view(dtype)


def _chunk(tensor: Tensor) -> int:
    """Return how many weights to handle at a time: a GPU takes all, a core what its cache holds."""
    return _CHUNK if tensor.device.type == "cpu" else 2**62


def _relabel(packed: Tensor, values: tuple[float, ...]) -> Tensor:
    """Turn indices into the sorted codebook into codes, where the two differ (FP4).

    All bytes at once: a 256-entry table holds both halves' new codes.
    """
    order = sorted(range(len(values)), key=lambda code: values[code])
    if order == list(range(len(values))):
        return packed
    order += [0] * (16 - len(order))
    table = [order[byte >> 4] << 4 | order[byte & 15] for byte in range(256)]
    return torch.tensor(table, dtype=torch.uint8, device=packed.device)[packed.int()]


def _resolve(
    codebook: str | Sequence[float], most: int
) -> tuple[str | tuple[float, ...], tuple[float, ...]]:
    """Return what to remember of a codebook (its name if it has one) and its values."""
    if isinstance(codebook, str):
        name, values = codebook, codebooks.codebook(codebook)
    else:
        name = values = codebooks.numbers(codebook)
        ascending = all(low < high for low, high in zip(values, values[1:], strict=False))
        if not ascending or values[0] < -1 or values[-1] > 1:
            raise InputError("codebook values must be two or more, ascending, and within [-1, 1]")
    if len(values) > most:
        raise InputError(f"the codebook has {len(values)} values: at most {most} fit here")
    return name, values


def check_blocksize(blocksize: int) -> None:
    """Refuse a block size that no kernel takes.

    Args:
        blocksize: Weights per scale.

    Raises:
        InputError: It is no power of two from 32 to 4096.
    """
    if not isinstance(blocksize, Integral) or blocksize not in BLOCKSIZES:
        raise InputError(
            f"blocksize={shown(blocksize)}: use a power of two from 32 to 4096, "
            "because bitsandbytes' kernels take no other"
        )


def _check(weight: Tensor) -> None:
    needs("tensor", weight, "weight")
    if weight.dtype not in DTYPES:
        raise InputError(f"weight is {weight.dtype}: quantize float32, float16 or bfloat16")
    if weight.numel() == 0:
        raise InputError(f"weight of shape {tuple(weight.shape)} is empty: nothing to quantize")


@lru_cache(maxsize=64)
def _tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _borders(values: tuple[float, ...], device: torch.device) -> Tensor:
    return _tensor(codebooks.midpoints(values), device)


@lru_cache(maxsize=64)
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the two weights of each byte as one int64 that holds two float32: shape (256,)."""
    levels = [*values, *[0.0] * (16 - len(values))]
    pairs = [(levels[byte >> 4], levels[byte & 15]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device).view(torch.int64).view(-1)
