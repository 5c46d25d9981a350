"""Compute the patch features of a run's images once, so that it trains from them: for studies of the projector.

    python -m llava_sp.data.precompute --config configs/pretrain_7b_cropping.yaml --precompute_features FOLDER [--key value]
    python -m llava_sp.train           --config configs/pretrain_7b_cropping.yaml --precompute_features FOLDER

Says first how large they become. The same command again goes on where an interrupted one ended, and replaces damaged
shards. The run must have the same vision tower, layer, image settings, number format and data. Its validation data of
`eval_data_path` is read as images.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp.common.command import at_once, command_parser, count, natural, run_command
from llava_sp.common.files import counted, lock, readable, replacing, write_json, writing
from llava_sp.data.annotations import BadSample, images_of

if TYPE_CHECKING:
    from torch import Tensor

    from llava_sp.config.arguments import Run
    from llava_sp.data.dataset import ConversationDataset
    from llava_sp.model.configuration_llava_sp import LlavaSPConfig
    from llava_sp.model.modeling_llava_sp import LlavaSPModel

Images = list[tuple[str, int, str]]  # key, source, name


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("llava_sp.data.precompute", __doc__)
    parser.add_argument("--config", required=True, help="training YAML")
    parser.add_argument("--batch-size", type=at_once, default=16, help="images per forward pass")
    parser.add_argument(
        "--images-per-shard", type=count, default=1024, help="1024: 1.1 GiB of CLIP-L/14-336 in bfloat16"
    )
    parser.add_argument("--workers", type=natural, default=4, help="reading processes")
    options, overrides = parser.parse_known_args(arguments)
    return run_command(lambda: precompute(options, overrides), traceback=options.traceback)


def precompute(options: Namespace, overrides: list[str]) -> None:
    """Write the shards that are missing. Raises `ValueError` and `OSError` as the run does, and for a full disk."""
    from llava_sp.data.build import build_datasets, build_processor, config_of, run_of_config
    from llava_sp.data.features import made_of

    run = run_of_config(options.config, overrides)
    folder, run.data.precompute_features = run.data.precompute_features, None
    if folder is None:
        raise ValueError("precompute_features is not set: give the folder for the features")
    config, target = config_of(run), Path(folder)
    dataset, _ = build_datasets(build_processor(run), run)
    images = images_in(dataset)
    size = config.num_patch_tokens * config.vision_width * (2 if run.train.bf16 else 4)
    made = made_of(dataset, run, config)
    manifest = {"made_of": made, "images": len(images), "images_per_shard": options.images_per_shard}
    print(
        f"{counted(len(images), 'image')} of {readable(size)} each: {readable(size * len(images))} in {target}",
        flush=True,
    )
    with owned(target):
        missing = open_folder(target, manifest, images)
        needed, free = size * sum(map(len, missing.values())), shutil.disk_usage(target).free
        if free < needed:
            raise OSError(f"{target} needs {readable(needed)} more, but {readable(free)} are free there")
        if missing:
            write_shards(target, missing, dataset, run, config, options)
    print(f"{target} is complete")


def images_in(dataset: ConversationDataset) -> Images:
    """Every distinct image, in the order of the records."""
    import numpy as np

    from llava_sp.data.features import key_of

    found = {}
    for source, file in enumerate(dataset.files):
        for record in np.flatnonzero(file.image_counts).tolist():
            for name in images_of(file[record]):
                if isinstance(name, str):  # else the record is bad
                    found[key_of(source, name)] = (key_of(source, name), source, name)
    if not found:
        raise ValueError("the training data has no images")
    return list(found.values())


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, for this command alone."""
    with writing(folder / ".lock"):
        stream = open(folder / ".lock", "a")  # noqa: SIM115
    with stream:
        if not lock(stream, folder):
            raise ValueError(f"{folder} is being written by another command: wait for it, or end it")
        yield


