"""What people ask next, run small: DoRA, IA3, LoftQ and 8 bits beside QLoRA, and how much data.

    python -m experiments.next            # all that is missing; again after a stop

Every run has the same steps, batch, rows and seeds; each writes `results/cpu/next/<method>-
seed<k>.json` with its losses, the loss on validation rows, the exact match on unseen pairs and its
provenance. A file that exists is not made again. At the end `summary.json` collects them.

The runs are short on purpose (under a fifth of the course's): they show what each method *is* on a
4-bit base, what it costs and that it trains. They do not rank the methods. QLoRA's learning rate
was tuned for this model; DoRA, LoftQ and 8 bits use the same. IA3's vectors want a
larger one, and were given 0.03: nobody searched, so IA3 could do better than is recorded.

LoftQ starts the adapter at the best low-rank approximation of what the rounding took away. PEFT's
own code for it needs a CUDA device (`experiments/faults/loftq_on_cpu.py` shows where it stops), so
its one step is written out in `start_at_the_residual`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

from experiments.methods import write
from qlora_lab.provenance import provenance

METHODS = ("qlora", "dora", "ia3", "loftq", "8bit")
SIZES = (50, 400)  # of the 6,000 rows; all of them is the run "qlora"
STEPS = 60
BATCH = 8
RANK = 16
LEARNING_RATE = {"ia3": 3e-2}
VALIDATION_ROWS = 96
PAIRS = 40
OUT = Path("results/cpu/next")
COMMAND = "python -m experiments.next"
PAGE = Path("book/what_people_ask_next.md")
FIRST_MARK, LAST_MARK = "<!-- measured -->", "<!-- end -->"
TITLES = {
    "qlora": "QLoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "loftq": "LoftQ",
    "8bit": "8-bit LoRA",
    "qlora-400rows": "QLoRA, 400 rows",
    "qlora-50rows": "QLoRA, 50 rows",
}


def adapted(method: str):
    """Load the base and put the method's adapter on it: (model, tokenizer, seconds of init)."""
    from peft import IA3Config, LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qlora_lab.loading import load_model, quiet
    from qlora_lab.training import ALPHA_OVER_R

    model, tokenizer, report = load_model(bits=8 if method == "8bit" else 4)
    if method == "ia3":
        config = IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    else:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=ALPHA_OVER_R * RANK,
            target_modules="all-linear",
            use_dora=method == "dora",
        )
    with quiet():
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, config)
    distance = start_at_the_residual(model) if method == "loftq" else None
    return model, tokenizer, report, distance


