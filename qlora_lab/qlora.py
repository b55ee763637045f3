"""QLoRA: train adapters through a base whose weights are 4-bit codes.

One layer, in four steps:

1. The base holds codes and scales (`blockwise`), not weights, and nothing that an optimizer
   could move: there is no gradient "of the codes" and no straight-through estimator.
2. Forward: dequantize to the compute dtype, multiply, drop the dequantized weight.
3. Backward: the gradient with respect to the input is `grad_y W`, so W is needed once more, and
   is dequantized once more. The gradients of A and B never need it.
4. A and B sit on top, exactly as in `lora`: a `QLoRALinear` is a `LoRALinear` with another base.

The choice made here is in step 3. Plain autograd would keep the dequantized W of every layer
from forward to backward: all the memory that 4 bits had saved. `Matmul4bit` saves the codes
(which exist anyway, so they cost nothing) and pays with a second dequantization. Storage is in
4 bits; the computing is in the compute dtype, as it is for bitsandbytes, whose numbers this
module reproduces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.blockwise import DTYPES, QuantizedTensor, dequantize_4bit, quantize_4bit
from qlora_lab.bnb_compat import quantize_4bit_bnb
from qlora_lab.double_quant import QuantizedAbsmax
from qlora_lab.errors import InputError, needs, shown
from qlora_lab.lora import LoRALinear, find_targets


class Matmul4bit(torch.autograd.Function):
    """`x @ W.T` with W dequantized in forward, thrown away, and dequantized again in backward.

    Source:
        QLoRA (arXiv 2305.14314), section 3, equation 5 and the paragraph after it;
        bitsandbytes `autograd/_functions.py`, class MatMul4Bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: dict[str, Any], *parts: Tensor) -> Tensor:
        """Multiply by the dequantized weight.

        Args:
            ctx: Where the codes are kept for the backward pass.
            x: (..., in) in the compute dtype.
            spec: The fields of the `QuantizedTensor` that are no tensors.
            *parts: Its tensors: packed codes and scales, or packed codes, codes of the scales,
                second-level scales and offset.

        Returns:
            (..., out) in the dtype of x.
        """
        ctx.spec = spec
        ctx.save_for_backward(*parts)  # not W, and not x either: W is not trained
        return F.linear(x, dequantize_4bit(_assemble(spec, parts), x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x (..., in) from that of y (..., out), and none for the codes."""
        parts = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        weight = dequantize_4bit(_assemble(ctx.spec, parts), grad_y.dtype)
        return grad_y @ weight, None, *(None for _ in parts)


class QuantizedLinear(nn.Module):
    """A frozen linear layer that stores its weight as 4-bit codes.

    The codes and scales are buffers: they move with the module and are part of its `state_dict`.

    Args:
        quantized: The weight, of shape (out, in).
        bias: (out,) or None.
        compute_dtype: Dtype of the multiplication; None: that of the input.

    Raises:
        InputError: The weight is not quantized or not 2-D, the bias does not fit, or
            `compute_dtype` is not fp32, fp16 or bf16.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(quantized, QuantizedTensor):
            raise InputError(
                f"a weight {shown(quantized)} is not possible; give what quantize_4bit returned"
            )
        if len(quantized.shape) != 2:
            raise InputError(f"a weight of shape {tuple(quantized.shape)} is not (out, in)")
        if compute_dtype not in (None, *DTYPES):
            raise InputError(
                f"compute_dtype={shown(compute_dtype)}: use float32, float16 or bfloat16"
            )
        self.out_features, self.in_features = quantized.shape
        self.compute_dtype = compute_dtype
        self._spec, parts = _take_apart(quantized)
        for name, part in parts.items():
            self.register_buffer(name, part)
        self._part_names = tuple(parts)
        if bias is not None:
            needs("tensor", bias, "bias")
            if bias.shape != quantized.shape[:1]:
                raise InputError(
                    f"a bias of shape {tuple(bias.shape)} does not fit {quantized.shape[0]} outputs"
                )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored; it shares its tensors with the layer."""
        return _assemble(self._spec, self._parts())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the layer computes with.

        Args:
            dtype: float32, float16 or bfloat16; None: that of the weight before quantization.

        Returns:
            (out, in), a new tensor.
        """
        return dequantize_4bit(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in) times the dequantized weight, (..., out), in the dtype of x."""
        dtype = self.compute_dtype or x.dtype
        y = Matmul4bit.apply(x.to(dtype), self._spec, *self._parts())
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self._part_names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # model.half() or .to(bfloat16) must move the scales, not round them.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.quantized!r}, compute_dtype={self.compute_dtype}"


class QLoRALinear(LoRALinear):
    """4-bit codes below, named low-rank adapters on top; only the adapters are trained.

    Args:
        quantized: The frozen weight, of shape (out, in).
        bias: (out,) or None; frozen.
        r: Rank of the first adapter, 1..min(in, out).
        alpha: Numerator of the scaling alpha / r, above 0.
        compute_dtype: Dtype of the multiplication by the dequantized weight; None: the input's.
        dropout: Probability in [0, 1) of dropping an input of the detour while training.
        rslora: Scale by alpha / sqrt(r) instead.
        adapter: Name of the first adapter, which becomes the active one.

    Raises:
        InputError: A value is outside what is allowed above.

    Source:
        QLoRA (arXiv 2305.14314), section 3, equation 5; peft `tuners/lora/bnb.py`, Linear4bit.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        r: int = 16,
        alpha: float = 16,
        compute_dtype: torch.dtype | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter: str = "default",
    ) -> None:
        base = QuantizedLinear(quantized, bias, compute_dtype)
        super().__init__(base, r, alpha, dropout, rslora, adapter)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        alpha: float = 16,
        blocksize: int = 64,
        codebook: str = "nf4",
        double_quant: bool | str = True,
        compute_dtype: torch.dtype | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter: str = "default",
    ) -> QLoRALinear:
        """Quantize a linear layer and put a fresh adapter on it.

        Args:
            linear: Weight (out, in) in fp32, fp16 or bf16, and maybe a bias (out,).
            r: Rank, 1..min(in, out).
            alpha: Numerator of the scaling.
            blocksize: Weights per scale, a power of two from 32 to 4096.
            codebook: "nf4", "fp4" or another 4-bit codebook.
            double_quant: False, True (scales to the nearest 8-bit code), or "bnb" (the bytes that
                bitsandbytes' CPU rounding gives, for comparisons with it).
            compute_dtype: Dtype of the multiplication; None: that of the input.
            dropout: For the detour's input while training.
            rslora: Scale by alpha / sqrt(r) instead.
            adapter: Name of the adapter.

        Returns:
            A layer that maps (..., in) to (..., out) like `linear` with its weight rounded.

        Raises:
            InputError: A value is outside what is allowed above, or the weight is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"a layer {shown(linear)} is not possible; give an nn.Linear")
        quantized = quantize_weight(linear.weight, blocksize, codebook, double_quant)
        layer = cls(quantized, linear.bias, r, alpha, compute_dtype, dropout, rslora, adapter)
        return layer.train(linear.training)


def quantize_model(
    model: nn.Module, r: int = 16, alpha: float = 16, **options: Any
) -> dict[str, QLoRALinear]:
    """Turn every linear layer of a model but the output head into a `QLoRALinear`, in place.

    Embeddings, norms and the head keep their dtype and are frozen, as in the paper.

    Args:
        model: Any model with `nn.Linear` layers and no adapters yet; changed in place.
        r: Rank, 1..min(in, out) of every layer.
        alpha: Numerator of the scaling.
        **options: The other arguments of `QLoRALinear.from_linear`, the same for every layer.

    Returns:
        Name -> new layer, in the model's order.

    Raises:
        InputError: The model has no linear layer or carries adapters already, or a value does not
            fit one of its layers (nothing is changed).

    Source:
        QLoRA (arXiv 2305.14314), section 4: adapters on all linear layers.
    """
    chosen = find_targets(model, "all-linear")
    if any(type(layer) is not nn.Linear for layer in chosen.values()):
        raise InputError("the model has adapters or quantized layers: give a plain 16-bit model")
    made = {
        path: QLoRALinear.from_linear(layer, r, alpha, **options) for path, layer in chosen.items()
    }
    model.requires_grad_(False)
    for path, layer in made.items():
        model.set_submodule(path, layer)
    return made


def quantize_weight(
    weight: Tensor, blocksize: int = 64, codebook: str = "nf4", double_quant: bool | str = True
) -> QuantizedTensor:
    """Quantize a weight, with a choice of how the scales are rounded.

    Args:
        weight: (out, in), fp32, fp16 or bf16, finite.
        blocksize: Weights per scale, a power of two from 32 to 4096.
        codebook: "nf4", "fp4" or another 4-bit codebook.
        double_quant: False, True (nearest 8-bit code) or "bnb" (bitsandbytes' CPU rounding).

    Returns:
        The codes and scales.

    Raises:
        InputError: A value is outside what is allowed above.
    """
    if not isinstance(double_quant, bool) and double_quant != "bnb":
        raise InputError(f"double_quant={shown(double_quant)}: use True, False or 'bnb'")
    if double_quant == "bnb":
        return quantize_4bit_bnb(weight, blocksize, codebook)
    return quantize_4bit(weight, blocksize, codebook, double_quant)


def _take_apart(quantized: QuantizedTensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of a quantized tensor, and its tensors by name."""
    absmax = quantized.absmax
    spec = {
        field: getattr(quantized, field) for field in ("shape", "dtype", "blocksize", "codebook")
    }
    if not isinstance(absmax, QuantizedAbsmax):
        return spec, {"packed": quantized.packed, "absmax": absmax}
    spec["absmax_blocksize"] = absmax.blocksize
    parts = {"absmax": absmax.codes, "absmax2": absmax.absmax2, "offset": absmax.offset}
    return spec, {"packed": quantized.packed, **parts}


def _assemble(spec: dict[str, Any], parts: tuple[Tensor, ...]) -> QuantizedTensor:
    """The quantized tensor that `_take_apart` took apart."""
    settings = dict(spec)
    absmax_blocksize = settings.pop("absmax_blocksize", None)
    packed, absmax, *second = parts
    scales = QuantizedAbsmax(absmax, *second, absmax_blocksize) if second else absmax
    return QuantizedTensor(packed=packed, absmax=scales, **settings)
