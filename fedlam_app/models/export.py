"""The trained model as files: LoRA in PEFT's format, the device modules beside it.

adapter/adapter_config.json, adapter_model.safetensors   PeftModel.from_pretrained(backbone, adapter)
adapter/device_modules.safetensors                       embedding.* and head.*, by parameter name
adapter/README.md                                        what it is and how to load it
"""

from __future__ import annotations

from pathlib import Path

from fedlam_app.base.store import atomic_file
from fedlam_app.models.backbones import Backbone
from fedlam_app.models.split import SplitModel

DEVICE_MODULES = "device_modules.safetensors"


def export(model: SplitModel, folder: Path, backbone: str, blocks: int, summary: str) -> None:
    """Write the trained parameters of ``model`` into ``folder``, whole files only."""
    from peft import PeftModel
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    adapted = model.backbone.model if isinstance(model.backbone, Backbone) else None
    if isinstance(adapted, PeftModel):
        adapted.peft_config["default"].base_model_name_or_path = backbone
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    # What PEFT does not know: the device's modules and, under LN tuning, the norms of the backbone.
    rest = {name: p.detach().contiguous() for name, p in model.trainable().items() if "lora_" not in name}
    if rest:
        with atomic_file(folder / DEVICE_MODULES) as file:
            save_file(rest, file, {"format": "pt"})
    with atomic_file(folder / "README.md") as file:
        file.write_text(_CARD.format(summary=summary, backbone=backbone, blocks=blocks), encoding="utf-8")


_CARD = """# FedLAM adapter

{summary}

LoRA factors for the first {blocks} blocks of `{backbone}` in PEFT's format, and the device modules
(embedding and head) in `device_modules.safetensors`, by parameter name.

```python
from fedlam_app.models import backbones
from peft import PeftModel

backbone = backbones.load("{backbone}", blocks={blocks}).model
adapted = PeftModel.from_pretrained(backbone, "this folder")
```
"""
