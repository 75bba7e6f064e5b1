"""Several ranks: collective operations, sharding, offload."""
