"""Collective operations of ranks, sharding, and offload to host memory."""
