"""Sums over clients of which nobody sees a part."""
