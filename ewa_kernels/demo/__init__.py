"""`make demo`: a small ViT on scikit-learn's digits, dense and with averaged experts, which are then folded."""
