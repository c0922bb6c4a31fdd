"""What can go wrong while training, beside `UserError`. Importing this costs nothing."""

from __future__ import annotations


class RecordError(ValueError):
    """A record that cannot be trained on; the message names the sample and the field."""


class RouteError(RecordError):
    """A record whose routes are missing or cannot be of this model. The rest of it is in order."""


class NonFiniteRouterError(RuntimeError):
    """A router computed NaN, with which no expert can be chosen or weighted. The weights are those from before the step."""
