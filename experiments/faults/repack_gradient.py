"""bitsandbytes, AVX512-BF16: after an evaluation no gradient passes through a 4-bit layer.

The layer stays on the inference kernel when it is put back into training mode, and that kernel has
no backward pass. What lies below the layer is no longer trained; the loss falls a little and
stalls.
"""

import warnings

import torch

from experiments.faults import (
    ABSENT,
    NOT_HERE,
    PRESENT,
    evaluate,
    has_avx512bf16,
    heading,
    layer,
    read,
    verdict,
)


def main() -> str:
    heading("The gradient through a layer that was evaluated once", "bitsandbytes", "torch")
    made = layer()
    weight = read(made).clone()
    evaluate(made)
    made.train()
    x = torch.randn(3, made.in_features, requires_grad=True)
    loss = made(x).square().sum() + 0 * x.sum()  # the second term: there is always a graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # all that the library says
        loss.backward()
    expected = 2 * x.detach() @ weight.T @ weight
    missing = ((x.grad - expected).norm() / expected.norm()).item()
    print(f"  share of the gradient that is missing: {missing:.3f}")
    if missing > 0.1:
        return verdict(PRESENT, "everything below this layer has stopped learning")
    if has_avx512bf16():
        return verdict(ABSENT, "this CPU repacks, and the gradient is whole")
    return verdict(NOT_HERE, "the layer stays on its training path on this CPU")


if __name__ == "__main__":
    main()
