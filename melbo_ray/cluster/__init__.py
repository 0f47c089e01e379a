"""A run on Ray: workers, the pool, the driver. Only `driver`, `metrics`, `pool` and `session` import ray."""
