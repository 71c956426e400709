"""What a model is worth: one file per kind of task."""
