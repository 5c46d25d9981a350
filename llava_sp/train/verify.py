"""The proof at the end of a run: what was written, loaded back, gives the logits that the trained model gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_sp.checkpoints import load_adapter
from llava_sp.checkpoints.backbones import gathered
from llava_sp.train.stages import trained_names
from llava_sp.train.trainer import LlavaSPTrainer

# bf16 and fp32 tensors come back bit for bit; the rest is for kernels that sum in another order.
TOLERANCE = 1e-3


@torch.no_grad()
def verify_saved(trainer: LlavaSPTrainer, path: str | Path, sample: dict[str, Tensor]) -> dict[str, float]:
    """Forget what was trained, load it from `path`, and compare the logits of one sample.

    Every process must call this. Raises RuntimeError when forgetting changes nothing (then the comparison would prove
    nothing) or when the logits do not come back.
    """
    before = logits_of(trainer, sample)
    forget(trainer.model)
    emptied = logits_of(trainer, sample)
    load_adapter(trainer.model, path)
    after = logits_of(trainer, sample)

    scale = before.abs().max().item()
    moved = (emptied - before).abs().max().item() / scale
    error = (after - before).abs().max().item() / scale
    if not moved > TOLERANCE:
        raise RuntimeError(
            "The check of the saved weights is void: zeroing what was trained left the logits as they were."
        )
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"The weights written to {path} do not give the trained model back: logits differ by {error:.2e} of their "
            f"largest value ({scale:.3g}), {TOLERANCE:g} is allowed. The checkpoints in the run's folder are untouched."
        )
    return {"relative_logit_error": error, "relative_change_when_forgotten": moved}


def logits_of(trainer: LlavaSPTrainer, sample: dict[str, Tensor]) -> Tensor:
    """Logits [L, words] of one sample at all positions, in float32, without those of ids that are no words."""
    model = trainer.model_wrapped
    model.eval()
    inputs: dict[str, Any] = trainer.data_collator([sample])
    inputs = {name: value.to(trainer.args.device) for name, value in inputs.items() if name != "labels"}
    with trainer.compute_loss_context_manager():
        logits = model(**inputs).logits
    return logits[0, :, : trainer.model.config.image_token_id].float()


def forget(model: nn.Module) -> None:
    """Zero everything that was trained."""
    trained = trained_names(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            with gathered([parameter], modify=True):
                parameter.data.zero_()
