"""The experts of transformers 5 through the kernels of this package: one setting switches a model.

    import ewa_kernels.integrations.transformers_experts
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="ewa")
    model.set_experts_implementation("ewa_random_partition")    # or later

"ewa" computes what the model's own experts compute: routers, their logits and losses, parameters and checkpoints stay
as they are. Experts whose formula the kernels do not have (GPT-OSS clamps, for one) go on with their own loop, with
one warning for each class.

"ewa_random_partition" deals the tokens at random in training and takes the mean expert in eval mode, whatever the
router says. It is called all the same, and so its logits and losses are there; without a loss on them it gets no
gradient. The output is that of one expert: where a router's weights do not sum to 1 the scale changes.
"""

from __future__ import annotations

from ..models.stacked import random_partition_forward, register_implementations, routed_forward

__all__ = ["random_partition_forward", "routed_forward"]

try:
    register_implementations()
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"ewa_kernels.integrations.transformers_experts needs transformers 5: pip install 'transformers>=5' ({error})"
    ) from error
