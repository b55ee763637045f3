"""The full QLoRA run: transformers' Trainer, PEFT's adapters, bitsandbytes' 4-bit weights.

Nothing of theirs is written again here. What this module adds is the order of the steps and the
few settings on which runs fail quietly:

1. load the base in 4, 8 or 16 bits (`qlora_lab.loading`, with its guards);
2. measure it before training, so that there is something to compare with;
3. put adapters on all linear layers (`attach_adapter`);
4. train on labels that mask the prompt (`qlora_lab.data`);
5. measure again with the same code, and save the adapter (a few hundred kilobytes), not the base.

Four methods share all of it, so that a difference between them is one of method: "qlora" (4 bits
and adapters), "8bit", "lora" (16 bits and adapters), "full" (every weight is trained, no
adapter). Choices: adapters are held in float32 although the base is smaller, because an update of
1e-5 on a bfloat16 number near 1 is rounded away. The gradient is clipped at 1.0, where a small
model rarely gets; the paper clips at 0.3, for models of 7B and more. What can be refused is refused
before the first measurement, not minutes later, and a folder that holds anything is never written.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_lab import distributed, recorded
from qlora_lab.data import collator, encode_rows, load_orders
from qlora_lab.errors import InputError, above_zero, needs, share, shown, texts_of, whole
from qlora_lab.evaluation import Score, evaluate_orders, graded_rows
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
from qlora_lab.lora import unmatched
from qlora_lab.orders import GRADES
from qlora_lab.provenance import provenance

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = {"qlora": 4, "8bit": 8, "lora": 16, "full": 16}
# Those of transformers that need no further setting and no evaluation in between.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
STEPS = 340  # enough for the orders on the embedded model
BATCH_SIZE = 8  # for the same time, twice the steps of 16 rows taught more
# On the embedded model a large scale with a small rate (256 / 16 at 1e-3) learns the task in a
# third of the steps of the usual 2 r at 5e-3: a larger rate shakes A as much as it moves B.
LEARNING_RATE = {"qlora": 1e-3, "8bit": 1e-3, "lora": 1e-3, "full": 1e-3}
ALPHA_OVER_R = 16.0
# Any other base takes the paper's settings for 7B and 13B (QLoRA, appendix B.2), and a usual rate
# for training all weights.
PAPER_LEARNING_RATE = {"qlora": 2e-4, "8bit": 2e-4, "lora": 2e-4, "full": 1e-5}
PAPER_ALPHA = 16.0


@dataclass
class Run:
    """What one training run did.

    Attributes:
        losses: Training loss of each optimizer step, in nats per target token.
        seconds: Time in the training loop.
        trainable: Number of trained parameters.
        peak_bytes: Most CUDA memory allocated at once; None on a CPU.
        recorded: The day this run was recorded, if it was not made here (`qlora_lab.recorded`).
    """

    losses: list[float] = field(repr=False)
    seconds: float
    trainable: int
    peak_bytes: int | None
    recorded: str | None = None


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


def attach_adapter(
    model: PreTrainedModel,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    checkpointing: bool = False,
) -> PeftModel:
    """Put LoRA adapters on a model with PEFT; everything else is frozen.

    Args:
        model: As `load_model` gives it, in 4, 8 or 16 bits.
        r: Rank of every adapter.
        alpha: Scale: the adapter's output is multiplied by alpha / r; 16 r by default,
            which suits the embedded model (`recipe`).
        dropout: Probability of dropping an adapter's input.
        targets: "all-linear" (every linear layer except the output head) or name patterns.
        checkpointing: Recompute activations in the backward pass instead of keeping them.

    Returns:
        The `PeftModel`, with its adapter parameters in float32 and requiring gradients.

    Raises:
        InputError: If the model carries an adapter already, the rank is not between 1 and the
            smallest layer dimension, the dropout is no probability, alpha is not above 0, or no
            layer has one of the names asked for.

    Source:
        Hu et al. 2021 (LoRA), section 4; Dettmers et al. 2023 (QLoRA), section 4: all layers.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    check_adapter(model, r, 1.0 if alpha is None else alpha, dropout)
    alpha = ALPHA_OVER_R * r if alpha is None else alpha
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise InputError(
            "the model carries an adapter already, which a second would wrap; reload it"
        )
    linear = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    if not isinstance(targets, str):
        needs("texts", targets, "targets")
        lost = unmatched(targets, (name for name, _ in model.named_modules()))
        if lost and len(lost) < len(targets):  # PEFT would leave these out without a word
            raise InputError(
                f"of the targets no layer is called {lost}; the linear ones are {names}"
            )
    if getattr(model, "is_quantized", False):
        # It freezes the base and holds norms, embedding and head in float32 for stability.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        recompute_activations(model)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        with quiet():
            return get_peft_model(model, config)
    except (ValueError, re.error):
        raise InputError(
            f"no layer can be adapted by targets={targets!r}; the linear layers are {names}"
        ) from None


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch checkpointing on: activations are computed again in the backward pass, not kept.

    Args:
        model: Changed in place.

    Raises:
        InputError: If this is no transformers model.

    Source:
        Chen et al. 2016 (Training Deep Nets with Sublinear Memory Cost).
    """
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(f"a model {shown(model)} is not possible; give load_model's .model")
    with quiet():
        # The reentrant kind would need an input that requires gradients.
        model.gradient_checkpointing_enable({"use_reentrant": False})


def check_adapter(model: torch.nn.Module, r: int, alpha: float, dropout: float = 0.0) -> None:
    """Refuse a rank, an alpha or a dropout that no adapter of this model can have.

    Args:
        model: The base.
        r: Rank, 1 to the smallest dimension of a linear layer; above it nothing is gained.
        alpha: Scale, above 0: at 0 the adapter adds nothing and learns nothing.
        dropout: A probability, 0 to less than 1.

    Raises:
        InputError: If one of them is outside, or this is no model with linear layers.
    """
    needs("model", model)
    widths = [
        min(m.in_features, m.out_features)
        for name, m in model.named_modules()
        if hasattr(m, "in_features") and "lm_head" not in name
    ]
    if not widths:
        raise InputError("the model has no linear layer: there is nothing to put an adapter on")
    whole("rank", r, 1, min(widths))
    above_zero("alpha", alpha)
    share("dropout", dropout)


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    accumulation: int = 1,
    lr: float = 3e-3,
    warmup: int = 10,
    schedule: str = "cosine",
    max_grad_norm: float = 1.0,
    optim: str = "adamw_torch",
    max_length: int = 512,
    seed: int = 0,
    output: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Train the trainable parameters of a model on rows of text and answer.

    Args:
        model: With adapters, or as it is for full fine-tuning.
        tokenizer: Its tokenizer, with a padding token that is not the end token.
        rows: Rows with "text" and "answer".
        steps: Optimizer steps.
        batch_size: Rows in a forward pass, on each device.
        accumulation: Forward passes for an optimizer step.
        lr: Highest learning rate.
        warmup: Steps over which the rate rises from zero.
        schedule: Shape of the rate afterwards, one of `SCHEDULES`.
        max_grad_norm: Gradients with a larger norm are scaled down to it.
        optim: Any of the Trainer's optimizers, such as "paged_adamw_8bit".
        max_length: Longest row in tokens; a longer one is an error, never cut.
        seed: Order of the rows and dropout.
        output: Folder for checkpoints; needed only for `save_every` and `resume`.
        save_every: Steps between checkpoints.
        resume: Go on from the newest *complete* checkpoint in `output`.
        progress: Show a bar with the loss on a terminal.

    Returns:
        The `Run`: losses, time, trained parameters, peak memory.

    Raises:
        InputError: If a number is out of range, nothing is trainable, the rows cannot be
            encoded, or there is no checkpoint to resume from.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    needs("model", model)
    needs("tokenizer", tokenizer)
    _check_numbers(steps, batch_size, accumulation, lr, seed, save_every)
    whole("warmup", warmup, 0)
    above_zero("max_grad_norm", max_grad_norm)
    _check_optimizer(optim)
    if schedule not in SCHEDULES:
        raise InputError(
            f"schedule {shown(schedule)} is unknown; choose from {', '.join(SCHEDULES)}"
        )
    if output is not None:
        needs("path", output, "output")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise InputError("nothing is trainable; attach an adapter, or train all weights")
    if (save_every or resume) and output is None:
        raise InputError("checkpoints need a folder; give output=...")
    checkpoint = last_complete_checkpoint(output) if resume else None
    if resume and checkpoint is None:
        raise InputError(f"{output} holds no complete checkpoint to resume from")
    dataset = encode_rows(tokenizer, rows, max_length)
    cuda = next(model.parameters()).device.type == "cuda"
    dtype = _compute_dtype(model)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "lr": lr,
        "warmup": warmup,
        "schedule": schedule,
        "max_grad_norm": max_grad_norm,
        "optim": optim,
        "seed": seed,
    }
    fast, keeping = recorded.fast(), "QLORA_LAB_RECORD" in os.environ
    alone = not cuda and distributed.world_size() == 1
    wanted = (fast or keeping) and alone and not (save_every or resume)
    known = recorded.key(model, dataset, settings) if wanted else None
    if known and fast and (kept := recorded.restore(model, known)):
        date = kept["provenance"]["date"]
        return Run(kept["losses"], kept["seconds"], trainable, None, recorded=date)
    # The Trainer makes its folder even if it has nothing to save.
    unsaved = tempfile.TemporaryDirectory() if output is None else None
    arguments = TrainingArguments(
        output_dir=unsaved.name if unsaved else str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=lr,
        warmup_steps=min(warmup, steps // 2),
        lr_scheduler_type=schedule,
        max_grad_norm=max_grad_norm,
        optim=optim,
        weight_decay=0.0,
        seed=seed,
        data_seed=seed,
        use_cpu=not cuda,
        bf16=cuda and dtype == torch.bfloat16,
        fp16=cuda and dtype == torch.float16,
        train_sampling_strategy="sequential",  # in the order of `order_of_rows`
        dataloader_pin_memory=cuda,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or steps,
        logging_steps=1,
        # A NaN must be seen in the losses. The filter would show the mean of the others.
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,  # every adapter is used in every step
        report_to="none",
        disable_tqdm=True,
    )
    rows_a_step = batch_size * accumulation * arguments.world_size
    order = order_of_rows(dataset["length"], rows_a_step, steps, seed)
    with quiet():
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset.select(order),
            data_collator=collator(tokenizer),
            callbacks=[_callback(steps, progress and distributed.is_first())],
        )
        trainer.remove_callback(PrinterCallback)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else None
    if unsaved:
        unsaved.cleanup()
    # The Trainer's history, since after a resume it also holds the steps before.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if known and keeping:
        recorded.keep(model, known, losses, seconds)
    return Run(losses, seconds, trainable, peak)


def order_of_rows(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Draw the rows of a whole run: rows of similar length share a batch, batches are shuffled.

    Less padding means the same steps in less time. The Trainer's own "group_by_length" does the
    first half: it leaves batches sorted, so that the rate decays while only short rows are seen,
    and it draws each epoch's order from PyTorch's global random state, so that a run resumed in
    its second epoch sees other rows than an uninterrupted one. An order drawn once has neither.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a step.
        steps: Number of steps; rows come again, in another order, if there are too few.
        seed: Same seed, same order.

    Returns:
        Indices of rows, steps * batch_size of them. A last batch that an epoch does not fill is
        filled with rows of similar length from the same epoch.

    Source:
        transformers `trainer_pt_utils.get_length_grouped_indices`.

    Raises:
        InputError: If a number is out of range.
    """
    _check_numbers(steps, batch_size, seed=seed)
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        epoch = get_length_grouped_indices(lengths, batch_size, generator=generator)
        while len(epoch) % batch_size:
            epoch.append(epoch[-min(batch_size, len(epoch))])
        batches = torch.tensor(epoch).view(-1, batch_size)
        order += batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()
    return order[: steps * batch_size]


