"""transformers: a loss that is not a number is logged as a number.

`TrainingArguments.logging_nan_inf_filter` is on by default. A NaN step is reported as the mean of
the steps since the last log, which is 0 where every step is logged, while its gradients are
applied: the log shows numbers, the weights are gone.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from experiments.faults import ABSENT, PRESENT, heading, verdict

STEPS, BROKEN = 6, 3


class Fails(torch.nn.Module):
    """A regression whose loss becomes NaN at one step, as a division by zero would make it."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
        self.calls = 0

    def forward(self, x, labels):
        self.calls += 1
        loss = (self.linear(x).squeeze(-1) - labels).square().mean()
        return {"loss": loss / 0 * 0 if self.calls == BROKEN else loss}


def run(**settings) -> tuple[list[float], bool]:
    """Logged losses, and whether the weights are still finite."""
    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.tensor(1.0)} for _ in range(STEPS)]
    model = Fails()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            **settings,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses, bool(torch.isfinite(model.linear.weight).all())


def main() -> str:
    heading(f"A loss of NaN at step {BROKEN} of {STEPS}", "transformers", "torch")
    default, finite = run()
    plain, _ = run(logging_nan_inf_filter=False)
    print("  logged by default:           " + " ".join(f"{x:.3f}" for x in default))
    print("  logged without the filter:   " + " ".join(f"{x:.3f}" for x in plain))
    print(f"  weights finite at the end: {finite}")
    if not finite and all(x == x for x in default):
        return verdict(PRESENT, "the log shows numbers, the weights are NaN")
    return verdict(ABSENT, "the log shows that something broke")


if __name__ == "__main__":
    main()
