"""Methods that change behaviour reversibly. `X(...).on(runtime)` yields a Runtime and always restores."""

from demur.control.refusal_tokens import RefusalTokens, check_point

__all__ = ["RefusalTokens", "check_point"]
