"""``report.html``: what a run did, on one self-contained page, made from the run directory alone."""
