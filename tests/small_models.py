"""Small models of seven architectures that really exist: loaded in 4 bits, adapted by PEFT."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

VOCABULARY, BATCH, SEQUENCE = 320, 2, 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCABULARY, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=4, n_head=4),
    "gpt2": GPT2Config(**GPT, n_embd=64, n_positions=64, **NO_DROPOUT),
    # Classes of attention and of linear layers of its own; the latter are not quantized.
    "falcon": FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=4, num_attention_heads=4
    ),
    # A gate of width 1, narrower than any rank but 1, and experts that are no linear layers.
    "qwen2-moe": Qwen2MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def save_checkpoints(tmp_path_factory):
    """Folders with a random float32 checkpoint of each architecture."""
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


def load(folder, dtype=torch.float32, bits=16, double_quant=True, attention=None):
    extra = {"attn_implementation": attention} if attention else {}
    if bits == 4:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).train()


def adapt(model, r=4, targets="all-linear", kbit_prep=False):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if kbit_prep:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))


def build(folder, method, dtype=torch.float32, attention=None, kbit_prep=False, r=4):
    """The real thing for each method of the ledger."""
    bits = 4 if method == "qlora" else 16
    model = load(folder, dtype, bits, attention=attention)
    return model if method == "full" else adapt(model, r=r, kbit_prep=kbit_prep)


def quant_state_tensors(model):
    """Every tensor of every quant_state in a model, found by looking and not by name."""

    def tensors(state):
        for value in vars(state).values():
            if isinstance(value, torch.Tensor):
                yield value
            elif type(value).__name__ == "QuantState":
                yield from tensors(value)

    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):
            yield from tensors(parameter.quant_state)


def token_ids():
    return torch.randint(3, VOCABULARY, (BATCH, SEQUENCE), generator=torch.manual_seed(1))
