"""Full fine-tuning, LoRA on 16, 8 and 4 bits by the same harness, over seeds, beside the controls.

    python -m experiments.methods                 # all that is missing; again after a stop
    python -m experiments.methods --seeds 0 1 2 3 4

Each run writes `results/cpu/methods/<method>-seed<k>.json` (on CUDA: `results/gpu/...`) with
losses, scores of the six grades, bits per byte on held-out text afterwards, and its provenance. A
file that exists is not made again; delete it to repeat that run. At the end
`results/cpu/methods/summary.json` collects the exact match of every run, and `answers.json` what
the methods wrote on the first ten rows of two grades, at the first seed. Adapters of QLoRA and LoRA
wait in `runs/methods` for `experiments.merging`, what full fine-tuning added to the weights in
`runs/low_rank` for `experiments.low_rank`.

Beside the four methods: LoRA on a *randomly initialised* base, the base model with three solved
examples in its prompt, and a regular expression. They answer whether pretraining, training and a
model are needed at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from experiments.low_rank import CACHE, keep_update
from qlora_lab.orders import GRADES
from qlora_lab.provenance import provenance

METHODS = ("qlora", "lora", "full", "8bit")
ANSWERED = {"phrasings": 10, "corrections": 10}  # grade -> first rows whose answers are kept
RANK = 16
FORGETTING_FILES = 6  # of the held-out files, by name: 10 seconds instead of a minute
EXAMPLES = 3
KEPT = ("qlora", "lora")  # whose adapters wait in `RUNS` for `experiments.merging`
RUNS = Path("runs/methods")


def one_run(method: str, seed: int, device: str) -> dict:
    """Fine-tune once and measure; the record is ready for JSON."""
    from qlora_lab.data import heldout_texts
    from qlora_lab.evaluation import bits_per_byte
    from qlora_lab.finetuning import finetune, recipe

    texts = list(heldout_texts(FORGETTING_FILES).values())
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "random-base"
        name = random_base(fresh, seed) if method == "lora-random-base" else None
        like = "lora" if name else method
        lr, alpha = recipe(None, like, RANK)  # the random base trains by the same recipe
        output = RUNS / f"{method}-seed{seed}" if method in KEPT and device == "cpu" else None
        if output:
            shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
        result = finetune(
            name,
            like,
            r=RANK,
            alpha=alpha,
            lr=lr,
            seed=seed,
            device=device,
            output=output,
            before=False,
            say=lambda line: print(f"  {line}", flush=True),
        )
        if method == "full" and device == "cpu":
            keep_update(result.model, seed, CACHE)
        record = result.record()
        record["method"] = method
        record["heldout_files"] = FORGETTING_FILES
        # "1" for each row answered right, so that two runs can be compared row by row
        record["right"] = {
            grade: "".join("01"[right] for right in score.exact)
            for grade, score in result.after.items()
        }
        record["answers"] = {
            grade: result.after[grade].predictions[:count] for grade, count in ANSWERED.items()
        }
        after = bits_per_byte(result.model, result.tokenizer, texts)
        record["bits_per_byte_after"] = round(after, 4)
    record["provenance"]["command"] = "python -m experiments.methods"
    print(result.table(), flush=True)
    return record


def random_base(folder: Path, seed: int) -> Path:
    """The embedded model's architecture and tokenizer with weights that learnt nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_lab import embedded_model

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(embedded_model())
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)
    return folder


def base_run(device: str) -> dict:
    """The base model untrained: with no example, with three, and its bits per byte in 16 and 4."""
    from qlora_lab.baselines import few_shot_examples, few_shot_prompt, regex_baseline
    from qlora_lab.data import heldout_texts, load_orders
    from qlora_lab.evaluation import bits_per_byte, evaluate_orders
    from qlora_lab.finetuning import score_record
    from qlora_lab.loading import load_model, quiet
    from qlora_lab.scoring import score

    orders = load_orders()
    tests = {grade: orders[grade] for grade in GRADES}
    shown = few_shot_examples(orders["train"], EXAMPLES)
    texts = list(heldout_texts(FORGETTING_FILES).values())
    model, tokenizer, _ = load_model(bits=16, device=device)
    with quiet():
        zero = evaluate_orders(model, tokenizer, tests)
        few = evaluate_orders(
            model, tokenizer, tests, make_prompt=lambda text: few_shot_prompt(shown, text)
        )
    sixteen = bits_per_byte(model, tokenizer, texts)
    four = bits_per_byte(*load_model(bits=4, device=device)[:2], texts)
    regex = {
        grade: score([regex_baseline(row["text"]) for row in rows], list(rows["answer"]))
        for grade, rows in tests.items()
    }
    return {
        "method": "controls",
        "zero_shot": {grade: score_record(s) for grade, s in zero.items()},
        "few_shot": {grade: score_record(s) for grade, s in few.items()},
        "regex": {grade: score_record(s) for grade, s in regex.items()},
        "examples": EXAMPLES,
        "heldout_files": FORGETTING_FILES,
        "bits_per_byte": {"16-bit": round(sixteen, 4), "nf4": round(four, 4)},
        "provenance": provenance(command="python -m experiments.methods"),
    }


def write(path: Path, record: dict) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(path)


def summarise(folder: Path) -> dict:
    """Exact match of every run: method -> grade -> one value a seed, in order of the seeds."""
    summary: dict = {}
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text("utf-8"))
        rows = summary.setdefault(record["method"], {grade: [] for grade in GRADES})
        for grade in GRADES:
            rows[grade].append(record["after"][grade]["exact_match"])
    return summary


def collect_answers(folder: Path, seed: int = 0) -> dict:
    """What each method wrote at one seed on the rows of `ANSWERED`, beside what is right."""
    from qlora_lab.data import load_orders

    orders = load_orders(list(ANSWERED))
    rows = [row for grade, count in ANSWERED.items() for row in orders[grade].to_list()[:count]]
    answers = {}
    for path in sorted(folder.glob(f"*-seed{seed}.json")):
        record = json.loads(path.read_text("utf-8"))
        if record["method"] in METHODS and "answers" in record:
            said = record["answers"]
            answers[record["method"]] = [text for grade in ANSWERED for text in said[grade]]
    kept = [{key: row[key] for key in ("grade", "text", "answer")} for row in rows]
    return {"seed": seed, "rows": kept, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "lora-random-base"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    out = args.out or Path("results") / ("cpu" if args.device == "cpu" else "gpu") / "methods"
    # Seeds may run side by side: the first of them makes what all of them share.
    if 0 in args.seeds and not (out / "controls.json").exists():
        print("controls", flush=True)
        write(out / "controls.json", base_run(args.device))
    for seed in args.seeds:
        for method in args.methods:
            path = out / f"{method}-seed{seed}.json"
            if not path.exists():
                print(path.stem, flush=True)
                write(path, one_run(method, seed, args.device))
    summary = summarise(out)
    source = provenance(command="python -m experiments.methods")
    write(out / "summary.json", {"exact_match": summary, "provenance": source})
    write(out / "answers.json", collect_answers(out) | {"provenance": source})
    for method, grades in summary.items():
        means = "  ".join(f"{g} {sum(v) / len(v):.1%}" for g, v in grades.items())
        print(f"{method:<17} {means}")


if __name__ == "__main__":
    main()
