"""How much memory a run takes on every rank, predicted before there is one.

Bytes of saved slots, per layer, per chunk and per rank: `activations.saved_bytes`.
"""
