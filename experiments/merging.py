"""Ship a QLoRA adapter in five ways, over seeds: the merge ladder.

    python -m experiments.merging                 # all that is missing; again after a stop
    python -m experiments.merging --seeds 0 1 2 3 4

For each seed two files in `results/cpu/merging`:

- `seed<k>.json`: QLoRA trained to the end (the recipe of `experiments.methods`) and measured on
  each rung of `qlora_lab.merge.ladder`; beside it two *light* adapters, stopped after 10 and 40
  steps, whose updates are small.
- `cross-seed<k>.json`: the same adapter and a 16-bit LoRA of the same seed, each on both bases.

A file that exists is not made again; delete it to repeat it. Trained adapters wait in
`runs/merging`, so that a stop costs one training run at most.

The QLoRA adapter of seed 0 is kept beside the records (1.3 MB), so that chapter 10 can climb the
ladder live without 80 seconds of training. It belongs to the base whose hash is recorded with it,
and to no other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from experiments.methods import KEPT, RANK, RUNS, write
from qlora_lab.provenance import provenance

GRADES = ("pairs", "phrasings")  # bits are measured on both, exact match on the harder one
FILES, CHARACTERS = 12, 800  # of the held-out Python, as much as tells a rung from another
LIGHT = (10, 40)  # steps of adapters that have hardly begun
WORK = Path("runs/merging")


def measuring(tokenizer):
    """One function of a model that returns all measures, and the bytes of the right answers."""
    from qlora_lab.data import heldout_texts, load_orders
    from qlora_lab.evaluation import evaluate_orders, text_bits
    from qlora_lab.loading import quiet
    from qlora_lab.merge import answer_bits

    tests = load_orders(GRADES)
    rows = [row for grade in GRADES for row in tests[grade]]
    texts = [text[:CHARACTERS] for text in heldout_texts(FILES).values()]
    text_bytes = sum(len(text.encode()) for text in texts)

    def measure(model, whole: bool = True) -> dict:
        with quiet():
            found = {"answer_bits": answer_bits(model, tokenizer, rows)}
            if whole:
                hard = {GRADES[-1]: tests[GRADES[-1]]}
                scores = evaluate_orders(model, tokenizer, hard)
                found["exact"] = {grade: score.exact for grade, score in scores.items()}
                found["python"] = sum(text_bits(model, tokenizer, texts)) / text_bytes
        return found

    return measure, [len(row["answer"].encode()) for row in rows]


def trained(method: str, seed: int, steps: int | None = None) -> Path:
    """The folder of a finished run, trained now unless an earlier start has done it."""
    from qlora_lab.finetuning import finetune
    from qlora_lab.training import STEPS

    shared = RUNS / f"{method}-seed{seed}"
    if steps is None and method in KEPT and (shared / "result.json").exists():
        return shared  # the same run, kept by `experiments.methods`
    steps = STEPS if steps is None else steps
    folder = WORK / f"{method}-seed{seed}-{steps}"
    if not (folder / "result.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped
        options = {"r": RANK, "seed": seed, "steps": steps, "device": "cpu", "output": folder}
        finetune(None, method, before=False, tests={}, progress=False, **options)
    return folder


def trained_record(folder: Path) -> dict:
    """What the run says of itself."""
    result = json.loads((folder / "result.json").read_text("utf-8"))
    return {key: result[key] for key in ("settings", "seconds", "provenance")}


def stored_in_16_bits(adapter: Path, measure) -> tuple[list[float], int]:
    """What is really shipped after a merge: a bfloat16 checkpoint, loaded again."""
    from qlora_lab.loading import load_model
    from qlora_lab.merge import dequantized_base, merge_into, save_merged

    tokenizer = load_model(None, bits=16, device="cpu").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        size = save_merged(merge_into(dequantized_base(None, "cpu"), adapter), tokenizer, folder)
        model = load_model(folder, bits=16, device="cpu").model
        return measure(model, whole=False)["answer_bits"], size


def cross(adapters: dict[str, Path], measure) -> dict:
    """Bits of the right answers for each adapter on each base, and for the bases alone."""
    from peft import PeftModel

    from qlora_lab.loading import load_model

    table: dict = {}
    for base in (4, 16):
        model = load_model(None, bits=base, device="cpu").model
        table[f"{base}-bit base alone"] = measure(model, whole=False)["answer_bits"]
        for name, folder in adapters.items():
            adapted = PeftModel.from_pretrained(model, str(folder))
            table[f"{name} on {base} bits"] = measure(adapted, whole=False)["answer_bits"]
            model = adapted.unload()
    return table


def updates(adapter: Path) -> dict:
    """How large the update of each layer is, in sigmas of its weights, and what NF4 keeps of it."""
    from qlora_lab.blockwise import fake_quantize
    from qlora_lab.loading import load_model
    from qlora_lab.lora import load_adapter, lora_layers

    model = load_model(None, bits=16, device="cpu").model
    load_adapter(model, adapter)
    found = {}
    for name, layer in lora_layers(model).items():
        weight, update = layer.base.weight.detach(), layer.delta().double()
        grid = fake_quantize(weight)
        kept = {}
        for start, before in (("on the codes", grid), ("from the original", weight)):
            moved = (fake_quantize(before + update.float()) - grid).double()
            kept[start] = round((moved * update).sum().item() / update.square().sum().item(), 4)
        size = update.square().mean().sqrt().item() / weight.double().std().item()
        found[name] = {"size": round(size, 4), "kept": kept}
    return found


def against(reference: list[float], bits: list[float], sizes: list[int]) -> dict:
    """Bits per byte of the answers, and what they are above the first rung's, with interval."""
    from qlora_lab.intervals import paired_difference

    added = paired_difference(reference, bits, sizes)
    return {
        "bits_per_byte": round(sum(bits) / sum(sizes), 5),
        "added": [round(x, 5) for x in added],
    }


