"""Fixtures that several test files use."""

import pytest
from models import SwiGLU

import ewa_kernels as ewa
from ewa_kernels.surgery import adapters


@pytest.fixture
def registered(monkeypatch):
    """SwiGLU is known, for one test."""
    monkeypatch.setattr(adapters, "_registered", [])
    ewa.register_ffn_adapter(SwiGLU, up=("w_gate", "w_value"), down="w_out")
