"""LoRA: a frozen linear layer with a trainable low-rank detour beside it.

What happens to an input x (..., in), in four steps:

1. The frozen layer answers as it always did: `W x + b`.
2. A (r x in) projects x down to r numbers and B (out x r) projects them up again; A starts
   random (kaiming-uniform, a = sqrt 5) and B at zero, so the first step changes nothing.
3. The detour is scaled by alpha / r (or alpha / sqrt r, "rsLoRA") and added.
4. Only A and B get gradients. Several named pairs can sit on one layer; one is active.

Choices. The layer *holds* its base layer instead of inheriting from it, so any module that maps
(..., in) to (..., out) can be the base: `qlora_lab.qlora` puts 4-bit codes there. Merging is a
call, never a side effect of `.eval()`: the original `loralib` merges there, which surprises
whoever compares weights after an evaluation. A and B stay in float32 also on a 16-bit base, as
in PEFT: an update smaller than a bf16 rounding step would be lost, at the price of 4 bytes for
each of the few adapter weights. Files are PEFT's own (`adapter_config.json`,
`adapter_model.safetensors`), so either library reads what the other has trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.errors import InputError, above_zero, needs, share, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """The settings of one named adapter on one layer.

    Args:
        r: Rank, the width of the detour.
        alpha: Numerator of the scaling.
        dropout: Probability with which an input of the detour is dropped in training.
        rslora: Scale by alpha / sqrt(r) instead of alpha / r.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor on B A x: alpha / r (LoRA section 4.1) or alpha / sqrt(r) (rsLoRA)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRALinear(nn.Module):
    """A frozen linear layer plus named low-rank adapters, one of which is active.

    Args:
        base: The layer to adapt, mapping (..., in) to (..., out); its parameters are frozen.
        r: Rank of the first adapter, 1..min(in, out).
        alpha: Numerator of the scaling alpha / r, above 0.
        dropout: Probability in [0, 1) of dropping an input of the detour while training.
        rslora: Scale by alpha / sqrt(r) instead.
        adapter: Name of the first adapter, which becomes the active one.

    Raises:
        InputError: A value is outside what is allowed above.

    Source:
        Hu et al., LoRA (arXiv 2106.09685), section 4.1; Kalajdzievski, rsLoRA (arXiv 2312.03732);
        peft `tuners/lora/layer.py`, class Linear.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter: str = "default",
    ) -> None:
        super().__init__()
        if not hasattr(base, "in_features") or not hasattr(base, "out_features"):
            raise InputError(f"a base {shown(base)} is not possible; give a linear layer")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.adapters: dict[str, Adapter] = {}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.add_adapter(adapter, Adapter(r, alpha, dropout, rslora))
        self.set_adapter(adapter)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Create another named pair A, B on this layer, without making it the active one.

        Args:
            name: A new name of letters, digits, `_` and `-`.
            adapter: Rank and scaling; A becomes (r, in) and B (out, r), float32.

        Raises:
            InputError: The name is taken or not allowed, or a setting is out of range.

        Source:
            peft `LoraLayer.reset_lora_parameters`: A kaiming-uniform with a = sqrt(5), B zero.
        """
        _check_adapter(self, name, adapter)
        like = {"dtype": torch.float32, "device": next(_tensors(self.base)).device}
        A = torch.empty(adapter.r, self.in_features, **like)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(self.out_features, adapter.r, **like)
        self.adapters[name] = adapter
        self.lora_A[name] = nn.Parameter(A, requires_grad=False)
        self.lora_B[name] = nn.Parameter(B, requires_grad=False)

    def set_adapter(self, name: str | None) -> None:
        """Make one adapter active and the only trainable one.

        Args:
            name: An adapter of this layer; None turns all off.

        Raises:
            InputError: There is no such adapter, or one is merged into the base weight.
        """
        if self.merged is not None:
            raise InputError(f"adapter {self.merged!r} is merged: call unmerge before switching")
        if name is not None and name not in self.adapters:
            raise InputError(f"no adapter {name!r} on this layer: it has {sorted(self.adapters)}")
        self.active = name
        for pair in (self.lora_A, self.lora_B):
            for owner, parameter in pair.items():
                parameter.requires_grad_(owner == self.active)

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's answer plus that of the active adapter.

        Args:
            x: (..., in), any floating-point dtype.

        Returns:
            (..., out) in the dtype of the base layer's answer.

        Source:
            LoRA (arXiv 2106.09685), equation 3: h = W x + (alpha / r) B A x.
        """
        result = self.base(x)
        if self.active is None or self.merged is not None:
            return result
        adapter = self.adapters[self.active]
        A, B = self.lora_A[self.active], self.lora_B[self.active]
        narrow = F.linear(F.dropout(x.to(A.dtype), adapter.dropout, self.training), A)
        # Scaled here, where a row is r numbers wide, instead of after B, where it is `out` wide.
        return (result + F.linear(narrow * adapter.scaling, B)).to(result.dtype)

    def delta(self, name: str | None = None) -> Tensor:
        """Return the update that an adapter stands for, as a full matrix.

        Args:
            name: Which adapter; None: the active one.

        Returns:
            scaling * B A, (out, in), float32, detached.

        Raises:
            InputError: There is no such adapter on this layer.
        """
        name = self.active if name is None else name
        if name not in self.adapters:
            raise InputError(f"no adapter {name!r} on this layer: it has {sorted(self.adapters)}")
        A, B = self.lora_A[name].detach(), self.lora_B[name].detach()
        return self.adapters[name].scaling * (B.float() @ A.float())

    def merge(self) -> None:
        """Add the active adapter's update to the base weight, in place.

        Raises:
            InputError: Nothing is active, it is merged already, or the base holds quantized codes.
        """
        if self.merged is not None or self.active is None:
            state = f"{self.merged!r} is merged already" if self.merged else "no adapter is active"
            raise InputError(f"cannot merge: {state}")
        _check_mergeable(self.base)
        self._shift_base(self.delta())
        self.merged = self.active

    def unmerge(self) -> None:
        """Take the merged update out of the base weight again (exact but for rounding).

        Raises:
            InputError: Nothing is merged.
        """
        if self.merged is None:
            raise InputError("cannot unmerge: no adapter is merged into this layer")
        self._shift_base(-self.delta(self.merged))
        self.merged = None

    @torch.no_grad()
    def _shift_base(self, delta: Tensor) -> None:
        # Summed in float32 and rounded once, whatever the dtype of the weight.
        self.base.weight.copy_(self.base.weight.float() + delta)

    def extra_repr(self) -> str:
        each = ", ".join(f"{name}: r={a.r} alpha={a.alpha:g}" for name, a in self.adapters.items())
        return f"in={self.in_features}, out={self.out_features}, active={self.active}, {each}"


def add_adapters(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    r: int = 16,
    alpha: float = 16,
    name: str = "default",
    dropout: float = 0.0,
    rslora: bool = False,
) -> list[str]:
    """Freeze a model and put one named adapter on each layer chosen; it becomes the active one.

    Args:
        model: Any module with `nn.Linear` layers (or `LoRALinear`, for a further adapter);
            changed in place.
        targets: "all-linear" (every linear layer but the output head), a list of name endings
            such as ["q_proj", "v_proj"], or one regular expression for the whole name.
        r: Rank, 1..min(in, out) of every layer chosen.
        alpha: Numerator of the scaling alpha / r.
        name: Name of the adapter.
        dropout: Probability in [0, 1) for the detour's input while training.
        rslora: Scale by alpha / sqrt(r) instead.

    Returns:
        The names of the layers that carry the adapter.

    Raises:
        InputError: No layer matches, or a value does not fit one of them (nothing is changed).

    Source:
        The meaning of `targets` is that of peft's LoraConfig.target_modules.
    """
    chosen = find_targets(model, targets)
    adapter = Adapter(r, alpha, dropout, rslora)
    for layer in chosen.values():  # all checks first, so that a bad value leaves the model whole
        _check_adapter(layer, name, adapter)
    for path, layer in chosen.items():
        _attach(model, path, layer, name, adapter)
    model.requires_grad_(False)
    set_adapter(model, name)
    return list(chosen)


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that an adapter would be put on.

    Args:
        model: Any module.
        targets: "all-linear", name endings, or one regular expression, as in `add_adapters`.

    Returns:
        Name -> layer (`nn.Linear` or, where adapters exist, `LoRALinear`), in the model's order.

    Raises:
        InputError: No linear layer matches, or one of the endings matches none.

    Source:
        peft `tuners/tuners_utils.py`, check_target_module_exists and
        _maybe_include_all_linear_layers.
    """
    layers = _linear_layers(model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        find_head = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()  # left out as PEFT leaves it out: often tied to the embeddings
        chosen = {path: layer for path, layer in layers.items() if layer is not head}
    elif isinstance(targets, str):
        try:
            chosen = {path: layer for path, layer in layers.items() if re.fullmatch(targets, path)}
        except re.error as error:
            raise InputError(f"targets {targets!r} is no regular expression: {error}") from None
    else:
        needs("texts", targets, "targets")
        chosen = {path: layer for path, layer in layers.items() if _ends_with(path, targets)}
    some = sorted({path.rsplit(".", 1)[-1] for path in layers})
    if not chosen:
        raise InputError(f"targets {targets!r} match no linear layer: this model has {some}")
    lost = [] if isinstance(targets, str) else unmatched(targets, chosen)
    if lost:  # PEFT goes on without them, and half of what was asked for is missing
        raise InputError(f"of the targets, {lost} match no linear layer: this model has {some}")
    return chosen


def unmatched(endings: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the name endings that no layer has.

    Args:
        endings: Such as ["q_proj", "v_proj"].
        paths: Names of layers.
    """
    paths = list(paths)
    return [ending for ending in endings if not any(_ends_with(path, [ending]) for path in paths)]


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch every layer to one named adapter, or to the bare base model.

    Args:
        model: A model with adapters.
        name: The adapter to use and to train; None turns all off.

    Raises:
        InputError: No layer has an adapter of this name, or one is merged.
    """
    layers = lora_layers(model)
    _known(layers, name)
    for layer in layers.values():
        layer.set_adapter(name if name in layer.adapters else None)


def merge(model: nn.Module) -> None:
    """Merge the active adapter into the base weights; the model then costs what the base costs.

    Args:
        model: A model with an active adapter on 16- or 32-bit base layers.

    Raises:
        InputError: Nothing is active, an adapter is merged already, a base layer holds quantized
            codes, or its weight is tied to a layer that would change with it.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.active}
    if not layers:
        raise InputError("cannot merge: no adapter is active in this model")
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        _check_mergeable(layer.base)
        shared = owners[id(layer.base.weight)]
        if len(shared) > 1:
            raise InputError(f"cannot merge {path}: its weight is tied ({' = '.join(shared)})")
    for layer in layers.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take a merged adapter out of the base weights again.

    Args:
        model: A model whose adapter was merged by `merge`.

    Raises:
        InputError: Nothing is merged.
    """
    merged = [layer for layer in lora_layers(model).values() if layer.merged is not None]
    if not merged:
        raise InputError("cannot unmerge: no adapter is merged into this model")
    for layer in merged:
        layer.unmerge()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's adapted layers by name.

    Args:
        model: Any module.

    Returns:
        Name -> layer, in the model's order; empty without adapters.

    Raises:
        InputError: This is no model.
    """
    needs("model", model)
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the adapter weights to give to an optimizer.

    Args:
        model: A model with adapters.
        name: Which adapter; None: the active one.

    Returns:
        A (r, in) and B (out, r) of each layer that carries the adapter, in the model's order.

    Raises:
        InputError: No layer has an adapter of this name, or none is active.
    """
    layers = _known(lora_layers(model), name).values()
    chosen = [(layer, layer.active if name is None else name) for layer in layers]
    if not any(owner for _, owner in chosen):
        raise InputError("no adapter is active: name one, or call set_adapter first")
    return [
        pair[owner] for layer, owner in chosen if owner for pair in (layer.lora_A, layer.lora_B)
    ]


def save_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Write one adapter as the two files that PEFT writes and reads.

    Args:
        model: A model with adapters.
        directory: Folder for `adapter_config.json` and `adapter_model.safetensors`; made if absent.
        name: Which adapter; the name itself is not stored, as in PEFT.

    Raises:
        InputError: No layer has an adapter of this name, or its layers differ in more than rank.

    Source:
        peft `PeftModel.save_pretrained` and `utils/save_and_load.py`.
    """
    from safetensors.torch import save_file

    needs("path", directory, "directory")
    if not isinstance(name, str):
        raise InputError(f"adapter name {shown(name)} is not possible; give a text")
    layers = _known(lora_layers(model), name)
    settings = {path: layer.adapters[name] for path, layer in layers.items()}
    if len({(a.alpha, a.dropout, a.rslora) for a in settings.values()}) > 1:
        raise InputError(f"adapter {name!r} has layers with different alpha, dropout or rslora")
    first = next(iter(settings.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": first.r,
        "rank_pattern": {path: a.r for path, a in settings.items() if a.r != first.r},
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "bias": "none",
        "target_modules": _shortest_names(model, list(layers)),
    }
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name].detach().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name].detach().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> list[str]:
    """Read an adapter that this package or PEFT has written, and make it the active one.

    Args:
        model: The base model, with or without other adapters; changed in place and frozen.
        directory: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: A new name for it in this model.

    Returns:
        The names of the layers that carry the adapter.

    Raises:
        InputError: A file is missing, the adapter is not plain LoRA, or it does not fit the model
            (nothing is changed).

    Source:
        peft `PeftModel.from_pretrained` and `utils/save_and_load.py`.
    """
    needs("path", directory, "directory")
    config, weights = _read_adapter(Path(directory))
    candidates = _linear_layers(model)
    settings = {}
    for path, (A, B) in weights.items():
        layer = candidates.get(path)
        if layer is None:
            raise InputError(f"the adapter has a layer {path!r} and this model has no such layer")
        if (B.shape[0], A.shape[1]) != (layer.out_features, layer.in_features):
            raise InputError(
                f"the adapter's {path} maps {A.shape[1]} -> {B.shape[0]} and the model's "
                f"{layer.in_features} -> {layer.out_features}: it was made for another model"
            )
        settings[path] = Adapter(
            A.shape[0], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]
        )
        _check_adapter(layer, name, settings[path])
    for path, (A, B) in weights.items():
        layer = _attach(model, path, candidates[path], name, settings[path])
        layer.lora_A[name].data.copy_(A)
        layer.lora_B[name].data.copy_(B)
    model.requires_grad_(False)
    set_adapter(model, name)
    return list(weights)


def _read_adapter(directory: Path) -> tuple[dict, dict[str, tuple[Tensor, Tensor]]]:
    """The settings, and A and B by layer name; refuses what plain LoRA cannot express."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise InputError(f"no {file} in {directory}: give the folder that save_adapter wrote")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS_FILE)
    except (ValueError, SafetensorError):
        raise InputError(f"a file in {directory} is damaged: save the adapter again") from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"peft_type {config.get('peft_type')!r} is not LORA, the only one read")
    # These change the arithmetic and leave no extra tensor in the file that would betray them.
    silent = ("alpha_pattern", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens")
    used = [key for key in silent if config.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        used.append("init_lora_weights")  # pissa, olora, loftq ...: they changed the base weights
    if used:
        raise InputError(f"{used[0]}={config[used[0]]!r} is not plain LoRA: read it with PEFT")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{key!r} is not a plain LoRA tensor: read this adapter with PEFT")
        pairs.setdefault(match["layer"], {})[match["matrix"]] = tensor
    if not pairs:
        raise InputError(f"{WEIGHTS_FILE} in {directory} holds no tensors: the adapter is empty")
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{path} has lora_{' '.join(pair)} only: A and B belong together")
    defaults = {"lora_dropout": 0.0, "use_rslora": False}
    return defaults | config, {path: (pair["A"], pair["B"]) for path, pair in pairs.items()}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can carry an adapter, by name; the base inside a LoRALinear is not one."""
    inside = {id(layer.base) for layer in lora_layers(model).values()}
    return {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(module, nn.Linear | LoRALinear) and id(module) not in inside
    }


def _ends_with(path: str, endings: Sequence[str]) -> bool:
    return any(path == ending or path.endswith("." + ending) for ending in endings)


def _shortest_names(model: nn.Module, paths: list[str]) -> list[str]:
    """["q_proj", ...] where that selects exactly these layers, else their full names."""
    endings = sorted({path.rsplit(".", 1)[-1] for path in paths})
    everything = [path for path, _ in model.named_modules()]
    selected = {path for path in everything if _ends_with(path, endings)}
    return endings if selected == set(paths) else sorted(paths)


def _attach(
    model: nn.Module, path: str, layer: nn.Module, name: str, adapter: Adapter
) -> LoRALinear:
    """Add the adapter to the layer, which a plain linear layer becomes a LoRALinear for."""
    if isinstance(layer, LoRALinear):
        layer.add_adapter(name, adapter)
        return layer
    adapted = LoRALinear(layer, adapter.r, adapter.alpha, adapter.dropout, adapter.rslora, name)
    adapted.train(layer.training)
    model.set_submodule(path, adapted)
    return adapted


def _known(layers: dict[str, LoRALinear], name: str | None) -> dict[str, LoRALinear]:
    """The layers that carry the adapter `name` (all for None)."""
    found = {
        path: layer
        for path, layer in layers.items()
        if name is None or name in tuple(layer.adapters)
    }
    if name is not None and not found:
        names = sorted({each for layer in layers.values() for each in layer.adapters})
        raise InputError(f"no adapter {shown(name)} in this model: it has {names}")
    return found


def _check_adapter(layer: nn.Module, name: str, adapter: Adapter) -> None:
    highest = min(layer.in_features, layer.out_features)
    whole_number = isinstance(adapter.r, Integral) and not isinstance(adapter.r, bool)
    if not whole_number or not 1 <= adapter.r <= highest:
        raise InputError(
            f"rank {shown(adapter.r)} is not allowed: "
            f"a {layer.in_features} -> {layer.out_features} layer "
            f"takes a whole number from 1 to {highest}"
        )
    above_zero("alpha", adapter.alpha)
    share("dropout", adapter.dropout)
    if not isinstance(name, str):
        raise InputError(f"adapter name {shown(name)} is not allowed: give a text")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ParameterDict, name):
        raise InputError(f"adapter name {name!r} is not allowed: use letters, digits, _ and -")
    if isinstance(layer, LoRALinear) and name in layer.adapters:
        raise InputError(f"adapter {name!r} exists already: choose another name")
    if isinstance(layer, LoRALinear) and layer.merged is not None:
        raise InputError(f"adapter {layer.merged!r} is merged: call unmerge first")


def _check_mergeable(base: nn.Module) -> None:
    weight = getattr(base, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise InputError(
            "cannot merge into quantized codes without rounding the update away: see "
            "qlora_lab.merge, which merges into a dequantized or the original base"
        )


def _tensors(module: nn.Module):
    yield from module.parameters()
    yield from module.buffers()
