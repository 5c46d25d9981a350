"""LLaVA-SP on transformers' LLaVA: embed the text, encode the image, project, place the image tokens, decode.

The processor has already written `config.num_image_tokens` placeholders for every image, so lengths are final here.
Shape suffixes: B batch, L sequence, M supervised positions, D language width, V vocabulary.
"""

import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_llava_sp import LlavaSPConfig
from .opening import needed_formats, other_formats
from .packed_attention import keep_apart
from .projector import SpatialProjector, reset_parameters

IGNORE_INDEX = -100
ADAPTER_FILE = "projector.safetensors"  # the name that makes a folder an adapter checkpoint
# Not quantised unless the caller asks for it
FULL_PRECISION = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


class LlavaSPPreTrainedModel(LlavaPreTrainedModel):
    config_class = LlavaSPConfig
    config: LlavaSPConfig


class LlavaSPModel(LlavaSPPreTrainedModel, LlavaModel):
    """Vision tower, spatial projector and decoder, without the language head."""

    def __init__(self, config: LlavaSPConfig):
        LlavaSPPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = SpatialProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        # Layer by layer: transformers skips a module without parameters of its own, such as the whole projector.
        if any(module is part for part in self.multi_modal_projector.modules()):
            reset_parameters(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """The model without its head; see `LlavaSPForCausalLM.from_pretrained`."""
        opened: Any = LlavaSPForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return (opened[0].model, opened[1]) if isinstance(opened, tuple) else opened.model

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [images, 3, H, W] -> patch features of the configured layer(s), [images, N, C].

        A frozen tower leaves no autograd graph (transformers' activation checkpointing makes its embeddings require
        gradients) and computes in its own number format, under autocast too.
        """
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        if pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters()):
            return self._run_tower(pixel_values)
        kind = pixel_values.device.type
        own_format = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with torch.no_grad(), own_format:
            return self._run_tower(pixel_values)

    def _run_tower(self, pixel_values: Tensor) -> Tensor:
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        layers = self.config.vision_feature_layer
        selected = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if selected[0].ndim == 4:  # timm towers return [images, C, G, G], class token already dropped
            selected = [layer.flatten(2).transpose(1, 2) for layer in selected]
        else:
            selected = [layer[:, self.config.num_leading_tokens :] for layer in selected]
        return torch.cat(selected, dim=-1)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Image tokens of every image: `.pooler_output` is a list of [num_image_tokens, D]."""
        patches = self.get_patch_features(pixel_values)
        tokens: Any = list(self.project(patches))  # transformers' LLaVA returns a list too
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=tokens)

    def project(self, patches: Tensor) -> Tensor:
        """Patch features -> image tokens, [images, num_image_tokens, D]."""
        dtype = next(p.dtype for p in self.multi_modal_projector.parameters() if p.is_floating_point())
        return self.multi_modal_projector(patches.to(dtype))

    def check_counts(self, placeholders: int, tokens: int) -> None:
        """Raises `ValueError` unless there is a placeholder for each image token."""
        expected = f"{tokens / self.config.num_image_tokens:g} x {self.config.num_image_tokens} image tokens"
        if placeholders != tokens:
            raise ValueError(f"input_ids hold {placeholders} image placeholders, but pixel_values hold {expected}")

    def place_image_tokens(self, embeds_BLD: Tensor, placeholders_BL: Tensor, tokens: Tensor | None) -> Tensor:
        """Replace the placeholders by the image tokens [images, num_image_tokens, D]; for part of a prompt, its share.

        Raises:
            ValueError: the number of placeholders is not that of the image tokens.
        """
        if not torch.compiler.is_compiling():
            self.check_counts(int(placeholders_BL.sum()), 0 if tokens is None else tokens.shape[:2].numel())
        if tokens is None:
            return embeds_BLD
        mask = placeholders_BL.unsqueeze(-1).to(embeds_BLD.device)
        return embeds_BLD.masked_scatter(mask, tokens.to(embeds_BLD.device, embeds_BLD.dtype))

    def blank_image_edge(self, patch_features: Tensor | None = None) -> Tensor:
        """Zero, computed through tower and projector: adds them to the graph of a batch without images.

        Every process of a distributed run then runs the same modules and reduces the same gradients. A run on stored patch
        features gives those of no image, [0, N, C]: its batches do not pass through the tower.
        """
        if patch_features is not None:
            return (0.0 * self.project(patch_features.new_zeros(1, *patch_features.shape[1:]))).sum()
        side, channels = self.config.image_size, getattr(self.config.vision_config, "num_channels", 3)
        blank = torch.zeros(1, channels, side, side, device=self.vision_tower.device)
        return (0.0 * self.project(self.get_patch_features(blank))).sum()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        patch_features: Tensor | None = None,
        blank_image: bool = False,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """See `LlavaSPForCausalLM.forward`; `blank_image` runs an empty image when the batch has none.

        Samples may share a row (a pack): `position_ids` then start again at 0 with each, without an `attention_mask`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is None and pixel_values is not None:
            raise ValueError("pixel_values need input_ids, with placeholders where the images belong")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(pixel_values)
        tokens = None if images is None else torch.stack(list(images.pooler_output))
        if patch_features is not None and len(patch_features):
            tokens = self.project(patch_features)
        if input_ids is not None and (tokens is not None or input_ids.shape[1] > 1):
            inputs_embeds = self.place_image_tokens(inputs_embeds, input_ids == self.config.image_token_id, tokens)
        if tokens is None and blank_image:
            inputs_embeds = inputs_embeds + self.blank_image_edge(patch_features).to(
                inputs_embeds.device, inputs_embeds.dtype
            )

        options = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        if attention_mask is None and past_key_values is None and position_ids is not None and position_ids.ndim == 2:
            options |= keep_apart(position_ids, self.language_model.config._attn_implementation)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, position_ids=position_ids, **options, return_dict=True
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=tokens,
        )


class LlavaSPForCausalLM(LlavaSPPreTrainedModel, LlavaForConditionalGeneration):
    """LLaVA with visual spatial tokens: `from_pretrained` a checkpoint, or assemble one `from_backbones`."""

    def __init__(self, config: LlavaSPConfig):
        LlavaSPPreTrainedModel.__init__(self, config)
        self.model = LlavaSPModel(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=config.language_model_head_bias)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: Tensor | None = None,
        patch_features: Tensor | None = None,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        r"""
        Args:
            input_ids: [B, L], with `num_image_tokens` placeholders where each image belongs.
            pixel_values: [images of the whole batch, 3, H, W] in the order of their placeholders; `None` for text.
            position_ids: [B, L]; positions that start again at 0 begin another sample of a pack (no attention_mask then),
                whose first label must be -100.
            labels: [B, L], aligned with `input_ids` (not shifted), -100 where nothing is learned. The language head
                then runs at the learned positions only, and `logits` is `None` unless `logits_to_keep` asks for them.
            logits_to_keep: how many positions, from the end, get logits (0 = all), or their indices.
            num_items_in_batch: what the summed token losses are divided by; by default the learned tokens here.
            patch_features: [images of the whole batch, N, C], what `get_patch_features` gives, instead of pixel_values.
            mm_token_type_ids: not used; `input_ids` contain the same. A processor can return them.

        Raises:
            ValueError: placeholders and images do not fit together; the message has both numbers.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            patch_features=patch_features,
            blank_image=labels is not None,
            **kwargs,
            return_dict=True,
        )
        hidden_BLD = outputs.last_hidden_state
        loss = None if labels is None else self.supervised_loss(hidden_BLD, labels, num_items_in_batch)
        logits = None
        if labels is None or logits_to_keep is not None:
            kept = slice(-(logits_to_keep or 0), None) if not isinstance(logits_to_keep, Tensor) else logits_to_keep
            logits = self.silence(self.logits_of(hidden_BLD[:, kept]))
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The language model's logits, including the steps after its head."""
        logits = self.lm_head(hidden)
        scale, softcap = self.config.language_model_logit_scale, self.config.language_model_logit_softcap
        if scale is not None:
            logits = logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def silence(self, logits: Tensor) -> Tensor:
        """Mask, in place, ids that are not vocabulary: placeholder, filler rows, padding (unless it ends answers)."""
        lowest = torch.finfo(logits.dtype).min
        logits[..., self.config.image_token_id :] = lowest
        pad, ends = self.config.pad_token_id, self.generation_config.eos_token_id
        if pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
            logits[..., pad] = lowest
        return logits

    def supervised_loss(self, hidden_BLD: Tensor, labels_BL: Tensor, num_items_in_batch=None) -> Tensor:
        """Next-token cross-entropy over the vocabulary; the [B, L, V] logits are never materialised.

        Ids that `silence` masks are excluded, as targets and from the softmax.
        """
        targets_BL = labels_BL[:, 1:].to(hidden_BLD.device)
        learned_BL = (targets_BL != IGNORE_INDEX) & (targets_BL < self.config.image_token_id)
        logits_MV = self.silence(self.logits_of(hidden_BLD[:, :-1][learned_BL]).float())
        loss = F.cross_entropy(logits_MV, targets_BL[learned_BL], reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = learned_BL.sum().clamp(min=1)
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Several beams or answers per prompt: the images of a prompt are repeated as a group, [a, b] -> [a, b, a, b].

        Newer transformers encode the images first and do this themselves; older ones would return [a, a, b, b].
        """
        pixel_values = model_kwargs.pop("pixel_values", None)
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        images = pixel_values if encoded is None else encoded.pooler_output
        if images is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(dim=1)
            self.model.check_counts(int(placeholders.sum()), len(images) * self.config.num_image_tokens)
        if pixel_values is not None and encoded is None:
            groups = pixel_values.split((placeholders // self.config.num_image_tokens).tolist())
            pixel_values = torch.cat([group.repeat(expand_size, 1, 1, 1) for group in groups])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        several = inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] > 1
        if several and (past_key_values is None or past_key_values.get_seq_length() == 0):
            # transformers omits them if this model is the assistant of another one
            inputs.setdefault("mm_encoder_outputs", kwargs.get("mm_encoder_outputs"))
        return inputs

    def _get_candidate_generator(self, logits_processor, **kwargs):
        """Prompt lookup copies from the prompt, except placeholders: each would require an image."""
        words = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
        return super()._get_candidate_generator(
            logits_processor=LogitsProcessorList([*logits_processor, words]), **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "LlavaSPForCausalLM":
        """Open a full checkpoint as any transformers model, or one of the formats of `llava_sp.checkpoints`.

        An adapter checkpoint (LoRA and projector), ours or the original code's, is opened on the base models it records;
        `language_model=` and `vision_tower=` (hub ids or paths) replace them, `is_trainable=True` leaves LoRA and
        projector trainable. The folder's content gives its format.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: a part of the checkpoint is missing or broken, or a keyword sets what the weights determine.
        """
        given = [name for name in kwargs if name in _OF_THE_WEIGHTS]
        if given:
            raise ValueError(
                f"{pretrained_model_name_or_path}: {' and '.join(f'{name}=' for name in given)} cannot be set on opening, "
                "the weights determine it. from_backbones(...) makes a new model"
            )
        kwargs = _with_dtype(kwargs)
        formats = other_formats()
        if formats is not None:
            return formats.open_model(cls, pretrained_model_name_or_path, *args, **kwargs)
        return cls.from_full(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_full(cls, path, *args, output_loading_info: bool = False, **kwargs):
        """transformers' own `from_pretrained`, of a full checkpoint. Raises `ValueError` where tensors are missing in it."""
        if (Path(path) / ADAPTER_FILE).is_file():
            raise ImportError(f"{path} is an adapter checkpoint: pip install llava_sp, and import it, to open it")
        quantization: Any = kwargs.get("quantization_config")
        for skipped in ("llm_int8_skip_modules", "modules_to_not_convert"):  # of bitsandbytes, of torchao
            if getattr(quantization, skipped, FULL_PRECISION) is None:
                setattr(quantization, skipped, FULL_PRECISION)  # only the language model is large
        opened: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = opened
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"{path} lacks tensors ({len(missing)}), for example {', '.join(missing[:4])}")
        return (model, info) if output_loading_info else model

    @classmethod
    def from_backbones(
        cls, language_model: str | os.PathLike | None = None, vision_tower: str | os.PathLike | None = None, **kwargs
    ):
        """Assemble a model from a language model and a vision tower, with a fresh projector between them.

        `warm_start=` (a trained LLaVA-1.5) keeps its patch MLP and its LoRA or language model.

        The keywords, formats and errors are those of `llava_sp.checkpoints.opening.from_backbones`.
        """
        return needed_formats().from_backbones(cls, language_model, vision_tower, **_with_dtype(kwargs))

    def save_pretrained(  # type: ignore[override]  # the others are in kwargs
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs,
    ) -> None:
        """Save a full checkpoint; with LoRA attached, an adapter checkpoint (LoRA and projector, no base weights).

        Args:
            is_main_process: false on processes that only take part in gathering.
            state_dict: instead of the model's own; an adapter checkpoint keeps LoRA and projector of it.
            kwargs: transformers' own, for a full checkpoint.
        """
        self._name_classes()
        kwargs.setdefault("save_original_format", False)  # opening expects the model's own names
        if not getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        asked = [name for name, value in kwargs.items() if value not in (None, False)]
        if asked:
            raise ValueError(f"saving LoRA and projector does not support {', '.join(asked)}")
        needed_formats().save_adapter(self, None, save_directory, state_dict=state_dict, write=is_main_process)

    def _name_classes(self) -> None:
        """Record in the configuration the classes for `trust_remote_code`; a subclass has its own file."""
        if type(self) is LlavaSPForCausalLM:
            self.config.auto_map = {name: f"modeling_llava_sp.{value}" for name, value in _AUTO_CLASSES.items()}

    def save_code(self, folder: str | os.PathLike) -> None:
        """Copy the model's files to a checkpoint, for `trust_remote_code`."""
        self._name_classes()
        part: Any
        for part in (self, self.config):
            custom_object_save(part, folder, config=self.config)  # type: ignore[arg-type]  # its stub


_AUTO_CLASSES = {
    "AutoModel": "LlavaSPModel",
    "AutoModelForImageTextToText": "LlavaSPForCausalLM",
    "AutoModelForMultimodalLM": "LlavaSPForCausalLM",
}
# Keywords of `from_pretrained` that would make a model that does not match the weights.
_OF_THE_WEIGHTS = {field.name for field in dataclasses.fields(LlavaSPConfig)} | {"seed"}
_OF_THE_WEIGHTS -= {field.name for field in dataclasses.fields(PreTrainedConfig)}


def _with_dtype(kwargs: dict) -> dict:
    """`torch_dtype=`, its name in older code, becomes `dtype=`."""
    older = {"dtype": kwargs.pop("torch_dtype")} if "torch_dtype" in kwargs else {}
    return older | kwargs


LlavaSPForCausalLM.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["LlavaSPForCausalLM", "LlavaSPModel"]
