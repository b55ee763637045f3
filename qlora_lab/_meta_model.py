"""A run's model without its weights: what `memory` counts and `activations` runs.

Any `transformers` config is instantiated on whatever device is current: on PyTorch's "meta" device
a tensor has a shape and a dtype but no memory. Then the libraries' rules are applied, as a run
would apply them:

1. GPT-2's `Conv1D` becomes the linear layer that it is;
2. what would be quantized is named by `transformers`' own rule (`quantizable`);
3. PEFT's `prepare_model_for_kbit_training` casts the rest to float32, if the run asks for it;
4. every layer with an adapter is replaced by a stand-in that keeps what PEFT's layer keeps.

The choice made here: a stand-in (`Adapter`) in place of PEFT's layer on top of bitsandbytes'. Those
quantize real weights on a real device; the stand-in has their shapes and saves their tensors, and
the tests hold it to them.

Source: transformers `quantizers/base.py` and `integrations/bitsandbytes.py`; peft
`tuners/lora/bnb.py` and `utils/other.py` (`prepare_model_for_kbit_training`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.errors import InputError, shown, whole
from qlora_lab.lora import find_targets

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw_8bit")

STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types on whose `out_proj` PEFT puts no adapter: their kernel reads the weight itself, past
the adapter. Source: peft `tuners/tuners_utils.py`, `_check_lora_target_modules_mamba`."""


@dataclass(frozen=True)
class Run:
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
        quantized = set(quantizable(model)) if self.method == "qlora" else set()
        if self.casts_to_float32:
            _cast_to_float32(model, except_weights_of=quantized)
        targets = find_targets(model, self.targets)
        self._check_targets(targets)
        for name, layer in targets.items():
            adapter = Adapter(layer, self, name in quantized)
            model.set_submodule(name, adapter)
        return model

    def _check_targets(self, targets: dict[str, nn.Module]) -> None:
        """Refuse, in one line, layers and ranks that no run can have."""
        refused = any(name.endswith(".out_proj") for name in targets)
        if refused and self.config.model_type in STATE_SPACE:
            raise InputError(
                f"PEFT puts no adapter on out_proj in a {type(self.config).__name__} model: "
                "give targets without it"
            )
        # One narrow layer among others, a gate of width 1 say, is no reason: PEFT accepts it too.
        widest = max(min(each.in_features, each.out_features) for each in targets.values())
        if self.r > widest:
            raise InputError(
                f"rank {self.r} is larger than every layer with an adapter: give 1..{widest}"
            )


class Adapter(nn.Module):
    """A stand-in for PEFT's LoRA layer that saves for the backward pass what PEFT's saves.

    The base is an ordinary frozen linear layer also where the run has a 4-bit one: neither keeps
    its input, because a frozen weight needs no gradient (bitsandbytes keeps only the codes).

    Source:
        peft `tuners/lora/layer.py`, `Linear.forward`; `tuners/lora/bnb.py`,
        `Linear4bit.forward`; bitsandbytes `nn/modules.py`, `Linear4bit.forward`.
    """

    def __init__(self, base: nn.Linear, run: Run, quantized: bool):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(run.r, base.in_features, dtype=run.adapter_dtype))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, run.r, dtype=run.adapter_dtype))
        self.dropout = run.dropout
        self.compute_dtype = run.dtype if quantized else None

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # some models read a layer's dtype from its weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # and some hand it to a kernel; PEFT's layer has both

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
            name = _register_causal_attention() if fused else "eager"
            try:
                return auto.from_config(config, dtype=dtype, attn_implementation=name)
            except KeyError as error:
                if error.args != (name,):
                    raise
                # Some look the name up among classes of their own. Plain sdpa is right for them:
                # of those that read text, Falcon makes its mask in a real run too.
                return auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
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


def quantizable(model: nn.Module) -> list[str]:
    """Names of the layers that `load_in_4bit` quantizes, by transformers' own rule."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if type(module.base if isinstance(module, Adapter) else module) is nn.Linear
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


# Arguments


def as_config(config: PretrainedConfig | str) -> PretrainedConfig:
    """Return a config as it is, and read the one of a model's path or name."""
    from transformers import PretrainedConfig

    if isinstance(config, str | os.PathLike):
        from qlora_lab.loading import load_config

        return load_config(config)
    if not isinstance(config, PretrainedConfig):
        raise InputError(
            f"config is a {type(config).__name__}: give a transformers config or a model's path"
        )
    return config


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return one of the three dtypes that a run can have, by itself or by its name."""
    names = ("bfloat16", "float16", "float32")
    name = (dtype if isinstance(dtype, str) else shown(dtype)).removeprefix("torch.")
    if name not in names:
        raise InputError(f"dtype {name!r} is not possible here: give one of {', '.join(names)}")
    return getattr(torch, name)


def check_run(
    method: str, r: int, batch: int, sequence: int, optimizer: str, attention: str
) -> None:
    """Refuse what no run can have, in one line."""
    if method not in METHODS:
        raise InputError(f"method {shown(method)} is unknown: give one of {', '.join(METHODS)}")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer {shown(optimizer)} is unknown: give {' or '.join(OPTIMIZERS)}")
    for name, value, least in (("r", r, 1), ("batch", batch, 0), ("sequence", sequence, 1)):
        whole(name, value, least)
    if attention not in ("sdpa", "eager"):
        raise InputError(f"attention {shown(attention)} is unknown: give 'sdpa' or 'eager'")
