"""Values that cannot be: each ends in one error that names the row, and nothing else breaks."""

from pathlib import Path

import numpy as np
import pytest

from cryorbit.errors import CryorbitError
from cryorbit.io.examine import examine
from cryorbit.io.mrc import StackWriter
from cryorbit.io.particle_set import duplicate_groups
from cryorbit.io.particles import new_particles, open_particles, write_particles
from cryorbit.io.relion import CTF_LABELS
from cryorbit.io.stacks import split_image_name
from cryorbit.io.star import read_star

CTF = {
    "defocus_u": 15_000.0,
    "defocus_v": 14_500.0,
    "defocus_angle": 0.3,
    "voltage": 300.0,
    "spherical_aberration": 2.7,
    "amplitude_contrast": 0.1,
}


def stack(path: Path, images: np.ndarray) -> Path:
    with StackWriter(path, *images.shape[:2], 1.5) as writer:
        writer.write(images.astype(np.float32))
    return path


def noise(count: int = 12, box: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, box, box)).astype(np.float32)


def save(folder: Path, columns: dict[str, np.ndarray], shifts: np.ndarray | None = None, pixel: float = 1.5) -> Path:
    stack(folder / "s.mrcs", noise())
    names = [f"{i + 1}@s.mrcs" for i in range(12)]
    made = new_particles(names, pixel, 16, {k: np.full(12, v) for k, v in CTF.items()} | columns, shifts=shifts)
    write_particles(folder / "p.star", made)
    return folder / "p.star"


def errors(path: Path, **options: object) -> list[tuple[str, str]]:
    found = examine(path, **options)
    assert found.usable == all(finding.level != "error" for finding in found.findings)
    return [(finding.code, finding.message) for finding in found.findings if finding.level == "error"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("voltage", 0.0, "0 kV, expected 1 to 2000 kV"),
        ("voltage", -300.0, "-300 kV"),
        ("voltage", 300_000.0, "300000 kV"),
        ("spherical_aberration", 2.7e7, "2.7e+07 mm, expected -20 to 20 mm"),
        ("amplitude_contrast", 1.0, "1, expected 0 to"),
        ("amplitude_contrast", -0.1, "-0.1, expected"),
        ("defocus_u", 2e6, "2e+06 A, expected -1e+06 to 1e+06 A"),
        ("defocus_v", -2e6, "-2e+06 A"),
        ("defocus_v", 1e300, "1e+300 A"),
        ("bfactor", 1e9, "1e+09 A^2"),
        ("defocus_angle", 1e38, "rlnDefocusAngle) is 1e+38 deg, expected -3600 to 3600 deg"),
        ("phase_shift", 1e300, "rlnPhaseShift) is 1e+300 deg"),
        ("scale", 1e9, "1e+09"),
        ("scale", 0.0, "0, expected 0.001 to 1e+06"),
        ("scale", -1.0, "-1, expected"),
    ],
)
def test_ctf_values_that_cannot_be_name_the_row(tmp_path: Path, field: str, value: float, expected: str) -> None:
    values = np.full(12, CTF.get(field, 1.0))
    values[4:6] = value * CTF_LABELS[field][1]
    found = errors(save(tmp_path, {field: values}))
    assert [code for code, _ in found] == ["DATA030"]
    assert found[0][1].startswith(f"row 5: the {field.replace('_', ' ')} (rln")
    assert expected in found[0][1]
    assert "(1 more row(s) are out of range)" in found[0][1]


@pytest.mark.parametrize("value", [1e6, 0.0, 2.7])
def test_values_at_the_limits_are_usable(tmp_path: Path, value: float) -> None:
    assert not errors(save(tmp_path, {"defocus_u": np.full(12, value), "defocus_v": np.full(12, value)}))


def test_origins_beyond_the_box_name_the_row(tmp_path: Path) -> None:
    shifts = np.zeros((12, 2))
    shifts[2] = (24.0, -24.0)
    assert not errors(save(tmp_path, {}, shifts))
    shifts[7, 1] = -24.1
    code, message = errors(save(tmp_path, {}, shifts))[0]
    assert (code, message[:42]) == ("DATA030", "row 8: the origin (shift in x or y) is 16.")
    assert "expected at most the box of 16 px" in message


