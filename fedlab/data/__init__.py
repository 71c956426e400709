"""The data of a run: a corpus, assigned to clients, tokenised. ``open_data`` gives what training and scoring read."""

from fedlab.data.federated import FederatedData
from fedlab.data.opening import corpus_and_shards, objective_of, open_data, task_data

__all__ = ["FederatedData", "corpus_and_shards", "objective_of", "open_data", "task_data"]
