"""Files with tensors: their headers, their values, and whether these can be trained weights.

Weights come as safetensors, or as PyTorch's pickles (`.bin`, `.pt`), which may hold code: a pickle is only ever opened with
`weights_only=True`.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_sp.checkpoints.reading.manifest import hold_to_sha256
from llava_sp.common.files import counted, read_json
from llava_sp.common.schema import Check, expect

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
# An index of shards: key -> name of the file that holds it.
_INDEX = {"weight_map": Check(bool, "an object that names a file for each key", {str: str}), "metadata": dict}
_TENSORS = Check(lambda held: all(isinstance(key, str) for key in held), "tensors under names", {str: Tensor})
_UNREADABLE = (  # raised by torch's unpickler for bytes that are not a pickle
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
_HUGE, _TINY = 1e4, 1e-30  # no trained weight is that large; most of a tensor is never that small
_SAMPLE = 2**16  # values checked for that
_ENDS = 64  # values at each end of a tensor that are hashed


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its key, shape, type, the file, and the file's hash if a manifest records it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    sha256: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights in a model folder, safetensors first, as its index (if there is one) names them.

    Raises:
        ValueError: no weights, the index is not valid, or it names a file that does not exist.
    """
    index = shard_index(folder)
    if index is None:
        file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{folder} holds no weights: expected {', '.join(WEIGHT_FILES)} or an index of shards")
        return [file]
    shards = read_index(index)
    for key, name in shards.items():
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which does not exist; {key} is in it")
    return sorted({folder / name for name in shards.values()})


def shard_index(folder: Path) -> Path | None:
    """The index file of the shards; None if the weights are a single file or missing."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return None
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
    return None


def read_index(index: Path) -> dict[str, str]:
    """Key -> name of the shard that holds it. Raises `ValueError` for a file that is not an index of shards."""
    return read_json(index, _INDEX)["weight_map"]


def folder_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of a model folder's weight files. Raises `ValueError` for a shard that is missing or lacks a tensor."""
    tensors = [tensor for file in weight_files(folder) for tensor in stored_tensors(file)]
    index = shard_index(folder)
    lacking = set() if index is None else read_index(index).keys() - {tensor.key for tensor in tensors}
    if lacking:
        raise ValueError(f"{index} names {min(lacking)}, which no shard holds ({counted(len(lacking), 'such tensor')})")
    return tensors


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a file. Reads the header of safetensors; of a pickle, old or new, all but its tensors.

    Raises:
        ValueError: the file is cut off, is not a file of tensors, or (a pickle) holds code.
    """
    if file.suffix != ".safetensors":
        return [StoredTensor(k, tuple(v.shape), v.dtype, file) for k, v in _open_pickle(file, headers=True).items()]
    with _open_safetensors(file) as opened:
        keys = opened.keys()
        slices = {key: opened.get_slice(key) for key in keys}
        return [StoredTensor(k, tuple(s.get_shape()), _DTYPES[s.get_dtype()], file) for k, s in slices.items()]


def read_tensors(file: Path, keys: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file on the CPU: those of `keys`, or all. Raises as `stored_tensors`; `KeyError` for an unknown key."""
    if file.suffix != ".safetensors":
        tensors = _open_pickle(file)
        return tensors if keys is None else {key: tensors[key] for key in keys}
    with _open_safetensors(file) as opened:
        return {key: opened.get_tensor(key) for key in (opened.keys() if keys is None else keys)}


