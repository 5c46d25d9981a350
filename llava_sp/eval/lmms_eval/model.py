"""A LLaVA-SP checkpoint as a model of lmms-eval (EvolvingLMMs-Lab), for the benchmarks that are there and not here.

    pip install -e ".[lmms-eval]"                       # in an environment of its own: see pyproject.toml for why
    lmms-eval --model llava_sp --model_args pretrained=CHECKPOINT --tasks NAME --batch_size 8 --output_path OUT
    lmms-eval --model llava_sp --model_args pretrained=CHECKPOINT --include_path DIR --tasks TASK_OF_DIR ...
    accelerate launch --num_processes 2 -m lmms_eval --model llava_sp ...

`configs/lmms_eval/` holds tasks to try and to copy. What `--model_args` takes, as `name=value,name=value`:

    pretrained             any checkpoint that `LlavaSPForCausalLM.from_pretrained` opens: directory or hub id
    language_model         language model of an adapter checkpoint, where it has moved
    vision_tower           vision tower of an adapter checkpoint, where it has moved
    dtype                  auto (float16 on a GPU, as LLaVA evaluates, else float32), float32, float16, bfloat16
    device                 as `--device`: cuda, cuda:1, cpu (default: this process's GPU if there is one)
    image_aspect_ratio     pad or crop (default: the checkpoint's own)
    conversation_template  conversation template (default: the checkpoint's own)
    use_cache              False generates without the cache of keys and values
    likelihood             nll or logprob, see below

The prompt is that of this package's own benchmarks: images in front, each on a line of its own, unless the task's text says
with `<image>` where they go; then the checkpoint's conversation template. A task's `image_aspect_ratio` is ignored: it is for
models that do not record theirs.

`likelihood`: lmms-eval's multiple choice takes the *smallest* number for the best answer, because its models return losses. So
`nll`, the default, is the summed negative log-probability of the answer: `acc` is then the likeliest answer, `acc_norm` the
likeliest per character. `logprob` is its opposite, what lmms-eval's documentation and its metrics `perplexity` and
`acc_mutual_info` mean, and tasks that look for the largest number. `--use_cache`, the harness's store of responses, cannot
hold these pairs (in 0.7.3); it works for generation.

Not there: video and audio, `--apply_chat_template` (the template is applied here), `--batch_size auto`, and the few tasks that
have `doc_to_messages` and no `doc_to_text`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import Collator
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from llava_sp.common.schema import Check, expect, one_of
from llava_sp.decoding import Generation
from llava_sp.inference import (
    Engine,
    Source,
    answering,
    encode_prompt,
    open_image,
    pad_left,
    place_images,
    positions,
    render_prompt,
)
from llava_sp.model.conversation import IMAGE_MARK, get_template
from llava_sp.model.processing_llava_sp import ASPECT_RATIOS

MAX_NEW_TOKENS = 1024  # where a task does not say, as lmms-eval's LLaVA
VIDEO = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
AUDIO = (".wav", ".mp3", ".flac", ".ogg", ".m4a")
_ARGUMENTS = {
    "pretrained": (str, Path),
    "dtype": one_of("auto", "float32", "float16", "bfloat16"),
    "batch_size": Check(lambda size: str(size).isdigit() and int(size) >= 1, "a whole number above 0"),
    "image_aspect_ratio": one_of(None, *ASPECT_RATIOS),
    "use_cache": one_of(True, False),
    "likelihood": one_of("nll", "logprob"),
}
_NOT_FOR_US = frozenset(("image_aspect_ratio",))  # see the module's docstring
_ONE_ANSWER = ("num_return_sequences", "return_dict_in_generate")  # what would give `generate` another result
_KNOWN = frozenset(GenerationConfig().to_dict()).difference(_ONE_ANSWER)


@dataclass(frozen=True)
class Query:
    """What is asked: a user's message with one mark per image. `where` names task and document in messages."""

    where: str
    message: str
    images: tuple[Image.Image, ...]


