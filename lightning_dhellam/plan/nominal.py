"""Nominal rates of one H200 with NVLink, measured or from the data sheet.

Operators have their nominal costs by them. Plans that are made without a profile depend on the
ratios only; work that is told from a cost, operations or bytes, is the cost times its rate.
"""

FLOPS = 700e12
"""Operations per second."""

MEMORY = 4.0e12
"""Bytes of memory that are moved per second."""

LINK = 300e9
"""Bytes per second over a link."""

HOST_LINK = 50e9
"""Bytes per second between a device and its host, one way."""
