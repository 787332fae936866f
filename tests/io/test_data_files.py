"""Every third-party metadata and particle file either loads with the right numbers or gives one clear error."""

from pathlib import Path

import numpy as np
import pytest

from cryorbit.errors import CryorbitError
from cryorbit.io.cryodrgn import read_arrays
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.io.star import read_star, write_star

# file, rows, box, pixel size, has CTF, has angles, has shifts, has half sets: written down from the files themselves
LOADS = """
particles_real/apoferritin_empiar10146/apo10146_mit10_64px_f16.star 1357 64 3.0 1 0 0 0
particles_real/apoferritin_empiar10146/apo10146_top256_64px_f32.star 256 64 3.0 1 0 0 0
particles_real/apoferritin_empiar10146/apo10146_mit10_64px_f16.mrcs 1357 64 3.0 0 0 0 0
particles_real/apoferritin_empiar10146/apo10146_top256_64px_f32.mrcs 256 64 3.0 0 0 0 0
particles_real/aspire_sample17/sample_incomplete_ctf_params.star 1 200 1.338 0 1 1 1
particles_real/aspire_sample17/sample_particles_relion30.star 17 200 1.338 1 1 1 1
particles_real/aspire_sample17/sample_particles_relion31.star 17 200 1.4 1 1 1 1
particles_real/aspire_sample17/sample_relion_symmetry_group_D4.star 17 200 1.338 1 1 1 1
particles_real/bioem/TwoImages.mrc 2 220 0.00024414 0 0 0 0
particles_real/bioem/bioem20.mrcs 20 224 1.32 0 0 0 0
particles_real/bioem/particle3.mrcs 1 196 1.0 0 0 0 0
particles_real/empiar10076_7/empiar_10076_7.star 7 320 1.31 1 0 0 0
particles_real/empiar10076_7/empiar_10076_7.cs 7 320 1.31 1 0 0 0
particles_real/relion31_filament5/relion31.star 5 256 2.806 1 1 1 1
particles_real/relion31_filament5/relion31.v2.star 5 256 2.806 1 1 1 1
particles_real/relion31_filament5/relion31.mrcs 5 256 1.0 0 0 0 0
particles_real/ribosome_tilts_64px/sta_testing_bin8.star 219 64 1.96 1 1 0 1
particles_real/ribosome_tilts_64px/ay19102021_L3_position6_ribo_it09_bin8_1.82A.mrcs 220 64 1.0 0 0 0 0
metadata/cryojax/test_starfile.star 3 16 12.0 1 1 1 0
metadata/cryojax/000000.mrcs 3 16 1.0 0 0 0 0
metadata/xmipp/smallStack.mrcs 4 64 1.0 0 0 0 0
particles_simulated/cryodrgn/toy_projections.star 1000 30 1.0 1 0 0 0
particles_simulated/cryodrgn/toy_projections.txt 1000 30 1.0 0 0 0 0
particles_simulated/cryodrgn/hand.mrcs 100 64 1.0 0 0 0 0
particles_simulated/aspire/rln_proj_64_shifted.star 4 64 1.0 0 1 1 0
particles_simulated/aspire/rln_proj_65_shifted.star 4 65 1.0 0 1 1 0
particles_simulated/relion_project/relion_proj_batch.star 24 64 3.54 1 1 1 0
golden/proj48.star 16 48 2.2 1 1 1 0
golden/projctf64.star 16 64 1.6 1 1 1 0
"""

