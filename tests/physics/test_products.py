"""Matrix products of every kernel backend, on arrays laid out either way; and how a GPU may round them."""

import os
import subprocess
import sys

import pytest
import torch

from cryorbit.physics import kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (40, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_right(device, dtype, rows, columns, transposed, generator):
    left, right = (torch.randn(n, 170, dtype=dtype, generator=generator) for n in (rows, columns))
    exact = left.double() @ right.double().T
    if transposed:
        left, right = (x.T.contiguous().T for x in (left, right))
    before = torch.backends.cuda.matmul.fp32_precision
    tolerance = {
        "cpu": {torch.float32: 1e-6, torch.float64: 1e-13},
        "cuda": {torch.float32: 3e-4, torch.float64: 1e-13},
    }
    for name in kernels.backend_names(device):
        product = kernels.select(torch.device(device), name).product
        found = product(left.to(device), right.to(device))
        assert found.dtype == dtype
        error = ((found.cpu().double() - exact).abs() / torch.outer(left.norm(dim=1), right.norm(dim=1))).max()
        assert float(error) < tolerance[device][dtype]
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_kernels_leave_the_users_threads_alone():
    asked = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    code = "import torch, cryorbit.physics.kernels; print(torch.get_num_threads())"
    told = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "1"
