"""The laws of the step kernels on a GPU: those of tests/test_kernels_step.py, and in bfloat16."""

import pytest
import step_laws
from cases import CASES, DTYPES, Case

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SCANS = [case for case in CASES if case.T > 0 and case.cu_seqlens is None]


@every_dtype
@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
def test_a_sequence_is_the_scan_of_step(case, dtype, device):
    step_laws.assert_scan_of_step(case, dtype, device)


@every_dtype
@pytest.mark.parametrize("K, V", [(32, 32), (64, 256), (100, 33), (128, 128), (256, 200), (256, 256)])
def test_every_head_size(K, V, dtype, device):
    case = Case(f"step of {K} and {V}", 1, B=3, H=1, HV=2, K=K, V=V, decay="channels")
    step_laws.assert_one_step(case, dtype, device)


@every_dtype
def test_in_place_is_not_in_place(dtype, device):
    step_laws.assert_in_place_is_not_in_place(dtype, device)


def test_a_slot_outside_of_the_pool_touches_nothing(device):
    step_laws.assert_a_slot_outside_of_the_pool_touches_nothing(device)


def test_strides_do_not_matter(device):
    step_laws.assert_strides_do_not_matter(device)


def test_a_bfloat16_state(device):
    step_laws.assert_bfloat16_state(0.5, device)


@every_dtype
@pytest.mark.parametrize("name", step_laws.LAYERS)
def test_step_layer_is_the_layer(name, dtype, device):
    step_laws.assert_step_layer_is_the_layer(name, dtype, device, tokens=20)
