"""The full QLoRA run, from data to a folder: transformers' Trainer, PEFT's adapters, 4-bit weights.

What this module adds to `qlora_lab.training` is the order of the steps:

1. load the base in 4, 8 or 16 bits (`qlora_lab.loading`, with its guards);
2. measure it before training, so that there is something to compare with;
3. put adapters on all linear layers (`attach_adapter`);
4. train on labels that mask the prompt (`train`);
5. measure again with the same code, and save the adapter (a few hundred kilobytes), not the base.

Four methods share all of it, so that a difference between them is one of method: "qlora" (4 bits
and adapters), "8bit", "lora" (16 bits and adapters), "full" (every weight is trained, no
adapter). What can be refused is refused before the first measurement, not minutes later, and a
folder that holds anything is never written.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qlora_lab import distributed
from qlora_lab.data import load_orders
from qlora_lab.errors import InputError, above_zero, needs, share, shown, texts_of, whole
from qlora_lab.evaluation import evaluate_orders
from qlora_lab.loading import (
    EMBEDDED,
    Loaded,
    Report,
    choose_dtype,
    default_device,
    load_model,
    portable_name,
    quiet,
)
from qlora_lab.orders import GRADES
from qlora_lab.provenance import provenance
from qlora_lab.scoring import Score, graded_rows
from qlora_lab.training import (
    ALPHA_OVER_R,
    BATCH_SIZE,
    STEPS,
    Run,
    _check_numbers,
    _check_optimizer,
    attach_adapter,
    check_adapter,
    last_complete_checkpoint,
    make_portable,
    recompute_activations,
    train,
)

METHODS = {"qlora": 4, "8bit": 8, "lora": 16, "full": 16}
# On the embedded model, at the large scale of `ALPHA_OVER_R`.
LEARNING_RATE = {"qlora": 1e-3, "8bit": 1e-3, "lora": 1e-3, "full": 1e-3}
# Any other base takes the paper's settings for 7B and 13B (QLoRA, appendix B.2), and a usual rate
# for training all weights.
PAPER_LEARNING_RATE = {"qlora": 2e-4, "8bit": 2e-4, "lora": 2e-4, "full": 1e-5}
PAPER_ALPHA = 16.0


@dataclass
class Result:
    """A fine-tuning run from loading to saving.

    Attributes:
        method: One of `METHODS`.
        report: How the base was loaded.
        run: The training itself.
        before: Score of each grade before training; empty if it was not asked for.
        after: Score of each grade after training.
        folder: Where everything was saved, or None.
        evaluation_seconds: Time spent on both evaluations.
        settings: Hyperparameters, for the record.
    """

    method: str
    report: Report
    run: Run
    before: dict[str, Score]
    after: dict[str, Score]
    folder: Path | None
    evaluation_seconds: float
    settings: dict[str, Any]
    model: Any = field(repr=False, default=None)
    tokenizer: Any = field(repr=False, default=None)

    def table(self) -> str:
        """Exact match before and after with a 95 % bootstrap interval, one grade a line."""
        lines = [f"{'grade':<12} {'before':>8} {'after':>8}   95 % interval    valid JSON   n"]
        for grade, after in self.after.items():
            before = f"{self.before[grade].exact_match:.1%}" if self.before else "-"
            low, high = after.interval()
            lines.append(
                f"{grade:<12} {before:>8} {after.exact_match:>8.1%}   "
                f"{low:>6.1%} .. {high:<6.1%} {after.valid_json:>10.1%} {len(after.exact):>5}"
            )
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Everything measured, with provenance, as plain values for JSON."""
        report = asdict(self.report)
        report["compute_dtype"] = str(self.report.compute_dtype)
        return {
            "method": self.method,
            "settings": self.settings,
            "base": report,
            "seconds": {
                "training": round(self.run.seconds, 2),
                "evaluation": round(self.evaluation_seconds, 2),
            },
            "peak_bytes": self.run.peak_bytes,
            "trainable": self.run.trainable,
            "before": {grade: score_record(s) for grade, s in self.before.items()},
            "after": {grade: score_record(s) for grade, s in self.after.items()},
            "losses": [round(x, 6) for x in self.run.losses],
            "provenance": provenance(self.settings["seed"]),
        }


