"""transformers and accelerate, CPUs: the Trainer's `fsdp=True` is passed over without a word.

Two processes train a model of one layer on the CPU with `fsdp=True`. What a process then holds says
whether the weights were cut.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.faults import ABSENT, NOT_HERE, PRESENT, heading, verdict

ROOT = Path(__file__).resolve().parent.parent.parent


def worker(file: Path) -> None:
    """Train two steps as one of the processes; the first writes what it holds."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **shape))
    row = {"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}
    arguments = {"fsdp": True, "fsdp_config": {"version": 2}, "disable_tqdm": True}
    arguments |= {"report_to": "none", "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(folder, max_steps=2, use_cpu=True, **arguments)
        trainer = Trainer(model, options, train_dataset=[row] * 8)
        trainer.train()
    held = [getattr(p, "to_local", lambda p=p: p)() for p in trainer.model.parameters()]
    if trainer.is_world_process_zero():
        found = {
            "wrapped in": type(trainer.model_wrapped).__name__,
            "distributed type": trainer.accelerator.distributed_type.value,
            "numbers held": sum(p.numel() for p in held),
            "numbers in all": sum(p.numel() for p in trainer.model.parameters()),
        }
        file.write_text(json.dumps(found), encoding="utf-8")


def two_processes() -> dict:
    """Start them and return what the first wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", "2", "-m", "experiments.faults.fsdp_on_cpu", str(file)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(start, cwd=ROOT, env=env, check=True, capture_output=True)
        return json.loads(file.read_text(encoding="utf-8"))


def main() -> str:
    import torch.distributed

    heading("The Trainer's fsdp=True on two CPU processes", "transformers", "accelerate", "torch")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return verdict(NOT_HERE, "this PyTorch has no gloo")
    found = two_processes()
    for name, value in found.items():
        print(f"  {name:17}{value:,}" if isinstance(value, int) else f"  {name:17}{value}")
    if found["numbers held"] == found["numbers in all"]:
        return verdict(PRESENT, "asked to cut the weights, it copies them whole, without a word")
    return verdict(ABSENT, "the weights are cut")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(Path(sys.argv[1]))
    else:
        main()
