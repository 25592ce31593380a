"""What a run would do on a cluster, and how a model is best spread over one, before there is one.

`predict` says what a step takes, an `Adviser` which choice is the fastest; nothing here starts a
process or needs a GPU.
"""

from lightning_dhellam.advice.advise import Adviser
from lightning_dhellam.advice.choices import Question
from lightning_dhellam.advice.lowering import Lowering, lowering_of, work_of
from lightning_dhellam.advice.memory import memory_of
from lightning_dhellam.advice.narrower import offers
from lightning_dhellam.advice.plans import PlanSearch
from lightning_dhellam.advice.predict import predict
from lightning_dhellam.advice.priceable import Conditions, check_device, check_run

__all__ = [
    "Adviser",
    "Conditions",
    "Lowering",
    "PlanSearch",
    "Question",
    "check_device",
    "check_run",
    "lowering_of",
    "memory_of",
    "offers",
    "predict",
    "work_of",
]
