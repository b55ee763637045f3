"""Execute the chapters with another model: `python -m tools.other_model`, or with `04 09`.

Each of the chapters 0 to 11 promises that `MODEL` is the one variable to change. So this makes a
small model of another architecture (a Qwen2 with random weights: grouped queries, biases, other
widths), puts its folder into `MODEL` and executes the chapters from top to bottom. Nothing is
stored. A chapter may skip what it asserts of the embedded model, and must not stop.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError

from qlora_lab import embedded_model
from tools.notebooks import NOTEBOOKS, chapters, read
from tools.run_notebooks import execute

LINE = re.compile(r"^MODEL = None\b.*$", re.MULTILINE)


def make_model(folder: Path) -> None:
    """Write a small random Qwen2 with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_model(notebook: nbformat.NotebookNode, name: str) -> int:
    """Put a model's name into `MODEL`; return in how many places."""
    places = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, found = LINE.subn(f"MODEL = {name!r}", cell.source)
            places += found
    return places


def main(numbers: list[str]) -> int:
    """Execute the chapters that have a `MODEL`; return how many stopped."""
    stopped = 0
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for path in chapters():
            notebook = read(path)
            chosen = not numbers or path.name[:2] in numbers
            if not chosen or not with_model(notebook, folder):
                continue
            try:
                print(f"{path.stem}: {execute(notebook, NOTEBOOKS):.0f} s", flush=True)
            except CellExecutionError as error:
                stopped += 1
                print(f"{path.stem} stopped\n{error}", flush=True)
    return stopped


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