def climb(adapter: Path, measure, sizes: list[int], whole: bool) -> dict:
    """Every rung's record."""
    from qlora_lab.merge import ladder

    rungs = ladder(None, adapter, lambda model: measure(model, whole), device="cpu")
    reference = rungs["unmerged"]["answer_bits"]
    records = {}
    for name, found in rungs.items():
        records[name] = against(reference, found["answer_bits"], sizes)
        if whole:
            shares = {grade: sum(e) / len(e) for grade, e in found["exact"].items()}
            records[name] |= {
                "exact_match": shares,
                "python_bits_per_byte": round(found["python"], 4),
            }
    return records


def one_ladder(seed: int, keep: Path | None) -> dict:
    """Train and climb; the record is ready for JSON."""
    from qlora_lab.loading import load_model
    from qlora_lab.merge import dequantized_base, merge_into

    measure, sizes = measuring(load_model(None, bits=16, device="cpu").tokenizer)
    run = trained("qlora", seed)
    adapter = run / "adapter"
    stored, merged_bytes = stored_in_16_bits(adapter, measure)
    exact = measure(merge_into(dequantized_base(None, "cpu"), adapter).eval(), whole=False)
    record = {
        "seed": seed,
        "rows": len(sizes),
        "answer_bytes": sum(sizes),
        "training": trained_record(run),
        "rungs": climb(adapter, measure, sizes, whole=True),
        "stored in bfloat16": against(exact["answer_bits"], stored, sizes),
        "updates": updates(adapter),
        "light": {},
        "bytes": {
            "adapter": (adapter / "adapter_model.safetensors").stat().st_size,
            "merged in bfloat16": merged_bytes,
        },
        "base_sha256": base_hash(),
    }
    for steps in LIGHT:
        light = trained("qlora", seed, steps) / "adapter"
        record["light"][str(steps)] = {
            "rungs": climb(light, measure, sizes, whole=False),
            "updates": updates(light),
        }
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(adapter / name, keep / name)
    return record


def one_cross(seed: int) -> dict:
    """Two adapters on two bases; the record is ready for JSON."""
    from qlora_lab.loading import load_model

    measure, sizes = measuring(load_model(None, bits=16, device="cpu").tokenizer)
    runs = {method: trained(method, seed) for method in ("qlora", "lora")}
    table = cross({method: run / "adapter" for method, run in runs.items()}, measure)
    moved = {
        method: against(table[f"{method} on {home} bits"], table[f"{method} on {away} bits"], sizes)
        for method, home, away in (("qlora", 4, 16), ("lora", 16, 4))
    }
    return {
        "seed": seed,
        "training": {method: trained_record(run) for method, run in runs.items()},
        "bits_per_byte": {name: round(sum(bits) / sum(sizes), 5) for name, bits in table.items()},
        "moved": moved,
        "base_sha256": base_hash(),
    }


def base_hash() -> str:
    """Which base all this is about."""
    from qlora_lab import embedded_model

    return hashlib.sha256((Path(embedded_model()) / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["ladder", "cross"])
    parser.add_argument("--out", type=Path, default=Path("results/cpu/merging"))
    args = parser.parse_args()
    keep = args.out / "adapter"
    parts = {
        "ladder": ("seed", lambda seed: one_ladder(seed, None if seed else keep)),
        "cross": ("cross-seed", one_cross),
    }
    for part in args.parts:
        stem, make = parts[part]
        for seed in args.seeds:
            path = args.out / f"{stem}{seed}.json"
            if path.exists():
                continue
            print(path.stem, flush=True)
            record = make(seed)
            record["provenance"] = provenance(seed, command="python -m experiments.merging")
            write(path, record)


if __name__ == "__main__":
    main()
