"""Dynamic Hybrid Attention: self-attention over a short context of real and memory tokens (pure PyTorch)."""