# the stacks are not there: the metadata loads alone, and asking for images gives FILE010 (box 0: the file does not say)
METADATA = """
metadata/compSPI/test.star 452 128 1.911 1 1 1 1
metadata/cryodrgn/FinalRefinement-OriginalParticles-PfCRT.star 5 0 1.035 0 1 1 1
metadata/cryodrgn/relion31.6opticsgroups.star 139 196 1.25 1 1 1 1
metadata/cryodrgn/relion5.star 17 448 0.89 1 1 1 1
metadata/cryodrgn/sta_testing.star 219 0 1.96 1 1 0 1
metadata/cryodrgn/toy_projections_13.star 13 300 1.035 1 0 0 0
metadata/cryodrgn/cryosparc_P12_J24_001_particles.cs 2019 180 2.95 1 1 1 1
metadata/cryodrgn/cryosparc_J2_particles_exported.cs 22 300 1.345 1 0 0 0
metadata/cryolike/relion_style_particles.star 106 384 0.725 1 1 1 1
metadata/drgnai/M_particles_sub10.star 10 0 3.9 1 1 0 1
metadata/scipion/input_particles.star 2021 86 3.0 1 0 0 0
metadata/starfile/optics_group_inter1965.star 1 400 1.04 1 1 1 1
metadata/topaz/particles.star 1500 0 0.98186 1 1 1 1
particles_real/aspire_sample17/sample_relion_one_image.star 1 0 1.338 1 1 1 1
particles_simulated/relion_project/pyem.star 24 64 3.54 1 1 1 0
"""

REFUSED = """
metadata/aspire/sample.star STAR003
metadata/aspire/sample_data_model.star STAR010
metadata/cryolike/particle_data.star STAR010
metadata/topaz/ctf_params.star STAR010
metadata/starfile/postprocess.star STAR010
metadata/starfile/default_pipeline.star STAR010
metadata/starfile/empty_loop.star STAR010
metadata/starfile/one_loop.star FILE010
metadata/starfile/rln3.1_data_style.star STAR010
metadata/cryosparc/4k_dataset.cs CS004
metadata/drgnai/00256_Ribosomes_1.70A.mrcs MRC003
metadata/xmipp/KLH.tif FILE003
metadata/xmipp/smallStack.stk FILE003
metadata/xmipp/smallStack.hed FILE003
metadata/xmipp/smallStack.img FILE003
metadata/cryodrgn/toy_projections_dir.star FILE010
particles_real/aspire_sample17/sample.mrcs DATA027
particles_real/empiar10076_7/empiar_10076_7.mrc DATA027
particles_real/bioem/particles_file.txt FILE012
particles_simulated/aspire/rln_proj_64.star STAR013
"""

PICKLES = """
metadata/cryodrgn/ctf1.pkl 5,9
metadata/cryodrgn/ctf2.pkl 2019,9
metadata/cryodrgn/test_ctf.100.pkl 100,9
metadata/cryodrgn/ind100.pkl 100
metadata/cryodrgn/pose.cs.pkl 2019,3,3 2019,2
metadata/cryodrgn/pose.star.pkl 5,3,3 5,2
metadata/drgnai/hand_pose.pkl 100,3,3
particles_real/ribosome_tilts_64px/sta_ctf.pkl 219,9
particles_real/ribosome_tilts_64px/sta_pose.pkl 219,3,3 219,2
particles_simulated/cryodrgn/toy_rot_trans.pkl 1000,3,3 1000,2
particles_simulated/tomodrgn_10076/labels_D-0_E-1.pkl 144
"""


