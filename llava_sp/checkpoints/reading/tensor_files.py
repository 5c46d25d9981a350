"""Files with tensors: what is in them without reading it, reading without executing anything, and whether it can be right.

Both of the formats that weights come in: safetensors, and PyTorch's pickles (`.bin`, `.pt`), which may hold code. A pickle
is only ever opened with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a whole model, the preferred first
_HEADER_LIMIT = 100 * 2**20  # of safetensors' own reader
_UNREADABLE = (  # by what torch's unpickler stumbles over bytes that are no pickle
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
_HUGE, _TINY = 1e4, 1e-30  # no trained weight is that large; most of a tensor is never that small
_SAMPLE = 2**16  # values looked at for that


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its key there, shape, type, and the file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights in a model folder, safetensors first, as its index (if it has one) names them.

    Raises:
        ValueError: there are none, the index cannot be read, or it names a file that is not there.
    """
    index = shard_index(folder)
    if index is not None:
        shards = read_index(index)
        for key, name in shards.items():
            if not (folder / name).is_file():
                count = sum(other == name for other in shards.values())
                raise ValueError(f"{index} names {name}, which is not there; {key} is in it ({count} tensors in all)")
        return sorted({folder / name for name in shards.values()})
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin or an index of shards")


def shard_index(folder: Path) -> Path | None:
    """The file that says which shard holds what, or None: the weights are one file, or there are none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return None
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
    return None


def read_index(index: Path) -> dict[str, str]:
    """Key -> name of the shard that holds it. Raises `ValueError` for a file that is no index of shards."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} is no index of shards: it has no weight_map from keys to files")
    return shards


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a file holds. Reads the header of safetensors; of a pickle, of any age, all but its tensors.

    Raises:
        ValueError: the file is cut off, is no file of tensors, or (a pickle) holds code.
    """
    if file.suffix == ".safetensors":
        header, _ = _safetensors_header(file)
        return [StoredTensor(k, tuple(v["shape"]), _dtype(v["dtype"], k, file), file) for k, v in header.items()]
    return [StoredTensor(k, tuple(v.shape), v.dtype, file) for k, v in _open_pickle(file, headers=True).items()]


def read_tensors(file: Path, keys: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file on the CPU: those of `keys`, or all. Raises as `stored_tensors`; `KeyError` for an unknown key."""
    if file.suffix != ".safetensors":
        tensors = _open_pickle(file)
        return tensors if keys is None else {key: tensors[key] for key in keys}
    header, _ = _safetensors_header(file)
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in (header if keys is None else keys)}


