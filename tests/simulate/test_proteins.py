"""Random molecules: size follows mass, residues keep apart, domains join, the ball basis holds them."""

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.simulate.proteins import Proteins
from cryorbit.volumes.ball import BallBasis


def gyration(points: torch.Tensor) -> float:
    """Radius of gyration."""
    return float((points - points.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def test_radius_of_gyration_follows_the_law_of_compact_chains(generator):
    family = Proteins(domains=(1, 1), residues=(60, 400))
    ratios = torch.tensor([gyration(x) / (2.2 * len(x) ** 0.38) for x in (family.draw(generator) for _ in range(30))])
    assert 0.88 < float(ratios.median()) < 1.05
    assert float(ratios.max()) < 1.35


def test_more_domains_make_longer_molecules(generator):
    one = [gyration(Proteins((1, 1), (200, 200)).draw(generator)) for _ in range(10)]
    four = [gyration(Proteins((4, 4), (50, 50)).draw(generator)) for _ in range(10)]
    assert sum(four) > 1.15 * sum(one)


def test_density_inside_a_domain_is_that_of_protein(generator):
    """135 cubic angstrom a residue."""
    points = torch.cat([Proteins((1, 1), (400, 400)).draw(generator)[None] for _ in range(4)])
    inside = points.norm(dim=2) < 12.0
    assert float(inside.sum(dim=1).double().mean()) == pytest.approx(4 / 3 * torch.pi * 12**3 / 135, rel=0.25)


def test_same_seed_same_molecule_and_centre_of_mass():
    first, again, other = (Proteins().draw(torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert float(first.mean(dim=0).norm()) < 1e-9


def test_coefficients_are_those_of_the_blurred_residues(generator):
    basis = BallBasis(24, 10.0, 8, 8)
    family = Proteins(domains=(1, 1), residues=(60, 60), fill=(0.7, 0.7))
    found = family.coefficients(basis, 1, torch.Generator().manual_seed(0))[0]
    points = family.draw(torch.Generator().manual_seed(0))
    pixel = float(points.norm(dim=1).max()) / 7.0
    axis = torch.arange(24, dtype=torch.float64) - 12
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    grid = torch.stack([x, y, z], dim=-1).reshape(-1, 1, 3)
    width = 2.8 / pixel
    density = torch.exp(-(grid - points / pixel).square().sum(dim=2) / (2 * width**2)).mean(dim=1)
    density /= (2 * torch.pi * width**2) ** 1.5
    overlap = float((basis.volume(found).flatten() * density).sum() / density.norm())
    assert overlap / float(found.norm()) > 0.97
    assert float(found.norm()) == pytest.approx(float(density.norm()), rel=0.05)


@pytest.mark.parametrize(
    "wrong", [{"domains": (0, 2)}, {"domains": (3, 2)}, {"residues": (10, 50)}, {"most": 50}, {"fill": (0.5, 1.2)}]
)
def test_families_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match="CONF345"):
        Proteins(**wrong)
