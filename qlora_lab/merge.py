"""Merge an adapter into its base: five rungs, and what each of them costs.

An adapter that was trained on 4-bit codes can be shipped in five ways:

1. *Unmerged*: 4-bit base plus adapter file. This is the model that was trained.
2. *Into the dequantized base*: the same numbers, added up. The answers stay, the size is that of
   16 bits again.
3. *Into the original 16-bit base*: the obvious wish, and another model. At step 0 the loss was the
   *quantized* model's; the adapter learned to live with that rounding, and here it is taken away.
4. *Re-quantized*: rung 3 rounded to NF4 once more. Small again. The weights lie anywhere between
   two codes, so some cross a midpoint: the update survives on average, under rounding noise.
5. *Merged in 4 bits*: rung 2 rounded to NF4 once more, which is what `merge_and_unload` does to a
   4-bit model. The weights lie *on* their codes, and what of an update is smaller than half the
   distance to the next one is rounded away.

The choice made here: every merge starts from a freshly loaded model, because a live one may lie.
On a CPU with AVX512-BF16, bitsandbytes repacks the bytes of a layer at its first evaluation
forward, and both transformers' `dequantize` and PEFT's `merge_and_unload` then read the repacked
bytes as NF4, without a word: a loss of 1.90 became 6.32. `loading.load_model` switches the
repacking off; `dequantize` below refuses a model that came from elsewhere and was repacked. The
price is one more load from disk for each merge.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from qlora_lab.blockwise import DTYPES, dequantize_4bit
from qlora_lab.data import IGNORED, collator, encode
from qlora_lab.errors import InputError, needs, shown, texts_of, whole
from qlora_lab.evaluation import evaluating
from qlora_lab.loading import four_bit_layers, load_model, quiet
from qlora_lab.lora import find_targets
from qlora_lab.qlora import quantize_weight

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
RUNGS = ("unmerged", "dequantized base", "original base", "re-quantized", "merged in 4 bits")


def dequantized_base(name: str | Path, device: str | None = None) -> PreTrainedModel:
    """Load a model in 4 bits (NF4, double quantization) and write its weights out again.

    Args:
        name: A hub name or a folder.
        device: "cpu" or "cuda"; by default CUDA where there is one.

    Returns:
        A plain model in the compute dtype; each linear weight is the one that QLoRA trained
        against.

    Raises:
        InputError: The model cannot be loaded in 4 bits (see `loading.load_model`).
    """
    return dequantize(load_model(name, bits=4, device=device).model)


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a 4-bit model's layers into ordinary ones, in place, unless their bytes were repacked.

    Args:
        model: A model in bitsandbytes' 4 bits, without adapters.

    Returns:
        The same model, plain.

    Raises:
        InputError: The model has no 4-bit layer, or one whose bytes no longer mean its weight, or
            carries adapters.

    Source:
        transformers `integrations/bitsandbytes.py`, dequantize_and_replace.
    """
    layers = four_bit_layers(model)
    if not layers:
        raise InputError("the model has no 4-bit layer: there is nothing to dequantize")
    if hasattr(model, "peft_config"):
        raise InputError("the model carries adapters: save them and dequantize a bare base")
    for path, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise InputError(
                f"{path} was repacked by an evaluation forward on this CPU and would be read "
                "wrongly: load the model afresh with qlora_lab.loading.load_model"
            )
    dtype = next(iter(layers.values())).weight.quant_state.dtype
    with quiet():
        return model.dequantize(dtype=dtype)