def score_record(score: Score) -> dict[str, Any]:
    """Turn a score into plain values for JSON: shares from 0 to 1, the interval, the row count."""
    low, high = score.interval()
    return {
        "exact_match": round(score.exact_match, 4),
        "interval": [round(low, 4), round(high, 4)],
        "valid_json": round(score.valid_json, 4),
        "fields": {k: round(v, 4) for k, v in score.fields.items()},
        "n": len(score.exact),
    }


def recipe(name: str | Path | None, method: str, r: int) -> tuple[float, float]:
    """Choose the learning rate and alpha that suit a base.

    Args:
        name: The base as `finetune` takes it; None is the embedded model.
        method: One of `METHODS`.
        r: Rank of the adapters.

    Returns:
        The learning rate and alpha: found by a few trials for the embedded model, the paper's for
        any other.

    Raises:
        InputError: The method is unknown, or the rank is below 1.

    Source:
        Dettmers et al. 2023 (QLoRA), appendix B.2: 2e-4 and alpha 16 for 7B and 13B.
    """
    if method not in tuple(METHODS):
        raise InputError(f"method {shown(method)} is unknown; choose from {', '.join(METHODS)}")
    whole("rank", r)
    if name is not None:
        needs("path", name, "model")
    if portable_name(EMBEDDED if name is None else name) == EMBEDDED:
        return LEARNING_RATE[method], ALPHA_OVER_R * r
    return PAPER_LEARNING_RATE[method], PAPER_ALPHA


