"""What backward makes again, chosen so that a stage fits into memory at the least time."""

from lightning_dhellam.search.recompute.candidates import Candidate, candidates
from lightning_dhellam.search.recompute.choose import Chosen, choose
from lightning_dhellam.search.recompute.moments import Moment, moments

__all__ = ["Candidate", "Chosen", "Moment", "candidates", "choose", "moments"]
