"""LoRA adapters of teachers, which are trained while the teacher stays as it is."""

import copy
import re

from torch import nn

from lit_kd.models.files import optional
from lit_kd.teachers.adapted import AdaptedTeacher

UNREAD = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Layers that read the weights of their linear layers, and so pass adapters by."""


def with_lora(model: nn.Module, rank: int) -> tuple[nn.Module, nn.ParameterList]:
    """A copy of a teacher with LoRA of peft, and the adapters' parameters, which alone can be trained.

    The copy shares the teacher's parameters. At first it answers as the teacher does. Adapters are at all linear layers
    outside of torch's own transformer layers; of models of Hugging Face, at all but a language model's head.

    Args:
        model: A network with linear layers; else a ValueError.
        rank: Of the adapters, at least 1; their scale is 1.
    """
    peft, transformers = (optional(name, "hf", "LoRA") for name in ("peft", "transformers"))
    own = {id(parameter): parameter for parameter in model.parameters()}
    unread = {part for layer in model.modules() if isinstance(layer, UNREAD) for part in layer.modules()}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part not in unread]
    # as one pattern: of a list peft would also take layers whose names end so
    named = "|".join(re.escape(name) for name in linear if name)
    targets = "all-linear" if isinstance(model, transformers.PreTrainedModel) else named
    if not targets or hasattr(model, "peft_config") or isinstance(model, AdaptedTeacher):
        raise ValueError(
            "expected as the teacher a network with linear layers inside it and no adapters yet, for LoRA, found "
            f"{type(model).__name__}: merge_and_unload() makes adapters part of a network"
        )
    adapted = copy.deepcopy(model, dict(own))
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapted)
    return adapted.eval(), nn.ParameterList(p for p in adapted.parameters() if id(p) not in own)
