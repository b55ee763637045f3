"""Where, how wide, how fast: three small sweeps over one small base, for chapter 2.

    python -m experiments.adapting                     # all that is missing; again after a stop
    python -m experiments.adapting where --seeds 0     # part of it

Two tasks. "orders": orders of one item become JSON; measured are the bits that the model needs
for a right answer it has not seen, and the share of right answers. "codes": each thing has a random
code of four digits; measured are the same two, on the codes that were trained, because nothing
else can be known of them.

- `ranks`: both tasks at ranks 1 to 64 with alpha fixed, so that a first step promises the same at
  every rank; a short run on the orders under two other rules for alpha; rank 1 with more time, and
  more codes with as many passes over each.
- `where`: the same number of trained parameters on all layers, on the attention alone, on two of
  its matrices, on the MLP alone, and as a prefix. Seed 0 tries four or five learning rates for
  each, the other seeds take the best of them.
- `learning_rates`: full fine-tuning and LoRA at two alphas, from rates that do little to rates
  that destroy the model.

`results/cpu/<sweep>/seed<k>.json` holds the runs of a seed by name. A run that is there is not made
again; delete it to repeat it. The base is the embedded model in 16 bits, computed in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

from qlora_lab.provenance import provenance

COMMAND = "python -m experiments.adapting"
SWEEPS = ("ranks", "where", "learning_rates")

RANKS = (1, 4, 16, 64)
MIDDLE = 16  # the rank at which the rules for alpha agree
ALPHA = 256.0  # at that rank, as in qlora_lab.training
TEST_ROWS = 60
TASKS = {
    "orders": {"steps": 200, "batch_size": 4, "lr": 1e-3},
    "short orders": {"steps": 40, "batch_size": 4, "lr": 1e-3},
    "64 codes": {"steps": 80, "batch_size": 16, "lr": 1e-3},  # 20 passes over the codes
    "128 codes": {"steps": 160, "batch_size": 16, "lr": 1e-3},  # and here, too
    "256 codes": {"steps": 320, "batch_size": 16, "lr": 1e-3},
}
# What people hold fixed while they turn the rank.
RULES = {
    "alpha fixed": lambda r: ALPHA,
    "rsLoRA": lambda r: ALPHA * (r / MIDDLE) ** 0.5,  # alpha / sqrt(r) as alpha' / r
    "alpha = 16 r": lambda r: ALPHA * r / MIDDLE,
}
# Ranks that make the numbers of trained parameters equal, to 0.4 %.
PLACES = {
    "all layers": (10, "all-linear"),
    "attention": (24, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "query and value": (48, ["q_proj", "v_proj"]),
    "MLP": (17, ["gate_proj", "up_proj", "down_proj"]),
}
VIRTUAL_TOKENS = 96
PLACE_RATES, PREFIX_RATES = (5e-4, 1e-3, 2e-3, 4e-3), (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LORA_ALPHAS = {"alpha=2r": 2.0 * MIDDLE, "alpha=16r": 16.0 * MIDDLE}


class Bench:
    """The base and the data, loaded once; each run gets its own copy of the model."""

    def __init__(self) -> None:
        from qlora_lab.data import load_orders
        from qlora_lab.loading import load_model
        from qlora_lab.orders import memory_rows

        self.base, self.tokenizer, _ = load_model(None, bits=16, device="cpu")
        orders = load_orders(["train", "pairs"])
        train = [row for row in orders["train"] if one_item(row)]
        test = orders["pairs"].select(range(TEST_ROWS)).to_list()
        self.rows = {task: (train, test) for task in ("orders", "short orders")}
        for count in (64, 128, 256):
            self.rows[f"{count} codes"] = (memory_rows(count),) * 2

    def run(self, task: str, adapter: dict | None, seed: int, **changes) -> tuple[dict, list]:
        """Train once and measure: a plain record, and the loss of each step."""
        import torch

        from qlora_lab.training import train

        settings = TASKS[task] | changes
        rows, test = self.rows[task]
        model = copy.deepcopy(self.base)
        torch.manual_seed(seed)
        model = model if adapter is None else attach(model, **adapter)
        run = train(model, self.tokenizer, rows, **settings, seed=seed, progress=False)
        return {
            **measure(model, self.tokenizer, test, task),
            "trainable": run.trainable,
            "seconds": round(run.seconds, 1),
            "settings": settings | {k: v for k, v in (adapter or {}).items() if k != "targets"},
        }, [round(loss, 4) for loss in run.losses]


def one_item(row: dict) -> bool:
    """Orders of one item without a correction: shorter, so that more fit into the time."""
    return row["answer"].count('"item":') == 1 and not row["correction"]


def attach(model, r=None, alpha=None, targets="all-linear", virtual_tokens=None):
    """PEFT's LoRA, or PEFT's prefix tuning where virtual tokens are given."""
    from peft import PrefixTuningConfig, get_peft_model

    from qlora_lab.loading import quiet
    from qlora_lab.training import attach_adapter

    if virtual_tokens is None:
        return attach_adapter(model, r, alpha, targets=targets)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    with quiet():
        return get_peft_model(model, config)


def measure(model, tokenizer, rows: list[dict], task: str) -> dict:
    """Bits for a right answer and, but after the short runs, the share of right answers."""
    import math

    from qlora_lab.data import prompt
    from qlora_lab.evaluation import generate
    from qlora_lab.loading import quiet
    from qlora_lab.merge import answer_bits
    from qlora_lab.scoring import exact_match, score_lines

    truth = [row["answer"] for row in rows]
    with quiet():
        bits = sum(answer_bits(model, tokenizer, rows)) / len(rows)
        measured = {"bits": round(bits, 3) if math.isfinite(bits) else None}
        if task == "short orders":
            return measured
        prompts = [prompt(row["text"]) for row in rows]
        if task == "orders":
            said = generate(model, tokenizer, prompts, 60, must_start="{")
            right = list(map(exact_match, said, truth))
        else:
            right = score_lines(generate(model, tokenizer, prompts, 6), truth)
    return measured | {"right": round(sum(right) / len(right), 4)}


def ranks(first: dict) -> Iterator[tuple[str, dict]]:
    """The runs of the first sweep: name -> arguments of `Bench.run`."""
    for r in RANKS:
        for task in ("64 codes", "orders"):
            yield f"{task}, r={r}", {"task": task, "adapter": {"r": r, "alpha": ALPHA}}
    # Does rank 1 lack room, or time? Four times as many passes tell.
    long = {"task": "64 codes", "adapter": {"r": 1, "alpha": ALPHA}, "steps": 320}
    yield "64 codes, r=1, four times as long", long
    for task in ("128 codes", "256 codes"):
        for r in (1, 4, 16):
            yield f"{task}, r={r}", {"task": task, "adapter": {"r": r, "alpha": ALPHA}}
    for rule, alpha in RULES.items():
        for r in (1, 16, 64):
            adapter = {"r": r, "alpha": alpha(r)}
            if rule == "alpha fixed" or r != MIDDLE:  # there all rules are the same run
                yield f"short orders, r={r}, {rule}", {"task": "short orders", "adapter": adapter}


def where(first: dict) -> Iterator[tuple[str, dict]]:
    """The runs of the second sweep; after seed 0 only at the best rate of each place."""
    ways = {
        place: ({"r": r, "alpha": ALPHA, "targets": targets}, PLACE_RATES)
        for place, (r, targets) in PLACES.items()
    }
    ways["prefix"] = ({"virtual_tokens": VIRTUAL_TOKENS}, PREFIX_RATES)
    for place, (adapter, rates) in ways.items():
        tried = {lr: first[f"{place}, lr={lr:g}"]["bits"] for lr in rates} if first else {}
        for lr in [min(tried, key=tried.get)] if tried else rates:
            yield f"{place}, lr={lr:g}", {"task": "64 codes", "adapter": adapter, "lr": lr}


def learning_rates(first: dict) -> Iterator[tuple[str, dict]]:
    """The runs of the third sweep."""
    ways = {"full": None} | {
        f"LoRA {name}": {"r": MIDDLE, "alpha": alpha} for name, alpha in LORA_ALPHAS.items()
    }
    for way, adapter in ways.items():
        for lr in RATES:
            yield f"{way}, lr={lr:g}", {"task": "short orders", "adapter": adapter, "lr": lr}


def write(path: Path, record: dict) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="*", default=SWEEPS, metavar=f"{{{','.join(SWEEPS)}}}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="begin no further run after this time")
    parser.add_argument("--out", type=Path, default=Path("results/cpu"))
    args = parser.parse_args()
    unknown = set(args.sweeps) - set(SWEEPS)
    if unknown:
        parser.error(f"no sweep {', '.join(sorted(unknown))}; there are {', '.join(SWEEPS)}")
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    bench = None
    for seed in args.seeds:
        for sweep in args.sweeps:
            first = read(args.out / sweep / "seed0.json")["runs"] if seed else {}
            path = args.out / sweep / f"seed{seed}.json"
            record = read(path)
            for name, arguments in globals()[sweep](first):
                if name in record["runs"]:
                    continue
                if time.monotonic() > end:
                    return
                bench = bench or Bench()
                run, losses = bench.run(**arguments, seed=seed)
                record["runs"][name], record["losses"][name] = run, losses
                write(path, record | {"seed": seed, "provenance": provenance(seed, COMMAND)})
                line = f"{run['bits']} bits, right {run.get('right', '-')}, {run['seconds']} s"
                print(f"seed {seed}, {sweep}, {name}: {line}", flush=True)


def read(path: Path) -> dict:
    """The runs of a seed so far, and their losses."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {"runs": {}, "losses": {}}


if __name__ == "__main__":
    main()
