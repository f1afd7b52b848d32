"""The rating service: intake, worker, ledger, catalog and the pages that show them."""
