"""The zoo: tiny PEFT models, exported by real exporters, on which the finder and the extractor are proven.

``CASES`` is data and imports nothing heavy; ``build(name)`` exports on first use (torch) and then reads a cache.
"""

from tests.zoo.build import build
from tests.zoo.case import Built, Case, TruthSite
from tests.zoo.cases import CASES

__all__ = ["CASES", "Built", "Case", "TruthSite", "build"]