def finetune(
    name: str | Path | None = None,
    method: str = "qlora",
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    tests: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    lr: float | None = None,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    accumulation: int = 1,
    optim: str | None = None,
    checkpointing: bool = False,
    seed: int = 0,
    device: str | None = None,
    before: bool = True,
    output: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    shard: bool = False,
    progress: bool = True,
    say=lambda line: None,
) -> Result:
    """Run QLoRA from end to end: load, measure, train, measure, save.

    Args:
        name: Hub name or folder of the base; the embedded model by default.
        method: "qlora", "8bit", "lora" or "full".
        rows: Training rows with "text" and "answer"; the orders by default.
        tests: Test sets by name; the six grades of the orders by default. May be empty.
        r: Rank of the adapters.
        alpha: Their scale; by default what `recipe` says.
        dropout: Their dropout.
        lr: Learning rate; by default what `recipe` says.
        steps: Optimizer steps.
        batch_size: Rows in a forward pass, of each process where torchrun started several.
        accumulation: Forward passes for a step.
        optim: The Trainer's optimizer; paged AdamW on CUDA, plain AdamW on a CPU.
        checkpointing: Recompute activations in the backward pass.
        seed: Of adapters, order of rows and dropout.
        device: "cpu" or "cuda".
        before: Also measure before training.
        output: New folder for the adapter and the record; nothing is saved without it.
        save_every: Steps between checkpoints, in `output`.
        resume: Go on in `output` from its newest complete checkpoint, with the same settings.
        shard: Of several processes, each keeps a share of the weights (FSDP) and not all (DDP).
        progress: Show progress on a terminal.
        say: Called with a line of text at each stage.

    Returns:
        The `Result`, with the trained model in it.

    Raises:
        InputError: If an argument is out of range, or `output` holds anything that this run is not
            resuming; in both cases before anything is measured or written.
    """
    full = method == "full"
    usual_lr, usual_alpha = recipe(name, method, r)
    lr = usual_lr if lr is None else lr
    alpha = usual_alpha if alpha is None else alpha
    device = default_device() if device is None else device
    if optim is None:  # paging knows no shares
        optim = "paged_adamw_32bit" if device == "cuda" and not shard else "adamw_torch"
    _check_numbers(steps, batch_size, accumulation, lr, seed, save_every)
    _check_optimizer(optim)
    if (save_every or resume) and output is None:
        raise InputError("checkpoints need a folder; give output=...")
    above_zero("alpha", alpha)
    share("dropout", dropout)
    if rows is not None:
        needs("rows", rows)
        rows = list(rows)  # looked at twice
        for row in rows:
            texts_of(row, "text", "answer")
    if tests is not None:
        graded_rows(tests)
    if shard:
        _check_shard(method, bool(save_every or resume))
    distributed.start(device)
    folder = None if output is None else distributed.first(lambda: check_output(output, resume))

    compute_dtype = torch.float32 if full else None
    storage = choose_dtype(device)[0] if shard and method == "qlora" else torch.uint8
    loaded = load_model(
        name, METHODS[method], device=device, compute_dtype=compute_dtype, quant_storage=storage
    )
    model, tokenizer, report = loaded
    say(str(report))
    if not full:
        check_adapter(model, r, alpha, dropout)
    orders = load_orders() if rows is None or tests is None else {}
    rows = orders["train"] if rows is None else rows
    tests = {grade: orders[grade] for grade in GRADES} if tests is None else tests
    settings = {
        "method": method,
        "base": report.name,
        "r": None if full else r,
        "alpha": None if full else alpha,
        "dropout": None if full else dropout,
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "optim": optim,
        "seed": seed,
        "processes": distributed.world_size(),
    }
    batch = 120 if report.device == "cpu" else 360

    seconds = 0.0
    first: dict[str, Score] = {}
    if before and tests:
        say("measuring the base model, before training")
        first, seconds = _timed_evaluation(model, tokenizer, tests, batch)
    if folder is not None:
        distributed.first(lambda: claim(folder, settings, resume))
    torch.manual_seed(seed)  # the same adapters whether or not something was measured before
    if not full:
        model = attach_adapter(model, r, alpha, dropout, checkpointing=checkpointing)
    elif checkpointing:
        recompute_activations(model)
    if shard:
        distributed.shard(model)
    run = train(
        model,
        tokenizer,
        rows,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        lr=lr,
        optim=optim,
        seed=seed,
        output=folder,
        save_every=save_every,
        resume=resume,
        progress=progress,
    )
    after: dict[str, Score] = {}
    if tests:
        say("measuring again, after training")
        after, more = _timed_evaluation(model, tokenizer, tests, batch)
        seconds += more
    result = Result(method, report, run, first, after, folder, seconds, settings, model, tokenizer)
    if folder is not None:
        save(result, folder)
    return result


def _check_shard(method: str, checkpoints: bool) -> None:
    if method not in ("qlora", "lora"):
        raise InputError(f"method {method!r} is not shared out here; choose qlora or lora")
    if checkpoints:
        raise InputError(
            "the Trainer would save one process's share of Adam's moments; "
            "checkpoints need a run without shard"
        )
    if distributed.world_size() == 1:
        raise InputError(distributed.ALONE)


def _timed_evaluation(model, tokenizer, tests, batch) -> tuple[dict[str, Score], float]:
    start = time.perf_counter()
    with quiet():
        scores = evaluate_orders(model, tokenizer, tests, batch_size=batch)
    return scores, time.perf_counter() - start


def check_output(output: str | Path, resume: bool = False) -> Path:
    """Refuse a folder that holds anything, unless it holds an unfinished run to go on with.

    Args:
        output: The folder; it need not exist.
        resume: Whether the run in it is to be gone on with.

    Returns:
        The folder as a path. Nothing is written yet.

    Raises:
        InputError: If it holds a finished run, is not empty (without `resume`), is no folder, or
            holds no complete checkpoint (with `resume`).
    """
    needs("path", output, "output")
    folder = Path(output)
    if (folder / "result.json").exists():
        raise InputError(f"{folder} already holds a finished run; choose another --output")
    if resume and last_complete_checkpoint(folder) is None:
        raise InputError(f"{folder} holds no complete checkpoint to resume from")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a new folder as --output")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise InputError(f"{folder} is not empty; choose another --output, or --resume in it")
    return folder


