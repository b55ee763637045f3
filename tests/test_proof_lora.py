"""The proof is proven: a wrong alpha, sign or scale makes the parity tests' own comparisons fail.

Each test corrupts one thing and hands it to the very function that the parity test uses; if that
function accepted it, the parity test would prove nothing.
"""

import pytest
import torch
from test_lora import assert_layers_agree, pair
from test_qlora import (
    ALPHA,
    R,
    assert_gradients_agree,
    assert_losses_agree,
    assert_weights_equal,
    embedded_base,
    from_scratch,
    gradients,
    ours_by_name,
    reference,
    their_gradients,
    their_losses,
    train,
)

from qlora_lab.lora import Adapter

X = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))


def test_the_uncorrupted_layer_is_accepted():
    assert_layers_agree(*pair(), X)


@pytest.mark.parametrize("r, alpha", [(4, 16.01), (5, 16), (4, 8)])
def test_a_wrong_alpha_or_divisor_fails(r, alpha):
    theirs, ours = pair(r=4, alpha=16)
    ours.adapters["default"] = Adapter(r, alpha)  # the matrices keep rank 4: only alpha / r is off
    with pytest.raises(AssertionError):
        assert_layers_agree(theirs, ours, X)


def test_rslora_in_place_of_lora_fails():
    theirs, ours = pair()
    ours.adapters["default"] = Adapter(4, 16, rslora=True)
    with pytest.raises(AssertionError):
        assert_layers_agree(theirs, ours, X)


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_one_flipped_sign_fails(matrix):
    theirs, ours = pair()
    getattr(ours, matrix)["default"].data[0, 0] *= -1
    with pytest.raises(AssertionError):
        assert_layers_agree(theirs, ours, X)


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_whole_matrix_with_the_wrong_sign_fails(matrix):
    theirs, ours = pair()
    getattr(ours, matrix)["default"].data.neg_()
    with pytest.raises(AssertionError):
        assert_layers_agree(theirs, ours, X)


# --- through the 4-bit model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> str:
    return embedded_base()


@pytest.fixture(scope="module")
def theirs(base):
    return reference(base)


def test_leaving_out_double_quantization_fails_all_three(base, theirs):
    with pytest.raises(AssertionError):
        assert_weights_equal(from_scratch(base, theirs, double_quant=False), theirs)
    ours = from_scratch(base, theirs, double_quant=False)
    with pytest.raises(AssertionError):
        assert_gradients_agree(gradients(ours), their_gradients(base))
    ours = from_scratch(base, theirs, double_quant=False)
    with pytest.raises(AssertionError):
        assert_losses_agree(train(ours), their_losses(base))


def test_a_wrong_alpha_fails_in_the_model(base, theirs):
    ours = from_scratch(base, theirs)
    for layer in ours_by_name(ours).values():
        layer.adapters["default"] = Adapter(R, 1.001 * ALPHA)
    with pytest.raises(AssertionError):
        assert_gradients_agree(gradients(ours), their_gradients(base))


def test_one_sign_fails_in_the_model(base, theirs):
    ours = from_scratch(base, theirs)
    ours_by_name(ours)["model.layers.3.mlp.up_proj"].lora_A["default"].data[2, 7] *= -1
    with pytest.raises(AssertionError):
        assert_gradients_agree(gradients(ours), their_gradients(base))


def test_one_flipped_code_fails(base, theirs):
    ours = from_scratch(base, theirs)
    packed = ours_by_name(ours)["model.layers.1.self_attn.v_proj"].base.packed
    packed[1000] ^= 0x80  # the top bit of a high nibble: the other half of the codebook
    with pytest.raises(AssertionError, match="model.layers.1.self_attn.v_proj"):
        assert_weights_equal(ours, theirs)
    with pytest.raises(AssertionError):
        assert_gradients_agree(gradients(ours), their_gradients(base))


def test_a_model_without_gradients_is_not_accepted(base):
    nothing = {name: torch.zeros_like(g) for name, g in their_gradients(base).items()}
    with pytest.raises(AssertionError, match="nothing is compared"):
        assert_gradients_agree(nothing, nothing)