def read_json(file: Path) -> dict:
    """A JSON object from a file. Raises `ValueError` naming file and line."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): cut off, or not the file it should be") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object of settings")
    return content


def value_problem(tensor: Tensor, zeros_allowed: bool = False) -> str | None:
    """Why these cannot be trained weights, or None: empty, NaN or infinite, or memory that nobody initialised.

    `zeros_allowed`: a matrix of zeros may be meant (LoRA's B before training).
    """
    if tensor.numel() == 0:
        return "is empty (a part that ZeRO-3 had not gathered?)"
    if not tensor.is_floating_point():
        return None
    if tensor.element_size() == 1:  # float8, of which torch computes nothing
        tensor = tensor.float()
    largest = torch.stack(torch.aminmax(tensor)).abs().max().item()  # NaN if there is one; makes no copy of the tensor
    if not math.isfinite(largest):
        count = int((~torch.isfinite(tensor)).sum())
        return f"holds NaN or infinity in {count:,} of its {tensor.numel():,} values"
    if largest > _HUGE:
        return f"has values up to {largest:.1e}, which no training gives: memory that was never initialised"
    if tensor.ndim > 1:
        if largest == 0:
            return None if zeros_allowed else "is zero everywhere: it was saved before it was initialised"
        sample = tensor.flatten()[:: max(1, tensor.numel() // _SAMPLE)].abs()
        used = sample[sample > 0]
        if used.numel() and (used < _TINY).float().mean().item() > 0.5:
            return f"has most of its values below {_TINY:.0e}: memory that was never initialised"
    return None


def read_checked(stored: dict[str, StoredTensor], zeros_allowed: bool = False) -> dict[str, Tensor]:
    """The tensors under the same names, each file read once. Raises `ValueError` for values that training cannot give."""
    tensors = read_all(stored)
    problems = []
    for name, tensor in tensors.items():
        problem = value_problem(tensor, zeros_allowed or ".lora_B" in name)
        problems += [f"{stored[name].key} in {stored[name].file} {problem}"] if problem else []
    raise_problems(problems)
    return tensors


def read_all(stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors under the same names, each file read once."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        here = {name: tensor.key for name, tensor in stored.items() if tensor.file == file}
        content = read_tensors(file, list(here.values()))
        tensors |= {name: content[key] for name, key in here.items()}
    return tensors


def raise_problems(problems: list[str]) -> None:
    """Raises `ValueError` with the first of them, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("these cannot be trained weights:\n  " + "\n  ".join(problems[:8]) + more)


def tensor_lines(file: Path) -> list[str]:
    """One line per floating-point tensor: key, shape, type, hash of its first and last 64 values."""
    lines = []
    for key, dtype, shape, first, last in _safetensors_ends(file) if file.suffix == ".safetensors" else _bin_ends(file):
        if dtype.startswith(("F", "BF")):
            lines.append(f"{key} {tuple(shape)} {dtype} {hashlib.sha256(first + last).hexdigest()}\n")
    return lines


def _safetensors_header(file: Path) -> tuple[dict[str, dict], int]:
    """`(key -> dtype, shape, data_offsets; where the data begins)`. Raises `ValueError` for a file that is cut off."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{file} ({size:,} bytes) is no safetensors file, or it is cut off within its header")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{file} is no safetensors file: its header is not JSON") from None
    _check_header(header, file)
    end = 8 + length + max((about["data_offsets"][1] for about in header.values()), default=0)
    if end != size:
        raise ValueError(f"{file} is {size:,} bytes long, but its header promises {end:,}: the copy is cut off")
    return header, 8 + length


def _check_header(header: dict, file: Path) -> None:
    """Raises `ValueError` where an entry is not type, shape and as many bytes as these ask for."""
    if not isinstance(header, dict):
        raise ValueError(f"{file} is no safetensors file: its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    for key, about in header.items():
        try:
            size = math.prod(about["shape"]) * _dtype(about["dtype"], key, file).itemsize
            start, end = about["data_offsets"]
            fits = end - start == size and start >= 0
        except (KeyError, TypeError):
            raise ValueError(
                f"{file}: the header's entry for {key} is not that of a tensor: {str(about)[:120]}"
            ) from None
        if not fits:
            raise ValueError(
                f"{file}: {key} {tuple(about['shape'])} needs {size:,} bytes, its header gives it {end - start:,}"
            )


def _dtype(name: str, key: str, file: Path) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{file}: {key} is of the type {name}, which is not known here")
    return _DTYPES[name]


def _open_pickle(file: Path, headers: bool = False) -> dict[str, Tensor]:
    """A dict of tensors, mapped into memory where the format allows; else read, unless `headers` are all that is wanted."""
    try:
        if zipfile.is_zipfile(file):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        elif headers:
            content = _without_values(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            raise ValueError(
                f"{file} holds code ({code.group(1).rstrip('.')}), not only tensors: it was refused, and nothing in it was "
                "executed. Where you trust its origin, save its tensors as safetensors"
            ) from None
        raise ValueError(f"{file} is cut off, or it is no file of tensors") from None
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} is cut off, or it is no file of tensors ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a dict of tensors")
    if not all(isinstance(key, str) for key in content):
        raise ValueError(f"{file} holds tensors under keys that are no names, such as {next(iter(content))!r}")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        kind = type(content[others[0]]).__name__
        raise ValueError(f"{file} holds a {kind} under {others[0]!r}; expected tensors only")
    return content


def _without_values(file: Path) -> Any:
    """What a pickle of torch before 1.6 holds, its tensors with room for values that are not read."""
    with open(file, "rb") as stream, torch.serialization.skip_data():
        content = torch.load(stream, map_location="cpu", weights_only=True)
        tensors = (
            [value for value in content.values() if isinstance(value, Tensor)] if isinstance(content, dict) else []
        )
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        end = stream.tell() + sum(8 + size for size in sizes.values())  # each after its length, behind the pickle
    if end > file.stat().st_size:
        raise EOFError(f"{file.stat().st_size:,} bytes long, where its tensors need {end:,}")
    return content


def _safetensors_ends(file: Path) -> Iterator[tuple[str, str, list[int], bytes, bytes]]:
    """(key, type, shape, first and last values) of each tensor, reading the header and those values only."""
    header, base = _safetensors_header(file)
    with open(file, "rb") as stream:
        for key, about in header.items():
            start, end = about["data_offsets"]
            size = min(end - start, 64 * (end - start) // max(1, math.prod(about["shape"])))
            stream.seek(base + start)
            first = stream.read(size)
            stream.seek(base + end - size, os.SEEK_SET)
            yield key, about["dtype"], about["shape"], first, stream.read(size)


def _bin_ends(file: Path) -> Iterator[tuple[str, str, list[int], bytes, bytes]]:
    """The same of a pickle."""
    for key, tensor in _open_pickle(file).items():
        ends = (
            part.contiguous().view(torch.uint8).numpy().tobytes()
            for part in (tensor.flatten()[:64], tensor.flatten()[-64:])
        )
        yield key, _NAMES.get(tensor.dtype, "other"), list(tensor.shape), *ends
