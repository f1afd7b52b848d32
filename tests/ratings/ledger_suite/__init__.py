"""What every ledger does, written once.

A ledger's own test file is a harness and a subclass:

    class TestSQLite(LedgerSuite):
        @pytest.fixture
        def harness(self, tmp_path: Path) -> LedgerHarness:
            return SQLiteHarness(tmp_path)

A test is skipped only where a field of the ledger's ``LedgerCapabilities`` declares that it
cannot do what is tested.
"""

from tests.ratings.ledger_suite.harness import LedgerHarness
from tests.ratings.ledger_suite.histories import Histories
from tests.ratings.ledger_suite.outcomes import Outcomes
from tests.ratings.ledger_suite.surface import Surface
from tests.ratings.ledger_suite.writers import Writers

__all__ = ["LedgerHarness", "LedgerSuite"]


class LedgerSuite(Histories, Outcomes, Surface, Writers):
    """The suite. Subclasses bring the fixture ``harness``."""
