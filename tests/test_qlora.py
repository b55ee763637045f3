"""The from-scratch QLoRA layer against PEFT on bitsandbytes, and what it keeps in memory."""

import copy
import warnings
from functools import cache
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_lab
from qlora_lab.blockwise import dequantize_4bit, quantize_4bit
from qlora_lab.errors import InputError
from qlora_lab.loading import load_model
from qlora_lab.lora import (
    add_adapters,
    load_adapter,
    lora_parameters,
    merge,
    save_adapter,
    set_adapter,
)
from qlora_lab.qlora import QLoRALinear, QuantizedLinear, quantize_model, quantize_weight

R, ALPHA, STEPS, LEARNING_RATE = 16, 32, 50, 3e-3


# --- one layer -----------------------------------------------------------------------------


def linear(bias: bool = True, out: int = 96, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, out, bias=bias)


def shake(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("double_quant", [False, True, "bnb"])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_dequantized_layer(bias, codebook, double_quant):
    plain = linear(bias)
    layer = QLoRALinear.from_linear(plain, 4, 8, codebook=codebook, double_quant=double_quant)
    shake(layer)
    twin = linear(bias)  # an ordinary layer that holds the rounded weight, under ordinary autograd
    twin.weight.data = layer.base.dequantize()
    assert not torch.equal(twin.weight, plain.weight)
    x, x_twin = (torch.randn(2, 5, 64, generator=torch.manual_seed(1)) for _ in range(2))
    x.requires_grad_(), x_twin.requires_grad_()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    y, y_twin = layer(x), twin(x_twin) + 2.0 * (x_twin @ A.T @ B.T)
    torch.testing.assert_close(y, y_twin, atol=1e-6, rtol=1e-5)
    got = torch.autograd.grad(y.square().mean(), [x, A, B])
    expected = torch.autograd.grad(y_twin.square().mean(), [x_twin, A, B])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradcheck_of_the_autograd_function():
    layer = QuantizedLinear(quantize_4bit(linear().weight))
    torch.manual_seed(0)
    x = torch.randn(3, 64, requires_grad=True)
    # The weight is float32, so is the check: the function is linear, hence coarse steps are exact.
    assert torch.autograd.gradcheck(layer, x, eps=1e-1, atol=1e-3, rtol=1e-3)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([32, 64, 256]), st.booleans())
def test_any_shape_works_ragged_blocks_too(out, width, blocksize, double_quant):
    torch.manual_seed(0)
    plain = nn.Linear(width, out)
    layer = QLoRALinear.from_linear(plain, 1, 1, blocksize=blocksize, double_quant=double_quant)
    x = torch.randn(3, width, requires_grad=True)
    y = layer(x)
    expected = quantize_weight(plain.weight, blocksize, "nf4", double_quant)
    torch.testing.assert_close(
        y, nn.functional.linear(x, dequantize_4bit(expected), plain.bias), atol=1e-5, rtol=1e-5
    )
    assert layer.base.quantized.packed.numel() == (out * width + 1) // 2


