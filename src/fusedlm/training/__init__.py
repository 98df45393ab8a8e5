"""Training: from text to a model, on a CPU, a GPU or many; see docs/training.md.

Names are imported from where they are: `fusedlm.training.run` has `train`, `fusedlm.training.config` the settings.
"""
