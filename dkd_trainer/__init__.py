"""Decoupled knowledge distillation of Dynamic Hybrid Attention students."""
