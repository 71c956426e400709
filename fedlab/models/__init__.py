"""Base models: where they are, how they are loaded, and the adapter inside them."""
