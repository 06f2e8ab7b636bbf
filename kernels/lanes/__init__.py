"""A backend's storage and attention of one layer: the contract and the implementations in MLX operations."""
