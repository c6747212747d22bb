"""Dynamic Hybrid Attention: self-attention over a short context of real tokens and an external memory (pure PyTorch)."""
