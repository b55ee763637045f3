"""PEFT: a saved adapter names this machine's folder as its base model.

`adapter_config.json` keeps the path that the base was loaded from. Elsewhere the path names
nothing, and it tells everybody how this machine's folders are called.
"""

import json
import tempfile
from pathlib import Path

from experiments.faults import ABSENT, PRESENT, heading, verdict
from qlora_lab.loading import EMBEDDED, load_model, quiet
from qlora_lab.training import attach_adapter, make_portable


def main() -> str:
    heading("The base that a saved adapter names", "peft", "transformers")
    model = attach_adapter(load_model(bits=16).model, r=1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        file = Path(folder) / "adapter_config.json"
        named = json.loads(file.read_text("utf-8"))["base_model_name_or_path"]
        make_portable(Path(folder))
        portable = json.loads(file.read_text("utf-8"))["base_model_name_or_path"]
    absolute = Path(named).is_absolute()
    print(f"  as PEFT saves it: {'an absolute path of this machine' if absolute else named}")
    print(f"  as the course saves it: {portable}")
    if absolute and portable == EMBEDDED:
        return verdict(PRESENT, "the adapter cannot find its base on another machine")
    return verdict(ABSENT, "the base is named in a way that holds elsewhere")


if __name__ == "__main__":
    main()
