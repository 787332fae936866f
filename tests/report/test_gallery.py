"""The gallery of 2-D classes: every class with particles is shown, the others are not."""

import io

import numpy as np
from PIL import Image

from cryorbit.report.align2d import gallery, write_gallery


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def test_rows_grow_with_the_classes_that_have_particles(tmp_path):
    pictures = np.random.default_rng(0).normal(size=(12, 8, 8)).astype(np.float32)
    few = gallery(pictures, [5] * 10 + [0] * 2, [8.0] * 12, 2.0)
    many = gallery(pictures, [5] * 12, [None] * 12, 2.0)
    assert size_of(many)[0] == size_of(few)[0]
    assert size_of(many)[1] > 1.5 * size_of(few)[1]
    path = write_gallery(tmp_path / "classes.png", pictures, [5] * 12, [None] * 12, 2.0)
    assert path.read_bytes() == many  # the same for the same data
