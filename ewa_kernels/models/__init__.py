"""Somebody else's model: what is an FFN or a layer of experts in it, replaced, folded and restored."""
