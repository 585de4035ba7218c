"""Every error that demur raises on purpose.

    DemurError
    |-- InputError          what was passed cannot be used: file, row, option, category
    |-- DataUnavailable     a public set, a model or a download is not to be had here
    |-- MissingExtra        an optional dependency is not installed; the message holds the install line
    |-- CapabilityError     the runtime cannot do what a method needs (states from an API, say)
    |   |-- Unscored        some prompts have no score; all others were given theirs first
    |-- MismatchError       an artefact (adapter, operating point, probe) belongs to another model, dtype or T
    |-- UnsupportedClaim    the data are too few for the guarantee that was asked for
    |-- UnfitOrganism       a model organism misses its entry condition (in demur.organisms)
    |-- RefusalLowering     the change would lower refusal and the operator has not allowed it

Messages say what was passed, why it clashes and what to do instead. The command line prints them without
a traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 10


class DemurError(Exception):
    """Base of all errors that demur raises on purpose."""


class InputError(DemurError, ValueError):
    """What was passed cannot be used."""


class DataUnavailable(DemurError):
    """A data set, a model or a download cannot be had here."""


class MissingExtra(DemurError, ImportError):
    """An optional dependency is missing."""

    def __init__(self, feature: str, extra: str) -> None:
        self.feature, self.extra = feature, extra
        super().__init__(
            f"{feature} needs packages that are not installed. Run: pip install 'demur[{extra}]'"
        )

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), (self.feature, self.extra)


class CapabilityError(DemurError):
    """A runtime cannot do what was asked of it."""


class Unscored(CapabilityError):
    """Some prompts have no score. Raised when all others were given theirs, so that no prompt is lost in silence.

    Attributes:
        blocked: {prompt id: reason} where a filter or the provider itself answered; asking again changes nothing.
        failed: {prompt id: reason} where the request failed in spite of its retries.
        n: how many prompts were asked.

    >>> print(Unscored({"a": "content_filter: hate"}, {}, 20))
    1 of 20 prompts could not be scored (1 blocked):
      a: content_filter: hate
    """

    def __init__(self, blocked: Mapping[str, str], failed: Mapping[str, str], n: int) -> None:
        self.blocked, self.failed, self.n = dict(blocked), dict(failed), n
        counts = [f"{len(some)} {how}" for how, some in (("blocked", blocked), ("failed", failed)) if some]
        lines = [f"\n  {id}: {why}" for id, why in (self.blocked | self.failed).items()]
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        super().__init__(
            f"{len(lines)} of {n} prompts could not be scored ({', '.join(counts)}):"
            + "".join(lines[:SHOWN])
            + more
        )

    def __reduce__(self) -> tuple[type[Unscored], tuple[dict[str, str], dict[str, str], int]]:
        return type(self), (self.blocked, self.failed, self.n)


class MismatchError(DemurError):
    """An artefact belongs to another model, dtype or softmax temperature."""


class UnsupportedClaim(DemurError):
    """The data cannot support the guarantee that was asked for."""


class RefusalLowering(DemurError):
    """A change that lowers refusal was asked for without the operator's consent. The message says how to give it.

    >>> print(RefusalLowering("This answers what should be refused"))
    This answers what should be refused. --allow-refusal-lowering (Python: allow_refusal_lowering=True) permits \
it; it is logged (docs/design.md, section 12)
    """

    def __str__(self) -> str:
        what = super().__str__()
        if "--allow-refusal-lowering" not in what:  # some callers say it in words of their own
            what += (
                ". --allow-refusal-lowering (Python: allow_refusal_lowering=True) permits it; it is logged"
            )
        return f"{what} (docs/design.md, section 12)"


class UpstreamError(DemurError):
    """An engine behind the gateway failed or took too long; what happens then is the operator's choice."""