def saved_tensors(function) -> list[torch.Tensor]:
    """Everything that autograd keeps between a forward and its backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("double_quant", [False, True])
def test_only_codes_and_scales_are_saved_for_backward(double_quant):
    base = QLoRALinear.from_linear(linear(False), 4, 8, double_quant=double_quant).base
    x = torch.randn(2, 5, 64, requires_grad=True)
    kept = saved_tensors(lambda: base(x))
    stored = list(base.buffers())
    assert [id(t) for t in kept] == [id(t) for t in stored]  # the layer's own buffers: no copy
    assert {t.dtype for t in kept} <= {torch.uint8, torch.float32}
    assert sum(t.nbytes for t in kept) == base.quantized.nbytes
    # An ordinary layer on the dequantized weight keeps all of it: 4 bytes for each weight.
    weight = base.dequantize()
    kept = saved_tensors(lambda: nn.functional.linear(x, weight))
    assert max(t.nbytes for t in kept) == 4 * 96 * 64


def test_the_adapters_keep_only_the_input_and_the_narrow_middle():
    layer = QLoRALinear.from_linear(linear(False), 4, 8)
    x = torch.randn(10, 64, requires_grad=True)
    kept = saved_tensors(lambda: layer(x))
    floats = sum(t.numel() for t in kept if t.dtype == torch.float32 and t.numel() > 4)
    x_and_middle, A_and_B = 10 * 64 + 10 * 4, 4 * 64 + 96 * 4
    assert floats <= x_and_middle + A_and_B


def test_codes_get_no_gradient_and_do_not_move():
    layer = QLoRALinear.from_linear(linear(), 4, 8)
    before = [buffer.clone() for buffer in layer.base.buffers()]
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        layer(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.base.buffers(), strict=True))
    assert all(buffer.grad is None for buffer in layer.base.buffers())
    assert layer.base.bias.grad is None
    assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_is_where_the_multiplication_happens(given_dtype, compute):
    layer = QLoRALinear.from_linear(linear(), 4, 8, compute_dtype=compute)
    x = torch.randn(3, 64, dtype=given_dtype, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x.to(compute), layer.base.dequantize(compute))
    expected = (expected + layer.base.bias.to(compute)).to(given_dtype)
    assert y.dtype == given_dtype and torch.equal(y, expected)  # B is zero: only the base speaks
    y.sum().backward()
    assert x.grad.dtype == given_dtype and torch.isfinite(x.grad).all()


def test_autocast_and_checkpointing_change_nothing_but_rounding():
    layer = QLoRALinear.from_linear(linear(), 4, 8)
    shake(layer)
    x = torch.randn(4, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.02)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, atol=0.2, rtol=0.05)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_casting_a_model_moves_the_scales_and_does_not_round_them():
    layer = QLoRALinear.from_linear(linear(), 4, 8)
    before = layer.base.dequantize()
    for cast in (layer.half, layer.bfloat16, lambda: layer.to("cpu", torch.float16), layer.double):
        cast()
        assert torch.equal(layer.base.dequantize(), before)


def test_state_dict_carries_the_codes_and_a_copy_is_independent():
    layer = QLoRALinear.from_linear(linear(seed=0), 4, 8)
    shake(layer)
    other = QLoRALinear.from_linear(linear(seed=1), 4, 8)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    twin.base.packed.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_quantize_model_leaves_head_embeddings_and_norms(base):
    model = copy.deepcopy(plain_base(base))
    made = quantize_model(model, R, ALPHA)
    assert len(made) == 28 and not any("lm_head" in name for name in made)
    floats = {n for n, p in model.named_parameters() if "lora_" not in n}
    assert all("embed" in n or "norm" in n or "lm_head" in n for n in floats)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    bits = sum(layer.base.quantized.nbytes for layer in made.values()) * 8
    # Smaller than 4.127 + a little: matrices this small fill their last block of scales badly.
    assert bits / sum(layer.base.quantized.shape.numel() for layer in made.values()) < 4.14


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: QLoRALinear.from_linear(linear(), 0, 8), "rank 0"),
        (lambda: QLoRALinear.from_linear(linear(), 65, 8), "rank 65"),
        (lambda: QLoRALinear.from_linear(linear(), 4, 8, blocksize=48), "blocksize=48"),
        (lambda: QLoRALinear.from_linear(linear(), 4, 8, double_quant="twice"), "'twice'"),
        (lambda: QLoRALinear.from_linear(linear(), 4, 8, compute_dtype=torch.int8), "int8"),
        (lambda: QLoRALinear(quantize_4bit(torch.ones(64)), r=1), "not .out, in."),
        (lambda: QLoRALinear(torch.ones(8, 8), r=1), "of type Tensor .* quantize_4bit"),
        (lambda: QLoRALinear(quantize_4bit(torch.ones(8, 8)), torch.ones(3)), "8 outputs"),
        (lambda: QLoRALinear(quantize_4bit(torch.ones(8, 8)), 3), "bias 3"),
        (lambda: QLoRALinear.from_linear("layer"), "a layer 'layer'"),
        (lambda: QLoRALinear.from_linear(linear(), "4"), "rank '4'"),
        (lambda: quantize_model((linear(), None)), "give a model: .* its .model"),
        (
            lambda: merge(QLoRALinear.from_linear(linear(), 4, 8)),
            "quantized codes.*qlora_lab.merge",
        ),
        (lambda: quantize_model(nn.Sequential(nn.ReLU())), "match no linear layer"),
        (lambda: quantize_model(adapted()), "adapters or quantized layers"),
    ],
)
def test_bad_input_is_answered_in_one_line(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def adapted() -> nn.Module:
    model = nn.Sequential(linear())
    add_adapters(model, r=4, alpha=8)
    return model


def test_nan_weights_are_refused_and_leave_the_model_whole():
    model = nn.Sequential(linear(), linear(out=64))
    model[1].weight.data[3, 3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        quantize_model(model, 4, 8)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


# --- the embedded model: ours against PEFT + bitsandbytes ------------------------------------


def embedded_base() -> str:
    return qlora_lab.embedded_model()


@pytest.fixture(scope="module")
def base() -> str:
    """The folder of the embedded model."""
    return embedded_base()


@cache
def loaded(base: str) -> nn.Module:
    """The base in bitsandbytes' NF4 with double quantization, guarded; copied before any use."""
    return load_model(base, bits=4, device="cpu").model


