"""The refusal-token adapter of demur's default model and the prompts it was trained on: no code that runs.

Apply it with `demur`, which checks that the base model has the fingerprint the adapter was trained on; read the
prompts with `demur.prompts.core("train")`.
"""

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["path"]


def path() -> Path:
    """Folder of the adapter: PEFT files, control rows and their description.

    Raises:
        FileNotFoundError: the installed package holds no adapter.
    """
    folder = Path(__file__).parent / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"the installed demur-smollm2 holds no adapter (no adapter_config.json in {folder}). "
            "Reinstall it, or "
            "use the bare base model smollm2"
        )
    return folder
