"""Keep a quickstart's model in the repository, for the notebook: LoRA and projector in 16 bits, and a held-out image.

python -m llava_sp.shapes.ship --run runs/quickstart/cropping/lora
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_sp.common.command import command_parser, run_command
from llava_sp.common.files import read_json, write_atomic
from llava_sp.shapes.images import Images
from llava_sp.shapes.world import SHAPES, Scene, sample_scene

SCORED = {"score": float, "metrics": {"count_per_question_type": {str: int}}}
DEFAULT_OUTPUT = Path(__file__).resolve().parent / "model"
README = """# A trained model of the shapes world

`{variant}`, as `bash scripts/quickstart.sh` trains it, in float16; kept by `python -m llava_sp.shapes.ship`. LoRA and
projector only: it is opened on `../backbones`. VQA accuracy of the run on {questions} held-out questions: {score}.
`example.jpg` is a scene of the held-out split.
"""


def example_scene(seed: int = 7) -> Scene:
    """The first held-out scene of this seed that shows each of the four shapes and a digit once."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng, "val")
        kinds = [thing.kind for thing in scene.things]
        if sorted(kinds) == sorted((*SHAPES, "digit")):
            return scene


def ship(run: Path, output: Path) -> None:
    """Write the model of a finished stage 2 run to `output`. Raises `ValueError` if the run is not scored yet."""
    metrics = read_json(run.parent / "vqav2" / "metrics.json", SCORED)

    import torch

    from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
    from llava_sp.checkpoints.opening.adapter import save_adapter

    model = LlavaSPForCausalLM.from_pretrained(run, dtype=torch.float16)
    model.config.language_model_name_or_path = "../backbones/llama"
    model.config.vision_tower_name_or_path = "../backbones/clip"
    for part in (model.config.text_config, model.config.vision_config):
        part._name_or_path = ""  # a path of the machine that trained it
    save_adapter(model, LlavaSPProcessor.from_pretrained(run), output, run={"stage": "finetune_lora"})
    for code in output.glob("*.py"):  # a processor is saved with its code; here it stands two folders up
        code.unlink()
    Images(output).save("example.jpg", example_scene())
    questions = sum(metrics["metrics"]["count_per_question_type"].values())
    text = README.format(variant=model.config.spatial_variant, questions=questions, score=metrics["score"])
    write_atomic(output / "README.md", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = command_parser("llava_sp.shapes.ship", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="the lora folder of a finished quickstart")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    args = parser.parse_args(argv)
    return run_command(lambda: ship(args.run, args.output), traceback=args.traceback)


if __name__ == "__main__":
    sys.exit(main())
