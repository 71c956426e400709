"""One client's local training. ``trainer`` runs the steps, ``dp`` gets per-example gradients."""
