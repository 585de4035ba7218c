"""Where pictures come from: a diffusers pipeline, a script; and how drawings are kept for a later run.

A backend is no Runtime: it takes text and gives pictures. The endpoint is in `endpoint.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from demur.errors import InputError, MissingExtra
from demur.files import dumps_row, iter_jsonl, write_atomic
from demur.measure.overt.drawing import Drawing, Fault, Picture, Stage, classify, failed, from_row, to_row
from demur.runtime.base import Progress
from demur.types import Prompt


class Backend(Protocol):
    """An image generator.

    `name` is shown in reports; `settings` is all that may change a picture beside the prompt.
    """

    name: str
    settings: Mapping[str, Any]

    def draw(
        self, prompts: Iterable[Prompt], *, images: int = 1, sample: int = 0, progress: Progress | None = None
    ) -> Iterator[Drawing]:
        """One Drawing per prompt, in order; failures are Drawings with `fault` set."""
        ...


Line = int | Stage | Fault | Drawing | Exception
Script = Mapping[str, Line] | Callable[[Prompt, int], Line]


class ScriptedImages:
    """Draws by rule: for tests, and to try a prompt filter without an image model.

    Args:
        script: {prompt id or text: line}, "*" for all others; or a function (prompt, sample) -> line. A line is
            a number of pictures, a `Stage` (refused), a `Fault`, a whole `Drawing`, or an exception, whose text
            is classified like a server's.

    >>> from demur.types import Prompt
    >>> filter = ScriptedImages(lambda p, _: Stage.PROMPT_FILTER if "knife" in p.text else 1)
    >>> [d.refused for d in filter.draw([Prompt.of("a knife"), Prompt.of("a spoon", id="s")])]
    [True, False]
    """

    def __init__(self, script: Script, *, name: str = "scripted") -> None:
        self.name = name
        self.settings: Mapping[str, Any] = {}
        self._script = script

    def draw(
        self, prompts: Iterable[Prompt], *, images: int = 1, sample: int = 0, progress: Progress | None = None
    ) -> Iterator[Drawing]:
        """Yield the scripted drawings in order."""
        for done, prompt in enumerate(prompts, 1):
            yield self._draw(prompt, images, sample)
            if progress:
                progress(done, None)

    def _draw(self, prompt: Prompt, images: int, sample: int) -> Drawing:
        if callable(self._script):
            line = self._script(prompt, sample)
        else:
            found = [self._script[k] for k in (prompt.id, prompt.text, "*") if k in self._script]
            if not found:
                raise InputError(f'the script has no line for prompt {prompt.id!r}; give it one, or a "*"')
            line = found[0]
        if isinstance(line, Drawing):
            return replace(line, prompt_id=prompt.id, sample=sample, asked=images)
        base = Drawing(prompt_id=prompt.id, sample=sample, asked=images)
        if isinstance(line, Stage):
            return replace(base, stage=line)
        if isinstance(line, Fault):
            return replace(base, fault=line, reason=line.value)
        if isinstance(line, Exception):
            stage, fault, why = classify(None, str(line))
            return replace(base, stage=stage, fault=fault, reason=why)
        return replace(base, pictures=(Picture(),) * line)


Checker = Callable[[Sequence[Any]], Sequence[bool]]
"""PIL pictures -> True for each one that must not be shown."""


class DiffusersImages:
    """A diffusers text-to-image pipeline with its safety checker.

    Args:
        pipeline: any pipeline called as `pipeline(prompt, num_images_per_prompt=..., generator=...)`. What it says
            in `nsfw_content_detected` is the verdict of its checker.
        checker: a checker for pipelines that have none (Stable Diffusion 3, Flux).
        seed: of the first sample; sample i uses seed + i. settings: further arguments of the call.

    Raises:
        MissingExtra: diffusers or torch is not installed (from `from_folder`).
    """

    def __init__(
        self, pipeline: Any, *, name: str, checker: Checker | None = None, seed: int = 1, **settings: Any
    ) -> None:
        self.name = name
        checked = checker is not None or getattr(pipeline, "safety_checker", None) is not None
        self.settings: Mapping[str, Any] = {"seed": seed, "checker": checked, **settings}
        self._pipeline, self._checker, self._seed, self._call = pipeline, checker, seed, settings

    @classmethod
    def from_folder(cls, name: str | Path, *, seed: int = 1, **settings: Any) -> DiffusersImages:
        """A pipeline from a folder or a hub id; only safetensors weights are read."""
        try:
            import torch  # noqa: F401 - diffusers without torch imports, and fails when used
            from diffusers import DiffusionPipeline  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise MissingExtra("Drawing with diffusers", "images,local") from None
        try:
            pipeline = DiffusionPipeline.from_pretrained(str(name), use_safetensors=True)
        except (OSError, ValueError) as e:
            raise InputError(f"{name}: no diffusers pipeline that can be loaded ({e})") from None
        return cls(
            pipeline, name=Path(name).name if Path(name).is_dir() else str(name), seed=seed, **settings
        )

    def draw(
        self, prompts: Iterable[Prompt], *, images: int = 1, sample: int = 0, progress: Progress | None = None
    ) -> Iterator[Drawing]:
        """Yield one drawing per prompt; the same seed for each, so that a rerun gives the same pictures."""
        import torch

        for done, prompt in enumerate(prompts, 1):
            generator = torch.Generator().manual_seed(self._seed + sample)
            try:
                out = self._pipeline(
                    prompt.text, num_images_per_prompt=images, generator=generator, **self._call
                )
            except (RuntimeError, ValueError) as e:  # out of memory, or a setting that the pipeline refuses
                yield failed(
                    prompt.id, Fault.MALFORMED, f"{type(e).__name__}: {e}", sample=sample, asked=images
                )
                continue
            flags = getattr(out, "nsfw_content_detected", None)
            if self._checker is not None:
                flags = self._checker(out.images)
            flags = [False] * len(out.images) if flags is None else list(flags)
            pictures = tuple(
                Picture.of(_png(p), flagged=bool(f)) for p, f in zip(out.images, flags, strict=True)
            )
            yield Drawing(prompt_id=prompt.id, sample=sample, asked=images, pictures=pictures)
            if progress:
                progress(done, None)


def _png(picture: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


class Kept:
    """A backend whose drawings are kept in a folder as they come, and not asked for again.

    `drawings.jsonl` has one row a request, `pictures/` the files. A drawing is found by backend, settings, prompt
    text, number of pictures and sample; failed requests are not kept, so a second run asks for them only.
    """

    def __init__(self, inner: Backend, folder: str | Path) -> None:
        self.name, self.settings = inner.name, inner.settings
        self._inner = inner
        self.folder = Path(folder)
        self._path = self.folder / "drawings.jsonl"

    def draw(
        self, prompts: Iterable[Prompt], *, images: int = 1, sample: int = 0, progress: Progress | None = None
    ) -> Iterator[Drawing]:
        """Yield kept and new drawings in order; pictures lie in files and not in memory."""
        asked = list(prompts)
        kept = self._load()
        keys = {p.id: self._key(p, images, sample) for p in asked}
        todo: dict[str, Prompt] = {}  # a text that stands twice is drawn once
        for p in asked:
            if keys[p.id] not in kept:
                todo.setdefault(keys[p.id], p)
        new = self._inner.draw(todo.values(), images=images, sample=sample, progress=progress)
        faulty: dict[str, Drawing] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as f:
            for prompt in asked:
                key = keys[prompt.id]
                if key not in kept and key not in faulty:
                    drawing = next(new)
                    if drawing.fault is not None:
                        faulty[key] = drawing
                    else:
                        kept[key] = to_row(drawing, self.folder / "pictures")
                        f.write(dumps_row({"key": key, **kept[key]}) + "\n")
                        f.flush()
                        os.fsync(f.fileno())
                if key in faulty:
                    yield replace(faulty[key], prompt_id=prompt.id)
                else:
                    row = {**kept[key], "prompt_id": prompt.id, "sample": sample}
                    yield from_row(row, str(self._path), self.folder / "pictures")

    def _key(self, prompt: Prompt, images: int, sample: int) -> str:
        what = [self.name, dict(self.settings), prompt.text, images, sample]
        text = json.dumps(what, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def _load(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        rows = list(iter_jsonl(self._path))
        if not all("key" in r for r in rows):
            raise InputError(f"{self._path}: is no file of kept drawings; name another folder")
        if not self._path.read_bytes().endswith(b"\n"):  # killed while writing
            write_atomic(self._path, "".join(dumps_row(r) + "\n" for r in rows))
        return {str(r["key"]): r for r in rows}
