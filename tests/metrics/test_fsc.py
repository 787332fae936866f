"""FSC, resolution and the phase-randomised correction, in numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.metrics.fsc import (
    _same_shape,
    crossing,
    frc,
    fsc,
    masked_fsc,
    randomise_phases,
    resolution,
    shell_power,
    ssnr,
)
from cryorbit.metrics.masks import soft_sphere


def _loop_fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The definition, voxel by voxel over the whole transform."""
    box = a.shape[0]
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    freq = np.round(np.fft.fftfreq(box) * box).astype(int)
    top, left, right = (np.zeros(box // 2 + 1) for _ in range(3))
    for iz in range(box):
        for iy in range(box):
            for ix in range(box):
                s = round(float(np.sqrt(freq[iz] ** 2 + freq[iy] ** 2 + freq[ix] ** 2)))
                if s <= box // 2:
                    top[s] += (fa[iz, iy, ix] * np.conj(fb[iz, iy, ix])).real
                    left[s] += abs(fa[iz, iy, ix]) ** 2
                    right[s] += abs(fb[iz, iy, ix]) ** 2
    return top / np.sqrt(left * right)


@pytest.mark.parametrize("box", [8, 9, 14])
def test_equals_the_definition(box: int, generator: torch.Generator) -> None:
    a = torch.randn(box, box, box, generator=generator)
    b = a + torch.randn(box, box, box, generator=generator)
    np.testing.assert_allclose(fsc(a, b).numpy(), _loop_fsc(a.double().numpy(), b.double().numpy()), atol=1e-6)


def test_frc_equals_the_definition(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 12, 12, generator=generator)
    fa, fb = (np.fft.fft2(v.double().numpy()) for v in (a, b))
    freq = np.fft.fftfreq(12) * 12
    shell = np.round(np.hypot(freq[:, None], freq[None])).astype(int)
    expected = [
        (fa * fb.conj()).real[shell == s].sum()
        / np.sqrt((abs(fa) ** 2)[shell == s].sum() * (abs(fb) ** 2)[shell == s].sum())
        for s in range(7)
    ]
    np.testing.assert_allclose(frc(a, b).numpy(), expected, atol=1e-6)


def test_of_a_map_with_itself_is_one_and_with_its_negative_minus_one(generator: torch.Generator) -> None:
    a = torch.randn(16, 16, 16, generator=generator)
    torch.testing.assert_close(fsc(a, a), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(fsc(a, -3 * a), -torch.ones(9, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), box=st.integers(4, 13), scale=st.floats(1e-3, 1e3))
def test_lies_between_minus_one_and_one_and_ignores_scale(seed: int, box: int, scale: float) -> None:
    a, b = torch.randn(2, box, box, box, generator=torch.Generator().manual_seed(seed))
    curve = fsc(a, b)
    assert float(curve.abs().max()) <= 1 + 1e-9
    torch.testing.assert_close(fsc(scale * a, b), curve, atol=1e-5, rtol=0)


def test_of_noise_is_zero_within_its_own_error(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 48, 48, 48, generator=generator)
    voxels = shell_counts(48)
    z = fsc(a, b)[3:] * (voxels[3:] / 2) ** 0.5  # half of the voxels are independent
    assert float(z.abs().max()) < 4
    assert 0.6 < float(z.std()) < 1.4


def shell_counts(box: int) -> Tensor:
    freq = torch.arange(box) - box // 2
    r = (freq[:, None, None] ** 2 + freq[None, :, None] ** 2 + freq[None, None, :] ** 2).sqrt().round().long()
    return torch.bincount(r.flatten())[: box // 2 + 1]


def test_without_power_is_zero_and_not_nan() -> None:
    assert fsc(torch.zeros(8, 8, 8), torch.ones(8, 8, 8)).tolist() == [0.0] * 5


def test_maps_of_different_size_are_refused() -> None:
    with pytest.raises(DataError, match="DATA201"):
        _same_shape(torch.zeros(8, 8, 8), torch.zeros(9, 9, 9))


def test_resolution_is_interpolated_between_shells() -> None:
    curve = torch.tensor([1.0, 1.0, 1.0, 0.8, 0.3, 0.0, 0.9, 0.0, 0.0])
    assert crossing(curve, 0.5) == pytest.approx(3.6)
    assert resolution(curve, 0.5, 16, 2.0) == pytest.approx(16 * 2.0 / 3.6)
    assert resolution(curve, 0.15, 16, 2.0) == pytest.approx(16 * 2.0 / 4.5)


def test_resolution_is_nyquist_when_the_curve_stays_up_and_the_box_when_it_drops_at_once() -> None:
    assert resolution(torch.full((9,), 0.9), 0.143, 16, 1.5) == 3.0
    low = torch.zeros(9)
    assert resolution(low, 0.5, 16, 1.5) == 16 * 1.5  # never coarser than the map is wide


def test_ssnr_matches_the_noise_that_was_added(generator: torch.Generator) -> None:
    signal = torch.randn(40, 40, 40, generator=generator)
    halves = [signal + 2.0 * torch.randn(40, 40, 40, generator=generator) for _ in range(2)]
    expected = 1.0 / (4.0 / 2)  # the full map averages the halves: noise variance 4 / 2
    assert float(ssnr(fsc(*halves))[10:].mean()) == pytest.approx(expected, rel=0.1)
    assert float(ssnr(fsc(signal, (halves[0] + halves[1]) / 2), halves=False)[10:].mean()) == pytest.approx(
        expected, rel=0.1
    )


def test_phase_randomisation_keeps_amplitudes_and_low_shells(
    generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    volume = draw_atoms(atoms * 0.5, 32)
    mixed = randomise_phases(volume, 5, generator)
    torch.testing.assert_close(shell_power(mixed), shell_power(volume), rtol=1e-3, atol=1e-6)
    curve = fsc(volume, mixed)
    assert float(curve[:5].min()) > 1 - 1e-6
    assert float(curve[8:14].abs().max()) < 0.3


def test_correction_takes_away_what_a_tight_mask_makes(
    generator: torch.Generator, draw_atoms: Callable[..., Tensor]
) -> None:
    """Two independent noise maps share nothing; a small common mask makes their low shells agree by chance, and the
    correction removes it.
    """
    box = 48
    low = 5.0 * draw_atoms(torch.zeros(1, 3, dtype=torch.float64), box, sigma=4.0)  # nothing beyond shell 6
    a, b = (low + torch.randn(box, box, box, generator=generator) for _ in range(2))
    result = masked_fsc(a, b, soft_sphere(box, 10.0, 2.0), generator)
    tail = slice(result.shell + 2, 24)
    assert float(result.masked[1]) > 0.9
    assert abs(float(result.corrected[tail].mean())) < 0.15
    expected = (result.masked - result.randomised) / (1 - result.randomised)
    torch.testing.assert_close(result.corrected[tail], expected[tail])
    torch.testing.assert_close(result.corrected[: result.shell + 2], result.masked[: result.shell + 2])
