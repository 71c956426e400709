"""The server around a strategy: rounds, messages, who is there, what was spent."""
