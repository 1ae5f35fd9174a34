"""The trained model as files: LoRA in PEFT's format, and whatever else trained beside it.

adapter/adapter_config.json, adapter_model.safetensors   PeftModel.from_pretrained(backbone, adapter)
adapter/device_modules.safetensors                       what is not LoRA (embedding, head), by parameter name
adapter/README.md                                        what it is and how to load it

An adapter is for the backbone as it was before training. What was merged into the backbone meanwhile is part
of it, at a larger rank: s B A + s sum_m B_m A_m = s [B, B_1, ..] [A; A_1; ..].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlam_app.base.layout import Array
from fedlam_app.base.store import atomic_file
from fedlam_app.models.backbones import Backbone
from fedlam_app.models.split import SplitModel

DEVICE_MODULES = "device_modules.safetensors"
INSIDE = "backbone.model."  # where peft's model is, in the names of a whole model's linears

Factors = Mapping[str, tuple[Array, Array]]  # (A (R, in), B (out, R)) of every linear, by its name


def export(
    model: SplitModel,
    folder: Path,
    *,
    backbone: str,
    load: str,
    notes: Sequence[str],
    factors: Factors | None = None,
    personal: bool = False,
) -> None:
    """Write the trained parameters of ``model`` into ``folder``, whole files only.

    ``load`` is the Python expression that gives the bare ``backbone``, ``notes`` are paragraphs of the
    README. ``factors``, of one rank, take the place of the model's own. ``personal``: the devices' modules
    are theirs, and are left out.
    """
    from peft import PeftModel
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = ["# FedLAM adapter", *notes]
    adapted = model.backbone.model if isinstance(model.backbone, Backbone) else None
    if isinstance(adapted, PeftModel):
        rank = _save_adapter(adapted, folder, backbone, factors)
        paragraphs.append(_ADAPTER.format(rank=rank, backbone=backbone, load=load))
    # What PEFT does not know: the devices' modules and, under other tunings, what trains in the backbone.
    rest = {
        name: p.detach().contiguous()
        for name, p in model.trainable().items()
        if "lora_" not in name and (name.startswith("backbone.") or not personal)
    }
    (folder / DEVICE_MODULES).unlink(missing_ok=True)
    if rest:
        with atomic_file(folder / DEVICE_MODULES) as file:
            save_file(rest, file, {"format": "pt"})
        paragraphs.append(_REST.format(count=len(rest), file=DEVICE_MODULES))
    with atomic_file(folder / "README.md") as file:
        file.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _save_adapter(adapted: Any, folder: Path, backbone: str, factors: Factors | None) -> int:
    """Write PEFT's files, with these factors or with the model's own; returns the rank."""
    config, state = adapted.peft_config["default"], None
    if factors is not None:
        rank = len(next(iter(factors.values()))[0])
        # PEFT's scale is alpha / r, which must stay what it was.
        config.lora_alpha, config.r = config.lora_alpha / config.r * rank, rank
        state = {
            f"{name.removeprefix(INSIDE)}.lora_{part}.default.weight": torch.from_numpy(matrix).float()
            for name, pair in factors.items()
            for part, matrix in zip("AB", pair, strict=True)
        }
    config.base_model_name_or_path = backbone
    adapted.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    return int(config.r)


_ADAPTER = """LoRA factors of rank {rank} for the linears of `{backbone}`, in PEFT's format:

```python
from fedlam_app.models import backbones
from peft import PeftModel

backbone = {load}
backbone.model = PeftModel.from_pretrained(backbone.model, "this folder")
```"""

_REST = "`{file}` holds the {count} other parameters that trained (embedding, head), by name."
