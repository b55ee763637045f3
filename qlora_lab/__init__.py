"""QLoRA Lab: QLoRA from first principles, each piece proven against the library it explains.

`import qlora_lab` is instant: it loads neither torch nor transformers, peft, bitsandbytes,
datasets or matplotlib. A name is imported when it is first used (PEP 562), so a page that only
needs the NF4 table pays for the standard library alone. The other choice, importing everything
here, would cost several seconds at every start, and would make `qlora-lab --help` wait for CUDA.

    >>> import qlora_lab
    >>> len(qlora_lab.nf4())          # loads qlora_lab.codebooks, and nothing else
    16
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qlora_lab._version import __version__

# Public name -> the module that defines it. A name equal to a module's own (such as `merge`)
# is left out: `qlora_lab.merge` is the module, `qlora_lab.lora.merge` the function.
_EXPORTS = {
    "InputError": "errors",
    "nf4": "codebooks",
    "normal_float": "codebooks",
    "codebook": "codebooks",
    "quantize_4bit": "blockwise",
    "dequantize_4bit": "blockwise",
    "fake_quantize": "blockwise",
    "QuantizedTensor": "blockwise",
    "quantize_absmax": "double_quant",
    "dequantize_absmax": "double_quant",
    "truncate": "low_rank",
    "truncation_error": "low_rank",
    "effective_rank": "low_rank",
    "LoRALinear": "lora",
    "add_adapters": "lora",
    "QLoRALinear": "qlora",
    "quantize_model": "qlora",
    "ledger": "memory",
    "PageCache": "paged_optimizer",
    "load_model": "loading",
    "finetune": "finetuning",
    "checkpoint": "sections",
}

_MODULES = (
    "activations",
    "baselines",
    "blockwise",
    "bnb_compat",
    "bootstrap",
    "cli",
    "codebooks",
    "data",
    "distributed",
    "double_quant",
    "errors",
    "evaluation",
    "finetuning",
    "intervals",
    "loading",
    "lora",
    "low_rank",
    "memory",
    "merge",
    "orders",
    "paged_optimizer",
    "plots",
    "provenance",
    "qlora",
    "recorded",
    "scoring",
    "sections",
    "training",
)

_ASSETS = Path(__file__).resolve().parent / "assets"

__all__ = ["__version__", "embedded_model", "heldout_dir", *_EXPORTS, *_MODULES]


def embedded_model() -> str:
    """Return the folder of the small language model that travels inside the package.

    It is an ordinary checkpoint, so `AutoModelForCausalLM.from_pretrained(embedded_model())`
    and `AutoTokenizer.from_pretrained(embedded_model())` load it without any network.

    Returns:
        The folder's path as a string, which is what `from_pretrained` takes.

    Raises:
        FileNotFoundError: The package was installed without its data files.
    """
    return str(_asset("model"))


def heldout_dir() -> str:
    """Return the folder of the held-out text on which bits per byte are measured.

    Returns:
        The folder's path as a string; every file in it was kept out of the model's training.

    Raises:
        FileNotFoundError: The package was installed without its data files.
    """
    return str(_asset("heldout"))


def _asset(name: str) -> Path:
    folder = _ASSETS / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: this copy of qlora_lab was installed without its data files; "
            "install it from a clone of the repository"
        )
    return folder


def __getattr__(name: str) -> Any:
    """Import the module behind a public name the first time the name is used (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
        globals()[name] = value  # the next use is an ordinary attribute, not a function call
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
