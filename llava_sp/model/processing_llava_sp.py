"""LlavaSPProcessor: images -> pixels, text -> ids with every image placeholder expanded, conversations -> ids and labels.

The processor decides all lengths: `<image>` becomes `num_image_tokens` placeholder ids here, so that `input_ids` and
`labels` are final before the model sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.processing_utils import MultiModalData

from .backbone_configs import damaged_file, has_words, load_tokenizer
from .configuration_llava_sp import LlavaSPConfig
from .conversation import (
    IMAGE_MARK,
    Segment,
    Turn,
    get_template,
    jinja_template,
    normalize_turns,
    render_segments,
    words_of,
)
from .image_preprocessing import (
    flatten_images,
    image_processor_of,
    images_per_prompt,
    pad_to_square,
    pillow_counterpart,
    pixels_of,
)
from .opening import other_formats
from .tokenization import TextEncoder, add_special_tokens

IGNORE_INDEX = -100
ASPECT_RATIOS = ("pad", "crop")
_BROKEN = (  # raised by transformers for broken files
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
_RETURNED = ("return_offsets_mapping", "return_text_replacement_offsets", "return_mm_token_type_ids")
_TEXT_KEYS = (
    "padding",
    "padding_side",
    "max_length",
    "pad_to_multiple_of",
    "add_special_tokens",
    "truncation",
    *_RETURNED,
)


class Token(NamedTuple):
    """A token of a rendered text: its label is -100 unless it is learned; it covers `text[start:end]`."""

    id: int
    label: int
    start: int
    end: int


class LlavaSPProcessor(LlavaProcessor):
    r"""Image processor and tokenizer of a LLaVA-SP model.

    Args:
        image_processor: the vision tower's. Only Pillow's resizing gives the pixels the weights were trained on, so a
            torchvision one is replaced by its Pillow counterpart.
        tokenizer: a fast tokenizer (character offsets are needed to know which tokens are learned).
        num_image_tokens: placeholders per image, `LlavaSPConfig.num_image_tokens`.
        image_aspect_ratio: `"pad"` pads to a square with the mean colour, `"crop"` leaves it to the image processor
            (for CLIP: shortest edge, centre crop).
        conversation_template: a key of `conversation.TEMPLATES`.
        chat_template: Jinja; `None` derives it from `conversation_template`.

    Raises:
        ValueError: unknown template or aspect ratio, a chat template that renders no question, a tokenizer without
            `<image>` or padding token or offsets.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=None,
        image_aspect_ratio="pad",
        conversation_template="vicuna_v1",
        chat_template=None,
        image_token=IMAGE_MARK,
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_aspect_ratio = image_aspect_ratio
        self.conversation_template = conversation_template
        for what, value, fits, right in self._needs(tokenizer, image_token):
            if not fits:
                raise ValueError(f"{what} is {value!r}; it must be {right}")
        template = get_template(conversation_template)
        if chat_template is None:
            chat_template = jinja_template(template, tokenizer.chat_template)
        super().__init__(
            pillow_counterpart(image_processor),
            tokenizer,
            chat_template=chat_template,
            image_token=image_token,
            **kwargs,
        )
        self._encoder = TextEncoder(tokenizer)
        question, caption = f"{image_token}\nWhat?", [{"role": "user", "content": image_token}]
        asked = caption if template.images_only else [{"role": "user", "content": question}]
        with _as_value_error("the chat template cannot render a question", *_BROKEN):
            text = self.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        if asked[0]["content"] not in text:
            raise ValueError(f"the chat template makes {text!r:.80} of {asked[0]['content']!r}, dropping it")

    def _needs(self, tokenizer, image_token: str) -> Iterator[tuple[str, object, bool, str]]:
        """(what, its value, whether it is valid, what is valid)"""
        number, ratio = self.num_image_tokens, self.image_aspect_ratio
        yield "num_image_tokens", number, isinstance(number, int) and number >= 1, "the config's num_image_tokens"
        yield "image_aspect_ratio", ratio, ratio in ASPECT_RATIOS, " or ".join(ASPECT_RATIOS)
        fast = getattr(tokenizer, "is_fast", False)
        yield "tokenizer", type(tokenizer).__name__, fast, "a fast tokenizer, which gives character offsets"
        words = "one with a vocabulary in its tokenizer.json or .model"
        yield "tokenizer", tokenizer.name_or_path, has_words(tokenizer), words
        added = "one of its tokens: call add_special_tokens(tokenizer) first"
        yield "image_token", image_token, image_token in tokenizer.get_vocab(), added
        yield "the tokenizer's eos_token", tokenizer.eos_token, tokenizer.eos_token is not None, "the end of an answer"
        yield "the tokenizer's pad_token", tokenizer.pad_token, tokenizer.pad_token is not None, added

    @classmethod
    def from_backbones(
        cls,
        config: LlavaSPConfig,
        language_model: str | PathLike | None = None,
        vision_tower: str | PathLike | None = None,
        image_aspect_ratio: str = "pad",
        conversation_template: str = "vicuna_v1",
        **hub_kwargs,
    ) -> LlavaSPProcessor:
        """The processor for `config` from the language model's tokenizer and the vision tower's image settings.

        Args:
            language_model, vision_tower: hub ids or directories; `None` takes those that `config` records.
            hub_kwargs: passed to `from_pretrained` (revision, token, cache_dir, ...).
        """
        language_model = language_model or config.language_model_name_or_path
        vision_tower = vision_tower or config.vision_tower_name_or_path
        if language_model is None:
            raise ValueError("language_model_name_or_path is not set in the configuration; give language_model=")
        tokenizer = load_tokenizer(language_model, **hub_kwargs)
        add_special_tokens(tokenizer)
        return cls(
            image_processor_of(config, vision_tower, **hub_kwargs),
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            image_aspect_ratio=image_aspect_ratio,
            conversation_template=conversation_template,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> LlavaSPProcessor:
        """The processor saved beside a checkpoint, or one made for a checkpoint of other code.

        For the latter, `language_model=` and `vision_tower=` replace recorded paths, as for the model;
        `image_aspect_ratio=` and `conversation_template=` set what such checkpoints do not record.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: one of its files is broken.
        """
        formats = other_formats()
        if formats is not None:
            return formats.open_processor(cls, pretrained_model_name_or_path, *args, **kwargs)
        return cls.from_saved(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_saved(cls, path, *args, **kwargs) -> LlavaSPProcessor:
        """transformers' own `from_pretrained`. Raises `ValueError` for files that are broken."""
        try:
            return super().from_pretrained(path, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"the processor of {path} cannot be read: {damaged_file(path, error)}") from error

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    def __call__(self, images=None, text=None, videos=None, audio=None, return_tensors="pt", **kwargs) -> BatchFeature:
        """Prompts and images to model inputs, left padded for generation.

        Args:
            images: one image (PIL, array, path, URL), a list, or one list per prompt, in the order of the marks.
            text: a prompt or a list of prompts with one `<image>` per image.
            padding, max_length, padding_side, pad_to_multiple_of, add_special_tokens: as for tokenizers; padding is to
                the longest prompt, on the left, by default.
            truncation: as for tokenizers, as long as no placeholder is cut.
            return_offsets_mapping, return_text_replacement_offsets, return_mm_token_type_ids: as for transformers'
                processors; places are those in the text with every mark expanded.
            kwargs: anything else goes to the image processor.

        Returns:
            `input_ids`, `attention_mask` [B, L] and, with images, `pixel_values` [images, 3, H, W].

        Raises:
            ValueError: marks and images do not agree (with both numbers), `truncation` would cut placeholders.
        """
        if (images is None and text is None) or videos is not None or audio is not None:
            raise ValueError("LlavaSPProcessor takes images or text or both, not videos or audio")
        for group in ("common_kwargs", "text_kwargs", "images_kwargs"):
            kwargs.update(kwargs.pop(group, None) or {})
        return_tensors = kwargs.pop("return_tensors", return_tensors)
        text_kwargs = {key: kwargs.pop(key) for key in _TEXT_KEYS if key in kwargs}
        kwargs = self._image_kwargs(kwargs)
        prompts = list(text) if isinstance(text, (list, tuple)) else [] if text is None else [text]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"text is {text!r:.60}; it must be a string or several: give images= and text= by name")
        flat = flatten_images(images)
        data = {}
        if text is not None:
            marks = [prompt.count(self.image_token) for prompt in prompts]
            given = images_per_prompt(images, len(flat))
            if given != (marks if isinstance(given, list) else sum(marks)):
                raise ValueError(f"the {self.image_token} marks per prompt are {marks}, but the images {given}")
            data.update(self._encode_prompts(prompts, **text_kwargs))
        if flat:
            data["pixel_values"] = self.preprocess_images(flat, **kwargs)
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _image_kwargs(self, kwargs: dict) -> dict:
        """The image processor's arguments; any other that is set is an error."""
        known = getattr(getattr(self.image_processor, "valid_kwargs", None), "__annotations__", kwargs)
        unknown = [key for key, value in kwargs.items() if key not in known and value not in (None, False)]
        if unknown:
            takes = f"{', '.join(_TEXT_KEYS)} and the arguments of {type(self.image_processor).__name__}"
            raise ValueError(f"LlavaSPProcessor does not support {', '.join(unknown)}; it takes {takes}")
        return {key: value for key, value in kwargs.items() if key in known}

    def _encode_prompts(
        self,
        prompts: list[str],
        padding=True,
        padding_side="left",
        max_length=None,
        pad_to_multiple_of=None,
        add_special_tokens=True,
        truncation=False,
        return_offsets_mapping=False,
        return_text_replacement_offsets=False,
        return_mm_token_type_ids=False,
    ) -> dict:
        rows = [self.align_segments([(prompt, False)], add_special_tokens) for prompt in prompts]
        if truncation not in (False, None, "do_not_truncate"):
            limit = self.tokenizer.model_max_length if max_length is None else max_length
            rows = [self._cut(row, limit) for row in rows]
        data = dict(
            self.tokenizer.pad(
                {
                    "input_ids": [[token.id for token in row] for row in rows],
                    "attention_mask": [[1] * len(row) for row in rows],
                },
                padding=padding,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
            )
        )
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if return_text_replacement_offsets:
            expanded = [self.replace_image_token()] * sum(prompt.count(self.image_token) for prompt in prompts)
            _, data["text_replacement_offsets"] = self.get_text_with_replacements([*prompts], expanded)
        if return_offsets_mapping:
            places = [self._expanded_places(row) for row in rows]
            filler = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(data["input_ids"], places, strict=True)]
            pairs = zip(filler, places, strict=True)
            data["offset_mapping"] = [a + b if padding_side == "left" else b + a for a, b in pairs]
        return data

    def _cut(self, tokens: list[Token], limit: int) -> list[Token]:
        """The first or last `limit` tokens, as the tokenizer cuts. Raises `ValueError` if a placeholder would be cut."""
        special = sum(token.end == 0 for token in tokens[: len(self._encoder.prefix)])
        start = special if self.tokenizer.truncation_side == "left" else limit
        lost = slice(start, start + max(0, len(tokens) - limit))
        if any(token.id == self.image_token_id for token in tokens[lost]):
            raise ValueError(f"max_length {limit} would cut image placeholders of a prompt of {len(tokens)} tokens")
        return tokens[: lost.start] + tokens[lost.stop :]

    def _expanded_places(self, tokens: list[Token]) -> list[tuple[int, int]]:
        """Positions of tokens in the text with each image mark repeated once per placeholder."""
        places, seen, mark = [], 0, len(self.image_token)
        for token in tokens:
            images, within = divmod(seen, self.num_image_tokens)
            shift = (images * (self.num_image_tokens - 1) + within) * mark
            places.append((token.start + shift, token.end + shift))
            seen += token.id == self.image_token_id
        return places

    def apply_chat_template(self, conversation, chat_template=None, conversation_template=None, **kwargs):
        """transformers' own; `conversation_template` names another template than the processor's.

        Raises:
            ValueError: the template cannot render this conversation, or would drop the question to be answered.
        """
        name = conversation_template or self.conversation_template
        template = get_template(name)
        drops = chat_template is None and template.images_only and kwargs.get("add_generation_prompt")
        if drops and (words := words_of(conversation)):
            dropped = f"the conversation template {name!r} (captions, of stage 1) would drop the question {words!r:.60}"
            raise ValueError(f"{dropped}: ask a checkpoint of stage 2, or with another conversation_template")
        if chat_template is None and name != self.conversation_template:
            chat_template = jinja_template(template, self.tokenizer.chat_template)
        with _as_value_error("the chat template cannot render this conversation", TemplateError):
            return super().apply_chat_template(conversation, chat_template, **kwargs)

    def render_conversation(
        self, turns: list[Turn], conversation_template: str | None = None, images: bool = True
    ) -> list[Segment]:
        """Segments `(text, learned?)` of a conversation; see `conversation.Template` for what is learned.

        Without `images` an image mark is text like any other.

        Raises:
            ValueError: an empty or ill-ordered conversation; a chat template that rewrites earlier turns.
        """
        template = get_template(conversation_template or self.conversation_template)
        turns = normalize_turns(turns, images)
        if not template.own_chat_template:
            bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
            return render_segments(turns, template, bos, eos, images)
        own = conversation_template in (None, self.conversation_template)
        jinja = self.chat_template if own else jinja_template(template, self.tokenizer.chat_template)
        return self._render_with_jinja(turns, jinja)

    def _render_with_jinja(self, turns: list[Turn], jinja: str | dict[str, str] | None) -> list[Segment]:
        segments, done = [], ""

        def extend(count: int, prompt: bool, learned: bool = False) -> None:
            nonlocal done
            with _as_value_error("the chat template cannot render this conversation", TemplateError, *_BROKEN):
                text = self.tokenizer.apply_chat_template(
                    turns[:count], chat_template=jinja, tokenize=False, add_generation_prompt=prompt
                )
            if not text.startswith(done):
                raise ValueError(f"the chat template rewrites earlier text at turn {count - 1}; training cannot use it")
            piece, done = text[len(done) :], text
            if learned and self.tokenizer.eos_token in piece:  # text after the end token is formatting
                answer, end, layout = piece.rpartition(self.tokenizer.eos_token)
                segments.append((answer + end, True))
                piece, learned = layout, False
            if piece:
                segments.append((piece, learned))

        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                extend(index, prompt=True)
                extend(index + 1, prompt=False, learned=bool(turn["content"]))
            elif turn["role"] == "user":
                extend(index + 1, prompt=False)
        return segments

    def encode_conversation(
        self, turns: list[Turn], conversation_template: str | None = None, images: bool = True
    ) -> tuple[list[int], list[int]]:
        """`(input_ids, labels)` of a conversation, placeholders expanded; labels are -100 where nothing is learned."""
        return self.encode_segments(self.render_conversation(turns, conversation_template, images), images=images)

    def encode_segments(
        self, segments: list[Segment], add_special_tokens: bool = True, images: bool = True
    ) -> tuple[list[int], list[int]]:
        """`(input_ids, labels)` of segments `(text, learned?)`, both of the final length; see `align_segments`."""
        tokens = self.align_segments(segments, add_special_tokens, images)
        return [token.id for token in tokens], [token.label for token in tokens]

    def align_segments(
        self, segments: list[Segment], add_special_tokens: bool = True, images: bool = True
    ) -> list[Token]:
        """All tokenization is done here: each token with its label and its position in the segments' joined text.

        The text between two image marks is tokenized as a text of its own, once, as the original does (so the piece "▁"
        comes after every image). A token is learned if it holds a character of a learned segment. Without `images` a mark is
        text, as in the original. Raises `ValueError` for half a surrogate pair.
        """
        text = "".join(piece for piece, _ in segments)
        learned = bytearray().join(bytes([flag]) * len(piece) for piece, flag in segments)
        bos = self.tokenizer.bos_token
        starts_itself = not add_special_tokens or (bos is not None and text.startswith(bos))
        tokens = [] if starts_itself else [Token(token, IGNORE_INDEX, 0, 0) for token in self._encoder.prefix]
        start, padding = 0, self.pad_token_id
        for index, chunk in enumerate(text.split(self.image_token) if images else [text]):
            if index:
                mark = Token(self.image_token_id, IGNORE_INDEX, start - len(self.image_token), start)
                tokens += [mark] * self.num_image_tokens
            for token, first, last in self._encoder.encode(chunk, spell=not images):
                first, last = start + first, start + last
                known = any(learned[first : max(last, first + 1)]) and token != padding
                tokens.append(Token(token, token if known else IGNORE_INDEX, first, last))
            start += len(chunk) + len(self.image_token)
        return tokens

    def preprocess_images(self, images: list[Image.Image], **kwargs) -> torch.Tensor:
        """Pixels [n, 3, H, W], float32. Colour modes are converted to RGB; `kwargs` go to the image processor."""
        images = [image.convert("RGB") for image in images]
        if self.image_aspect_ratio == "pad":
            colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            images = [pad_to_square(image, colour) for image in images]
        if kwargs:
            return self.image_processor(images, return_tensors="pt", **kwargs)["pixel_values"]
        return pixels_of(self.image_processor, images)

    def replace_image_token(self, image_inputs=None, image_idx: int = 0, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


@contextmanager
def _as_value_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except kinds as error:
        raise ValueError(f"{what} ({' '.join(str(error).split()) or type(error).__name__})") from error


LlavaSPProcessor.register_for_auto_class()

__all__ = ["LlavaSPProcessor", "add_special_tokens"]
