"""Puts another build of the extension in the place of the installed one: see extension_variants.py."""

import importlib.util
import os
import sys

import torch

# After torch, whose OpenMP runtime it uses.
spec = importlib.util.spec_from_file_location("ewa_kernels._C", os.environ["EWA_TEST_EXTENSION"])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["ewa_kernels._C"] = module

if os.environ["EWA_TEST_VARIANT"] == "cuda-on-host":
    module.parameter_pass_by_cpp = module.parameter_pass_cpu
    counter = torch.zeros(1, dtype=torch.int32)

    def parameter_pass_cpu(table, scalars):
        plan = module.CudaPlan(table)
        memory = torch.full((plan.memory_bytes + 16,), 77, dtype=torch.uint8)
        module.parameter_pass_cuda(plan, scalars, memory.data_ptr(), counter.data_ptr(), 0, 0)
        assert counter == 0, "the counter must be left zero"
        assert (memory[plan.memory_bytes :] == 77).all(), "more is written than was asked for"

    module.parameter_pass_cpu = parameter_pass_cpu
