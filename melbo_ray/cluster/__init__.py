"""A run on Ray: workers, the pool, the driver. Only `driver`, `pool` and `session` import ray."""
