"""What inspect finds: each fault is planted and must be named; sound data must raise no alarm."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from cryorbit.io.examine import Examination, examine
from cryorbit.io.image_checks import check_images, sample_of
from cryorbit.io.mrc import StackWriter, write_volume
from cryorbit.io.particles import new_particles, open_particles, write_particles

CTF = {
    "defocus_u": 15_000.0,
    "defocus_v": 14_500.0,
    "defocus_angle": 0.3,
    "voltage": 300.0,
    "spherical_aberration": 2.7,
    "amplitude_contrast": 0.1,
}


def blob(count: int, box: int, height: float, seed: int = 0) -> np.ndarray:
    offset = np.arange(box) - box // 2
    spot = np.exp(-0.5 * (offset[:, None] ** 2 + offset[None] ** 2) / (0.12 * box) ** 2)
    return (height * spot + np.random.default_rng(seed).normal(size=(count, box, box))).astype(np.float32)


def save(folder: Path, images: np.ndarray, pixel: float = 1.5, **columns: object) -> Path:
    count, box = images.shape[:2]
    with StackWriter(folder / "s.mrcs", count, box, 1.5) as writer:
        writer.write(images)
    made = new_particles([f"{i + 1}@s.mrcs" for i in range(count)], pixel, box, **({"ctf": CTF} | columns))
    write_particles(folder / "p.star", made)
    return folder / "p.star"


def messages(found: Examination, level: str) -> str:
    return "\n".join(finding.message for finding in found.findings if finding.level == level)


def test_sound_particles_raise_no_alarm(tmp_path: Path) -> None:
    found = examine(save(tmp_path, blob(60, 24, 1.0), half_set=np.arange(60) % 2 + 1, shifts=np.zeros((60, 2))))
    assert found.usable
    assert not found.findings
    facts = found.facts
    assert (facts["particles"], facts["box_px"], facts["pixel_size_A"], facts["stacks"]) == (60, 24, 1.5, 1)
    assert facts["images"]["protein"] == "bright"
    assert facts["images"]["background_sd"] == pytest.approx(1, abs=0.1)
    assert facts["ctf"]["defocus_um"] == {"min": 1.475, "median": 1.475, "max": 1.475}
    assert facts["half_sets"] == [30, 30]
    assert facts["shifts"]["stored_in"] == "angstrom"
    assert facts["duplicates"] == 0


def test_dark_protein_is_found_and_inverting_cures_it(tmp_path: Path) -> None:
    star = save(tmp_path, blob(60, 24, -1.0))
    found = examine(star)
    assert found.usable
    assert "protein is dark" in messages(found, "warning")
    assert "--invert-contrast" in found.findings[0].hint
    assert examine(star, invert_contrast=True).facts["images"]["protein"] == "bright"


@pytest.mark.parametrize("height", [0.0, 0.001])
def test_noise_alone_is_neither_bright_nor_dark(tmp_path: Path, height: float) -> None:
    found = examine(save(tmp_path, blob(200, 24, height, seed=5)))
    assert found.facts["images"]["protein"] == "unclear"
    assert "dark" not in messages(found, "warning")


def test_dead_and_nan_images_are_named(tmp_path: Path) -> None:
    images = blob(20, 16, 1.0)
    images[3], images[7, 2, 2] = 5.0, np.nan
    found = examine(save(tmp_path, images))
    assert not found.usable
    assert "1 of 20 images looked at hold NaN or infinite values: 8" in messages(found, "error")
    assert "1 of 20 images looked at are constant: 4" in messages(found, "warning")


@pytest.mark.parametrize(
    ("ctf", "expected"),
    [
        ({"defocus_u": 1.5, "defocus_v": 1.5}, "median defocus is 1.5 A"),
        ({"defocus_u": -15_000.0, "defocus_v": -15_000.0}, "negative defocus"),
        ({"defocus_u": 900_000.0, "defocus_v": 900_000.0}, "up to 90 um"),
        ({"defocus_u": 30_000.0, "defocus_v": 10_000.0}, "astigmatism above a quarter of the defocus in 20 particle"),
        ({"voltage": 1_000.0}, "voltage 1000 kV is out of the usual range"),
        ({"amplitude_contrast": 0.9}, "amplitude contrast 0.9 is out of"),
    ],
)
def test_odd_ctf_values_are_named(tmp_path: Path, ctf: dict[str, float], expected: str) -> None:
    assert expected in messages(examine(save(tmp_path, blob(20, 16, 1.0), ctf=CTF | ctf)), "warning")


def test_missing_ctf_columns_are_named(tmp_path: Path) -> None:
    found = examine(save(tmp_path, blob(20, 16, 1.0), ctf=None))
    assert found.usable
    assert found.facts["ctf"] is None
    assert "rlnDefocusU" in messages(found, "warning")
    assert "RELION refuses" in messages(found, "note")


def test_duplicates_pixel_conflict_shift_units_and_same_angles(tmp_path: Path) -> None:
    shifts = np.full((20, 2), 40.0)
    star = save(tmp_path, blob(20, 16, 1.0), pixel=3.0, shifts=shifts, rotations=np.stack([np.eye(3)] * 20))
    star.write_text(star.read_text().replace("\n5@s.mrcs", "\n4@s.mrcs").replace("000005@s.mrcs", "000004@s.mrcs"))
    found = examine(star)
    warnings = messages(found, "warning")
    assert found.facts["duplicates"] == 1
    assert "1 row(s) repeat an image" in warnings
    assert "header says 1.5 A per pixel, the metadata 3 A" in warnings
    assert "shifts go up to 18.9 px in a box of 16 px" in warnings
    assert "same angles" in messages(found, "note")


def test_missing_stacks_are_an_error_but_the_metadata_is_told(tmp_path: Path) -> None:
    star = save(tmp_path, blob(20, 16, 1.0))
    (tmp_path / "s.mrcs").unlink()
    found = examine(star)
    assert [finding.code for finding in found.findings if finding.level == "error"] == ["FILE010"]
    assert found.facts["particles"] == 20
    assert "images" not in found.facts


def test_unnormalised_images_and_odd_boxes_are_notes(tmp_path: Path) -> None:
    found = examine(save(tmp_path, blob(20, 17, 1.0) * 7 + 40))
    assert "not normalised: background 39.9 +- 6.7" in messages(found, "note")
    assert "box of 17 px is odd" in messages(found, "note")
    assert found.usable


def test_the_sample_is_spread_and_bounded() -> None:
    assert sample_of(10, 64).tolist() == list(range(10))
    many = sample_of(1_000_000, 64)
    assert len(many) == 500
    assert (many[0], many[-1]) == (0, 999_999)
    assert len(sample_of(1_000_000, 1024)) == 64
    assert sample_of(1, 64).tolist() == [0]


def test_a_big_stack_is_examined_in_a_moment(tmp_path: Path) -> None:
    save(tmp_path, blob(1, 64, 1.0))
    raw = bytearray((tmp_path / "s.mrcs").read_bytes())
    raw[8:12] = (200_000).to_bytes(4, "little")
    with (tmp_path / "s.mrcs").open("wb") as stream:
        stream.write(raw)
        stream.truncate(1024 + 200_000 * 64 * 64 * 4)  # 3.3 GB, sparse: all images but the first are zero
    start = time.perf_counter()
    found = examine(tmp_path / "s.mrcs")
    assert time.perf_counter() - start < 8
    assert found.facts["particles"] == 200_000
    assert "499 of 500 images looked at are constant: 401" in messages(found, "error")


def test_maps(tmp_path: Path) -> None:
    volume = blob(16, 16, 5.0)
    write_volume(tmp_path / "v.mrc", volume, 2.0)
    found = examine(tmp_path / "v.mrc")
    assert (found.kind, found.facts["box_px"], found.facts["pixel_size_A"]) == ("map", 16, 2.0)
    assert found.usable
    write_volume(tmp_path / "d.mrc", -volume, 0.0)
    warnings = messages(examine(tmp_path / "d.mrc"), "warning")
    assert "extreme values are negative" in warnings
    assert "voxel size" in warnings
    write_volume(tmp_path / "z.map", volume * 0, 1.0)
    assert not examine(tmp_path / "z.map").usable


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.stack([np.eye(3)] * 4), "cryoDRGN poses"),
        (np.zeros((4, 9)), "cryoDRGN CTF"),
        (np.arange(4), "selection of particles"),
    ],
)
def test_pickles(tmp_path: Path, value: np.ndarray, kind: str) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    found = examine(tmp_path / "x.pkl")
    assert (found.kind, found.facts["rows"], found.usable) == (kind, 4, True)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert not examine(tmp_path / "y.pkl").usable


def test_tiny_images_are_not_judged(tmp_path: Path) -> None:
    with StackWriter(tmp_path / "s.mrcs", 2, 4, 1.0) as writer:
        writer.write(np.ones((2, 4, 4), np.float32))
    assert check_images(open_particles(tmp_path / "s.mrcs")) is None


# known from elsewhere: RELION-made sets are bright; the apoferritin set correlates at -0.92 with the
# CTF-modulated profile of its model, and tomoDRGN simulates with cryoDRGN's CTF, whose sign is the opposite
@pytest.mark.parametrize(
    ("name", "protein"),
    [
        ("particles_real/aspire_sample17/sample_particles_relion30.star", "bright"),
        ("particles_real/bioem/bioem20.mrcs", "bright"),
        ("golden/projctf64.star", "bright"),
        ("particles_simulated/cryodrgn/hand.mrcs", "bright"),
        ("particles_real/apoferritin_empiar10146/apo10146_mit10_64px_f16.star", "dark"),
        ("particles_simulated/tomodrgn_10076/10076_classE_32_sim.mrcs", "dark"),
    ],
)
def test_the_sign_of_third_party_sets(shared_data: Path, name: str, protein: str) -> None:
    assert examine(shared_data / name).facts["images"]["protein"] == protein
