"""Methods that change behaviour reversibly. `X(...).on(runtime)` yields a Runtime and always restores."""

from demur.control.latent_guard import LatentGuard
from demur.control.refusal_tokens import RefusalTokens, check_point
from demur.control.steering import Ablate, Add

__all__ = ["Ablate", "Add", "LatentGuard", "RefusalTokens", "check_point"]
