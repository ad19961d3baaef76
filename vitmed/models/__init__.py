"""linen modules and pure functions of parameters and images; `from_pretrained` and `build` are the ways in."""

from vitmed.models.pretrained import from_pretrained
from vitmed.models.weights import preprocessing

__all__ = ["from_pretrained", "preprocessing"]