def reference(base: str) -> nn.Module:
    """PEFT on bitsandbytes: LoRA on all linear layers."""
    torch.manual_seed(0)
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(loaded(base)), lora)


@cache
def plain_base(base: str) -> nn.Module:
    """The base as it is; copied before any use."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def from_scratch(base: str, theirs: nn.Module, double_quant: bool | str = "bnb") -> nn.Module:
    """The same model and adapters with our layers."""
    model = copy.deepcopy(plain_base(base))
    quantize_model(model, R, ALPHA, double_quant=double_quant)
    modules = dict(theirs.base_model.model.named_modules())
    for path, layer in ours_by_name(model).items():
        layer.lora_A["default"].data.copy_(modules[path].lora_A["default"].weight)
        layer.lora_B["default"].data.copy_(modules[path].lora_B["default"].weight)
    return model


def ours_by_name(model: nn.Module) -> dict[str, QLoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, QLoRALinear)}


def theirs_by_name(model: nn.Module) -> dict[str, nn.Module]:
    named = model.base_model.model.named_modules()
    return {path: m for path, m in named if hasattr(m, "lora_A")}


@cache
def batches(steps: int) -> list[torch.Tensor]:
    """Token ids, (2, 64) a step, out of eight windows of held-out code."""
    text = sorted(Path(qlora_lab.heldout_dir()).glob("*.py.txt"))[0].read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    windows = torch.tensor(tokenizer(text).input_ids[: 8 * 64]).view(8, 64)
    generator = torch.Generator().manual_seed(0)
    return [windows[torch.randint(0, 8, (2,), generator=generator)] for _ in range(steps)]


def train(model: nn.Module, steps: int = STEPS) -> list[float]:
    """Losses of a short AdamW run."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    model.train()
    losses = []
    for ids in batches(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every A and B in one step, B having left zero, by PEFT's names."""
    torch.manual_seed(5)
    named = sorted(
        (n.removeprefix("base_model.model.").removesuffix(".weight"), p)
        for n, p in model.named_parameters()
        if p.requires_grad
    )
    for name, parameter in named:
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    model.zero_grad()
    ids = batches(1)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in named}


def assert_weights_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """The comparison of the parity test: every dequantized weight, bit for bit."""
    expected = theirs_by_name(theirs)
    assert ours_by_name(ours).keys() == expected.keys() and len(expected) == 28
    for path, layer in ours_by_name(ours).items():
        weight = expected[path].base_layer.weight
        their_weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(layer.base.dequantize(), their_weight), path


def assert_gradients_agree(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    """The comparison of the parity test: each layer's gradients relative to their own size."""
    assert ours.keys() == theirs.keys() and len(ours) == 56
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, f"{name} has no gradient: nothing is compared"
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error:.2e}"


def assert_losses_agree(ours: list[float], theirs: list[float], tolerance: float = 1e-4) -> None:
    """The comparison of the parity test: every step's loss."""
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1] < 0.8 * theirs[0], "the reference does not learn: nothing is compared"
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    assert worst < tolerance, f"{worst:.2e}"


def test_dequantized_weights_equal_bitsandbytes(base):
    theirs = reference(base)
    assert_weights_equal(from_scratch(base, theirs), theirs)


@cache
def their_gradients(base: str) -> dict[str, torch.Tensor]:
    return gradients(reference(base))