def lines(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


@pytest.mark.parametrize(
    ("row", "images"),
    [(r, True) for r in lines(LOADS)] + [(r, False) for r in lines(METADATA)],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_it_loads_with_the_right_numbers_and_survives_a_round_trip(
    shared_data: Path, tmp_path: Path, row: list[str], images: bool
) -> None:
    if not images:
        with pytest.raises(CryorbitError, match="FILE010"):
            open_particles(shared_data / row[0])
    particles = open_particles(shared_data / row[0], require_images=images)
    assert (len(particles), particles.box) == (int(row[1]), int(row[2]))
    assert particles.pixel_size == pytest.approx(float(row[3]), rel=1e-4)
    present = [
        value is not None for value in (particles.ctf, particles.rotations, particles.shifts, particles.half_set)
    ]
    assert present == [flag == "1" for flag in row[4:]]
    if images:
        assert particles.read([0, len(particles) - 1]).shape == (2, particles.box, particles.box)
    write_particles(tmp_path / "out.star", particles)
    again = open_particles(tmp_path / "out.star", require_images=images)
    for name in ("rotations", "shifts", "half_set"):
        before, after = getattr(particles, name), getattr(again, name)
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_allclose(after, before, atol=2e-6)
    for field in particles.ctf or {}:
        np.testing.assert_allclose(again.ctf[field], particles.ctf[field], rtol=1e-9)
    lost = set(particles.table.columns) - set(again.table.columns)
    assert lost <= {"rlnOriginX", "rlnOriginY"}


@pytest.mark.parametrize(("name", "code"), lines(REFUSED))
def test_it_is_refused_with_one_clear_error(shared_data: Path, name: str, code: str) -> None:
    with pytest.raises(CryorbitError) as caught:
        open_particles(shared_data / name)
    assert caught.value.code == code
    assert Path(name).name in caught.value.message or code == "FILE010"


@pytest.mark.parametrize("row", lines(PICKLES), ids=lambda r: r[0])
def test_pickles_have_the_right_shapes(shared_data: Path, row: list[str]) -> None:
    assert [",".join(map(str, array.shape)) for array in read_arrays(shared_data / row[0])] == row[1:]


def test_the_tables_above_name_every_file(shared_data: Path) -> None:
    named = {row[0] for table in (LOADS, METADATA, REFUSED, PICKLES) for row in lines(table)}
    parsed_only = {f"metadata/starfile/{name}" for name in PARSED}
    found = {
        str(path.relative_to(shared_data))
        for part in ("metadata", "particles_real")
        for path in (shared_data / part).rglob("*")
        if path.is_file()
    }
    assert found - named - parsed_only - {f"particles_real/bioem/particle-{i}.mrc" for i in range(1, 5)} == set()


PARSED = {  # STAR files for parsers: not particle files, or of one image whose stack nobody has; blocks and rows
    "basic_double_quote.star": {"": 1},
    "basic_single_quote.star": {"": 1},
    "empty_loop.star": {"": 0},
    "loop_double_quote.star": {"": 2},
    "loop_single_quote.star": {"": 2},
    "one_loop.star": {"": 16},
    "postprocess.star": {"general": 1, "fsc": 49, "guinier": 49},
    "single_line_end_of_multiblock.star": {"block_1": 2, "block_2": 1},
    "single_line_middle_of_multiblock.star": {"block_1": 1, "block_2": 1},
    "two_basic_blocks.star": {"block_0": 1, "block_1": 1},
    "two_single_line_loop_blocks.star": {"block_0": 1, "block_1": 1},
}


@pytest.mark.parametrize("name", PARSED)
def test_parser_files_have_the_right_rows(shared_data: Path, name: str) -> None:
    star = read_star(shared_data / "metadata/starfile" / name)
    assert {block: len(table) for block, table in star.blocks.items()} == PARSED[name]


def test_every_star_file_survives_reading_and_writing(shared_data: Path, tmp_path: Path) -> None:
    count = 0
    for path in sorted(shared_data.rglob("*.star")):
        if path.name == "sample.star":
            continue
        star = read_star(path)
        write_star(tmp_path / "copy.star", star)
        assert read_star(tmp_path / "copy.star") == star
        count += 1
    assert count >= 50


def test_quoted_cells(shared_data: Path) -> None:
    for kind in ("single", "double"):
        table = read_star(shared_data / f"metadata/starfile/loop_{kind}_quote.star").blocks[""]
        assert table.columns["quote_string"] == ["quote string"] * 2
        assert table.columns["whitespace_string"] == [" "] * 2
        assert table.columns["empty_string"] == [""] * 2
        assert table.columns["number_and_string"] == ["4.0", "noquote"]
