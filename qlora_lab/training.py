"""Training: transformers' Trainer, PEFT's adapters, and the settings on which runs fail quietly.

Nothing of theirs is written again here. `attach_adapter` puts adapters on all linear layers,
`train` runs the Trainer on labels that mask the prompt (`qlora_lab.data`), and
`last_complete_checkpoint` says from where a stopped run can go on.

Choices: adapters are held in float32 although the base is smaller, because an update of 1e-5 on a
bfloat16 number near 1 is rounded away. The gradient is clipped at 1.0, where a small model rarely
gets; the paper clips at 0.3, for models of 7B and more. The order of the rows is drawn once for the
whole run, so that a resumed run sees the rows of an uninterrupted one.
"""

from __future__ import annotations

import gc
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_lab import distributed, recorded
from qlora_lab.data import collator, encode_rows
from qlora_lab.errors import InputError, above_zero, needs, share, shown, whole
from qlora_lab.loading import portable_name, quiet
from qlora_lab.lora import unmatched

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
BATCH_SIZE = 8
# A large scale with a small rate: a larger rate shakes A as much as it moves B (chapter 2,
# section 3), and results/cpu/learning_rates has both sides of the best one.
ALPHA_OVER_R = 16.0


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
            width of the widest layer, the dropout is no probability, alpha is not above 0, or no
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
        r: Rank, 1 to the smaller dimension of the widest linear layer; above it nothing is gained.
            (One narrow layer among others, a gate of width 1 say, is no limit: PEFT accepts it.)
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
    whole("rank", r, 1, max(widths))
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
    if cuda and distributed.world_size() == 1:
        # One process uses one card. With a second one visible the Trainer would double the batch
        # and, since it spreads no quantized model, count each loss twice.
        arguments._n_gpu = 1
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
            gc.collect()  # a 4-bit weight refers to its layer and the layer to it
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() + _paged_bytes(trainer.optimizer) if cuda else None
    if unsaved:
        unsaved.cleanup()
    # The Trainer's history, since after a resume it also holds the steps before.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if known and keeping:
        recorded.keep(model, known, losses, seconds)
    return Run(losses, seconds, trainable, peak)


def _paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the driver pages: bitsandbytes takes them past PyTorch's own count."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if getattr(value, "is_paged", False))


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
