"""The test suite: unit (no server), contract (one body over every back end), integration and acceptance (servers)."""
