"""Mixture of experts in an encoder's feed-forward layers."""