def start_at_the_residual(model) -> dict[str, float]:
    """LoftQ with one iteration: B A * scaling = the best rank-r part of W minus its 4-bit form.

    Returns the relative error of the weights without and with the adapter, over all layers.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit
    from safetensors import safe_open

    from qlora_lab import embedded_model

    original = safe_open(Path(embedded_model()) / "model.safetensors", "pt")
    whole = before = after = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        weight = original.get_tensor(name.removeprefix("base_model.model.") + ".weight").float()
        base = layer.base_layer.weight
        residual = weight - dequantize_4bit(base.data, base.quant_state).float()
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        root = (s[:RANK] / layer.scaling["default"]).sqrt()  # PEFT's own leaves the scaling out
        layer.lora_B["default"].weight.data = (u[:, :RANK] * root).contiguous()
        layer.lora_A["default"].weight.data = (root[:, None] * vh[:RANK]).contiguous()
        whole += weight.square().sum().item()
        before += residual.square().sum().item()
        after += s[RANK:].square().sum().item()
    return {"without": (before / whole) ** 0.5, "with": (after / whole) ** 0.5}


def validation_loss(model, tokenizer, rows) -> float:
    """Mean loss of a target token on rows that no run has trained on, in nats."""
    import torch

    from qlora_lab.data import collator, encode_rows

    encoded = encode_rows(tokenizer, rows, 512)
    collate = collator(tokenizer)
    total = tokens = 0.0
    for start in range(0, len(encoded), 24):
        columns = ("input_ids", "attention_mask", "labels")
        rows_here = [
            {key: encoded[i][key] for key in columns if key in encoded[i]}
            for i in range(start, min(start + 24, len(encoded)))
        ]
        batch = collate(rows_here)
        with torch.no_grad():
            count = (batch["labels"][:, 1:] != -100).sum().item()
            total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens


def one_run(method: str, seed: int, size: int | None = None) -> dict:
    """Train once and measure; the record is ready for JSON."""
    import torch

    from qlora_lab.data import load_orders
    from qlora_lab.evaluation import evaluate_orders
    from qlora_lab.finetuning import LEARNING_RATE as TUNED
    from qlora_lab.finetuning import score_record
    from qlora_lab.loading import quiet
    from qlora_lab.training import train

    orders = load_orders()
    rows = orders["train"] if size is None else orders["train"].shuffle(seed).select(range(size))
    torch.manual_seed(seed)
    model, tokenizer, report, distance = adapted(method)
    before = validation_loss(model.eval(), tokenizer, orders["validation"].select(range(48)))
    lr = LEARNING_RATE.get(method, TUNED["qlora"])
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        run = train(
            model, tokenizer, rows, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed, progress=False
        )
    cpu = time.process_time() - start
    model.eval()
    validation = orders["validation"].select(range(VALIDATION_ROWS))
    with quiet():
        after = validation_loss(model, tokenizer, validation)
        pairs = {"pairs": orders["pairs"].select(range(PAIRS))}
        score = None if size else evaluate_orders(model, tokenizer, pairs)["pairs"]
    return {
        "method": method,
        "rows": len(rows),
        "steps": STEPS,
        "batch_size": BATCH,
        "lr": lr,
        "bits": report.bits,
        "trainable": run.trainable,
        "weight_error": distance,
        "validation_loss_before": round(before, 4),
        "validation_loss": round(after, 4),
        "pairs": score_record(score) if score else None,
        "cpu_seconds_per_step": round(cpu / STEPS, 3),
        "losses": [round(x, 5) for x in run.losses],
        "provenance": provenance(seed, command=COMMAND),
    }


def summarise(folder: Path) -> dict:
    """Per method or size: one value a seed for each measure."""
    summary: dict = {}
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text("utf-8"))
        row = summary.setdefault(
            path.stem.rpartition("-seed")[0],
            {"trainable": record["trainable"], "rows": record["rows"], "bits": record["bits"]},
        )
        row.setdefault("validation_loss", []).append(record["validation_loss"])
        row.setdefault("cpu_seconds_per_step", []).append(record["cpu_seconds_per_step"])
        row.setdefault("validation_loss_before", []).append(record["validation_loss_before"])
        if record["pairs"]:
            row.setdefault("exact_match", []).append(record["pairs"]["exact_match"])
            row.setdefault("valid_json", []).append(record["pairs"]["valid_json"])
    return summary


def table(summary: dict) -> str:
    """The page's table: one row a method, one value a seed."""
    lines = [
        "| Method | Numbers trained | Validation loss |",
        "|---|---|---|",
    ]
    for name, title in TITLES.items():
        row = summary[name]
        loss = " ".join(f"{x:.2f}" for x in row["validation_loss"])
        lines.append(f"| {title} | {row['trainable']:,} | {loss} |")
    return "\n".join(lines)


def stamp(page: Path, text: str) -> None:
    """Write the table into the page, between its two marks."""
    before, _, rest = page.read_text("utf-8").partition(FIRST_MARK)
    after = rest.partition(LAST_MARK)[2]
    page.write_text(f"{before}{FIRST_MARK}\n\n{text}\n\n{LAST_MARK}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--sizes", type=int, nargs="*", default=[*SIZES])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    plan = [(method, None, seed) for seed in args.seeds for method in args.methods]
    plan += [("qlora", size, seed) for seed in args.seeds for size in args.sizes]
    for method, size, seed in plan:
        stem = f"{method}-{size}rows" if size else method
        path = args.out / f"{stem}-seed{seed}.json"
        if not path.exists():
            record = one_run(method, seed, size)
            write(path, record)
            print(path.stem, record["validation_loss"], record["cpu_seconds_per_step"], flush=True)
    summary = summarise(args.out)
    write(args.out / "summary.json", {"runs": summary, "provenance": provenance(command=COMMAND)})
    if args.out == OUT:
        stamp(PAGE, table(summary))
    for name, row in summary.items():
        print(f"{name:<14} {row['trainable']:>9,} {row['validation_loss']}")


if __name__ == "__main__":
    main()