def open_folder(folder: Path, manifest: dict[str, Any], images: Images) -> dict[int, Images]:
    """The images of each shard that is missing or damaged; a new folder gets its features.json.

    Raises `ValueError` if the folder holds the features of something else, or files that are none.
    """
    from llava_sp.data.features import MANIFEST, read_manifest, read_sums, shard_name

    if not (folder / MANIFEST).is_file():
        if others := [entry.name for entry in folder.iterdir() if entry.name != ".lock"]:
            raise ValueError(f"{folder} holds {others[0]} but no {MANIFEST}: choose a new folder")
        write_json(folder / MANIFEST, manifest)
    per_shard = read_manifest(folder, manifest["made_of"])["images_per_shard"]
    missing = {}
    for number, start in enumerate(range(0, len(images), per_shard)):
        try:
            read_sums(folder / shard_name(number))
        except ValueError:
            missing[number] = images[start : start + per_shard]
    return missing


class Pixels:
    """`[index]` is the image's (key, pixels [3, H, W]), or (key, why it is bad)."""

    def __init__(self, dataset: ConversationDataset, images: Images):
        self.dataset, self.images = dataset, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        key, source, name = self.images[index]
        try:
            image = self.dataset.files[source].image(name)
        except BadSample as error:
            return key, str(error)
        return key, self.dataset.processor.preprocess_images([image])[0]


def write_shards(
    folder: Path,
    shards: dict[int, Images],
    dataset: ConversationDataset,
    run: Run,
    config: LlavaSPConfig,
    options: Namespace,
) -> None:
    """Compute and write shard after shard. Raises `BadSample` for a bad image, unless `on_bad_sample` is "skip"."""
    import torch
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from llava_sp.checkpoints.opening.backbones import open_tower
    from llava_sp.data.features import checksum, shard_name

    dtype = torch.bfloat16 if run.train.bf16 else torch.float32
    attention = {"attn_implementation": run.model.attn_implementation} if run.model.attn_implementation else {}
    model = open_tower(config, str(run.model.vision_tower), dtype=dtype, **attention)
    model.vision_tower.to(run.train.device)

    places, images = itertools.count(), [image for number in shards for image in shards[number]]
    batches = [  # of one shard each
        (number, list(itertools.islice(places, min(options.batch_size, len(ours) - start))))
        for number, ours in shards.items()
        for start in range(0, len(ours), options.batch_size)
    ]
    order, pixels = [indices for _, indices in batches], Pixels(dataset, images)
    loader: Any = DataLoader(pixels, batch_sampler=order, num_workers=options.workers, collate_fn=list)  # type: ignore[arg-type]
    numbered = zip((number for number, _ in batches), loader, strict=True)
    with tqdm(total=len(images), unit="image", disable=None) as progress:
        for number, group in itertools.groupby(numbered, key=lambda pair: pair[0]):
            features: dict[str, Tensor] = {}
            for _, batch in group:
                features |= features_of(batch, model, skip=run.data.on_bad_sample == "skip")
                progress.update(len(batch))
            file = folder / shard_name(number)
            sums = {"crc32": json.dumps({key: checksum(one) for key, one in features.items()})}
            with writing(file), replacing(file) as part:
                save_file(features, part, metadata=sums)


def features_of(batch: list[tuple[str, Tensor | str]], model: LlavaSPModel, skip: bool) -> dict[str, Tensor]:
    """The features [N, C] of the good images by their keys. With `skip`, bad ones are printed; else raises `BadSample`."""
    import torch

    good: dict[str, Tensor] = {}
    for key, given in batch:
        if not isinstance(given, str):
            good[key] = given
        elif skip:
            print(f"left out: {given}", flush=True)
        else:
            raise BadSample(f"{given} (on_bad_sample: skip leaves such samples out)")
    if not good:
        return {}
    pixels = torch.stack(list(good.values())).to(model.vision_tower.device)
    features = model.get_patch_features(pixels).cpu()
    return {key: one.clone() for key, one in zip(good, features, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
