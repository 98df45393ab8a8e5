"""Whose hazards racecheck reports. The first report is one that it gave on an H200."""

import pytest

from tests.kernels.sanitize import only_of_others

CUBLAS = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at nvjet_sm90_tst_64x8_64x16_1x1_h_bz_NNT+0xac0
=========     and Write access at nvjet_sm90_tst_64x8_64x16_1x1_h_bz_NNT+0x2790 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
OURS = CUBLAS.replace("Write access at nvjet_sm90_tst_64x8_64x16_1x1_h_bz_NNT", "Write access at loss_kernel")
TWO = OURS.partition("========= RACECHECK")[0] + CUBLAS.replace("1 hazard displayed (1", "2 hazards displayed (2")


@pytest.mark.parametrize(
    ("report", "others"),
    [
        (CUBLAS, True),
        (OURS, False),
        (TWO, False),
        (TWO.replace("loss_kernel", "nvjet_sm90"), True),
        (CUBLAS.replace("1 hazard displayed (1", "9 hazards displayed (9"), False),  # it does not show all
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_whose_hazards(report: str, others: bool) -> None:
    assert only_of_others(report) == others
