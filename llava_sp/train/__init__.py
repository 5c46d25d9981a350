"""Training: `python -m llava_sp.train --config configs/finetune_lora_7b_cropping.yaml`."""
