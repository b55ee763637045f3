"""transformers: grouping rows by length sorts the batches, and its order is not the run's seed's.

`train_sampling_strategy="group_by_length"` saves padding. Up to fifty batches in a row come longest
first, so the learning rate decays while the rows grow shorter. The order is drawn from PyTorch's
global random state: whatever drew a number before changes it.
"""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from experiments.faults import ABSENT, PRESENT, heading, verdict

ROWS, BATCH = 1600, 8


def main() -> str:
    heading("Rows grouped by length", "transformers", "torch")
    lengths = torch.randint(20, 140, (ROWS,), generator=torch.manual_seed(0)).tolist()

    def order(draws_before: int) -> list[int]:
        torch.manual_seed(1)
        torch.rand(draws_before)
        return list(LengthGroupedSampler(BATCH, lengths=lengths))

    first, second = order(0), order(1)
    batches = torch.tensor([lengths[i] for i in first], dtype=torch.float).view(-1, BATCH)
    means = batches[:50].mean(dim=1)
    falling = (means[1:] <= means[:-1]).float().mean().item()
    print(f"  mean length of batches 1, 25, 50: {means[1]:.0f}, {means[24]:.0f}, {means[49]:.0f}")
    print(f"  of the first 50 batches, {falling:.0%} are no longer than the one before")
    print(f"  same seed, one number drawn before: same order {first == second}")
    if falling > 0.9 and first != second:
        return verdict(PRESENT, "batches are sorted, and the seed alone does not fix the order")
    return verdict(ABSENT, "batches are mixed, or the order follows from the seed")


if __name__ == "__main__":
    main()