@pytest.mark.parametrize("pixel", [1e-3, 1001.0, 1e30, np.inf])
def test_pixel_sizes_that_cannot_be(tmp_path: Path, pixel: float) -> None:
    code, message = errors(save(tmp_path, {}), pixel_size=pixel)[0]
    assert code == "DATA030"
    assert f"the pixel size is {pixel:.6g} A, expected 0.01 to 1000 A" in message


@pytest.mark.parametrize(
    ("scale", "offset", "code", "words"),
    [
        (0.0, 0.0, "DATA013", "all images are constant (12 of 12"),
        (0.0, 0.1, "DATA013", "all images are constant"),
        (1e30, 0.0, "DATA014", "need values below 1e+12"),
        (1e-30, 0.0, "DATA014", "deviations above 1e-12"),
        (1.0, 1e13, "DATA013", "all images are constant"),  # the noise is lost in float32
    ],
)
def test_images_without_use(tmp_path: Path, scale: float, offset: float, code: str, words: str) -> None:
    found = errors(stack(tmp_path / "s.mrcs", noise() * scale + offset))
    assert [name for name, _ in found] == [code]
    assert words in found[0][1]


@pytest.mark.parametrize(("value", "code"), [(np.inf, "DATA012"), (1e30, "DATA014"), (-1e30, "DATA014"), (9e11, "")])
def test_an_image_no_sample_holds_is_named_where_it_is_read(tmp_path: Path, value: float, code: str) -> None:
    images = noise()
    images[6, 3, 4] = value
    particles = open_particles(stack(tmp_path / "s.mrcs", images))
    if code:
        with pytest.raises(CryorbitError, match=rf"{code}: 1 image\(s\) of s.mrcs hold .*: 7 \(counted from 1\)"):
            particles.read(range(12))
    else:
        assert particles.read(range(12))[6, 3, 4] == np.float32(value)


def test_a_hot_pixel_is_a_warning_that_names_the_image(tmp_path: Path) -> None:
    images = noise()
    images += 1e4  # an offset of all pixels is none
    images[6, 3, 4] += 900
    assert "apart" not in str(examine(stack(tmp_path / "s.mrcs", images)).findings)
    images[6, 3, 4] = 9e11
    found = examine(stack(tmp_path / "s.mrcs", images))
    assert found.usable
    assert "1 of 12 images looked at have pixels more than 1000 usual standard deviations apart: 7" in str(
        found.findings
    )


@pytest.mark.parametrize("box", [5, 7])
def test_boxes_too_small_for_checks_are_refused(tmp_path: Path, box: int) -> None:
    assert errors(stack(tmp_path / "s.mrcs", noise(12, box))) == [
        ("DATA030", f"the images are {box} px wide, expected at least 8 px")
    ]


def test_a_few_constant_images_are_a_warning(tmp_path: Path) -> None:
    images = noise()
    images[3:6] = 0.1
    found = examine(stack(tmp_path / "s.mrcs", images))
    assert found.usable
    assert any("3 of 12 images looked at are constant: 4, 5, 6" in finding.message for finding in found.findings)


