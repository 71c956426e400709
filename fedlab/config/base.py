"""What every table of a configuration is: a frozen model that rejects keys it does not know."""

from __future__ import annotations

import pydantic
from pydantic import ConfigDict


class Section(pydantic.BaseModel):
    """One table of the file: frozen, unknown keys rejected, neither NaN nor infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
