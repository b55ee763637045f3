"""A tokenizer and a model small enough to be made inside a test, with the real ones' manners."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_lab import data, orders

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over some orders; the special tokens are those of the embedded model."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = orders.make_rows("train", 300)
    bpe.train_from_iterator([f"# {r['text']}\n{r['answer']}\n\n" for r in rows], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(seed: int = 0, context: int = 128) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path) -> Path:
    """A base to load by its folder, with the embedded model's context."""
    tiny_model(context=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def learn_by_heart(model: LlamaForCausalLM, rows: list[dict], steps: int = 100) -> None:
    """Train until the model answers these rows, so that answers end at different lengths."""
    tokenizer = tiny_tokenizer()
    encoded = [data.encode(tokenizer, row["text"], row["answer"]) for row in rows]
    batch = data.collator(tokenizer)(encoded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
