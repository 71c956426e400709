"""Client side: what a node does with a message. ``app:app`` is the Flower ClientApp."""