def _check_numbers(
    steps: int,
    batch_size: int,
    accumulation: int = 1,
    lr: float = 1.0,
    seed: int = 0,
    save_every: int | None = None,
) -> None:
    whole("steps", steps)
    whole("batch_size", batch_size)
    whole("accumulation", accumulation)
    above_zero("lr", lr)
    whole("seed", seed, 0, 2**32 - 1)
    if save_every is not None:
        whole("save_every", save_every)


def _check_optimizer(optim: str) -> None:
    from transformers.training_args import OptimizerNames

    if not isinstance(optim, str) or optim not in [name.value for name in OptimizerNames]:
        raise InputError(
            f"optim {shown(optim)} is unknown; choose one of the Trainer's, such as adamw_torch, "
            "paged_adamw_32bit, paged_adamw_8bit or sgd"
        )


def _compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """What the loaded base computes in; full fine-tuning holds float32 and casts down."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    asked = getattr(config, "bnb_4bit_compute_dtype", None)
    if asked is not None and getattr(config, "load_in_4bit", False):
        return asked
    if torch.cuda.is_available():
        from qlora_lab.loading import choose_dtype

        return choose_dtype("cuda")[0]
    return torch.float32


def _callback(steps: int, progress: bool):
    """What the Trainer calls: one bar with the loss, and checkpoints that name no folder."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(
                total=steps, initial=state.global_step, disable=not progress, desc="training"
            )

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update()

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

        def on_save(self, args, state, control, **kwargs):
            if distributed.is_first():
                make_portable(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Callback()


def last_complete_checkpoint(folder: str | Path | None) -> Path | None:
    """Find the newest checkpoint that was written to its end.

    The Trainer writes a checkpoint file by file into its final folder, `trainer_state.json`
    last, and its own `get_last_checkpoint` takes the highest number even if the machine died
    half way. Here a checkpoint counts if its state can be read and names its step, and if no
    file of it was cut off.

    Args:
        folder: Where the `checkpoint-N` folders are.

    Returns:
        The newest complete one, or None.

    Raises:
        InputError: If this is no path.
    """
    if folder is not None:
        needs("path", folder, "folder")
    complete = {}
    processes = _processes_of(folder)
    for path in Path(folder).glob("checkpoint-*") if folder is not None else ():
        try:
            state = json.loads((path / "trainer_state.json").read_text("utf-8"))
            step = int(path.name.removeprefix("checkpoint-"))
        except (OSError, ValueError):
            continue
        if state.get("global_step") != step or not all(map(_is_whole, path.iterdir())):
            continue
        written = len(list(path.glob("rng_state_*.pth")))  # each of several processes writes one
        if not written or written >= processes:
            complete[step] = path
    return complete[max(complete)] if complete else None


def _processes_of(folder: str | Path | None) -> int:
    """How many processes the run in a folder was begun with; 1 if it does not say."""
    try:
        return json.loads((Path(folder or "") / "settings.json").read_text("utf-8"))["processes"]
    except (OSError, ValueError, KeyError):
        return 1


def _is_whole(file: Path) -> bool:
    """Whether a file of weights or of state ends where its own table of contents says."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except (OSError, SafetensorError):
            return False
    if file.suffix in (".pt", ".pth"):  # torch.save writes a zip file, its directory at the end
        return zipfile.is_zipfile(file)
    return True


def recipe(name: str | Path | None, method: str, r: int) -> tuple[float, float]:
    """Choose the learning rate and alpha that suit a base.

    Args:
        name: The base as `finetune` takes it; None is the embedded model.
        method: One of `METHODS`.
        r: Rank of the adapters.

    Returns:
        The learning rate and alpha: tuned ones for the embedded model, those of the paper for
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


def make_portable(folder: Path) -> None:
    """Take this machine's folder of the embedded model out of a saved adapter.

    PEFT writes the path that the base was loaded from into `adapter_config.json`, where it names
    the base (and would name nothing on another machine), and into a model card that is otherwise
    an empty form. The name is replaced by a portable one, the card removed.

    Args:
        folder: An adapter or a checkpoint; one without an adapter is left as it is.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text("utf-8"))
    base = config.get("base_model_name_or_path") or ""
    config["base_model_name_or_path"] = portable_name(base)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "README.md").unlink(missing_ok=True)


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
