"""Load a model in 4, 8 or 16 bits: the one place where every 4-bit model of the course is made.

In four steps: decide the dtype of the computation and say why (`choose_dtype`), load with
transformers' own `from_pretrained`, put the guards on (`guard`), count what it weighs (`Report`).

The dtype decision is short. CUDA with native bfloat16 computes in bfloat16. An older card (the
T4 of a free notebook) computes in float16 with loss scaling, because it would only emulate
bfloat16. A CPU computes in float32: most have no 16-bit arithmetic, and the 16-bit values of a
checkpoint fit into float32 exactly.

The guards are needed because three faults of bitsandbytes 0.50 on CPUs are silent:

* After one evaluation forward on a CPU with AVX512-BF16 a 4-bit layer repacks its bytes. In later
  training no gradient passes through it, and a merge reads the repacked bytes as NF4. Switching
  `support_avx512bf16_for_cpu` off on each layer, right after loading, avoids the repack.
* The CPU kernel indexes scales by row: a layer whose width is no multiple of the block size
  dequantizes to wrong values. Such a model is refused.
* Double-quantized scales are rounded through a table (see `qlora_lab.bnb_compat`): harmless.

Loading elsewhere and guarding later would be one forward pass too late, hence one place.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError

from qlora_lab import embedded_model
from qlora_lab.errors import InputError, needs, shown
from qlora_lab.provenance import without_folders

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What `from_pretrained` raises for a name or a folder that is no good.
LOAD_ERRORS = (OSError, ValueError, SafetensorError)

BITS = (4, 8, 16)
# How saved files name the embedded model: a path that means the same on every machine.
EMBEDDED = "qlora_lab/assets/model"
# Padding must be a token that is neither the end nor ever a target. Checkpoints without a
# padding token reserve such tokens under these names.
SPARE_TOKENS = (
    "<|finetune_right_pad_id|>",  # Llama 3
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",  # Qwen 2.5
    "<|padding|>",  # Pythia
    "<pad>",
    "<unk>",  # Llama 2, Mistral
)


@dataclass(frozen=True)
class Report:
    """What was loaded, and why so.

    Attributes:
        name: Hub name or folder, without this machine's folders; `EMBEDDED` for that model.
        bits: 4, 8 or 16.
        scheme: Such as "NF4, blocks of 64, double quantization".
        device: "cpu" or "cuda".
        compute_dtype: What matrix products are computed in.
        reason: Why that dtype.
        parameters: Number of weights, packed ones counted unpacked.
        weight_bytes: Bytes of all parameters and buffers as stored.
        constant_bytes: Bytes of the quantization constants, which `get_memory_footprint` omits.
        guarded: Number of 4-bit layers whose CPU repacking was switched off.
    """

    name: str
    bits: int
    scheme: str
    device: str
    compute_dtype: torch.dtype
    reason: str
    parameters: int
    weight_bytes: int
    constant_bytes: int
    guarded: int

    @property
    def total_bytes(self) -> int:
        """Weights and quantization constants together, in bytes."""
        return self.weight_bytes + self.constant_bytes

    def __str__(self) -> str:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        lines = [
            f"{self.name}: {self.parameters:,} parameters in {self.scheme}",
            f"  computes in {dtype}: {self.reason}",
            f"  {self.total_bytes / 1e6:,.2f} MB on {self.device}, "
            f"{self.constant_bytes / 1e6:,.2f} MB of it quantization constants",
        ]
        if self.guarded:
            lines.append(f"  {self.guarded} layers guarded against the CPU's silent repacking")
        return "\n".join(lines)


class Loaded(NamedTuple):
    """A model, its tokenizer, and the report of how it was loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: Report


def choose_dtype(device: str) -> tuple[torch.dtype, str]:
    """Decide what to compute in, in one place for the whole course.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The dtype, and the reason in words.

    Raises:
        InputError: The device is another.
    """
    if not isinstance(device, str) or device not in ("cpu", "cuda"):
        raise InputError(f"device {shown(device)} is unknown; choose cpu or cuda")
    if device == "cpu":
        return torch.float32, "a CPU; 16-bit checkpoint values are exact in float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU has native bfloat16, with float32's range"
    return torch.float16, "no native bfloat16 here; float16 needs loss scaling, which is set"