def claim(folder: Path, settings: Mapping[str, Any], resume: bool = False) -> None:
    """Make the folder of a run its own by writing `settings.json` into it.

    Two runs may have been sent to one folder at the same time: the file is created exclusively,
    so the second stops before it has written anything. A resumed run reads it instead, because
    other settings would go on with a schedule or with adapters of another shape. The rows of a
    step may be shared out otherwise than before: one process can go on where two had begun.

    Args:
        folder: Made if absent.
        settings: Plain values for JSON.
        resume: Whether the settings must be there already, and equal.

    Raises:
        InputError: If another run has the folder, the settings differ, or it cannot be made.
    """
    file = folder / "settings.json"
    try:
        if resume:
            begun = json.loads(file.read_text("utf-8"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as out:
                json.dump(settings, out, indent=1)
            return
    except FileExistsError:
        raise InputError(f"{folder} belongs to another run; choose another --output") from None
    except (OSError, ValueError):
        raise InputError(f"{file} cannot be used; choose another --output") from None
    rows, begun_rows = _rows_a_step(settings), _rows_a_step(begun)
    if rows != begun_rows:
        raise InputError(
            f"the run in {folder} was begun with {begun_rows} rows a step, not {rows}: "
            "batch size times accumulation times processes has to stay the same"
        )
    for key, value in settings.items():
        if begun.get(key) != value and key not in _SHARES:
            raise InputError(
                f"the run in {folder} was begun with {key}={begun.get(key)}, not {value}; "
                "resume it with the same settings"
            )


_SHARES = ("batch_size", "accumulation", "processes")


def _rows_a_step(settings: Mapping[str, Any]) -> int:
    return math.prod(settings.get(key, 1) for key in _SHARES)


def save(result: Result, folder: Path) -> None:
    """Save adapter (or full model), tokenizer and `result.json`, the record last.

    `result.json` marks a finished run, so it is moved into place only when all else is written.
    Of several processes the first writes; all of them help to gather what is cut.
    """
    target = folder / ("model" if result.method == "full" else "adapter")
    gathered = distributed.gather_trained(result.model)
    if not distributed.is_first():
        return
    with quiet():
        result.model.save_pretrained(target, state_dict=gathered)
        result.tokenizer.save_pretrained(target)
    make_portable(target)
    partial = folder / "result.json.part"
    partial.write_text(json.dumps(result.record(), indent=1) + "\n", "utf-8")
    os.replace(partial, folder / "result.json")


def load_adapter(folder: str | Path, name: str | Path | None = None, **loading: Any) -> Loaded:
    """Load a base and put a saved adapter on it, for use.

    Args:
        folder: The folder of a run, or the `adapter` folder in it.
        name: The base; by default the one that the adapter names.
        **loading: Further arguments of `load_model`.

    Returns:
        `Loaded(model, tokenizer, report)`; the model is a `PeftModel` in evaluation mode.

    Raises:
        InputError: If the folder holds no adapter, or one for a base of another shape.
    """
    from peft import PeftModel

    needs("path", folder, "adapter")
    folder = Path(folder)
    if (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if (folder / "model" / "config.json").is_file():
        raise InputError(f"{folder} holds a whole model; load {folder / 'model'} as the base")
    config = folder / "adapter_config.json"
    if not config.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder} holds no adapter; give the adapter folder of a finished run")
    try:
        named = json.loads(config.read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{config} is damaged: it names no base model") from None
    loaded = load_model(named if name is None else name, **loading)
    try:
        with quiet():
            model = PeftModel.from_pretrained(loaded.model, str(folder))
    except (RuntimeError, ValueError, SafetensorError):
        raise InputError(f"{folder} does not fit {loaded.report.name}; is it the base?") from None
    return Loaded(model.eval(), loaded.tokenizer, loaded.report)
