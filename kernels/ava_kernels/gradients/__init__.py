"""Gradient statistics in one pass, and clipping that stays on the device."""
