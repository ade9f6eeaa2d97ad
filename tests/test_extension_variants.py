"""The tests of the extension, with other builds of it: see extension_variants.py."""

import pytest
from extension_variants import run_tests


def test_cuda_kernel_compiled_for_the_host():
    run_tests("cuda-on-host")


@pytest.mark.slow
def test_sanitized():
    run_tests("sanitized")
