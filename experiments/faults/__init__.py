"""Faults of the libraries, each shown by a script of its own that runs in seconds.

    python -m experiments.faults                 # all of them
    python -m experiments.faults.row_scales      # one

Every script has a `main()` that prints what it finds and returns one of three words: `PRESENT`,
`ABSENT` (this version does not have the fault) or `NOT_HERE` (this CPU does not run the code that
has it). Nothing is imitated: where a script calls a part of the library by hand, because this CPU
would not call it by itself, the line that it prints says so.
"""

from __future__ import annotations

PRESENT = "present"
ABSENT = "absent in this version"
NOT_HERE = "not on this CPU"

SCRIPTS = (
    "row_scales",
    "repack_crash",
    "repack_merge",
    "repack_gradient",
    "repack_save",
    "scale_table",
    "one_packed_row",
    "hidden_nan",
    "half_checkpoint",
    "grouped_order",
    "footprint",
    "adapter_path",
    "loftq_on_cpu",
    "fsdp_on_cpu",
)


def heading(title: str, *packages: str) -> None:
    """Print what is looked at, and with which versions on which CPU."""
    from importlib.metadata import version

    print(title)
    print("  " + ", ".join(f"{name} {version(name)}" for name in packages))
    if "bitsandbytes" in packages:
        flags = {"AVX512F": has_avx512f(), "AVX512-BF16": has_avx512bf16()}
        print("  this CPU: " + ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in flags.items()))


def has_avx512f() -> bool:
    """What bitsandbytes' own library finds; PyTorch's setting does not change it."""
    from bitsandbytes.cextension import lib

    try:
        return bool(lib.has_avx512f_cpu())
    except (AttributeError, OSError):
        return False


def has_avx512bf16() -> bool:
    """Whether bitsandbytes repacks 4-bit weights on this CPU."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def verdict(word: str, reason: str) -> str:
    """Print the verdict and return its word."""
    print(f"  -> {word}: {reason}")
    return word


def layer(width: int = 128, height: int = 64):
    """One NF4 layer of bitsandbytes on the CPU, as it comes, without the course's guard."""
    import bitsandbytes as bnb
    import torch

    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        width, height, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    return made.to("cpu")


def evaluate(module) -> None:
    """One forward pass in evaluation mode: what an evaluation during training does."""
    import torch

    with torch.no_grad():
        module.eval()(torch.randn(3, module.in_features))


def read(module):
    """The weight as PEFT's merge and transformers' dequantize read it: shape (out, in), float32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state).float()


def repack_by_hand(module) -> None:
    """Call the function that an evaluation forward calls on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    module.weight.data, _ = _convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
