"""Mixtures of experts that somebody else wrote: find them, and put these kernels and averaging behind them."""
