"""Another engineer writes this file and tests/e2e/test_hostile_bytes.py at the moment: leave both to them."""
