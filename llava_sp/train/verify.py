"""The proof at the end of a run: the written weights, loaded back, give the logits of the trained model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_sp.checkpoints.opening.adapter import load_adapter
from llava_sp.checkpoints.opening.fill import gathered
from llava_sp.train.stages import trained_names
from llava_sp.train.trainer import LlavaSPTrainer

# bf16 and fp32 tensors come back bit for bit; the rest is for kernels that sum in another order.
TOLERANCE = 1e-3


@torch.no_grad()
def verify_saved(trainer: LlavaSPTrainer, path: str | Path, sample: dict[str, Tensor] | None) -> dict[str, float]:
    """Zero what was trained, load it from `path`, and compare the logits of one sample.

    Where zeroing leaves the logits as they were (a sample of text alone, LoRA after its first step) or there is no
    sample, logits would prove nothing: then the tensors themselves are compared, bit for bit.

    Every process must call this. Returns the figures for `finished.json`. Raises RuntimeError if something differs.
    """
    model = trainer.model
    before, kept = logits_of(trainer, sample), digests(model)
    zero_trained(model)
    emptied = logits_of(trainer, sample)
    load_adapter(model, path)
    after = logits_of(trainer, sample)

    moved, error = relative_change(before, emptied), relative_change(before, after)
    failure = f"the weights written to {path} do not reproduce the trained model (the checkpoints there are untouched)"
    if not error <= TOLERANCE:
        raise RuntimeError(f"{failure}: logits differ by {error:.2e} of their largest value; {TOLERANCE:g} is allowed")
    result = {"relative_logit_error": error, "relative_change_when_forgotten": moved}
    if moved > TOLERANCE:
        return result
    loaded = digests(model)
    changed = [name for name in kept if loaded[name] != kept[name]]
    if changed:
        raise RuntimeError(f"{failure}: {len(changed)} of {len(kept)} tensors differ, for example {changed[0]}")
    return {**result, "tensors_compared": len(kept)}


def in_words(proof: dict[str, float]) -> str:
    """The outcome as text."""
    if "tensors_compared" in proof:
        return f"loaded back, its {proof['tensors_compared']} trained tensors are the same bit for bit"
    return f"loaded back, it gives the same logits (relative difference {proof['relative_logit_error']:.1e})"


def relative_change(before: Tensor | None, now: Tensor | None) -> float:
    """Largest difference, in units of the largest logit; 0 without logits."""
    if before is None or now is None:
        return 0.0
    return (now - before).abs().max().item() / max(before.abs().max().item(), torch.finfo(torch.float32).tiny)


def digests(model: nn.Module) -> dict[str, str]:
    """A hash of every trained tensor. Every process must call this: ZeRO-3 gathers."""
    trained = trained_names(model)
    found = {}
    for name, parameter in model.named_parameters():
        if name in trained:
            with gathered([parameter]):
                data = parameter.detach().cpu().reshape(-1).view(torch.uint8)
                found[name] = hashlib.sha256(data.numpy().data).hexdigest()
    return found


def logits_of(trainer: LlavaSPTrainer, sample: dict[str, Tensor] | None) -> Tensor | None:
    """Logits [L, words] of one sample at all positions, in float32, without those of ids outside the vocabulary."""
    if sample is None:
        return None
    model = trainer.model_wrapped
    model.eval()
    inputs: dict[str, Any] = trainer.data_collator([sample])
    inputs = {name: value.to(trainer.args.device) for name, value in inputs.items() if name != "labels"}
    with trainer.compute_loss_context_manager():
        logits = model(**inputs).logits
    return logits[0, :, : trainer.model.config.image_token_id].float()


def zero_trained(model: nn.Module) -> None:
    """Zero everything that was trained."""
    trained = trained_names(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            with gathered([parameter], modify=True):
                parameter.data.zero_()
