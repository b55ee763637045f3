"""low_rank against the theorem it rests on and against numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab.errors import InputError
from qlora_lab.low_rank import (
    amplification,
    effective_rank,
    energy,
    subspace_similarity,
    truncate,
    truncation_error,
)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_times_table_has_rank_one():
    numbers = torch.arange(1.0, 10.0)
    table = torch.outer(numbers, numbers)
    B, A = truncate(table, 1)
    assert B.shape == (9, 1) and A.shape == (1, 9)
    torch.testing.assert_close(B @ A, table, atol=1e-4, rtol=1e-5)
    assert truncation_error(table, 1) < 1e-4
    assert effective_rank(table) == pytest.approx(1, abs=1e-3)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10_000), st.data())
def test_eckart_young(rows, columns, seed, data):
    matrix = gaussian(rows, columns, seed).double()
    rank = data.draw(st.integers(1, min(rows, columns)))
    B, A = truncate(matrix, rank)
    assert B.dtype == torch.float64
    error = truncation_error(matrix, rank)
    assert float((matrix - B @ A).norm()) == pytest.approx(error, abs=1e-9)
    # No rank-r matrix does better: not even the best answer to randomly chosen directions.
    directions = torch.linalg.qr(gaussian(columns, rank, seed + 1).double()).Q
    assert float((matrix - matrix @ directions @ directions.T).norm()) >= error - 1e-9


def test_truncate_agrees_with_numpy_and_its_A_is_orthonormal():
    matrix = gaussian(20, 12)
    B, A = truncate(matrix, 5)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose(B @ A, (u[:, :5] * s[:5]) @ vh[:5], atol=1e-5)
    torch.testing.assert_close(A @ A.T, torch.eye(5), atol=1e-5, rtol=0)


def test_energy_and_error_are_two_views_of_one_sum():
    matrix = gaussian(16, 24)
    assert energy(matrix, 0) == 0 and energy(matrix, 16) == pytest.approx(1)
    kept = 1 - (truncation_error(matrix, 5) / float(matrix.norm())) ** 2
    assert energy(matrix, 5) == pytest.approx(kept, abs=1e-6)
    assert truncation_error(matrix, 0) == pytest.approx(float(matrix.norm()), rel=1e-6)


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    # Two directions of strength 3 and 1: p = 3/4, 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-5)


def test_subspace_similarity_is_one_zero_and_what_chance_gives():
    basis = torch.linalg.qr(gaussian(64, 64)).Q
    strengths = torch.arange(8.0, 0.0, -1.0)[:, None]
    A1, A2 = basis[:8] * strengths, basis[8:16] * strengths
    assert subspace_similarity(A1, A1, 4, 4) == pytest.approx(1, abs=1e-5)
    assert subspace_similarity(A1, A1, 2, 6) == pytest.approx(1, abs=1e-5)
    assert subspace_similarity(A1, A2, 8, 8) == pytest.approx(0, abs=1e-5)
    # Two unrelated subspaces of 8 in 64 dimensions share 8/64 of their energy.
    chance = [
        subspace_similarity(gaussian(8, 64, s), gaussian(8, 64, 99 + s), 8, 8) for s in range(20)
    ]
    assert np.mean(chance) == pytest.approx(8 / 64, abs=0.02)


def test_amplification_is_the_ratio_of_strengths():
    basis = torch.linalg.qr(gaussian(16, 16)).Q
    weight = basis @ torch.diag(torch.tensor([10.0] + [0.5] * 15)) @ basis.T
    update = 6.0 * torch.outer(basis[:, 3], basis[:, 3])  # a direction the weight hardly uses
    assert amplification(weight, update, 1) == pytest.approx(12, rel=1e-4)
    assert amplification(weight, 0.1 * basis[:, :1] @ basis[:, :1].T, 1) == pytest.approx(
        0.01, rel=1e-3
    )


def test_half_precision_is_measured_in_float32():
    matrix = gaussian(8, 8).to(torch.bfloat16)
    assert truncate(matrix, 2)[0].dtype == torch.float32
    assert truncation_error(matrix, 2) == truncation_error(matrix.float(), 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: truncate(gaussian(4, 6), 0), "rank 0 is out of range: a 4 x 6 matrix"),
        (lambda: truncate(gaussian(4, 6), 5), "whole numbers from 1 to 4"),
        (lambda: truncate([[1.0, 2.0]], 1), "give a torch tensor"),
        (lambda: truncate(gaussian(4, 6), 1.5), "rank 1.5 is out of range: .* whole numbers"),
        (lambda: energy(gaussian(4, 6), "16"), "rank '16' is out of range"),
        (lambda: energy(gaussian(4, 6), True), "rank True is out of range"),
        (lambda: truncation_error(gaussian(4, 6), -1), "0 to 4"),
        (lambda: truncate(torch.ones(3), 1), "not a matrix"),
        (lambda: truncate(torch.ones(2, 2, dtype=torch.long), 1), "int64"),
        (lambda: effective_rank(torch.full((2, 2), float("nan"))), "NaN"),
        (lambda: energy(torch.zeros(2, 2), 1), "all zero"),
        (lambda: subspace_similarity(gaussian(2, 4), gaussian(2, 5), 1, 1), "4 and 5 differ"),
        (lambda: subspace_similarity(gaussian(2, 4), gaussian(2, 4), 1, 3), "j 3 is out of range"),
        (lambda: amplification(gaussian(2, 4), gaussian(4, 2), 1), "differ in shape"),
        (lambda: amplification(torch.zeros(2, 4), gaussian(2, 4), 1), "nothing to amplify"),
    ],
)
def test_bad_input_is_answered_in_one_line(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