class LlavaSP(lmms):
    """`--model llava_sp`; see the module's docstring for the arguments.

    Raises:
        ValueError: an argument that is unknown or out of range, or not a checkpoint.
    """

    is_simple = True  # requests are text and images; the conversation is made here

    def __init__(
        self,
        pretrained: str | None = None,
        language_model: str | None = None,
        vision_tower: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        image_aspect_ratio: str | None = None,
        conversation_template: str | None = None,
        use_cache: bool = True,
        likelihood: str = "nll",
        **unknown: Any,
    ):
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        super().__init__()
        if unknown:
            takes = [name for name in inspect.signature(LlavaSP).parameters if name not in ("batch_size", "unknown")]
            raise ValueError(f"--model_args holds {', '.join(unknown)}, but takes {', '.join(takes)}")
        expect(given, _ARGUMENTS, "--model llava_sp")
        if conversation_template is not None:
            get_template(conversation_template)
        processes = PartialState()
        self._rank, self._world_size = processes.process_index, processes.num_processes
        engine = Engine.choose(
            Source(str(pretrained), language_model, vision_tower), dtype, device, processes.local_process_index
        )
        self.device = engine.device
        if self._world_size > 1 and device is not None and ":" in device:
            raise ValueError(f"--device {device} is one device for {self._world_size} processes; leave the number out")
        self.batch_size = int(batch_size)
        self.conversation_template, self.use_cache, self.likelihood = conversation_template, use_cache, likelihood
        self.processor, self.model = engine.processor(image_aspect_ratio), engine.model

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers to `(text, generation arguments, doc_to_visual, doc_id, task, split)`, with token counts."""

        def answer(chunk: Sequence[tuple]) -> list[GenerationResult]:
            queries = [self._query(text, visual, *place) for text, _, visual, *place in chunk]
            return self._answer(queries, chunk[0][1])

        return self._generated(requests, answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of `(text, generation arguments, doc_to_visual, doc_to_text, doc_id, task, split)`.

        After round k the task's `doc_to_text(doc, round_idx=k, previous_output=answers, ...)` says what comes next. Each
        round is a prompt of its own.
        """
        return self._generated(requests, self._rounds)

    def _rounds(self, chunk: Sequence[tuple]) -> list[list[str]]:
        gen_kwargs = chunk[0][1]
        queries = [self._query(text, visual, *place) for text, _, visual, _, *place in chunk]
        outputs: list[list[str]] = [[] for _ in chunk]
        notes: list[Any] = [None] * len(chunk)
        live, round_index = list(range(len(chunk))), 0
        while live:
            round_index += 1
            for index, result in zip(live, self._answer([queries[index] for index in live], gen_kwargs)):
                outputs[index].append(result.text)
            for index in list(live):
                _, _, _, doc_to_text, doc_id, task, split = chunk[index]
                step = doc_to_text(
                    self.task_dict[task][split][doc_id],
                    round_idx=round_index,
                    previous_output=outputs[index],
                    previous_round_info=notes[index],
                )
                if not isinstance(step, tuple) or len(step) != 5:
                    where = f"{queries[index].where}: doc_to_text gave {step!r} for round {round_index}"
                    raise ValueError(f"{where}, not (visuals, text, finished, answers, notes)")
                visuals, text, finished, answers, notes[index] = step
                outputs[index] = outputs[index] if answers is None else list(answers)
                if finished:
                    live.remove(index)
                else:
                    queries[index] = _make_query(text, visuals, queries[index].where)
        return outputs

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """How likely answers are: `.text` of a result is the pair (number, would greedy decoding give this answer).

        Requests are `(text, answer or doc_to_target, doc_to_visual, doc_id, task, split)`, or `(text, answer)` for an
        answer without its question (`acc_mutual_info`). The number is what `likelihood` says.
        """
        # lmms-eval 0.7 to 0.7.3 turns a plain pair into its text, and multiple choice then fails; a GenerationResult
        # goes through as it is.
        collator = Collator(
            [request.args for request in requests], sort_fn=lambda args: (-len(str(args[0])), *map(str, args[3:]))
        )
        sign = -1 if self.likelihood == "nll" else 1
        results = []
        with self._progress(len(requests)) as bar:
            for chunk in collator.get_batched(n=self.batch_size):
                pairs = self.log_probabilities(*zip(*(self._query_and_answer(args) for args in chunk)))
                results += [GenerationResult(text=(sign * value, greedy)) for value, greedy in pairs]
                bar.update(len(chunk))
        return collator.get_original(results)

    def _query_and_answer(self, args: tuple) -> tuple[Query, str]:
        if len(args) == 2:
            return Query("an answer without its question", args[0], ()), args[1]
        text, answer, visual, doc_id, task, split = args
        query = self._query(text, visual, doc_id, task, split)
        return query, answer(self.task_dict[task][split][doc_id]) if callable(answer) else answer

    def log_probabilities(self, queries: Sequence[Query], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Per query, the summed log-probability of the tokens of its answer (without an end token), and whether each of
        them is the likeliest one. White space around an answer does not count: the template sets its own."""
        rows, counts = zip(*(self.encode(query, answer) for query, answer in zip(queries, answers)))
        inputs = pad_left(self.processor, rows).to(self.device)
        images = [image for query in queries for image in query.images]
        if images:
            inputs["pixel_values"] = self.processor.preprocess_images(images).to(self.device, self.model.dtype)
        places = positions(inputs["attention_mask"])
        with answering(f"with {len(rows)} requests at once; try a smaller --batch_size"):
            output = self.model(**inputs, position_ids=places, logits_to_keep=max(counts) + 1, use_cache=False)
        logits = output.logits.float()
        results = []
        for row, count in enumerate(counts):
            steps = logits[row, -count - 1 : -1].log_softmax(-1)
            targets = inputs["input_ids"][row, -count:]
            chosen = steps.gather(-1, targets[:, None])
            results.append((float(chosen.sum()), bool((steps.argmax(-1) == targets).all())))
        return results

    def encode(self, query: Query, answer: str) -> tuple[list[int], int]:
        """Ids of the prompt followed by the answer, and how many of them are the answer's."""
        if not isinstance(answer, str) or not answer.strip() or IMAGE_MARK in answer:
            raise ValueError(f"{query.where}: the answer to score is {answer!r}; it must be text without {IMAGE_MARK}")
        template = get_template(self.conversation_template or self.processor.conversation_template)
        segments = [(self.prompt(query), False), (template.answer_start + answer.strip(), True)]
        ids, labels = self.processor.encode_segments(segments)
        return ids, sum(label >= 0 for label in labels)

    def prompt(self, query: Query) -> str:
        return render_prompt(self.processor, query.message, self.conversation_template)

    def _query(self, text: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Query:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        return _make_query(text, visuals, f"task {task}, document {doc_id} of {split}")

    def _generated(self, requests: list[Instance], answer: Callable[[Sequence[tuple]], list[Any]]) -> list[Any]:
        """Calls `answer` with batches of equal generation arguments, longest texts first; results in the order of the
        requests."""
        for request in requests:  # all of them before the first answer
            self._generation(request.args[1])
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: -len(args[0]),
            group_fn=lambda args: args[1],
            grouping=True,
        )
        self._tokens, self._seconds = 0, 0.0
        results: list[Any] = []
        with self._progress(len(requests)) as bar:
            for chunk in collator.get_batched(n=self.batch_size):
                results += answer(chunk)
                bar.update(len(chunk))
        log_metrics(self._seconds, self._tokens, self._tokens / self._seconds if self._seconds else 0.0)
        return collator.get_original(results)

    def _answer(self, queries: Sequence[Query], gen_kwargs: Mapping[str, Any]) -> list[GenerationResult]:
        """One call of `generate`, left padded. An answer ends before the first stop string; no white space around it."""
        arguments, stops = self._generation(gen_kwargs)
        rows = [encode_prompt(self.processor, self.prompt(query), len(query.images), query.where) for query in queries]
        inputs = pad_left(self.processor, rows).to(self.device)
        images = [image for query in queries for image in query.images]
        if images:
            inputs["pixel_values"] = self.processor.preprocess_images(images).to(self.device, self.model.dtype)
        length = inputs["input_ids"].shape[1]
        if stops and arguments["num_beams"] == 1:
            stopping = _StopStrings(self.processor.tokenizer, stops, length)
            arguments["stopping_criteria"] = StoppingCriteriaList([stopping])
        start = time.perf_counter()
        with answering(f"with {len(queries)} requests at once; try a smaller --batch_size"):
            ids = self.model.generate(**inputs, **arguments)[:, length:].cpu()
        self._seconds += time.perf_counter() - start
        given = inputs["attention_mask"].sum(-1).tolist()
        made = (ids != self.processor.pad_token_id).sum(-1).tolist()
        self._tokens += sum(made)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [
            GenerationResult(_cut(text, stops), TokenCounts(input_tokens=before, output_tokens=after))
            for text, before, after in zip(texts, given, made)
        ]

    def _generation(self, gen_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Arguments for `generate` and the stop strings of a request. Greedy unless a temperature or `do_sample` asks for
        sampling.

        Raises:
            ValueError: an argument that `generate` does not know.
        """
        rest = {name: value for name, value in gen_kwargs.items() if name not in _NOT_FOR_US}
        until = rest.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        temperature = rest.pop("temperature", None)
        do_sample = rest.pop("do_sample", None)
        generation = Generation(
            do_sample=(bool(temperature) if do_sample is None else bool(do_sample)) and temperature != 0,
            temperature=1.0 if temperature is None else float(temperature),
            top_p=rest.pop("top_p", None),
            num_beams=int(rest.pop("num_beams", None) or 1),
            max_new_tokens=int(rest.pop("max_new_tokens", None) or MAX_NEW_TOKENS),
            use_cache=self.use_cache,
        )
        unknown = {name: value for name, value in rest.items() if name not in _KNOWN}
        if unknown:
            raise ValueError(f"generation_kwargs holds {unknown}, but takes `until` and GenerationConfig's arguments")
        return {**rest, **generation.arguments()}, stops

    def _progress(self, count: int) -> tqdm:
        return tqdm(total=count, desc="llava_sp", unit="q", disable=self.rank != 0)


class _StopStrings(StoppingCriteria):
    """Ends a row as soon as its new text holds one of the strings."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int):
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def _make_query(text: str, visuals: Any, where: str) -> Query:
    """Raises ValueError if the text holds image marks, but not one per image, or if a visual is not an image."""
    if visuals is None:
        visuals = []
    images = tuple(_image(visual, where) for visual in (visuals if isinstance(visuals, (list, tuple)) else [visuals]))
    return Query(where, place_images(text, len(images), f"{where}: the text"), images)


def _image(visual: Any, where: str) -> Image.Image:
    if isinstance(visual, Image.Image):
        try:
            return visual.convert("RGB")  # a file that was only opened so far is read here
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{where}: {error}") from error
    visual = Path(visual) if isinstance(visual, str) else visual
    film = isinstance(visual, Path) and visual.suffix.lower() in VIDEO + AUDIO
    if film or not isinstance(visual, (Path, bytes)):
        given = f"{visual} is video or audio" if film else f"doc_to_visual gave {type(visual).__name__}"
        raise ValueError(f"{where}: {given}; LLaVA-SP takes images (PIL, file or bytes) only")
    return open_image(visual, where)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()
