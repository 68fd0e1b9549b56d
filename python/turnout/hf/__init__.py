"""Hugging Face transformers on Turnout's experts.

Importing this module registers the experts implementation "turnout" with transformers, so that

    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="turnout")
    model.set_experts_implementation("turnout")

run the experts of a model by turnout.fused_experts: forward, backward and generate; save_pretrained writes what it
wrote before. The router, shared experts and all else stay those of the model.

patch(model) does the same for any supported model, and for the families whose experts do not go through that interface
(Switch Transformers); prepack(model) packs the experts for inference. docs/huggingface.md has examples and times.
"""

from __future__ import annotations

from ._version import check_transformers

check_transformers()

from .banks import IMPLEMENTATION, experts_forward, register  # noqa: E402  (transformers fits from here on)
from .models import patch, unpatch  # noqa: E402
from .packing import prepack, unpack  # noqa: E402

register()

__all__ = ["IMPLEMENTATION", "experts_forward", "patch", "prepack", "unpack", "unpatch"]