def value_problem(tensor: Tensor, zeros_allowed: bool = False) -> str | None:
    """Why these cannot be trained weights, or None: empty, NaN or infinite, or uninitialised memory.

    `zeros_allowed`: a matrix of zeros may be intended (LoRA's B before training).
    """
    if tensor.numel() == 0:
        return "is empty (not gathered under ZeRO-3?)"
    if not tensor.is_floating_point():
        return None
    if tensor.element_size() == 1:  # float8, which torch cannot compute with
        tensor = tensor.float()
    largest = torch.stack(torch.aminmax(tensor)).abs().max().item()  # NaN if any value is NaN; does not copy the tensor
    if not math.isfinite(largest):
        count = int((~torch.isfinite(tensor)).sum())
        return f"holds NaN or infinity in {count:,} of its {tensor.numel():,} values"
    if largest > _HUGE:
        return f"has values up to {largest:.1e}: the run that wrote it diverged, or the memory was never initialised"
    if tensor.ndim > 1:
        if largest == 0:
            return None if zeros_allowed else "is zero everywhere: it was saved before it was initialised"
        sample = tensor.flatten()[:: max(1, tensor.numel() // _SAMPLE)].abs()
        used = sample[sample > 0]
        if used.numel() and (used < _TINY).float().mean().item() > 0.5:
            return f"has most of its values below {_TINY:.0e}: memory that was never initialised"
    return None


def check_values(named: Iterable[tuple[str, Tensor, bool]]) -> None:
    """Raises `ValueError` for values that training cannot give.

    Each is `(how to name it in the error, tensor, whether a matrix of zeros is allowed)`.
    """
    problems = [f"{name} {found}" for name, tensor, zeros in named if (found := value_problem(tensor, zeros))]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("these cannot be trained weights:\n  " + "\n  ".join(problems[:8]) + more)


def read_checked(stored: dict[str, StoredTensor], zeros_allowed: bool = False) -> dict[str, Tensor]:
    """The tensors under the same names, each file read once. Raises `ValueError` for values that training cannot give."""
    tensors = read_all(stored)
    check_values(
        (f"{stored[name].key} in {stored[name].file}", tensor, zeros_allowed or ".lora_B" in name)
        for name, tensor in tensors.items()
    )
    return tensors


def read_all(stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors under the same names, each file read once. Raises `ValueError` if a recorded hash differs."""
    tensors: dict[str, Tensor] = {}
    for file, recorded in sorted({tensor.file: tensor.sha256 for tensor in stored.values()}.items()):
        hold_to_sha256(file, recorded)
        here = {name: tensor.key for name, tensor in stored.items() if tensor.file == file}
        content = read_tensors(file, list(here.values()))
        tensors |= {name: content[key] for name, key in here.items()}
    return tensors


def tensor_lines(file: Path) -> list[str]:
    """One line per floating-point tensor: key, shape, type, hash of its first and last 64 values."""
    lines = []
    for key, ends in _safetensors_ends(file) if file.suffix == ".safetensors" else _pickle_ends(file):
        shape, dtype, first, last = ends
        if dtype.is_floating_point:
            digest = hashlib.sha256(_bytes(first) + _bytes(last)).hexdigest()
            lines.append(f"{key} {tuple(shape)} {_NAMES[dtype]} {digest}\n")
    return lines


def _safetensors_ends(file: Path) -> Iterator[tuple[str, tuple[Any, torch.dtype, Tensor, Tensor]]]:
    """key, (shape, type, first and last values) of each tensor, reading the rows that hold them and no more."""
    with _open_safetensors(file) as opened:
        keys = opened.keys()
        for key in keys:
            part = opened.get_slice(key)
            shape, dtype = part.get_shape(), _DTYPES[part.get_dtype()]
            if 0 in shape or not shape:
                first = last = opened.get_tensor(key).flatten()
            else:
                rows = -(-_ENDS // math.prod(shape[1:]))
                first, last = part[:rows].flatten(), part[max(0, shape[0] - rows) :].flatten()
            yield key, (shape, dtype, first[:_ENDS], last[-_ENDS:])


def _pickle_ends(file: Path) -> Iterator[tuple[str, tuple[Any, torch.dtype, Tensor, Tensor]]]:
    for key, tensor in _open_pickle(file).items():
        yield key, (tensor.shape, tensor.dtype, tensor.flatten()[:_ENDS], tensor.flatten()[-_ENDS:])


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off, or it is not a valid safetensors file ({error})") from None
    except KeyError as error:
        raise ValueError(f"{file} holds a tensor of the type {error}, which is not supported") from None


def _open_pickle(file: Path, headers: bool = False) -> dict[str, Tensor]:
    """A dict of tensors, mapped into memory where the format allows; else read, unless only `headers` are needed."""
    try:
        if zipfile.is_zipfile(file):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        elif headers:
            content = _without_values(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
        if code is not None:
            reason = (
                f"holds code ({code.group(1).rstrip('.')}), nothing in it was executed; save its tensors as safetensors"
            )
        else:
            reason = f"is cut off, or it is not a file of tensors ({reason})"
        raise ValueError(f"{file} {reason}") from None
    return expect(content, _TENSORS, file)


def _without_values(file: Path) -> Any:
    """The content of a pickle of torch before 1.6, its tensors allocated but their values not read."""
    with open(file, "rb") as stream, torch.serialization.skip_data():
        content = torch.load(stream, map_location="cpu", weights_only=True)
        tensors = [t for t in content.values() if isinstance(t, Tensor)] if isinstance(content, dict) else []
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        end = stream.tell() + sum(8 + size for size in sizes.values())  # each after its length, behind the pickle
    if end > file.stat().st_size:
        raise EOFError(f"{file.stat().st_size:,} bytes long, where its tensors need {end:,}")
    return content