@pytest.mark.parametrize("name", ["²@s.mrcs", "٣@s.mrcs", "+1@s.mrcs", "0@s.mrcs", "@s.mrcs", f"{'9' * 5000}@s.mrcs"])
def test_image_numbers_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(CryorbitError, match="DATA020"):
        split_image_name(name)
    (tmp_path / "p.star").write_text(f"data_\nloop_\n_rlnImageName #1\n_rlnImagePixelSize #2\n{name} 1.5\n")
    assert [code for code, _ in errors(tmp_path / "p.star")] == ["DATA020"]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("bad.txt", b"\xff\xfe\x00s.mrcs", "FILE012"),
        ("bad.cs", b"PK\x03\x04 no archive", "CS001"),
        ("bad.cs", b"PK\x05\x06" + bytes(3), "CS001"),
        ("bad.tif", b"II*\x00", "FILE003"),
        ("bad.star", b"\xff\xfe", "STAR001"),
        ("bad.mrc", b"abc", "MRC001"),
        ("bad.map", b"abc", "MRC001"),
        ("bad.pkl", b"abc", "PKL001"),
        ("bad.mrcs", b"", "MRC001"),
    ],
)
def test_a_file_that_does_not_read_is_called_unreadable(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = examine(tmp_path / name)
    assert (found.kind, found.usable, found.findings[0].code) == ("unreadable", False, code)


OPTICS = """data_optics
loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnImagePixelSize #3
{groups}
data_particles
loop_
_rlnImageName #1
_rlnOpticsGroup #2
1@s.mrcs {group}
"""


@pytest.mark.parametrize(
    ("groups", "group", "message"),
    [
        ("1 300 1.5\n1 200 1.5\n", "1", "STAR013: the optics table of p.star lists group 1 twice"),
        ("1 300 1.5\n2 300 1.5\n", "1.5", 'STAR012: row 1 of column rlnOpticsGroup holds "1.5"'),
        ("1 300 1.5\n2.5 300 1.5\n", "1", 'STAR012: row 2 of column rlnOpticsGroup holds "2.5"'),
        ("1 300 1.5\n", "1e300", 'STAR012: row 1 of column rlnOpticsGroup holds "1e300"'),
    ],
)
def test_optics_groups_must_be_clear(tmp_path: Path, groups: str, group: str, message: str) -> None:
    (tmp_path / "p.star").write_text(OPTICS.format(groups=groups, group=group))
    with pytest.raises(CryorbitError) as caught:
        open_particles(tmp_path / "p.star", require_images=False)
    assert message in str(caught.value)


def test_an_optics_group_listed_twice_alike_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.star").write_text(OPTICS.format(groups="1 300 1.5\n1 300 1.5\n", group="1.0"))
    assert open_particles(tmp_path / "p.star", require_images=False).pixel_size == 1.5


def test_rows_with_a_multiple_of_extra_values_are_refused(tmp_path: Path) -> None:
    head = "data_p\n\nloop_\n_a #1\n_b #2\n"
    for rows, line in (("1 2\n3 4 5 6\n", 7), ("1 2 3\n4 5 6\n", 6), ("1 2\n3 4 5 6\n\ndata_q\nloop_\n_c\n1\n", 7)):
        (tmp_path / "x.star").write_text(head + rows)
        with pytest.raises(CryorbitError, match=f"STAR003: x.star is no valid STAR file, line {line}: [34] value"):
            read_star(tmp_path / "x.star")
    (tmp_path / "x.star").write_text(head + "1\n2\n3 4\n")  # a row on two lines is STAR too
    assert read_star(tmp_path / "x.star").blocks["p"].columns == {"a": ["1", "3"], "b": ["2", "4"]}


def test_copies_of_an_image_have_one_number(tmp_path: Path) -> None:
    stack(tmp_path / "s.mrcs", noise(4))
    stack(tmp_path / "t.mrcs", noise(9))
    (tmp_path / "other").symlink_to(tmp_path)
    names = ["1@s.mrcs", "2@s.mrcs", "000001@s.mrcs", "2@t.mrcs", "1@other/s.mrcs", "4@s.mrcs", "9@t.mrcs", "4@s.mrcs"]
    rows = "".join(f"{name} 1.5\n" for name in names)
    (tmp_path / "p.star").write_text("data_\nloop_\n_rlnImageName #1\n_rlnImagePixelSize #2\n" + rows)
    for images, same in ((True, [0, 1, 0, 2, 0, 3, 4, 3]), (False, [0, 1, 0, 2, 3, 4, 5, 4])):
        groups = duplicate_groups(open_particles(tmp_path / "p.star", require_images=images))
        assert groups.dtype == np.int64
        assert [[a == b for b in groups] for a in groups] == [[a == b for b in same] for a in same]
    assert examine(tmp_path / "p.star").facts["duplicates"] == 3
