"""Ship a QLoRA adapter in five ways, over seeds: the merge ladder.

    python -m experiments.merging                 # all that is missing; again after a stop
    python -m experiments.merging --seeds 0 1 2 3 4

For each seed: train QLoRA to the end (the recipe of `experiments.methods`), measure each rung of
`qlora_lab.merge.ladder` on the same orders, and cross it with a 16-bit LoRA of the same seed: both
adapters on both bases. Writes `results/cpu/merging/seed<k>.json`, with provenance and the hash
of the base. A file that exists is not made again; delete it to repeat that seed.

The QLoRA adapter of seed 0 is kept beside the records (1.3 MB), so that chapter 10 can climb the
ladder live without 80 seconds of training. It belongs to the base with that hash and to no other.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from pathlib import Path

from experiments.methods import RANK, write
from qlora_lab.provenance import provenance

GRADES = ("pairs", "phrasings")  # bits are measured on both, exact match on the harder one
FILES, CHARACTERS = 12, 800  # of the held-out Python, as much as tells a rung from another


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


def trained(method: str, seed: int, folder: Path) -> dict:
    """Train one adapter, save it in `folder`/adapter, and return its settings and seconds."""
    from qlora_lab.training import finetune

    result = finetune(
        None, method, r=RANK, seed=seed, device="cpu", before=False, tests={}, output=folder
    )
    return {"settings": result.settings, "seconds": round(result.run.seconds, 2)}


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
    """How large the update is beside its weights, and what 4-bit codes keep of it."""
    import torch

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
    assert all(torch.isfinite(torch.tensor(row["size"])) for row in found.values())
    return found


def one_seed(seed: int, keep: Path | None) -> dict:
    """Train, climb, cross; the record is ready for JSON."""
    from qlora_lab import embedded_model
    from qlora_lab.evaluation import paired_difference
    from qlora_lab.loading import load_model
    from qlora_lab.merge import RUNGS, ladder

    measure, sizes = measuring(load_model(None, bits=16, device="cpu").tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {method: Path(temporary) / method for method in ("qlora", "lora")}
        training = {method: trained(method, seed, folders[method]) for method in folders}
        adapters = {method: folder / "adapter" for method, folder in folders.items()}
        rungs = ladder(None, adapters["qlora"], measure, device="cpu")
        stored, merged_bytes = stored_in_16_bits(adapters["qlora"], measure)
        table = cross(adapters, measure)
        size_of_updates = updates(adapters["qlora"])
        adapter_bytes = (adapters["qlora"] / "adapter_model.safetensors").stat().st_size
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(adapters["qlora"] / name, keep / name)
    reference = rungs[RUNGS[0]]["answer_bits"]

    def against_the_first(bits: list[float]) -> dict:
        added = paired_difference(reference, bits, sizes)
        return {
            "bits_per_byte": round(sum(bits) / sum(sizes), 5),
            "added": [round(x, 5) for x in added],
        }

    return {
        "seed": seed,
        "training": training,
        "rows": len(sizes),
        "answer_bytes": sum(sizes),
        "rungs": {
            name: {
                "exact_match": {g: sum(e) / len(e) for g, e in found["exact"].items()},
                "python_bits_per_byte": round(found["python"], 4),
                **against_the_first(found["answer_bits"]),
            }
            for name, found in rungs.items()
        },
        "stored in bfloat16": against_the_first(stored),
        "cross": {name: round(sum(bits) / sum(sizes), 5) for name, bits in table.items()},
        "updates": size_of_updates,
        "bytes": {"adapter": adapter_bytes, "merged in bfloat16": merged_bytes},
        "base_sha256": hashlib.sha256(
            (Path(embedded_model()) / "model.safetensors").read_bytes()
        ).hexdigest(),
        "provenance": provenance(seed, command="python -m experiments.merging"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/cpu/merging"))
    args = parser.parse_args()
    for seed in args.seeds:
        path = args.out / f"seed{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            record = one_seed(seed, args.out / "adapter" if seed == 0 else None)
            write(path, record)
            for name, rung in record["rungs"].items():
                scores = " ".join(f"{g} {e:.0%}" for g, e in rung["exact_match"].items())
                print(f"  {name:27} {rung['bits_per_byte']:.4f} {rung['added']} {scores}")
            print(" ", record["cross"], flush=True)


if __name__ == "__main__":
    main()
