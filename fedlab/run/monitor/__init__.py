"""What is seen of a server, a client and a run from outside: logs for machines, figures for Prometheus, health.

Off unless configured. Nothing here is about single records; ``docs/monitoring.md`` says of each figure what it reveals.
"""
