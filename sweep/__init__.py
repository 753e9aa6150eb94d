"""Driver, store, reports and command line of the sensitivity sweep."""
