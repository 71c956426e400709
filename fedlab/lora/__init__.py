"""Low-rank algebra: pure functions of tensors.

``state`` names and carries them, ``svd`` refactorises, ``average`` averages.
"""