def default_device() -> str:
    """ "cuda" where a CUDA device is present, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    name: str | Path | None = None,
    bits: int = 4,
    *,
    device: str | None = None,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> Loaded:
    """Load a causal language model and its tokenizer, guarded.

    Args:
        name: A hub name or a folder; the embedded model by default and under the name `EMBEDDED`.
        bits: 4 (NF4 or FP4 weights), 8 (LLM.int8) or 16 (as stored; float32 on a CPU).
        device: "cpu" or "cuda"; by default CUDA where there is one.
        quant_type: "nf4" or "fp4", for 4 bits.
        double_quant: Quantize the scales too, for 4 bits.
        compute_dtype: Overrides `choose_dtype`.
        quant_storage: dtype in which packed codes are held; set it to the compute dtype where
            parameters of one dtype are sharded together (FSDP).

    Returns:
        `Loaded(model, tokenizer, report)`; the model is in evaluation mode.

    Raises:
        InputError: If the bits, the device or a type is unknown, the name cannot be loaded, or a
            layer's width would be dequantized wrongly on this CPU.

    Source:
        `BitsAndBytesConfig` of transformers; Dettmers et al. 2023 (QLoRA), section 3.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = default_device() if device is None else device
    dtype, reason = choose_dtype(device)
    _check(bits, device, quant_type, (compute_dtype, quant_storage))
    name = _find(name)
    if compute_dtype is not None:
        dtype, reason = compute_dtype, "it was asked for"
    config, scheme = _quantization(bits, quant_type, double_quant, dtype, quant_storage)
    # Of several processes each has a card of its own, and says which.
    place = torch.cuda.current_device() if device == "cuda" else device
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, quantization_config=config, device_map={"": place}
            )
    except LOAD_ERRORS as error:
        raise cannot_load(name, error) from None
    give_padding(tokenizer)
    guarded = guard(model)
    model.eval()
    report = Report(
        name=without_folders(portable_name(name)),
        bits=bits,
        scheme=scheme,
        device=device,
        compute_dtype=dtype,
        reason=reason,
        parameters=count_parameters(model),
        weight_bytes=model.get_memory_footprint(),
        constant_bytes=constant_bytes(model),
        guarded=guarded,
    )
    return Loaded(model, tokenizer, report)


def find(name: str | Path | None) -> str:
    """Where to load a base from.

    Args:
        name: A hub name, a folder, or None. A path that ends in `EMBEDDED` and is not here (an
            adapter may come from another machine) means the embedded model of this one.

    Returns:
        A folder of this machine, or a hub name.

    Raises:
        InputError: It is no name.
    """
    if name is None:
        return str(embedded_model())
    needs("path", name, "model")
    if portable_name(name) == EMBEDDED and not Path(name).is_dir():
        return str(embedded_model())
    return str(name)


def _find(name: str | Path | None) -> str:
    """As `find`, refusing a path that is no folder here: the hub would be asked for it in vain."""
    place = find(name)
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", place) and not isinstance(name, Path)
    if not hub_name and not Path(place).is_dir():
        raise InputError(f"{place!r} cannot be loaded, there is no such folder; {_HINT}")
    return place


def load_config(name: str | Path | None) -> PretrainedConfig:
    """Read a model's configuration, without its weights.

    Args:
        name: As `find` takes it.

    Raises:
        InputError: There is none of this name.
    """
    from transformers import AutoConfig

    name = _find(name)
    try:
        with quiet():
            return AutoConfig.from_pretrained(name)
    except LOAD_ERRORS as error:
        raise cannot_load(name, error) from None


def portable_name(name: str | Path) -> str:
    """Name a base in a way that also holds elsewhere: `EMBEDDED` for the embedded model.

    Args:
        name: A hub name or a path with slashes or backslashes, from any machine.

    Returns:
        `EMBEDDED` if the path ends so, otherwise the name as it was given.
    """
    slashed = f"/{name}".replace("\\", "/").rstrip("/")
    return EMBEDDED if slashed.endswith(f"/{EMBEDDED}") else str(name)


def cannot_load(name: str, error: Exception) -> InputError:
    """Say in one line that a base cannot be loaded, and why: no network, a gated model, a file."""
    reason = str(error).strip().partition("\n")[0]
    why = f" ({reason})" if reason else ""
    return InputError(f"{name!r} cannot be loaded{why}; {_HINT}")


_HINT = "give a folder with config.json, or a hub name while there is a network"


