"""Full fine-tuning, then the same knife for two patients: the weight and the update, over seeds.

    python -m experiments.low_rank                # all that is missing; again after a stop
    python -m experiments.low_rank --seeds 1 2    # part of it

A fine-tuned layer is W + D: the weight W that pretraining left and the update D that training
added. For each seed all weights are trained on the orders. Then one of the two is cut to rank r in
all linear layers, the other is left whole, and the model is measured again:

- exact match on two grades of the orders;
- bits per byte of their right answers, which moves before exact match does;
- bits per byte of Python, the first 800 characters of every third held-out file.

Embeddings and norms keep what training made of them, except in the points "update, embeddings put
back". "update, strongest removed" keeps all but the r strongest directions.

`results/cpu/low_rank/cuts-seed<k>.json` holds these, `update-seed<k>.json` what each update looks
like, `similarity.json` how alike the updates of different seeds are, and `update.safetensors` the
update of seed 0 in bfloat16, cut to rank 64, so that a chapter can cut it further without
training. The updates themselves stay in `runs/low_rank/`, which git does not take. A point that
is there is not measured again; delete a file to repeat it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qlora_lab.provenance import provenance

GRADES = ("pairs", "phrasings")
ROWS = 60  # of each grade: with two grades one batch
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 256)
CUTS = {
    "update": RANKS,
    "weight": (16, 64, 128, 192, 224, 240),
    "update, embeddings put back": (16, 256),
    "update, strongest removed": (16,),
}
STORED_SEED, STORED_RANK = 0, 64
CHARACTERS = 800  # of a held-out file, as in chapter 4
CACHE = Path("runs/low_rank")
COMMAND = "python -m experiments.low_rank"


def trained_update(seed: int, cache: Path) -> dict:
    """Fine-tune all weights once; return what was added to each parameter, by its name.

    `experiments.methods` makes the same run and leaves its update here: then nothing is trained.
    """
    import torch

    from qlora_lab.finetuning import finetune

    if not _file(seed, cache).exists():
        result = finetune(
            None, "full", seed=seed, device="cpu", before=False, tests={}, progress=False, say=print
        )
        keep_update(result.model, seed, cache)
    return torch.load(_file(seed, cache))


def keep_update(model, seed: int, cache: Path) -> None:
    """Write what full fine-tuning added to each parameter of the base."""
    import torch

    from qlora_lab.loading import load_model

    base = dict(load_model(None, bits=16, device="cpu").model.named_parameters())
    update = {name: (after - base[name]).detach() for name, after in model.named_parameters()}
    cache.mkdir(parents=True, exist_ok=True)
    path = _file(seed, cache)
    torch.save(update, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _file(seed: int, cache: Path) -> Path:
    return cache / f"update-seed{seed}.pt"


def base_digest() -> str:
    """Name the base's weights: an update fits no other base."""
    import hashlib

    from qlora_lab import embedded_model

    weights = Path(embedded_model()) / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def is_layer(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer, and not the embedding or a norm."""
    return name.endswith("proj.weight")


class Patient:
    """The base model and an update, to be put together with one of them cut."""

    def __init__(self, update: dict):
        import torch

        from qlora_lab.data import heldout_texts, load_orders
        from qlora_lab.loading import load_model

        self.model, self.tokenizer, _ = load_model(None, bits=16, device="cpu")
        self.base = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.update = update
        self.parts = {
            "weight": {n: torch.linalg.svd(w, False) for n, w in self.base.items() if is_layer(n)},
            "update": {n: torch.linalg.svd(d, False) for n, d in update.items() if is_layer(n)},
        }
        self.tests = {g: rows.select(range(ROWS)) for g, rows in load_orders(GRADES).items()}
        self.texts = [text[:CHARACTERS] for text in heldout_texts().values()][::3]

    def cut(self, what: str, rank: int) -> None:
        """Write the weights of one point of the sweep into the model."""
        which = what.partition(",")[0]
        for name, base in self.base.items():
            whole = base + self.update[name]
            if is_layer(name):
                u, s, vh = self.parts[which][name]
                strong = (u[:, :rank] * s[:rank]) @ vh[:rank]
                if what == "weight":
                    whole = strong + self.update[name]
                elif what == "update, strongest removed":
                    whole = whole - strong
                elif rank < min(base.shape):
                    whole = base + strong
            elif what == "update, embeddings put back":
                whole = base
            self.model.get_parameter(name).data.copy_(whole)

    def measure(self) -> dict:
        """Exact match, bits per byte of the answers and of Python, as plain values."""
        from qlora_lab.evaluation import evaluate_orders, text_bits
        from qlora_lab.loading import quiet

        with quiet():
            scores = evaluate_orders(self.model, self.tokenizer, self.tests)
        python = sum(text_bits(self.model, self.tokenizer, self.texts))
        return {
            "exact_match": {grade: round(s.exact_match, 4) for grade, s in scores.items()},
            "valid_json": {grade: round(s.valid_json, 4) for grade, s in scores.items()},
            "answer_bits_per_byte": {
                grade: round(answer_bits(self.model, self.tokenizer, rows), 4)
                for grade, rows in self.tests.items()
            },
            "python_bits_per_byte": round(
                python / sum(len(text.encode("utf-8")) for text in self.texts), 4
            ),
        }


def answer_bits(model, tokenizer, rows, batch_size: int = 50) -> float:
    """Bits that the model needs for a byte of the right answers, given the orders."""
    import math

    import torch

    from qlora_lab.data import IGNORED, collator, encode_rows

    encoded = encode_rows(tokenizer, rows).select_columns(["input_ids", "attention_mask", "labels"])
    collate = collator(tokenizer)
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(encoded), batch_size):
            batch = collate([encoded[i] for i in range(first, min(first + batch_size, len(rows)))])
            targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            nats += model(**batch).loss.item() * targets
    return nats / math.log(2) / sum(len(answer.encode("utf-8")) for answer in rows["answer"])


def shape(update: dict, base: dict) -> dict:
    """What the update of each layer looks like, beside the weight that it was added to."""
    import torch

    from qlora_lab.low_rank import amplification, effective_rank, energy, subspace_similarity

    rows = {}
    for name, delta in update.items():
        if not is_layer(name):
            continue
        weight, spectra = base[name], {}
        for kind, matrix in (("update", delta), ("weight", weight)):
            spectra[kind] = {
                "rank": int(torch.linalg.matrix_rank(matrix)),
                "effective_rank": round(effective_rank(matrix), 2),
                "energy": {r: round(energy(matrix, r), 4) for r in RANKS if r},
                "norm": round(matrix.norm().item(), 4),
            }
        rows[name] = spectra | {
            "amplification": round(amplification(weight, delta, 4), 2),
            "similarity_to_weight": {
                r: round(subspace_similarity(delta, weight, r, r), 4) for r in (4, 16, 64)
            },
        }
    return rows


def similarities(updates: dict[int, dict]) -> dict:
    """phi(r, r) between the updates of two seeds, for each pair of seeds, layer and r."""
    from itertools import combinations

    from qlora_lab.low_rank import subspace_similarity

    return {
        f"{one} and {other}": {
            name: {
                r: round(subspace_similarity(delta, updates[other][name], r, r), 4)
                for r in (1, 4, 16, 64)
            }
            for name, delta in updates[one].items()
            if is_layer(name)
        }
        for one, other in combinations(sorted(updates), 2)
    }


def store(update: dict, path: Path) -> None:
    """Write the update of the linear layers, cut to `STORED_RANK`, as factors in bfloat16."""
    import torch
    from safetensors.torch import save_file

    from qlora_lab.low_rank import truncate

    tensors = {}
    for name, delta in update.items():
        if is_layer(name):
            B, A = truncate(delta, STORED_RANK)
            tensors |= {f"{name}.B": B, f"{name}.A": A}
        else:
            tensors[name] = delta
    stored = {key: t.to(torch.bfloat16).contiguous() for key, t in tensors.items()}
    save_file(stored, path, {"command": COMMAND, "base": base_digest()})


def write(path: Path, record: dict) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(path)


def cuts_of_seed(seed: int, update: dict, path: Path) -> None:
    """Measure the points of one seed that are missing, writing after each."""
    record = json.loads(path.read_text("utf-8")) if path.exists() else {"seed": seed, "cuts": {}}
    todo = [
        (what, rank)
        for what, ranks in CUTS.items()
        for rank in ranks
        if str(rank) not in record["cuts"].get(what, {})
    ]
    patient = Patient(update) if todo else None
    for what, rank in todo:
        patient.cut(what, rank)
        point = patient.measure()
        record["cuts"].setdefault(what, {})[str(rank)] = point
        record |= {"base": base_digest(), "provenance": provenance(seed, COMMAND)}
        write(path, record)
        print(f"seed {seed}: {what} at rank {rank}: {point}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/cpu/low_rank"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()

    from qlora_lab.loading import load_model

    base = dict(load_model(None, bits=16, device="cpu").model.named_parameters())
    updates = {}
    for seed in args.seeds:
        updates[seed] = update = trained_update(seed, args.cache)
        path = args.out / f"update-seed{seed}.json"
        if not path.exists():
            source = provenance(seed, COMMAND)
            layers = shape(update, base)
            write(
                path, {"seed": seed, "base": base_digest(), "layers": layers, "provenance": source}
            )
        if seed == STORED_SEED and not (args.out / "update.safetensors").exists():
            store(update, args.out / "update.safetensors")
        cuts_of_seed(seed, update, args.out / f"cuts-seed{seed}.json")
    if len(updates) > 2 and not (args.out / "similarity.json").exists():
        write(
            args.out / "similarity.json",
            {"phi": similarities(updates), "provenance": provenance(command=COMMAND)},
        )


if __name__ == "__main__":
    main()
