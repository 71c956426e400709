"""Differential privacy: one plan per client builds sampler, clipper, noise and the event they amount to; ``accounting``
reads events.
"""
