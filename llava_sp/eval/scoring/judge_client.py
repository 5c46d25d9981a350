"""A judge's client: one request, the settings of the command line, and repeated requests where that can help.

What is asked, what is done with the replies, and all that a user needs to know is in `judge`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llava_sp.common.command import check_arguments
from llava_sp.common.provenance import now
from llava_sp.common.schema import fits, whole

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles each time
LONGEST_RETRY_AFTER = 600.0


@dataclass(frozen=True)
class Request:
    """One request to the judge: (role, text) pairs and the settings; max_tokens None is not sent."""

    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_tokens: int | None = None

    def arguments(self) -> dict[str, Any]:
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        messages = [{"role": role, "content": text} for role, text in self.messages]
        return {"messages": messages, "temperature": self.temperature, **limit}

    def sha256(self, judge: str) -> str:
        return hash_text(json.dumps({"judge": judge, **self.arguments()}, sort_keys=True))


@dataclass(frozen=True)
class JudgeOptions:
    """The judge's settings; without a model and recorded files there is no judge."""

    model: str | None = None
    url: str = OPENAI_URL
    key: str = field(default="", repr=False)
    key_env: str = OPENAI_KEY
    concurrency: int = 8
    runs: int | None = None
    timeout: float = 300.0
    recorded: tuple[Path, ...] = ()

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> JudgeOptions:
        """Raises ValueError early for what would fail after hours of answering: key, package, address."""
        options = cls(
            model=args.judge,
            url=(args.judge_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/"),
            key=os.environ.get(args.judge_key_env, "").strip(),
            key_env=args.judge_key_env,
            concurrency=args.judge_concurrency,
            runs=args.judge_runs,
            timeout=args.judge_timeout,
            recorded=tuple(args.judgements or ()),
        )
        if not options.asks:
            return options
        url, shown, key_env = options.url, options.public_url, options.key_env
        needs_key = url == OPENAI_URL or key_env != OPENAI_KEY
        check_arguments(
            [
                ("--judge", repr(options.model), bool(options.model), "the name of a model"),
                ("--judge-url", shown, url.startswith(("http://", "https://")), "an address with http:// or https://"),
                ("--judge-url", shown, not url.endswith("/completions"), "the part before /chat/completions"),
                ("--judge-key-env", key_env, bool(options.key) or not needs_key, "a variable that holds a key (a server of "
                    "your own, --judge-url, needs none)"),
                ("--output", args.output, args.output or not args.answers, "a directory: every reply of --judge is kept there"),
            ]
        )  # fmt: skip
        if importlib.util.find_spec("openai") is None:
            raise ValueError("--judge needs the package openai: pip install llava_sp[eval]")
        return options

    @property
    def asks(self) -> bool:
        """Whether requests are sent; beside recorded files, --judge only chooses among the judges in them."""
        return self.model is not None and not self.recorded

    @property
    def public_url(self) -> str:
        """The address without user names, passwords and parameters."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class JudgeClient:
    """Asks the judge; thread safe. `stop` ends every wait and every further request."""

    def __init__(self, options: JudgeOptions, stop: threading.Event):
        import openai

        self._openai = openai
        self._options = options
        self._stop = stop
        self._client = openai.OpenAI(
            api_key=options.key or "none", base_url=options.url, timeout=options.timeout, max_retries=0
        )

    def ask(self, request: Request, what: str) -> dict[str, Any]:
        """The reply with judge, date, settings and token counts.

        Raises:
            ValueError: naming `what`, the server and its message: at once where another try cannot help, else after
                `TRIES` tries.
        """
        problem = ""
        for failures in range(TRIES):
            if self._stop.is_set():
                break
            try:
                return self._once(request)
            except self._openai.APIStatusError as error:
                problem, wait = (
                    f"it says {error.status_code}: {self._words(error)}",
                    retry_after(error.response.headers),
                )
                advice = self._hopeless(error)
                if wait is not None and wait > LONGEST_RETRY_AFTER and advice is None:
                    advice = f" (try again in {wait:.0f} seconds)"
                if advice is not None:
                    raise ValueError(self._message(what, f"{problem}{advice}")) from None
            except self._openai.APITimeoutError:
                problem, wait = f"no reply within {self._options.timeout:g} seconds (--judge-timeout)", None
            except self._openai.APIConnectionError as error:
                problem, wait = f"no connection ({error.__cause__ or error})", None
            except (json.JSONDecodeError, UnicodeDecodeError, _NoReply) as error:
                problem, wait = f"its reply is not a chat completion ({error})", None
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**failures) * random.uniform(0.75, 1.25)
            if failures < TRIES - 1:
                self._stop.wait(backoff if wait is None else wait + backoff / 10)
        raise ValueError(self._message(what, f"{problem or 'stopped'} (tried {TRIES} times)"))

    def _once(self, request: Request) -> dict[str, Any]:
        start = time.perf_counter()
        completion = self._client.chat.completions.create(model=self._options.model or "", **request.arguments())
        try:
            choice = completion.choices[0]
            content = choice.message.content
        except (AttributeError, TypeError, IndexError):
            raise _NoReply(str(completion)[:200]) from None
        if content is not None and not isinstance(content, str):
            raise _NoReply(f"its content is {str(content)[:200]!r}")
        return {
            "judge": self._options.model,
            "url": self._options.public_url,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "reply": content or "",  # None is a refusal: the benchmark's rule for unreadable replies applies
            "answered_by": None if completion.model is None else str(completion.model),
            "finish_reason": choice.finish_reason,
            "refusal": getattr(choice.message, "refusal", None),
            "usage": _tokens(completion.usage),
            "date": now(),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _hopeless(self, error: Any) -> str | None:
        """What to do where trying again cannot help; None where it can."""
        status, options = error.status_code, self._options
        if status in (401, 403):
            return (
                f". The key in {options.key_env} is refused" if options.key else f". Set the key in {options.key_env}"
            )
        if status == 404:
            return f". Is {options.model} a model there, and the address the part before /chat/completions?"
        if status == 429 and "insufficient_quota" in (error.code, getattr(error, "type", None)):
            return ". The account has no quota left"
        return None if status in (408, 409, 425, 429) or status >= 500 else ". The request itself is refused"

    def _words(self, error: Any) -> str:
        body = error.body
        said = body.get("message") if isinstance(body, Mapping) else body
        return str(said or error.message)[:300]

    def _message(self, what: str, problem: str) -> str:
        text = f"the judge {self._options.model} at {self._options.public_url} gave no reply for {what}: {problem}"
        text = text.replace(self._options.key, "***") if self._options.key else text
        return f"{text}. What was judged is kept: the same command continues from here"


class _NoReply(Exception):
    """A well-formed response without a reply in it."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the headers `retry-after-ms` and `retry-after` (a number, or a date); None if they do not say."""
    said = headers.get("retry-after-ms") or headers.get("retry-after")
    if not said:
        return None
    try:
        return max(0.0, float(said) / (1000 if "retry-after-ms" in headers else 1))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


def _tokens(usage: Any) -> dict[str, int] | None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    found = {name: getattr(usage, name, None) for name in names}
    counts = {name: count for name, count in found.items() if isinstance(count, int) and fits(count, whole(0))}
    return counts if "total_tokens" in counts else None


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