def _check(bits: int, device: str, quant_type: str, dtypes: tuple) -> None:
    if not isinstance(bits, int) or bits not in BITS:
        raise InputError(
            f"bits={shown(bits)} is not possible; choose 4, 8 or 16, which bitsandbytes can store"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is present; use device='cpu'")
    if quant_type not in ("nf4", "fp4"):
        raise InputError(f"quant_type {shown(quant_type)} is unknown; choose nf4 or fp4")
    compute, storage = dtypes
    for name, dtype, least in (("compute", compute, None), ("storage", storage, torch.uint8)):
        if dtype not in (least, torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"the {name} dtype {shown(dtype)} is not possible; choose "
                f"{'torch.uint8, ' if least else ''}torch.float32, torch.float16 or torch.bfloat16"
            )


def _quantization(bits, quant_type, double_quant, dtype, storage):
    from transformers import BitsAndBytesConfig

    if bits == 16:
        words = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        return None, words.get(dtype, str(dtype))
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True), "int8 (LLM.int8)"
    # Written out on purpose: the library's own defaults are FP4, one level, float32.
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
    level = "double quantization" if double_quant else "float32 scales"
    return config, f"{quant_type.upper()}, blocks of 64, {level}"


@contextmanager
def quiet():
    """Keep the libraries' notes on loading, and on each other's old names, off the screen.

    They differ between CPUs and terminals, so a notebook's stored output would too. Errors are
    raised, not logged, and pass through.
    """
    from transformers.utils import logging as hf_logging

    loggers = [logging.getLogger(n) for n in ("bitsandbytes", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers renamed
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def give_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that padding is a token of its own, never the end token.

    Args:
        tokenizer: Changed in place where it has no padding token or uses its end token.

    Raises:
        InputError: If the vocabulary has no spare token, or this is no tokenizer.
    """
    needs("tokenizer", tokenizer)
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    vocabulary = tokenizer.get_vocab()
    for token in SPARE_TOKENS:
        if token in vocabulary and vocabulary[token] != tokenizer.eos_token_id:
            tokenizer.pad_token = token
            return
    raise InputError(
        "the tokenizer has no token to pad with except its end token; "
        "set tokenizer.pad_token to one that never occurs"
    )


def four_bit_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The bitsandbytes 4-bit layers of a model, by name.

    Raises:
        InputError: This is no model.
    """
    needs("model", model)
    from bitsandbytes.nn import Linear4bit

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def guard(model: torch.nn.Module) -> int:
    """Put the CPU guards on every 4-bit layer; call it before the first forward pass.

    Args:
        model: Any model; layers on other devices are left alone.

    Returns:
        How many layers were guarded.

    Raises:
        InputError: If this is no model, or a layer's width is no multiple of its block size,
            which the CPU kernel would dequantize with wrong scales.
    """
    guarded = 0
    for name, layer in four_bit_layers(model).items():
        if layer.weight.device.type != "cpu":
            continue
        blocksize = layer.weight.quant_state.blocksize if layer.weight.quant_state else 64
        if layer.in_features % blocksize:
            raise InputError(
                f"layer {name} is {layer.in_features} wide, no multiple of the block size "
                f"{blocksize}: bitsandbytes' CPU kernel would read wrong scales; use a GPU, "
                "or 16 bits"
            )
        layer.support_avx512bf16_for_cpu = False
        guarded += 1
    return guarded


def count_parameters(model: torch.nn.Module) -> int:
    """Number of weights, with two codes in each packed byte counted as two."""
    layers = four_bit_layers(model)
    packed = {id(layer.weight) for layer in layers.values()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return total + sum(layer.in_features * layer.out_features for layer in layers.values())


def constant_bytes(model: torch.nn.Module) -> int:
    """Bytes of all quantization constants of a freshly loaded model.

    In 4 bits: scales, second-level scales, offsets and the two code tables (16 and 256 float32
    values, of which each layer has a copy). In 8 bits: one float32 scale for each row.
    """
    total = 0
    for layer in four_bit_layers(model).values():
        # The layer keeps it, too, and still does when FSDP has cut the weight.
        state = layer.weight.quant_state if layer.quant_state is None else layer.quant_state
        for part in (state, state.state2) if state.nested else (state,):
            total += sum(t.nbytes for t in vars(part).values() if isinstance(t, torch.Tensor))
    for parameter in model.parameters():
        scales = getattr(parameter, "SCB", None)  # on the weight until the first forward pass
        total += 0 if scales is None else scales.nbytes
    return total
