"""A model as its config describes it: parameters, rows of media, KV, work. `planning.shapes` is what others use."""
