"""The empirical audit: canaries and mechanism checks put through the real trainer."""