def merge_into(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Add an adapter to a plain base and return a model without any trace of it.

    Args:
        base: From `dequantized_base` (rung 2), or loaded in 16 bits (rung 3); changed in place.
        adapter: Folder with an adapter in PEFT's format.

    Returns:
        The merged model, with the parameters and the size of the base.

    Raises:
        InputError: The base holds 4-bit codes, or the folder no adapter or one for another base.

    Source:
        LoRA (arXiv 2106.09685), section 4.1, "No additional inference latency"; peft
        `merge_and_unload`.
    """
    if four_bit_layers(base):
        raise InputError(
            "merging into 4-bit codes rounds most of the update away: merge into "
            "dequantized_base(name), or into the original 16-bit model"
        )
    _check_adapter_folder(adapter)
    return _adapted(base, adapter).merge_and_unload()


@torch.no_grad()
def requantize(
    model: nn.Module,
    blocksize: int = 64,
    codebook: str = "nf4",
    double_quant: bool | str = True,
) -> nn.Module:
    """Round every linear weight but the head's to 4 bits and back, in place.

    The result answers as the 4-bit model would, at full size: for measuring, not for shipping.

    Args:
        model: A plain model.
        blocksize: Weights per scale, a power of two from 32 to 4096.
        codebook: "nf4", "fp4" or another 4-bit codebook.
        double_quant: False, True or "bnb", as in `qlora.quantize_weight`.

    Returns:
        The same model.

    Raises:
        InputError: The model has no linear layer, or a value is outside what is allowed above.
    """
    for layer in find_targets(model, "all-linear").values():
        quantized = quantize_weight(layer.weight, blocksize, codebook, double_quant)
        layer.weight.copy_(dequantize_4bit(quantized, layer.weight.dtype))
    return model


def save_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Write a merged model as an ordinary 16-bit checkpoint.

    Args:
        model: From `merge_into`; its own dtype is left as it is.
        tokenizer: Saved beside it; None: not saved.
        directory: Folder for the checkpoint; made if absent.
        dtype: What the weights are stored in: bfloat16, float16 or float32. An update smaller
            than the rounding step of 16 bits (1/256 of a weight in bfloat16) is lost here.

    Returns:
        Bytes of the weight files: the old size of the base, whatever the adapter's was.

    Raises:
        InputError: The model still holds 4-bit codes, or the dtype or the tokenizer is none.
    """
    if four_bit_layers(model):
        raise InputError("the model holds 4-bit codes: merge it first, or save the adapter alone")
    if dtype not in DTYPES:
        raise InputError(f"dtype={shown(dtype)}: store bfloat16, float16 or float32")
    needs("path", directory, "directory")
    if tokenizer is not None:
        needs("tokenizer", tokenizer)
    directory = Path(directory)
    # A copy, so that the caller's model keeps its precision; `.to` keeps tied weights tied.
    stored = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    with quiet():
        stored.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def ladder(
    name: str | Path,
    adapter: str | Path,
    score: Callable[[nn.Module], T],
    device: str | None = None,
) -> dict[str, T]:
    """Measure all five rungs of the merge ladder, each on a freshly loaded model.

    Args:
        name: The base model: a hub name or a folder.
        adapter: Folder with an adapter that was trained on this base in 4 bits.
        score: Called with each model in evaluation mode, without gradients; returns its loss, or
            whatever is to be compared.
        device: "cpu" or "cuda"; by default CUDA where there is one.

    Returns:
        Rung (one of `RUNGS`) -> what `score` returned, in that order. "re-quantized" rounds the
        merge into the original base, "merged in 4 bits" the merge into the dequantized one.

    Raises:
        InputError: The model cannot be loaded, or the folder holds no adapter.
    """
    _check_adapter_folder(adapter)
    if not callable(score):
        raise InputError(f"score {shown(score)} is not possible; give a function of a model")

    def measure(model: nn.Module) -> T:
        with torch.no_grad():
            return score(model.eval())

    unmerged = load_model(name, bits=4, device=device).model
    adapted = _adapted(unmerged, adapter)
    scores = {RUNGS[0]: measure(adapted)}
    del unmerged, adapted  # one model in memory at a time
    gc.collect()  # a 4-bit weight refers to its layer and the layer to it
    merged = merge_into(dequantized_base(name, device), adapter)
    scores[RUNGS[1]] = measure(merged)
    in_place = measure(requantize(merged))
    del merged
    merged = merge_into(load_model(name, bits=16, device=device).model, adapter)
    scores[RUNGS[2]] = measure(merged)
    scores[RUNGS[3]] = measure(requantize(merged))
    scores[RUNGS[4]] = in_place
    return scores


def answer_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, str]],
    batch_size: int = 64,
) -> list[float]:
    """Measure how many bits a model needs for each right answer: finer than right or wrong.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows with "text" and "answer".
        batch_size: Rows at a time.

    Returns:
        For each row, in order, the sum of -log2 p over the answer's tokens and its end token,
        given the prompt. Divided by the answer's bytes it is comparable with `bits_per_byte`.

    Raises:
        InputError: A row cannot be encoded, or the batch size is below 1.
    """
    needs("model", model)
    needs("rows", rows)
    whole("batch_size", batch_size)
    encoded = [encode(tokenizer, *texts_of(row, "text", "answer")) for row in rows]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["labels"]))
    collate = collator(tokenizer)
    bits = [0.0] * len(encoded)
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = collate([encoded[i] for i in chosen])
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            told = labels != IGNORED  # the scores of the prompt are not looked at
            logits = model(**batch).logits[:, :-1][told].float()
            nats = torch.nn.functional.cross_entropy(logits, labels[told], reduction="none")
            sums = torch.zeros(len(chosen), dtype=torch.float64)
            sums.index_add_(0, told.nonzero()[:, 0].cpu(), nats.double().cpu())
            for i, row in zip(chosen, sums.tolist(), strict=True):
                bits[i] = row / math.log(2)
    return bits


def _adapted(base: PreTrainedModel, adapter: str | Path) -> PeftModel:
    from peft import PeftModel

    try:
        with quiet():
            return PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError, SafetensorError):
        raise InputError(
            f"the adapter in {adapter} does not fit this base, or is damaged"
        ) from None


def _check_adapter_folder(adapter: str | Path) -> None:
    needs("path", adapter, "adapter")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"no adapter_config.json in {adapter}: give the folder of an adapter")
