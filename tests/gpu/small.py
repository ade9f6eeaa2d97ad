"""Small cases for compute-sanitizer: every form, forward and backward, odd sizes, several programs."""

import torch

import ewa_kernels as ewa

torch.manual_seed(0)
for form in ("triton-single", "triton-split", "triton-onchip", "cublas"):
    for num_tokens, d_model, d_ff, gated in ((1000, 64, 256, False), (333, 72, 200, True), (65, 32, 48, False)):
        layer = ewa.RandomPartitionMoE(
            d_model, d_ff, 3, gated=gated, dropout=0.1, device="cuda", dtype=torch.bfloat16, backend=form
        )
        x = torch.randn(num_tokens, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        assert x.grad.isfinite().all()
    layer.recompute = True
    layer(x).sum().backward()
    permutation, offsets = torch.randperm(65, device="cuda"), torch.tensor([0, 40, 40, 65], device="cuda")
    weights = (layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias)
    partition = {"permutation": permutation, "expert_offsets": offsets}
    ewa.functional.grouped_ffn(x, *weights, backend=form, **partition).sum().backward()
    routed = ewa.RoutedMoE(d_model, d_ff, 3, 2, dropout=0.1, device="cuda", dtype=torch.bfloat16, backend=form)
    (routed(x).sum() + routed.load_balance_loss).backward()
    assert routed.router.weight.grad.isfinite().all()
    print(form, "done", flush=True)
weight, bias = torch.randn(3, 48, 32, device="cuda").bfloat16().requires_grad_(), torch.randn(3, 48, device="cuda")
for gather, scatter in ((True, False), (False, True), (True, True)):
    out = ewa.functional.expert_linear(x, weight, bias.bfloat16(), **partition, gather=gather, scatter=scatter)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (x, weight)))
print("one product done", flush=True)
assert (
    ewa.functional.random_permutation(1000, 3, device="cuda")
    .long()
    .sort()
    .values.equal(torch.arange(1000, device="cuda"))
)
torch.cuda.synchronize()

memory = torch.randn(4, 1111, device="cuda")
groups = [memory[:, 1:1000], torch.randn(9, 77, device="cuda", dtype=torch.bfloat16), torch.randn(6, 5, device="cuda")]
parameters = [torch.nn.Parameter(t) for t in groups]
averager = ewa.ExpertAverager(parameters, 0.3)
optimizer = ewa.optim.AdamW(parameters, averager=averager)
for backend in ("cuda", "triton"):
    ewa.functional.average_experts_(groups, 0.3, backend=backend)
for parameter in parameters:
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
torch.cuda.synchronize()
print("experts done", flush=True)