@cache
def their_losses(base: str) -> list[float]:
    return train(reference(base))


def test_gradients_of_every_layer_equal_peft_on_bitsandbytes(base):
    ours = from_scratch(base, reference(base))
    assert_gradients_agree(gradients(ours), their_gradients(base))


def test_fifty_training_losses_equal_peft_on_bitsandbytes(base):
    ours = from_scratch(base, reference(base))
    assert_losses_agree(train(ours), their_losses(base))


def assert_adapters_move(ours: nn.Module, peft: nn.Module, folder: Path) -> None:
    """The comparison of the parity test: trained here, read there, written there, read here."""
    ids = batches(1)[0]
    train(ours, 3)
    save_adapter(ours, folder / "ours")
    theirs = PeftModel.from_pretrained(peft.unload(), folder / "ours").eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(folder / "theirs")
        load_adapter(ours, folder / "theirs", "again")
        assert all(p.requires_grad for p in lora_parameters(ours, "again"))
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)
        set_adapter(ours, None)
        assert not torch.allclose(ours(ids).logits, expected, atol=1e-3)


def test_adapters_trained_on_codes_move_to_peft_on_bitsandbytes_and_back(base, tmp_path):
    peft = reference(base)
    assert_adapters_move(from_scratch(base, peft), peft, tmp_path)


# --- bitsandbytes' silent CPU faults, at the level of one layer ------------------------------

needs_the_repacking_cpu = pytest.mark.skipif(
    not has_avx512bf16(),
    reason="this CPU has no AVX512-BF16, so bitsandbytes does not repack weights in eval mode",
)


def bnb_layer(width: int = 128, guard: bool = True) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        width, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    ).to("cpu")
    if guard:
        layer.support_avx512bf16_for_cpu = False
    return layer


def run_eval(layer: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return layer.eval()(torch.randn(3, layer.in_features))


@needs_the_repacking_cpu
def test_fault_2_eval_forward_of_an_odd_width_crashes_without_the_guard():
    with pytest.raises(Exception):  # noqa: B017 - which error it is depends on the shape
        run_eval(bnb_layer(width=96, guard=False))


def test_fault_2_eval_forward_of_an_odd_width_works_with_the_guard():
    layer = bnb_layer(width=96)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(3, 96)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), x @ expected.T)


def weight_after_eval(guard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT's merge reads: the dequantized weight before and after an eval forward."""
    layer = bnb_layer(guard=guard)
    read = bnb.functional.dequantize_4bit
    before = read(layer.weight.data, layer.weight.quant_state).clone()
    run_eval(layer)
    return before, read(layer.weight.data, layer.weight.quant_state).float()


@needs_the_repacking_cpu
def test_fault_3_after_eval_the_bytes_no_longer_mean_the_weight_without_the_guard():
    before, after = weight_after_eval(guard=False)
    assert (after - before).abs().mean() > 0.5 * before.abs().mean()


def test_fault_3_after_eval_the_bytes_still_mean_the_weight_with_the_guard():
    before, after = weight_after_eval(guard=True)
    assert torch.equal(after, before)


def input_gradient_after_eval(guard: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradient that reaches x in training after an evaluation, and the right one."""
    layer = bnb_layer(guard=guard)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
    run_eval(layer)
    layer.train()
    x = torch.randn(3, 128, requires_grad=True)
    loss = layer(x).square().sum() + 0 * x.sum()  # the second term: there is always a graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # all that says what is lost
        loss.backward()
    return x.grad, 2 * x.detach() @ weight.T @ weight


@needs_the_repacking_cpu
def test_fault_4_the_gradient_is_lost_after_an_evaluation_without_the_guard():
    got, expected = input_gradient_after_eval(guard=False)
    assert (got - expected).norm() > 0.5 * expected.norm()  # it is zero: the whole is missing


def test_fault_4_gradients_flow_after_an_evaluation_with_the_guard():
    got, expected = input_gradient_after_eval(guard=True)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_none_of_the_three_faults_touches_the_from_scratch_layer():
    layer = QLoRALinear.from_linear(linear(), 4, 8).base
    before = layer.dequantize()
    run_eval(layer)
    assert torch.equal(layer.dequantize(), before)
    x = torch.randn(3, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 96) @ before)
