"""transformers: the newest checkpoint is chosen by its number, also when it was cut off.

The Trainer writes a checkpoint file by file into its final folder. If the machine dies half way,
`get_last_checkpoint` still returns that folder, and the run cannot be resumed from it.
"""

import json
import tempfile
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from experiments.faults import ABSENT, PRESENT, heading, verdict
from qlora_lab.training import last_complete_checkpoint


def main() -> str:
    heading("A run that died while it wrote checkpoint-20", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        for step in (10, 20):
            (Path(folder) / f"checkpoint-{step}").mkdir()
        state = Path(folder) / "checkpoint-10" / "trainer_state.json"
        state.write_text(json.dumps({"global_step": 10}), "utf-8")
        (Path(folder) / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"\x10\0\0")
        theirs, ours = Path(get_last_checkpoint(folder)), last_complete_checkpoint(folder)
        print(f"  get_last_checkpoint:       {theirs.name}")
        print(f"  last_complete_checkpoint:  {ours.name}")
    if theirs != ours:
        return verdict(PRESENT, "the half-written folder is chosen")
    return verdict(ABSENT, "the half-written folder is passed over")


if __name__ == "__main__":
    main()
