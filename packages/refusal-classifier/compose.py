"""Compose replies for training from `templates.yaml`, seeded: `python compose.py OUT.jsonl`."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"<(\w+)>")


def expand(template: str, slots: dict[str, str], parts: dict[str, list[str]], rng: random.Random) -> str:
    """Pick alternatives from the inside out, fill in parts and slots until none is left, tidy the result."""

    def fill(m: re.Match[str]) -> str:
        name = m[1]
        value = rng.choice(parts[name]) if name in parts else slots[name[0].lower() + name[1:]]
        return value[:1].upper() + value[1:] if name[0].isupper() else value

    while _CHOICE.search(template) or _SLOT.search(template):
        while _CHOICE.search(template):
            template = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), template, count=1)
        template = _SLOT.sub(fill, template)
    text = re.sub(r" +([.,:;?!])", r"\1", re.sub(r"[ \t]{2,}", " ", template)).strip()
    return re.sub(r"(^|[.!?] |\n)([a-z])", lambda m: m[1] + m[2].upper(), text)


def slots_for(source: dict[str, Any], misread: bool, rng: random.Random) -> dict[str, str]:
    """The words that a request and its reply share."""
    slots = {name: rng.choice(pool) for name, pool in source["pools"].items()}
    if misread:
        names = ("do", "ing", "noun", "tip1", "tip2")
        words = rng.choice(source["misread"]).split("; ")
        return slots | {
            k: w[:1].lower() + w[1:] if k.startswith("tip") else w for k, w in zip(names, words, strict=True)
        }
    act = dict(
        zip(("do", "ing", "noun", "victim", "law"), rng.choice(source["acts"]).split("; "), strict=True)
    )
    return slots | act | {"do2": re.sub(r"\bmy\b", "your", act["do"])}


def compose(n: int, seed: int) -> list[dict[str, str]]:
    """2n rows: n that decline and n that answer, no reply twice."""
    source = yaml.safe_load((HERE / "templates.yaml").read_text("utf-8"))
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for declines in (True, False):
        families = [f for f in source["replies"] if (f["label"] != "compliance") == declines]
        weights = [f.get("weight", 1) for f in families]
        made = 0
        while made < n:
            family = rng.choices(families, weights)[0]
            own = family["ask"] in ("ACTS", "MISREAD")
            slots = slots_for(source, family["ask"] == "MISREAD", rng)
            request = expand(
                rng.choice(source["asks"]) if own else family["ask"], slots, source["parts"], rng
            )
            reply = expand(family["reply"], slots, source["parts"], rng)
            if reply not in seen:
                seen.add(reply)
                row = {"request": request, "reply": reply, "label": family["label"], "style": family["style"]}
                rows.append(row)
                made += 1
    return rows


if __name__ == "__main__":
    made = compose(2000, seed=4)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made)
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
